"""Files that are whole or absent, and digests."""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LFS_START = b"version https://git-lfs"  # of a pointer that Git LFS leaves in the place of a file
NUMBERS = re.compile(r"\[\n[-+.,\deE\s]+\]")  # a list of numbers as json indents it; inside texts, json escapes \n


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` only if the block raises nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # the system does not name the file when the disk is full
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; lines end with \\n on every system."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401
    """Write indented JSON, a list of numbers on one line; ValueError for NaN and infinity."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_text(path, NUMBERS.sub(lambda found: f"[{' '.join(found[0][1:-1].split())}]", text))


def digest(value: Any) -> str:  # noqa: ANN401
    """SHA-256 (hex) of any value that JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def shared(name: str) -> Path:
    """The directory data/<name>, which all experiments share."""
    return shared_directory(f"data/{name}")


def shared_directory(path: str) -> Path:
    """A directory of the repository, or an absolute path, which all experiments share.

    `dvc exp run --temp` and queued experiments run in a copy of the repository and set DVC_ROOT to the original.
    """
    return Path(os.environ.get("DVC_ROOT", "."), path)
