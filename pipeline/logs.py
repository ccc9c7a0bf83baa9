"""Logging, progress bars, and how a stage ends: exit code 0, or one line and exit code 1 for a user's mistake.

A stage that succeeds writes reports/timings/<stage>[-<arguments>].json. Git and DVC ignore this file, because it
differs from run to run.
"""

import contextlib
import io
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
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
# Each library has its own words for it: torch on a CPU and a GPU, cuBLAS, cuDNN, oneDNN, OpenVINO, numpy, HDF5, Linux
NO_MEMORY = re.compile(
    r"out of memory|(can.?t|cannot|unable to|failed to) allocate|(not enough|insufficient) memory|bad_?alloc"
    r"|alloc_failed|memory allocation failed|could not create a memory(?! descriptor)",
    re.IGNORECASE,
)
KILLED_WORKER = re.compile(r"DataLoader worker \(pid.*")  # torch's own message
NO_SHARED_MEMORY = re.compile(r"unable to (allocate|write|open|resize).*/torch_|signal: Bus error", re.IGNORECASE)
NO_MORE_ALLOWED = re.compile(r"can't start new thread|items of ancdata|Too many open files", re.IGNORECASE)
NO_SPACE = re.compile(r"No space left|Disk quota exceeded")
WORKERS = "runtime.workers"

log = logging.getLogger("pipeline")


def run(main: Callable[[], None], memory: Sequence[str] = ()) -> None:
    """Run a stage's `main`. A user's mistake, or a limit of the machine, ends it with one line and no traceback.

    `memory`: the parameters that need less memory when they are lowered. SIGTERM ends the stage as Ctrl-C does: with
    the line "interrupted", and with every finished file kept. What the terminal cannot show is printed as an escape.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("httpx", "httpx2", "timm", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    asked: list[int] = []  # the signal that asked this stage to end

    def interrupt(number: int, _frame: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    main_process = os.getpid()  # print tracebacks only there: the workers are copies of it
    sys.excepthook = lambda *error: sys.__excepthook__(*error) if os.getpid() == main_process else None
    start = time.perf_counter()
    try:
        main()
        note_timing(time.perf_counter() - start)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except (MemoryError, OSError, RuntimeError) as error:
        # torchrun, SLURM and systemd send SIGTERM to the workers too, and their end is an error of its own here
        line = "" if asked else explain(error, memory)
        if line is None:
            raise
        sys.exit(f"error: {line}" if line else "interrupted")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def explain(error: Exception, memory: Sequence[str] = ()) -> str | None:
    """One line, with the error's own words, for what the machine or the user causes; None for a bug.

    `memory`: the parameters that need less memory when they are lowered.
    """
    words = " ".join(str(error).split())  # HDF5 reports a full disk in ten lines
    if "Original Traceback" in words:  # of a worker: the error itself is the last line
        words = str(error).strip().splitlines()[-1]
    short, is_runtime_error = words[:200].strip() or type(error).__name__, isinstance(error, RuntimeError)
    if NO_MORE_ALLOWED.search(words) and isinstance(error, OSError | RuntimeError):
        return f"this user may not have more ({short}); raise the limit (ulimit -n, ulimit -u), or lower {WORKERS}"
    if is_runtime_error and NO_SHARED_MEMORY.search(words):
        way_out = f"raise the limit (docker run --shm-size=1g), or set {WORKERS} to 0"
        return f"too little shared memory, /dev/shm, for the processes that decode images ({short}); {way_out}"
    if is_out_of_memory(error):
        on_gpu = re.search("CUDA|CUBLAS|CUDNN", words) is not None
        lower = ", ".join(key for key in memory if not (on_gpu and key == WORKERS))
        way_out = f"lower {lower} in params.yaml" if lower else "end other programs, or use a machine with more"
        return f"too little memory{' on the GPU' if on_gpu else ''} ({short}); {way_out}"
    if is_runtime_error and KILLED_WORKER.match(words):
        if "Terminated" in words:
            return f"a process that decodes images was told to end ({short}), not by this run; start it again"
        is_crash = "signal:" in words and "Killed" not in words
        why = "an image crashes its decoder" if is_crash else "memory is probably full"
        return f"a process that decodes images was killed ({short}); {why}; lower {WORKERS} in params.yaml"
    if NO_SPACE.search(words) and isinstance(error, OSError):
        return f"{words}; make room there, or set runtime.store to a directory on another disk if it is the store"
    return words if isinstance(error, OSError) else None


def raise_if_of_machine(error: BaseException) -> None:
    """Raise what is no fault of the input at work: memory that ran out, and a process of decoding that was killed.

    torch notices such a process at once, in whatever code the main process runs.
    """
    if is_out_of_memory(error):
        raise error
    if found := KILLED_WORKER.search(str(error)):
        raise RuntimeError(found.group()) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU."""
    is_system = isinstance(error, OSError | RuntimeError)
    return isinstance(error, MemoryError) or (is_system and NO_MEMORY.search(str(error)) is not None)


def leave_signals(*_worker: int) -> None:
    """Initialise a worker process: the main process handles Ctrl-C and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def one_line(error: BaseException) -> str:
    """The message of an error of another library in one line of at most 500 characters, without colours."""
    text = " ".join(re.sub(r"\x1b\[[\d;?]*[@-~]", "", str(error)).split())
    return text[:500] or type(error).__name__


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
