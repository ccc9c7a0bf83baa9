"""Run a frozen network fast: OpenVINO on a CPU, torch (channels-last, autocast) on a GPU.

A row of the output depends on its own input alone: batches are padded to one shape.
"""

import logging
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

# Without this package OpenVINO takes its own stub: nothing is sent from a user's machine
sys.modules["openvino_telemetry"] = None  # pyright: ignore[reportArgumentType]
import openvino  # noqa: E402

BATCH = 8
log = logging.getLogger("pipeline")


def choose_device(requested: str) -> torch.device:
    """`runtime.device` -> the device; ValueError where it is not there."""
    has_cuda = torch.cuda.is_available()
    if requested == "cuda" and not has_cuda:
        raise ValueError("params.yaml: runtime.device: cuda, but torch finds no GPU; expected auto or cpu")
    if requested == "cpu" or not has_cuda:
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    return torch.device("cuda")


def check_precision(key: str, precision: str, device: torch.device) -> None:
    """ValueError naming `key` where bf16 is asked of a CPU that has no instructions for it."""
    if precision == "bf16" and device.type == "cpu":
        able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in able:
            raise ValueError(f"params.yaml: {key}: this CPU has no bf16; expected fp32")


def choose_engine(requested: str, module: nn.Module, example: np.ndarray, device: torch.device) -> str:
    """`features.engine` -> openvino or torch; auto takes OpenVINO on a CPU if it converts the network."""
    if requested == "openvino" and device.type != "cpu":
        raise ValueError("params.yaml: features.engine: openvino runs on a CPU; expected auto or torch")
    if requested == "torch" or device.type != "cpu":
        return "torch"
    try:
        _convert(module, example)
    # The converter raises errors of many kinds, all of which mean that it cannot
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if requested == "openvino":
            raise ValueError(
                f"params.yaml: features.engine: openvino cannot convert this network ({reason}); expected auto or torch"
            ) from None
        log.warning("OpenVINO cannot convert this network, torch runs it (%s)", reason)
        return "torch"
    return "openvino"


def run(
    module: nn.Module, batches: Iterable[torch.Tensor], engine: str, precision: str, device: torch.device
) -> Iterator[np.ndarray]:
    """Outputs (float32) of `module` in evaluation mode, one for each batch, in order.

    Every batch but the last has the same number of rows; all are padded to it, and to BATCH at least.
    """
    module.eval()
    if engine == "openvino":
        yield from _run_openvino(module, batches, precision)
        return
    place(module, device)
    full = 0
    for batch in batches:
        full = full or max(BATCH, len(batch))
        with torch.inference_mode(), autocast(precision, device):
            output = module(_padded(batch, full).to(device, non_blocking=True))
        yield output[: len(batch)].float().cpu().numpy()


def place(module: nn.Module, device: torch.device) -> None:
    """Move to the device, with filters channels-last (Module.to would fail on constants of five dimensions)."""
    module.to(device)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a forward pass has this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _run_openvino(module: nn.Module, batches: Iterable[torch.Tensor], precision: str) -> Iterator[np.ndarray]:
    """Several requests under way at once, collected in order (callbacks of OpenVINO's own queue can deadlock)."""
    idle: list[openvino.InferRequest] = []
    under_way: deque[tuple[openvino.InferRequest, int]] = deque()
    full = 0

    def collect() -> np.ndarray:
        request, rows = under_way.popleft()
        request.wait()
        idle.append(request)
        return request.get_output_tensor(0).data[:rows].copy()

    for batch in batches:
        if not full:
            full = max(BATCH, len(batch))
            hint = {"fp32": "f32", "bf16": "bf16"}[precision]
            options = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": hint}
            compiled = openvino.Core().compile_model(_convert(module, _padded(batch, full).numpy()), "CPU", options)
            n_requests = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") + 1
            idle = [compiled.create_infer_request() for _ in range(n_requests)]
        output = None if idle else collect()
        request = idle.pop()
        request.start_async({0: _padded(batch, full).numpy()})
        under_way.append((request, len(batch)))
        if output is not None:
            yield output
    while under_way:
        yield collect()


def _convert(module: nn.Module, example: np.ndarray) -> openvino.Model:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's remarks on shapes, which are constant here
        shape = [openvino.PartialShape(example.shape)]
        return openvino.convert_model(module.eval(), example_input=torch.from_numpy(example), input=shape)


def _padded(batch: torch.Tensor, size: int) -> torch.Tensor:
    missing = size - len(batch)
    return torch.cat([batch, batch.new_zeros(missing, *batch.shape[1:])]) if missing else batch
