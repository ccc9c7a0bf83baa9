"""logs: how a stage ends, whoever ends it."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from pipeline import logs


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


def last_line(main: Callable[[], None]) -> str:
    """The line printed at the end; a text as exit code means that the process ends with 1."""
    with pytest.raises(SystemExit) as caught:
        logs.run(main)
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


@pytest.mark.parametrize(
    "text",
    ["DataLoader worker (pid 12) is killed by signal: Killed. ", "DataLoader worker (pid(s) 12) exited unexpectedly"],
)
def test_decoder_that_is_killed_is_one_line(text: str) -> None:
    assert last_line(failing(RuntimeError(text))).startswith("error: a process that decodes images was killed")


@pytest.mark.parametrize("text", ["no such operation", "Caught RuntimeError in DataLoader worker process 0.\n…"])
def test_error_of_our_own_keeps_its_traceback(text: str) -> None:
    with pytest.raises(RuntimeError, match=text[:10]):
        logs.run(failing(RuntimeError(text)))


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
