"""Logging, progress bars, and how a stage ends: 0 when done, one line and 1 on a mistake."""

import logging
import signal
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

log = logging.getLogger("pipeline")


def run(main: Callable[[], None]) -> None:
    """Run a stage's `main`; a user's mistake (ValueError, OSError) is one line, no traceback.

    Ended by Ctrl-C or SIGTERM alike, it says so and keeps what was finished.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("httpx", "httpx2", "timm", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
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


def progress(items: Iterable[T], total: int, unit: str, description: str = "") -> Iterable[T]:
    """`items` behind a bar with rate and time left; plain lines apart where there is no terminal."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(items, description, total, unit=f" {unit}", mininterval=interval, smoothing=0.1)
