"""Where torch computes: the choice of device, the layout of tensors on it, and the precision of a forward pass."""

import os

import torch
from torch import nn

BATCH = {"cpu": 8, "cuda": 64}  # rows that go through a frozen network together


def choose_device(requested: str, number: int = 0) -> torch.device:
    """The device for `runtime.device`; ValueError if there is none. `number` selects one of several GPUs."""
    has_cuda = torch.cuda.is_available()
    if requested == "cuda" and not has_cuda:
        raise ValueError("params.yaml: runtime.device: cuda, but torch finds no GPU; expected auto or cpu")
    if requested == "cpu" or not has_cuda:
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    if number >= torch.cuda.device_count():
        raise ValueError(f"environment: LOCAL_RANK: found {number}, expected less than {torch.cuda.device_count()}")
    return torch.device("cuda", number)


def place(module: nn.Module, device: torch.device) -> None:
    """Move to the device, with filters channels-last (Module.to would fail on constants of five dimensions)."""
    module.to(device)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a forward pass has this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
