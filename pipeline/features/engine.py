"""Run a frozen network fast: OpenVINO on a CPU, torch (channels-last, autocast) on a GPU.

A row of the output depends on its own input alone: batches are padded to one shape.
"""

from __future__ import annotations

import logging
import platform
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pipeline.logs import one_line, raise_if_of_machine
from pipeline.network.device import arithmetic, autocast, pinned, place

if TYPE_CHECKING:
    import openvino

# Of the largest value, by which OpenVINO may differ from torch in fp32: rounding, but no other result
FEATURES = {"fp32": 1e-4, "bf16": 0.5}
LOGITS = {"fp32": 0.01}  # in which features may cancel; in bf16 that can leave nothing but rounding
PIECE = 32  # rows of a GPU's batch, about, that are loaded together: a worker would take seconds for all of them
REQUEST = 2  # rows of a request to OpenVINO: few, so that what the layers hand on stays in a core's cache
IN_FLIGHT = 2  # batches that a GPU computes while the rows of the one before are waited for
log = logging.getLogger("pipeline")


def check_precision(key: str, precision: str, device: torch.device) -> None:
    """ValueError, naming `key`, for a precision that the device has no instructions for."""
    if precision == "fp32":
        return
    if device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):  # Ampere and later have bf16 and TF32
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"params.yaml: {key}: this GPU ({name}) has no {precision}; expected fp32")
    elif precision == "tf32":
        raise ValueError(f"params.yaml: {key}: tf32 needs a GPU, and this runs on a CPU; expected fp32 or bf16")
    elif "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError(f"params.yaml: {key}: this CPU has no bf16; expected fp32")


