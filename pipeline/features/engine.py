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

from pipeline.logs import is_out_of_memory, one_line
from pipeline.network.device import BATCH, autocast, place

if TYPE_CHECKING:
    import openvino

TOLERANCE = 1e-4  # of the largest value, by which OpenVINO in fp32 may differ from torch
log = logging.getLogger("pipeline")


def check_precision(key: str, precision: str, device: torch.device) -> None:
    """ValueError, naming `key`, for bf16 on a CPU that has no instructions for it."""
    if precision == "bf16" and device.type == "cpu":
        able = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in able:
            raise ValueError(f"params.yaml: {key}: this CPU has no bf16; expected fp32")


def machine(engine: str, device: torch.device) -> dict[str, Any]:
    """What of this machine can change the last digits of an output: the instructions of the CPU, the GPU and cuDNN.

    As torch and OpenVINO report it, which choose their kernels by it. The flags in /proc/cpuinfo would change with the
    kernel of Linux, and exist nowhere else.
    """
    found: dict[str, Any] = {"cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
    if engine == "openvino":
        found["openvino"] = sorted(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cudnn": torch.backends.cudnn.version()}
    return found


@dataclass(frozen=True)
class Runner:
    """A frozen network that is ready to run: `engine` is openvino or torch.

    `run` takes batches of `size` rows, the last of which may be shorter, and gives outputs (float32) in order.
    """

    engine: str
    size: int
    run: Callable[[Iterable[torch.Tensor]], Iterator[np.ndarray]]


def prepare(
    engine: str,
    module: nn.Module,
    example: torch.Tensor,
    precision: str,
    device: torch.device,
    expected: np.ndarray | None = None,
) -> Runner:
    """Make `module` ready for batches like `example`; `engine` is `features.engine`.

    auto takes OpenVINO on a CPU if it can convert the network, and logs a warning if not. `expected` is torch's output
    for the first row of `example` in fp32: if given, OpenVINO's output must equal it up to TOLERANCE. Raises ValueError
    if `engine` is openvino and OpenVINO cannot run the network.
    """
    module.eval()
    if engine == "openvino" and device.type != "cpu":
        raise ValueError("params.yaml: features.engine: openvino runs on a CPU; expected auto or torch")
    if engine != "torch" and device.type == "cpu":
        try:
            compiled = _compile(module, example, precision)
            if expected is not None and precision == "fp32":
                _compare(compiled, example, expected)
        # The converter raises errors of many types; all of them mean that it cannot convert the network
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if engine == "openvino":
                raise ValueError(
                    f"params.yaml: features.engine: openvino cannot convert this network ({one_line(error)}); expected "
                    "auto or torch"
                ) from None
            log.warning("OpenVINO cannot convert this network, torch runs it (%s)", one_line(error))
        else:
            return Runner("openvino", len(example), partial(_run_openvino, compiled, len(example)))
    place(module, device)
    return Runner("torch", len(example), partial(_run_torch, module, len(example), precision, device))


def run(
    module: nn.Module, batches: Iterable[torch.Tensor], engine: str, precision: str, device: torch.device
) -> Iterator[np.ndarray]:
    """Outputs (float32) of `module` in evaluation mode, one for each batch, in order.

    Every batch but the last has the same number of rows; all are padded to it, and to BATCH of the device at least.
    """
    remaining = iter(batches)
    first = next(remaining, None)
    if first is not None:
        example = _padded(first, max(BATCH[device.type], len(first)))
        yield from prepare(engine, module, example, precision, device).run(chain([first], remaining))


def _run_torch(
    module: nn.Module, size: int, precision: str, device: torch.device, batches: Iterable[torch.Tensor]
) -> Iterator[np.ndarray]:
    for batch in batches:
        with torch.inference_mode(), autocast(precision, device):
            output = module(_padded(batch, size).to(device, non_blocking=True))
        yield output[: len(batch)].float().cpu().numpy()


def _run_openvino(compiled: openvino.CompiledModel, size: int, batches: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
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
def _core() -> openvino.Core:
    """Import OpenVINO, and make the one core of this process.

    Each core installs a signal stack and, when it is deleted, restores the one that was there before. With several
    cores that stack may no longer exist, and the next signal (when a decoding worker ends) would end the process.
    """
    # Without this package OpenVINO uses its own stub: nothing is sent from a user's machine
    sys.modules["openvino_telemetry"] = None  # pyright: ignore[reportArgumentType]
    import openvino

    return openvino.Core()


def _compile(module: nn.Module, example: torch.Tensor, precision: str) -> openvino.CompiledModel:
    core = _core()
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


def _compare(compiled: openvino.CompiledModel, example: torch.Tensor, expected: np.ndarray) -> None:
    (found,) = _run_openvino(compiled, len(example), [example[:1]])
    apart, largest = np.abs(found - expected).max(), np.abs(expected).max()
    if not apart <= TOLERANCE * largest:  # true for NaN too
        raise RuntimeError(f"it differs from torch by {apart / largest:.1g} of the largest value")


def _padded(batch: torch.Tensor, size: int) -> torch.Tensor:
    missing = size - len(batch)
    return torch.cat([batch, batch.new_zeros(missing, *batch.shape[1:])]) if missing else batch
