"""Logging, progress bars, and how a stage ends: exit code 0, or one line and exit code 1 for a user's mistake.

A stage that succeeds writes reports/timings/<stage>[-<arguments>].json. Git and DVC ignore this file, because it
differs from run to run.
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
    """Run a stage's `main`. A user's mistake (ValueError, OSError) ends it with one line and no traceback.

    SIGTERM ends it as Ctrl-C does: with the line "interrupted", and with every finished file kept.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("httpx", "httpx2", "timm", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main_process = os.getpid()  # print tracebacks only there: the workers are copies of it
    sys.excepthook = lambda *error: sys.__excepthook__(*error) if os.getpid() == main_process else None
    start = time.perf_counter()
    try:
        main()
        note_timing(time.perf_counter() - start)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # HDF5 reports a full disk in ten lines
        sys.exit(f"error: {' '.join(str(error).split())}")
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # torch's own message when a worker was killed
            raise
        sys.exit(f"error: a process that decodes images was killed, probably because memory is full ({error})")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def leave_signals(*_worker: int) -> None:
    """Initialise a worker process: the main process handles Ctrl-C and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def one_line(error: BaseException) -> str:
    """The message of an error of another library in one line of at most 500 characters, without colours."""
    return " ".join(re.sub(r"\x1b\[[\d;?]*[@-~]", "", str(error)).split())[:500]


def note_timing(wall_seconds: float) -> None:
    """Write time and memory of the stage that this process runs; nothing if it runs no stage.

    `peak_memory_bytes` is that of the main process, None where the system does not report it.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not spec.name.startswith(STAGES) or any(word.startswith("-") for word in sys.argv[1:]):
        return  # dvc.yaml calls no stage with an option
    words = [spec.name.removeprefix(STAGES), *sys.argv[1:]]
    name = "-".join(re.sub(r"\W+", "_", word, flags=re.ASCII) for word in words)[:100]
    peak = None
    if resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with contextlib.suppress(OSError):  # a timing that cannot be written is no reason to fail
        write_json(TIMINGS / f"{name}.json", {"wall_seconds": round(wall_seconds, 2), "peak_memory_bytes": peak})


def progress(items: Iterable[T], total: int, unit: str, description: str = "") -> Iterable[T]:
    """Iterate over `items` with a progress bar; without a terminal, print a line every ten seconds at most."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(items, description, total, unit=f" {unit}", mininterval=interval, smoothing=0.1)