def machine(engine: str, device: torch.device) -> dict[str, Any]:
    """What of this machine can change the last digits of an output: the instructions of the CPU, the GPU and cuDNN.

    As torch and OpenVINO report it, which choose their kernels by it. The flags in /proc/cpuinfo would change with the
    kernel of Linux, and exist nowhere else.
    """
    found: dict[str, Any] = {"cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
    if engine == "openvino":
        found["openvino"] = sorted(openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cudnn": torch.backends.cudnn.version()}
    return found


@dataclass(frozen=True)
class Runner:
    """A frozen network that is ready to run in batches of `size` rows: `engine` is openvino or torch.

    `run` takes pieces of `piece` rows, the last of which may be shorter, and gives their outputs (float32) in order.
    """

    engine: str
    size: int
    piece: int
    run: Callable[[Iterable[torch.Tensor]], Iterator[np.ndarray]]


def prepare(
    engine: str,
    module: nn.Module,
    example: torch.Tensor,
    precision: str,
    device: torch.device,
    expected: np.ndarray | None = None,
    tolerance: dict[str, float] = FEATURES,
) -> Runner:
    """Make `module` ready for batches like `example`; `engine` is `features.engine`.

    auto takes OpenVINO on a CPU if it can convert the network, and logs a warning if not. `expected` is torch's output
    for the first row of `example` in fp32: if given, OpenVINO's output must equal it up to the `tolerance` of the
    precision, if it has one. Raises ValueError if `engine` is openvino and OpenVINO cannot run the network.
    """
    module.eval()
    if engine == "openvino" and device.type != "cpu":
        raise ValueError("params.yaml: features.engine: openvino runs on a CPU; expected auto or torch")
    if engine != "torch" and device.type == "cpu":
        try:
            compiled = _compile(module, example[:REQUEST], precision)
            if expected is not None and precision in tolerance:
                _compare(compiled, example[:1], expected, tolerance[precision])
        # The converter raises errors of many types; all of them mean that it cannot convert the network
        except Exception as error:
            raise_if_of_machine(error)
            if engine == "openvino":
                raise ValueError(
                    f"params.yaml: features.engine: openvino cannot convert this network ({one_line(error)}); expected "
                    "auto or torch"
                ) from None
            log.warning("OpenVINO cannot convert this network, torch runs it (%s)", one_line(error))
        else:
            return Runner("openvino", len(example), len(example), partial(_run_openvino, compiled))
    place(module, device)
    size = len(example)
    return Runner("torch", size, piece_size(size, device), partial(_run_torch, module, size, precision, device))


def piece_size(size: int, device: torch.device) -> int:
    """How many rows of a batch of `size` are loaded together: all on a CPU, an equal part of it on a GPU."""
    return size if device.type == "cpu" else size // max(1, round(size / PIECE))


def run(
    module: nn.Module, pieces: Iterable[torch.Tensor], engine: str, precision: str, device: torch.device, size: int
) -> Iterator[np.ndarray]:
    """Outputs (float32) of `module` in evaluation mode, one for each piece, in order.

    Pieces have `piece_size` rows, the last of them fewer; the network runs in batches of `size`, padded if need be.
    """
    remaining = iter(pieces)
    first = next(remaining, None)
    if first is not None:
        example = _padded(first, size)
        yield from prepare(engine, module, example, precision, device).run(chain([first], remaining))


def _run_torch(
    module: nn.Module, size: int, precision: str, device: torch.device, pieces: Iterable[torch.Tensor]
) -> Iterator[np.ndarray]:
    """On a GPU several batches are on their way at a time: both copies and the network overlap, none is waited for."""
    link = _Link(device)
    n_ahead = IN_FLIGHT if link.is_asynchronous else 0
    running: deque[tuple[list[int], torch.Tensor, torch.cuda.Event | None]] = deque()
    for batch in _batches(pieces, size):
        lengths = [len(piece) for piece in batch]
        with torch.inference_mode(), arithmetic(precision, device), autocast(precision, device):
            output = module(link.send(batch, size))[: sum(lengths)].float()
            running.append((lengths, *link.receive(output)))
        if len(running) > n_ahead:
            yield from _finish(*running.popleft())
    while running:
        yield from _finish(*running.popleft())


def _finish(lengths: list[int], output: torch.Tensor, done: torch.cuda.Event | None) -> Iterator[np.ndarray]:
    if done is not None:
        done.synchronize()
    for part in output.split(lengths):
        yield part.numpy()


def _batches(pieces: Iterable[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    """Successive pieces that make up a batch of `size` rows, or as many as there are left."""
    batch: list[torch.Tensor] = []
    for piece in pieces:
        if sum(map(len, batch)) + len(piece) > size:
            yield batch
            batch = []
        batch.append(piece)
        if sum(map(len, batch)) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class _Link:
    """Copies to a GPU and back that nothing waits for, each way on a stream of its own; a CPU needs no copy."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.is_asynchronous = device, device.type == "cuda"
        if self.is_asynchronous:
            self._there, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def send(self, pieces: list[torch.Tensor], size: int) -> torch.Tensor:
        """The pieces as one batch on the device, padded to `size` rows."""
        if not self.is_asynchronous or pieces[0].is_cuda:
            return _padded(torch.cat(pieces) if len(pieces) > 1 else pieces[0], size).to(self._device)
        network = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._there):
            first, start = pieces[0], 0
            batch = torch.empty((size, *first.shape[1:]), dtype=first.dtype, device=self._device)
            for piece in pieces:
                batch[start : start + len(piece)].copy_(pinned(piece), non_blocking=True)
                start += len(piece)
            batch[start:] = 0
        network.wait_stream(self._there)
        batch.record_stream(network)  # its memory is not given to the next batch while the network reads it
        return batch

    def receive(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """The output in memory of the CPU, and the event after which it is there."""
        if not self.is_asynchronous:
            return output, None
        self._back.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._back):
            copied = output.to("cpu", non_blocking=True)  # to pinned memory
            output.record_stream(self._back)
        done = torch.cuda.Event(blocking=True)  # to wait for it is to sleep
        done.record(self._back)
        return copied, done


def _run_openvino(compiled: openvino.CompiledModel, pieces: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
    """Run pieces in requests, whose size is that of the compiled network; outputs come piece by piece."""
    size, lengths = compiled.input(0).shape[0], deque[int]()

    def parts() -> Iterator[torch.Tensor]:
        for piece in pieces:
            lengths.append(len(piece))
            yield from piece.split(size)

    found: list[np.ndarray] = []
    for output in _run_requests(compiled, size, parts()):
        found.append(output)
        if sum(map(len, found)) == lengths[0]:
            yield np.concatenate(found)
            lengths.popleft()
            found = []


def _run_requests(compiled: openvino.CompiledModel, size: int, batches: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
    """Run several requests at once and collect them in order (callbacks of OpenVINO's own queue can deadlock)."""
    n_requests = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") + 1
    idle = [compiled.create_infer_request() for _ in range(n_requests)]
    running: deque[tuple[openvino.InferRequest, int]] = deque()

    def collect() -> np.ndarray:
        request, rows = running.popleft()
        request.wait()
        idle.append(request)
        return request.get_output_tensor(0).data[:rows].copy()

    for batch in batches:
        output = None if idle else collect()
        request = idle.pop()
        request.start_async({0: _padded(batch, size).numpy()})
        running.append((request, len(batch)))
        if output is not None:
            yield output
    while running:
        yield collect()


@cache
def openvino_core() -> openvino.Core:
    """Import OpenVINO, and make the one core of this process.

    Each core installs a signal stack and, when it is deleted, restores the one that was there before. With several
    cores that stack may no longer exist, and the next signal (when a decoding worker ends) would end the process.
    """
    # Without this package OpenVINO uses its own stub: nothing is sent from a user's machine
    sys.modules["openvino_telemetry"] = None  # pyright: ignore[reportArgumentType]
    import openvino

    return openvino.Core()


def _compile(module: nn.Module, example: torch.Tensor, precision: str) -> openvino.CompiledModel:
    core = openvino_core()
    import openvino
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), torch.no_grad(), _root_logger_kept():
        warnings.simplefilter("ignore")  # the tracer warns of shapes, which are constant here
        # torch's check of the trace would run the network twice more; tests compare outputs anyway
        decoder = TorchScriptPythonDecoder(module, example_input=example, trace_kwargs={"check_trace": False})
        shape = [openvino.PartialShape(list(example.shape))]
        converted = openvino.convert_model(decoder, example_input=example, input=shape)
    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    options = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": hint}
    return core.compile_model(converted, "CPU", options)


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Restore the root logger: `convert_model` silences it, and leaves it silent if it fails."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters.copy(), root.handlers.copy()
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers


def _compare(compiled: openvino.CompiledModel, example: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    (found,) = _run_openvino(compiled, [example])
    apart, largest = np.abs(found - expected).max(), np.abs(expected).max()
    if not apart <= tolerance * largest:  # true for NaN too
        raise RuntimeError(f"it differs from torch by {apart / largest:.1g} of the largest value")


def _padded(batch: torch.Tensor, size: int) -> torch.Tensor:
    missing = size - len(batch)
    return torch.cat([batch, batch.new_zeros(missing, *batch.shape[1:])]) if missing else batch
