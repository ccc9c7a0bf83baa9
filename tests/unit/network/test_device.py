"""device: the device that is asked for, or one line if there is none; nothing of CUDA for a CPU; precision, layout."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import deterministic

from pipeline.network import device
from pipeline.network.device import arithmetic, choose_device, place

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """Three GPUs that use 500, 100 and 300 MiB, and the devices that are set."""
    chosen: list[Any] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid=f"uuid-{index}"))
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda *_, **__: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("LOCAL_RANK", "5")  # of another program: the stage says which rank it is
    monkeypatch.setattr(device.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(device, "_claims", [])
    list_gpus(monkeypatch, "GPU-uuid-2, 300\nGPU-uuid-0, 500\nGPU-uuid-1, 100\n")
    before = torch.backends.cudnn.allow_tf32, deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    yield chosen
    torch.backends.cudnn.allow_tf32, deterministic.fill_uninitialized_memory = before  # pyright: ignore[reportAttributeAccessIssue]
    forget()


def forget() -> None:
    """Release what this process has claimed."""
    while device._claims:
        device._claims.pop().close()
    device._least_used.cache_clear()


def list_gpus(monkeypatch: pytest.MonkeyPatch, printed: str) -> None:
    """What nvidia-smi prints."""
    command = (sys.executable, "-c", f"print({printed!r}, end='')")
    monkeypatch.setattr(device, "USED", command)
    device._least_used.cache_clear()


def test_cuda_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto") == CPU
    assert choose_device("cpu") == CPU
    with pytest.raises(ValueError, match=r"runtime\.device: cuda, but torch finds no GPU; expected auto or cpu"):
        choose_device("cuda")


def test_each_process_of_a_machine_has_a_gpu_of_its_own(gpus: list[Any]) -> None:
    assert choose_device("auto", 0) == torch.device("cuda", 0)
    assert choose_device("cuda", 1) == torch.device("cuda", 1)
    assert gpus == [torch.device("cuda", 0), torch.device("cuda", 1)], "no context on another GPU"
    with pytest.raises(ValueError, match=r"LOCAL_RANK: found 3, expected less than 3"):
        choose_device("auto", 3)


def test_auto_takes_the_gpu_that_uses_least_memory_and_keeps_to_it(
    gpus: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_device("auto") == torch.device("cuda", 1)
    assert choose_device("cuda") == torch.device("cuda", 1)
    assert gpus == [torch.device("cuda", 1)] * 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert choose_device("auto") == torch.device("cuda", 0), "the only one, nothing is asked"


CLAIM = """
import sys
from pipeline.network import device
device.tempfile.gettempdir = lambda: sys.argv[1]
assert device._claim(sys.argv[2])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_processes_that_start_together_take_different_gpus(gpus: list[Any], tmp_path: Path) -> None:
    others: list[subprocess.Popen[str]] = []
    try:
        for name, expected in (("GPU-uuid-1", 2), ("GPU-uuid-2", 0), ("GPU-uuid-0", 1)):
            command = [sys.executable, "-c", CLAIM, str(tmp_path), name]
            others.append(subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            assert others[-1].stdout is not None
            assert others[-1].stdout.readline() == "ready\n"
            assert choose_device("auto") == torch.device("cuda", expected), "the least used of those that are free"
            forget()
    finally:
        for other in others:
            other.kill()
            other.communicate()
    assert choose_device("auto") == torch.device("cuda", 1), "a process that is gone holds none"


@pytest.mark.parametrize("printed", ["", "GPU-of-another-kind, 1\n", "No devices were found\n"])
def test_without_an_answer_of_nvidia_smi_the_first_gpu_is_taken_with_a_warning(
    gpus: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, printed: str
) -> None:
    list_gpus(monkeypatch, printed)
    assert choose_device("auto") == torch.device("cuda", 0)
    assert "nvidia-smi does not say which of 3 GPUs is used least" in caplog.text


def test_memory_is_not_filled_and_fp32_means_fp32_on_a_gpu(gpus: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda *given, **_: asked.append(given))
    choose_device("auto")
    assert asked == [(True,)]
    assert not deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_tf32_is_used_where_it_is_asked_for_on_a_gpu_and_nowhere_else(gpus: list[Any]) -> None:
    def flags() -> tuple[object, object]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    gpu = choose_device("auto")
    for precision in ("fp32", "tf32", "bf16"):
        with arithmetic(precision, gpu):
            assert flags() == (precision == "tf32",) * 2
        assert flags() == (False, False)
        with arithmetic(precision, CPU):
            assert flags() == (False, False)


def test_filters_are_channels_last_also_those_of_one_pixel() -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3))
    module.register_buffer("constant", torch.zeros(1, 2, 3, 4, 5))
    place(module, CPU)
    strides = [parameter.stride() for parameter in module.parameters() if parameter.ndim == 4]
    assert strides == [(4, 1, 4, 4), (72, 1, 24, 8)]  # what decides which kernels run, and so which bits come out
