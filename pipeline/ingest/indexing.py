"""Read image files in parallel, each once, and remember what was found: paths -> what each file is, or its problem.

The memory is a JSON file per directory in <root>/data/.index/. A file with the same path, size, times of change and
inode is not read again. Deleting the memory costs time and changes no result.
"""

import json
import os
import re
import stat
import sys
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import groupby
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL

from pipeline.dataset import decoding
from pipeline.files import LFS_START, digest, shared, write_text
from pipeline.ingest import duplicates, quality
from pipeline.logs import leave_signals, log, progress

# Decides what is remembered; an edit has all files read again
CODE = decoding.__file__, duplicates.__file__, quality.__file__, __file__
LARGEST_FILE = 1024**3  # bytes of an image file
# How files begin that Pillow may take as images, or that are images which are not read. A text may begin like a BMP or
# PPM file, with BM or P1, so that these two show nothing.
IMAGE_START = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|II[*+]\0|II\0\*|MM\0[*+]|MM\*\0|RIFF.{4}WEBP|.{4}ftyp(avi|mif1|msf1|hei|hev)"
    rb"|\0\0\0\x0cj[PX]|\xff\x4f\xff\x51",
    re.DOTALL,
)
LEAST_SIDE = 2 * quality.SIDE  # px: no check needs more of an image
DOUBTFUL_START = re.compile(rb"BM|P[0-9fy]")
NO_IMAGE = "none"  # the format of a file that does not begin like an image
CHUNK_FILES, CHUNK_BYTES = 64, 2_000_000  # handed to a process at a time: about so many files, or so many bytes of them
MAX_ALONE = 8  # files up to which no process is started
TIME_STAMP_NS = 100_000_000  # a file changed so shortly before it is read could change again within one time stamp


class Inspected(NamedTuple):
    """One image file, as text; `reason`, unless empty, says why it cannot be used.

    `format`: of an image, by Pillow's name; of another file NO_IMAGE, or empty if it begins like an image or cannot be
    read. `width`, `height`: px, upright; `mode`: of its pixels, by Pillow's name; `orientation`: EXIF's; `signature`:
    as in duplicates (base64 of int16), empty for a flat picture; `look`, `sharpness`: see quality.look.
    """

    reason: str = ""
    sha256: str = ""
    format: str = ""
    mode: str = ""
    width: str = ""
    height: str = ""
    orientation: str = ""
    signature: str = ""
    look: str = ""
    sharpness: str = ""


