"""device: the device that is asked for, or one line if there is none; filters that are channels-last."""

import pytest
import torch
from torch import nn

from pipeline.network.device import choose_device, place

CPU = torch.device("cpu")


def test_cuda_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto") == CPU
    assert choose_device("cpu") == CPU
    with pytest.raises(ValueError, match=r"runtime\.device: cuda, but torch finds no GPU; expected auto or cpu"):
        choose_device("cuda")


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda *_, **__: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)
    monkeypatch.setenv("LOCAL_RANK", "5")  # of another program: the stage says which rank it is
    assert choose_device("auto") == torch.device("cuda", 0)
    assert choose_device("cuda", 1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"LOCAL_RANK: found 2, expected less than 2"):
        choose_device("auto", 2)


def test_filters_are_channels_last_also_those_of_one_pixel() -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3))
    module.register_buffer("constant", torch.zeros(1, 2, 3, 4, 5))
    place(module, CPU)
    strides = [parameter.stride() for parameter in module.parameters() if parameter.ndim == 4]
    assert strides == [(4, 1, 4, 4), (72, 1, 24, 8)]  # what decides which kernels run, and so which bits come out
