"""Where torch computes: the choice of device, the layout of tensors on it, and the precision of a forward pass."""

import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from torch.utils import deterministic

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RESIDENT_SHARE = 0.5  # of a GPU's free memory that inputs may take, so that what computes on them has room
USED = ("nvidia-smi", "--query-gpu=uuid,memory.used", "--format=csv,noheader,nounits")  # MiB, of every process
_claims: list[IO] = []  # files whose locks are held until this process ends
log = logging.getLogger("pipeline")


def choose_device(requested: str, number: int | None = None) -> torch.device:
    """The device for `runtime.device`; ValueError if there is none.

    `number` selects one of several GPUs; None takes the least used. On a CPU nothing is asked of CUDA that would make
    a context, which takes seconds and memory of a GPU.
    """
    if requested == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if requested == "cuda":
            raise ValueError("params.yaml: runtime.device: cuda, but torch finds no GPU; expected auto or cpu")
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    fills: Any = deterministic  # a module with a property
    fills.fill_uninitialized_memory = False  # it helps to find bugs, and costs 8 to 16 % of the time
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    n_gpus = torch.cuda.device_count()
    if number is not None and number >= n_gpus:
        raise ValueError(f"environment: LOCAL_RANK: found {number}, expected less than {n_gpus}")
    device = torch.device("cuda", number if number is not None else _least_used(n_gpus))
    torch.cuda.set_device(device)  # what names no GPU would make a context on the first one
    return device


@cache
def _least_used(n_gpus: int) -> int:
    """The GPU, of several, that no other process of this pipeline has chosen, and that has the least memory in use.

    Processes that start together, as those of `dvc queue start --jobs N`, use no memory yet. So each locks a file for
    the GPU that it takes, until it ends. If all are taken, the least memory in use decides.
    """
    if n_gpus == 1:
        return 0
    try:
        listed = subprocess.run(USED, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
        used = {uuid.strip(): float(mib) for uuid, mib in (line.split(",") for line in listed)}
        names = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(n_gpus)]
        order = sorted(range(n_gpus), key=lambda index: used[names[index]])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        log.warning("nvidia-smi does not say which of %d GPUs is used least (%s); the first is taken", n_gpus, error)
        return 0
    return next((index for index in order if _claim(names[index])), order[0])


def _claim(name: str) -> bool:
    """Whether this process holds the lock of the GPU `name` now."""
    if fcntl is None:
        return True
    try:
        file = Path(tempfile.gettempdir(), f"pipeline-{os.getuid()}-{name}").open("a")  # noqa: SIM115 (open until the end)
        _claims.append(file)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def place(module: nn.Module, device: torch.device) -> None:
    """Move to the device, with filters channels-last (Module.to would fail on constants of five dimensions)."""
    module.to(device)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


def pinned(values: torch.Tensor) -> torch.Tensor:
    """Values in pinned memory of the CPU, from which a GPU copies while the program goes on."""
    return values if values.is_pinned() else values.pin_memory()


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values on the device; a copy to a GPU is not waited for."""
    is_copied = device.type == "cuda" and not values.is_cuda
    return (pinned(values) if is_copied else values).to(device, non_blocking=True)


def resident_bytes(device: torch.device, on_cpu: int) -> int:
    """How many bytes of inputs may stay on the device: `on_cpu`, or a share of the GPU's memory that is free now."""
    if device.type != "cuda":
        return on_cpu
    return int(RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0])


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """TF32 in convolutions and matrix products of a GPU, forward and backward, for the precision tf32 only."""
    is_tf32 = precision == "tf32" and device.type == "cuda"
    flags: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul) if is_tf32 else ()
    for flag in flags:
        flag.allow_tf32 = True
    try:
        yield
    finally:
        for flag in flags:
            flag.allow_tf32 = False


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a forward pass has this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
