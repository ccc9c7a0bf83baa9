"""Logging, progress bars, and how a stage ends: 0 when done, one line and 1 on a mistake.

A stage that is done leaves reports/timings/<stage>[-<arguments>].json, which git and DVC do not know: it differs from
run to run.
"""

import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

from pipeline.files import write_json

try:
    import resource
except ImportError:  # Windows
    resource = None

T = TypeVar("T")

TIMINGS = Path("reports/timings")
STAGES = "pipeline.stages."

log = logging.getLogger("pipeline")


def run(main: Callable[[], None]) -> None:
    """Run a stage's `main`; a user's mistake (ValueError, OSError) is one line, no traceback.

    Ended by Ctrl-C or SIGTERM alike, it says so and keeps what was finished.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("httpx", "httpx2", "timm", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.excepthook = _quiet_in_workers(os.getpid())
    start = time.perf_counter()
    try:
        main()
        note_timing(time.perf_counter() - start)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # HDF5 tells a full disk in ten lines
        sys.exit(f"error: {' '.join(str(error).split())}")
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # what torch says of workers, not what they say
            raise
        sys.exit(f"error: a process that decodes images was killed, as happens when memory is full ({error})")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def leave_signals(*_worker: int) -> None:
    """Initialise a worker process: signals are for the main process, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def one_line(error: Exception) -> str:
    """The message of an error of another library in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def _quiet_in_workers(main: int) -> Callable[[type[BaseException], BaseException, TracebackType | None], None]:
    """What goes wrong in a decoding worker reaches the main process; what it shows itself is that this one is gone."""

    def show(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if os.getpid() == main:
            sys.__excepthook__(kind, error, where)

    return show


def note_timing(wall_seconds: float) -> None:
    """Write what the stage that this process runs took; nothing where it runs something else.

    `peak_memory_bytes` is of the main process, None where the system does not say it.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not spec.name.startswith(STAGES) or any(word.startswith("-") for word in sys.argv[1:]):
        return  # dvc.yaml calls no stage with an option
    words = [spec.name.removeprefix(STAGES), *sys.argv[1:]]
    name = "-".join(re.sub(r"\W+", "_", word, flags=re.ASCII) for word in words)[:100]
    peak = None
    if resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with contextlib.suppress(OSError):  # what was computed counts, not how long it took
        write_json(TIMINGS / f"{name}.json", {"wall_seconds": round(wall_seconds, 2), "peak_memory_bytes": peak})


def progress(items: Iterable[T], total: int, unit: str, description: str = "") -> Iterable[T]:
    """`items` behind a bar with rate and time left; plain lines apart where there is no terminal."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(items, description, total, unit=f" {unit}", mininterval=interval, smoothing=0.1)