class Stamp(NamedTuple):
    """Identifies an unchanged file.

    No tool sets ctime back, so it changes even if size, mtime and inode stay: with an edit in place, for example.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


Memory = dict[str, tuple[Stamp, Inspected]]


def inspect(directory: Path, names: Sequence[str], workers: int, *, is_verifying: bool = False) -> list[Inspected]:
    """Inspect the files `names` of a directory; remembered ones are read again only if `is_verifying`."""
    code = [Path(module).read_text(encoding="utf-8") for module in CODE]  # whole: the memory holds texts of errors too
    key = digest([str(directory.resolve()), PIL.__version__, *code])[:32]
    place = shared(".index") / f"{key}.json"
    memory = _recall(place)
    stamps = {name: stamp for name in names if (stamp := _stamp(directory / name))}
    known = {name: memory[name][1] for name, stamp in stamps.items() if name in memory and memory[name][0] == stamp}
    unread = [name for name in names if is_verifying or name not in known]
    start = time.time_ns()
    found = dict(known)
    sizes = [stamps[name].size if name in stamps else 0 for name in unread]
    results = _inspect_all([f"{directory}/{name}" for name in unread], sizes, workers)
    bar = progress(results, len(unread), "images", "index") if unread else results
    try:
        for name, result in zip(unread, bar, strict=True):
            found[name] = result
    finally:  # also when interrupted
        new = {
            name: (stamp, found[name])
            for name, stamp in stamps.items()
            if name in found and found[name].sha256 and (name in known or stamp.ctime_ns < start - TIME_STAMP_NS)
        }
        if new != memory:
            write_text(place, json.dumps(new))
    if changed := [name for name in known if found[name] != known[name]]:
        log.warning("%d files changed although they look unchanged, first %s", len(changed), directory / changed[0])
    log.info("%d files read, %d known from before", len(unread), len(names) - len(unread))
    return [found[name] for name in names]


def inspect_file(path: str) -> Inspected:
    """Read and fully decode one file."""
    return _inspect_chunk([path])[0]


def _inspect_chunk(paths: Sequence[str]) -> list[Inspected]:
    """Inspect some files; their signatures are computed together, which is ten times as fast."""
    read = [_decode(path) for path in paths]
    found = iter(duplicates.signatures([pixels for _, pixels in read if pixels is not None]))
    return [
        inspected
        if pixels is None or (signature := next(found)) is None
        else inspected._replace(signature=b64encode(signature.tobytes()).decode())
        for inspected, pixels in read
    ]


def _decode(path: str) -> tuple[Inspected, np.ndarray | None]:
    """All but the signature, and the pixels that it is made from."""
    sha256, content = "", b""
    try:
        content = read(path)
        sha256 = decoding.sha256(content)
        decoded = decoding.examine(content, LEAST_SIDE)
        decoding.check_sums(content)
    except OSError as error:
        return Inspected(f"cannot be read: {error.strerror}"), None
    except ValueError as error:
        if content.startswith(LFS_START):
            return Inspected("a pointer of Git LFS to a file that is not here; run: git lfs pull", sha256), None
        is_image = not sha256 or IMAGE_START.match(content)
        return Inspected(str(error), sha256, "" if is_image else NO_IMAGE), None
    except MemoryError:  # without the digest, so that it is not remembered: there may be more memory another time
        return Inspected("needs more memory than there was"), None
    reduced = duplicates.reduced(decoded.image)
    look = quality.look(decoded.image, decoded.mode, reduced)
    width, height = map(str, decoded.size)
    header = decoded.kind, decoded.mode, width, height, str(decoded.orientation)
    return Inspected("", sha256, *header, "", *look), reduced


def read(path: str) -> bytes:
    """The file's bytes; only the first ones of a file that does not begin like an image, which may be a large video."""
    # O_NONBLOCK: if a pipe has taken the file's place, opening it would wait forever
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb", 0) as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("not a file any more")
        start = file.read(32)
        if not (IMAGE_START.match(start) or DOUBTFUL_START.match(start)):
            return start
        if info.st_size > LARGEST_FILE:
            raise ValueError(f"{info.st_size:,} bytes; expected at most {LARGEST_FILE:,}")
        return start + file.read()


# several processes


def _inspect_all(paths: Sequence[str], sizes: Sequence[int], workers: int) -> Iterator[Inspected]:
    if not workers or len(paths) <= MAX_ALONE:
        yield from map(inspect_file, paths)
        return
    work = np.cumsum([max(1 / CHUNK_FILES, size / CHUNK_BYTES) for size in sizes]).astype(int)
    chunks = groupby(zip(paths, work, strict=True), lambda pair: pair[1])
    yield from _inspect_chunks([[path for path, _ in chunk] for _, chunk in chunks], workers)


def _inspect_chunks(chunks: list[list[str]], workers: int) -> Iterator[Inspected]:
    """Inspect in processes that may crash; a file that crashes its process is refused."""
    while chunks:
        n_done = 0
        try:
            for results in _in_processes(chunks, workers):
                yield from results
                n_done += 1
        except BrokenProcessPool:
            suspects = chunks[n_done]  # of several processes, another one may have crashed
            if workers == len(suspects) == 1:
                yield Inspected("ended the process that decoded it (a crash, or too little memory)")
            else:
                yield from _inspect_chunks([[path] for path in suspects], 1)
            n_done += 1
        chunks = chunks[n_done:]


def _in_processes(chunks: Sequence[Sequence[str]], workers: int) -> Iterator[list[Inspected]]:
    # Forked processes need not import anything again; the libraries of other systems do not allow forking
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    others = set(active_children())
    pool = ProcessPoolExecutor(min(workers, len(chunks)), context, leave_signals)
    try:
        yield from pool.map(_inspect_chunk, chunks)
    except BaseException:  # when interrupted, do not wait for the chunks that are already handed out
        for process in set(active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


# memory


def _stamp(path: Path) -> Stamp | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return Stamp(info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)


def _recall(place: Path) -> Memory:
    try:
        rows = json.loads(place.read_text(encoding="utf-8"))
        return {name: (Stamp(*stamp), Inspected(*inspected)) for name, (stamp, inspected) in rows.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s): all files are read again", place, error)
        return {}
