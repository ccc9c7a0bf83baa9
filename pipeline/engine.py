"""Run a frozen network fast: OpenVINO on a CPU, torch (channels-last, autocast) on a GPU.

A row of the output depends on its input alone: batches are padded to one shape.
"""

import logging
import warnings
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import openvino
import torch
from torch import nn

BATCH = 8
log = logging.getLogger("pipeline")


def choose_device(requested: str) -> torch.device:
    """`runtime.device` -> the device; ValueError where it is not there."""
    has_cuda = torch.cuda.is_available()
    if requested == "cuda" and not has_cuda:
        raise ValueError("params.yaml: runtime.device: cuda, but torch sees no GPU; expected auto")
    return torch.device("cuda" if requested != "cpu" and has_cuda else "cpu")


def check_precision(key: str, precision: str, device: torch.device) -> None:
    """ValueError naming `key` where bf16 is asked of a CPU that has no instructions for it."""
    if precision == "bf16" and device.type == "cpu":
        able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in able:
            raise ValueError(f"params.yaml: {key}: bf16, which this CPU has not; expected fp32")


def choose_engine(requested: str, module: nn.Module, example: np.ndarray, device: torch.device) -> str:
    """`features.engine` -> openvino or torch; auto takes OpenVINO where it converts the network."""
    if requested == "torch" or device.type == "cuda":
        if requested == "openvino":
            raise ValueError("params.yaml: features.engine: openvino runs on a CPU; expected torch")
        return "torch"
    try:
        _convert(module, example)
    # The converter raises errors of many kinds, all of which mean that it cannot
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if requested == "openvino":
            raise ValueError(
                f"params.yaml: features.engine: openvino cannot convert this network ({reason}); expected torch or auto"
            ) from None
        log.warning("OpenVINO cannot convert this network, torch runs it (%s)", reason)
        return "torch"
    return "openvino"


def run(
    module: nn.Module, batches: Iterable[np.ndarray | torch.Tensor], engine: str, precision: str, device: torch.device
) -> Iterator[np.ndarray]:
    """Outputs (float32) of `module` in evaluation mode, one for each batch, in order.

    Every batch but the last has the same number of rows.
    """
    module.eval()
    return (_run_openvino if engine == "openvino" else _run_torch)(module, batches, precision, device)


def _convert(module: nn.Module, example: np.ndarray) -> openvino.Model:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's remarks on shapes that are constant here
        return openvino.convert_model(
            module.eval(), example_input=torch.from_numpy(example), input=[openvino.PartialShape(example.shape)]
        )


def _run_openvino(
    module: nn.Module, batches: Iterable[np.ndarray | torch.Tensor], precision: str, _device: torch.device
) -> Iterator[np.ndarray]:
    done: dict[int, np.ndarray] = {}
    sizes: deque[int] = deque()  # rows of the batches under way
    queue, first = None, 0

    def collect(request: openvino.InferRequest, number: int) -> None:
        done[number] = request.get_output_tensor(0).data.copy()

    for number, batch in enumerate(batches):
        rows = np.asarray(batch)
        if queue is None:
            full = len(rows)
            options = {
                "PERFORMANCE_HINT": "THROUGHPUT",
                "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
            }
            model = _convert(module, rows)
            queue = openvino.AsyncInferQueue(openvino.Core().compile_model(model, "CPU", options))
            queue.set_callback(collect)
        sizes.append(len(rows))
        queue.start_async({0: _padded(rows, full)}, number)
        while first in done:
            yield done.pop(first)[: sizes.popleft()]
            first += 1
    if queue is not None:
        queue.wait_all()
    while sizes:
        yield done.pop(first)[: sizes.popleft()]
        first += 1


def _run_torch(
    module: nn.Module, batches: Iterable[np.ndarray | torch.Tensor], precision: str, device: torch.device
) -> Iterator[np.ndarray]:
    module.to(device, memory_format=torch.channels_last)
    full = 0
    for batch in batches:
        rows = torch.as_tensor(batch)
        full = max(full, len(rows))
        if len(rows) < full:
            rows = torch.from_numpy(_padded(rows.numpy(), full))
        with torch.inference_mode(), autocast(precision, device):
            output = module(rows.to(device, non_blocking=True))
        yield output[: len(batch)].float().cpu().numpy()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a forward pass has this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    missing = size - len(rows)
    return np.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)]) if missing else rows
