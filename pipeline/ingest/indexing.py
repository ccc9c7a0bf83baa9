"""Read image files once, in parallel, and remember what was read: paths -> what each file is, or why it is refused.

The memory is a CSV file per directory in <root>/data/.index/. A file of the same path, size, times of change and inode
as remembered is not read again. Deleting the memory costs time, never a result.
"""

import csv
import os
import signal
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL

from pipeline.dataset import decoding
from pipeline.files import digest, replacing
from pipeline.ingest import duplicates
from pipeline.logs import log, progress

SCHEMA = 3
LARGEST = 1024**3  # bytes of an image file
CHUNK, CHUNK_BYTES = 64, 2_000_000  # files, and bytes of files, after which a process is handed no more at a time
FEW = 8  # files for which no process is started
YOUNG = 100_000_000  # ns: a file changed so shortly before it was read could change again at the same time stamp


class Inspected(NamedTuple):
    """What one file is, as text for CSV; `reason`, if there is one, is why it is refused.

    `width`, `height`: px, upright; `mode`: of its pixels, by Pillow's name; `orientation`: EXIF's; `phash`: the
    perceptual hash (hex), empty for a flat picture.
    """

    reason: str = ""
    sha256: str = ""
    format: str = ""
    mode: str = ""
    width: str = ""
    height: str = ""
    orientation: str = ""
    phash: str = ""


class Stamp(NamedTuple):
    """By which an unchanged file is known.

    ctime, which no tool sets back, notices what keeps size, mtime and inode: an edit in place, or a file written anew.
    """

    size: str
    mtime_ns: str
    ctime_ns: str
    inode: str


Memory = dict[str, tuple[Stamp, Inspected]]


def root() -> Path:
    """Where the memory lies: in the main checkout also inside `dvc exp run --temp`, which sets DVC_ROOT."""
    return Path(os.environ.get("DVC_ROOT", "."), "data", ".index")


def inspect(directory: Path, names: Sequence[str], workers: int, *, is_verifying: bool = False) -> list[Inspected]:
    """What each of the files `names` of a directory is; those that are remembered are read only if `is_verifying`."""
    place = root() / f"{digest([str(directory.resolve()), SCHEMA, decoding.VERSION, PIL.__version__])[:32]}.csv"
    memory = _recall(place)
    stamps = {name: stamp for name in names if (stamp := _stamp(directory / name))}
    known = {name: memory[name][1] for name, stamp in stamps.items() if name in memory and memory[name][0] == stamp}
    unread = [name for name in names if is_verifying or name not in known]
    start = time.time_ns()
    found = dict(known)
    sizes = [int(stamps[name].size) if name in stamps else 0 for name in unread]
    results = _inspect_all([f"{directory}/{name}" for name in unread], sizes, workers)
    bar = progress(results, len(unread), "images", "index") if unread else results
    try:
        for name, result in zip(unread, bar, strict=True):
            found[name] = result
    finally:  # also when interrupted
        new = {
            name: (stamp, found[name])
            for name, stamp in stamps.items()
            if name in found and found[name].sha256 and (name in known or int(stamp.ctime_ns) < start - YOUNG)
        }
        if new != memory:
            _remember(place, new)
    if wrong := [name for name in known if found[name] != known[name]]:
        log.warning("%d files changed unnoticed, first %s", len(wrong), directory / wrong[0])
    log.info("%d files read, %d known from before", len(unread), len(names) - len(unread))
    return [found[name] for name in names]


def inspect_file(path: str) -> Inspected:
    """Read and fully decode one file."""
    return _inspect_chunk([path])[0]


def _inspect_chunk(paths: Sequence[str]) -> list[Inspected]:
    read = [_inspect(path) for path in paths]
    hashes = iter(duplicates.hashes_of([pixels for _, pixels in read if pixels is not None]))
    return [
        inspected if pixels is None or (phash := next(hashes)) is None else inspected._replace(phash=f"{phash:016x}")
        for inspected, pixels in read
    ]


def _inspect(path: str) -> tuple[Inspected, np.ndarray | None]:
    """All but the hash, and the pixels that it is about."""
    try:
        content = _read(path)
    except (OSError, ValueError) as error:
        return Inspected(f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)), None
    sha256 = decoding.sha256(content)
    try:
        decoded = decoding.examine(content)
        decoding.check_sums(content)
    except ValueError as error:
        return Inspected(str(error), sha256), None
    except MemoryError:  # not remembered: another time there may be more
        return Inspected("needs more memory than there was"), None
    image = decoded.image
    told = decoded.format, decoded.mode, str(image.width), str(image.height), str(decoded.orientation)
    return Inspected("", sha256, *told), duplicates.reduced(image)


def _read(path: str) -> bytes:
    # Without O_NONBLOCK, a pipe that took the file's place would never end
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb", 0) as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("not a file any more")
        if info.st_size > LARGEST:
            raise ValueError(f"{info.st_size:,} bytes; expected at most {LARGEST:,}")
        return file.read()


# several processes


def _inspect_all(paths: Sequence[str], sizes: Sequence[int], workers: int) -> Iterator[Inspected]:
    if not workers or len(paths) <= FEW:
        yield from map(inspect_file, paths)
        return
    chunks = list(_chunks(paths, sizes))
    while chunks:
        n_done = 0
        try:
            for results in _in_processes(chunks, workers):
                yield from results
                n_done += 1
        except BrokenProcessPool:  # by a file that crashes the decoder, one of those in work just now
            yield from _one_by_one(chunks[n_done])
            n_done += 1
        chunks = chunks[n_done:]


def _chunks(paths: Sequence[str], sizes: Sequence[int]) -> Iterator[list[str]]:
    chunk: list[str] = []
    n_bytes = 0
    for path, size in zip(paths, sizes, strict=True):
        chunk.append(path)
        n_bytes += size
        if len(chunk) == CHUNK or n_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, n_bytes = [], 0
    if chunk:
        yield chunk


def _in_processes(chunks: Sequence[Sequence[str]], workers: int) -> Iterator[list[Inspected]]:
    pool = _pool(min(workers, len(chunks)))
    try:
        yield from pool.map(_inspect_chunk, chunks)
    except BaseException:  # interrupted; what is handed out already could take minutes
        for process in active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(paths: Sequence[str]) -> Iterator[Inspected]:
    """In a process that may crash: the file at which it does is refused."""
    pool = _pool(1)
    for path in paths:
        try:
            yield pool.submit(inspect_file, path).result()
        except BrokenProcessPool:
            yield Inspected("ended the process that decoded it (a crash, or too little memory)")
            pool = _pool(1)
    pool.shutdown()


def _pool(workers: int) -> ProcessPoolExecutor:
    # Forked processes have imported everything; on other systems the libraries do not bear it
    return ProcessPoolExecutor(workers, get_context("fork" if sys.platform == "linux" else "spawn"), _leave_signals)


def _leave_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# memory


def _stamp(path: Path) -> Stamp | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return Stamp(str(info.st_size), str(info.st_mtime_ns), str(info.st_ctime_ns), str(info.st_ino))


def _recall(place: Path) -> Memory:
    try:
        with place.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, strict=True))
        return {row[0]: (Stamp(*row[1:5]), Inspected(*row[5:])) for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, IndexError, csv.Error) as error:
        log.warning("%s cannot be read (%s): all files are read again", place, error)
        return {}


def _remember(place: Path, memory: Memory) -> None:
    with replacing(place) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(
            chain([name], stamp, inspected) for name, (stamp, inspected) in sorted(memory.items())
        )
