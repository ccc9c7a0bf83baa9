"""logs: how a stage ends, whoever ends it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from pipeline import logs
from tests.factories import REPOSITORY


@pytest.fixture(autouse=True)
def _handlers_are_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def failing(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def last_line(main: Callable[[], None], memory: Sequence[str] = ()) -> str:
    """The line printed at the end; a text as exit code means that the process ends with 1."""
    with pytest.raises(SystemExit) as caught:
        logs.run(main, memory)
    line = caught.value.code
    assert isinstance(line, str)
    assert "\n" not in line
    return line


def test_stage_that_is_done_just_ends() -> None:
    ran = []
    logs.run(lambda: ran.append(1))
    assert ran == [1]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("params.yaml: x: found 1, expected 2"), "error: params.yaml: x: found 1, expected 2"),
        (FileNotFoundError("data/images.csv"), "error: data/images.csv"),
        (OSError("file write failed:\n  errno = 28,\n  No space left"), "error: file write failed: errno = 28, No"),
        (
            OSError(28, "No space left on device", "/a/b.h5"),
            "error: [Errno 28] No space left on device: '/a/b.h5'; make room there, or set runtime.store to ",
        ),
    ],
)
def test_mistake_is_one_line(error: Exception, line: str) -> None:
    assert last_line(failing(error)).startswith(line)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_sigterm_ends_a_stage_as_ctrl_c_does(how: signal.Signals) -> None:
    cleaned = []

    def main() -> None:
        try:
            os.kill(os.getpid(), how)
            signal.pause()
        finally:
            cleaned.append(how)

    assert last_line(main) == "interrupted"
    assert cleaned == [how]


WORKER_ENDED = "DataLoader worker (pid 12) is killed by signal: Terminated. "


def test_a_signal_to_the_whole_process_group_is_no_lack_of_memory() -> None:
    def main() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:  # torch notices the end of a worker while the stage ends
            raise RuntimeError(WORKER_ENDED)

    assert last_line(main, MEMORY) == "interrupted"


MEMORY = ("batch_size", "features.image_size", "runtime.workers")
ON_CPU, ON_GPU = "lower batch_size, features.image_size, runtime.workers", "lower batch_size, features.image_size in"
IN_WORKER = (
    "Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
)


@pytest.mark.parametrize(
    ("error", "line", "way_out"),
    [
        (MemoryError(), "too little memory (MemoryError)", ON_CPU),
        (MemoryError("Unable to allocate 3.00 GiB for an array"), "too little memory (Unable to allocate", ON_CPU),
        (OSError(12, "Cannot allocate memory"), "too little memory ([Errno 12] Cannot allocate memory)", ON_CPU),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried"),
            "too little memory ([enforce fail",
            ON_CPU,
        ),
        (RuntimeError("std::bad_alloc"), "too little memory (std::bad_alloc)", ON_CPU),
        (MemoryError(f"{IN_WORKER}MemoryError: Unable to allocate 1 GiB"), "too little memory (MemoryError: U", ON_CPU),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total"),
            "too little memory on the GPU (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0",
            ON_GPU,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "too little memory on the GPU (cuDNN", ON_GPU),
        (
            RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
            "a process that decodes images was killed (DataLoader worker (pid 12) is killed by signal: Killed.); mem",
            "lower runtime.workers",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"),
            "a process that decodes images was killed (DataLoader worker (pid(s) 12) exited unexpectedly); memory",
            "lower runtime.workers",
        ),
        (
            RuntimeError(WORKER_ENDED),
            "a process that decodes images was told to end (DataLoader worker (pid 12) is killed by signal: Terminated",
            "not by this run; start it again",
        ),
        (
            RuntimeError("DataLoader worker (pid 12) is killed by signal: Segmentation fault. "),
            "a process that decodes images was killed (DataLoader worker (pid 12) is killed by signal: Segmentation",
            "an image crashes its decoder",
        ),
        (
            RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error. It is possible that dataloader's"),
            "too little shared memory, /dev/shm, for the processes that decode images (DataLoader worker (pid 3)",
            "set runtime.workers to 0",
        ),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)"),
            "too little shared memory, /dev/shm",
            "docker run --shm-size=1g",
        ),
        (
            RuntimeError("unable to mmap 9 bytes from file </torch_1_2>: Cannot allocate memory (12)"),
            "too little memory (unable to mmap",
            ON_CPU,
        ),
        (
            RuntimeError(
                "unable to open shared memory object </torch_1_2> in read-write mode: Too many open files (24)"
            ),
            "this user may not have more (unable to open",
            "ulimit -n",
        ),
        (RuntimeError("can't start new thread"), "this user may not have more (can't start new thread)", "ulimit -u"),
        (OSError(24, "Too many open files"), "this user may not have more ([Errno 24] Too many open", "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "this user may not have more (received 0", "ulimit -n"),
    ],
)
def test_limit_of_the_machine_is_one_line_with_the_words_of_the_library_and_the_way_out(
    error: Exception, line: str, way_out: str
) -> None:
    found = last_line(failing(error), MEMORY)
    assert found.startswith(f"error: {line}")
    assert way_out in found


def test_stage_without_a_parameter_that_needs_less_memory_says_so() -> None:
    assert last_line(failing(MemoryError())).endswith("end other programs, or use a machine with more")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no such operation"),
        RuntimeError("could not create a memory descriptor"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n…"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        KeyError("out of memory"),
        AttributeError("shared memory"),
        UnboundLocalError("can't start new thread"),
    ],
    ids=repr,
)
def test_bug_of_our_own_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        logs.run(failing(error), MEMORY)
    assert caught.value is error


NAMES = "na\u00efve \u65e5\u672c \U0001f600 \udcff"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_terminal_that_cannot_show_a_name_ends_nothing(encoding: str) -> None:
    code = f"from pipeline import logs\ndef main():\n    print({NAMES!a})\n    logs.log.info({NAMES!a})\n"
    code += f"    raise ValueError({NAMES!a})\nlogs.run(main)"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    expected = NAMES.encode(encoding, "backslashreplace").decode(encoding)
    assert done.stdout.decode(encoding).splitlines() == [expected]
    assert done.stderr.decode(encoding).splitlines() == [expected, f"error: {expected}"]
    assert done.returncode == 1


def test_the_words_of_a_library_are_one_line_without_colours() -> None:
    assert logs.one_line(ValueError("do \x1b[1mnot\x1b[0m\n\ttrust\x1b[38;5;1m it")) == "do not trust it"
    assert len(logs.one_line(ValueError("x" * 1000))) == 500


def test_a_worker_ignores_ctrl_c_and_ends_with_sigterm() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        logs.leave_signals(3)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_progress_gives_the_items(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(logs.progress(range(3), 3, "views", "layer3")) == [0, 1, 2]
    assert "layer3: 100%" in capsys.readouterr().err
