"""Indexing against decoding and hashing alone, and its memory: `python -m benchmarks.index [--quick]`.

Whole runs of `python -m pipeline.stages.index` on generated images, start-up included. The pure rate is that of
SHA-256 and a full decode in as many processes as there are cores, on the same files, which lie in the page cache; the
seconds that the stage needs beside reading are those of a run in which it knows every file.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import EMPTY, Line, Workspace, generate, run, workspace
from pipeline.dataset import decoding

LONG_AGO = 1_600_000_000


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Rate on images of the default data's size, memory on small ones, and both again."""
    yield from rate(1200 if is_quick else 4000)
    yield from small(5000 if is_quick else 50_000)


def rate(n: int) -> Iterator[Line]:
    """Images of 300 px: files that the stage reads in a second, over those that are decoded and hashed alone."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        for part in ("one", "other"):
            (directory / part).mkdir()
        generate(n, directory / "one")
        paths = sorted((directory / "one").iterdir())
        for path in paths[::2]:
            path.rename(directory / "other" / path.name)
        files = [str(path) for path in directory.rglob("*.png")]
        make_old(files)
        with workspace(EMPTY, directory) as place:
            decode_and_hash(files)  # into the page cache
            pure = decode_and_hash(files)
            whole = place.run("index").seconds
            again = place.run("index").seconds
        print(f"  {n} images of 300 px: {n / pure:.0f} images/s alone; {whole:.1f} s, again {again:.1f} s", flush=True)
        yield Line("indexing / decoding and hashing alone", pure / (whole - again), "times", "at least", 0.9)


def small(n: int) -> Iterator[Line]:
    """Images of 24 px: peak memory, and seconds for twice as many names that are known."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        random = np.random.default_rng(0)
        for part in ("one", "other"):
            (directory / part).mkdir()
            for number in range(n // 2):
                pixels = random.integers(0, 256, (24, 24), dtype=np.uint8)
                Image.fromarray(pixels).save(directory / part / f"{number:06}.png", compress_level=1)
        files = [str(path) for path in directory.rglob("*.png")]
        make_old(files)
        with workspace(EMPTY, directory) as place:
            seconds, peak_mb = watched(place)
            link_again(directory)
            place.run("index")
            again = place.run("index").seconds
        print(f"  {n} images of 24 px: {seconds:.1f} s; {2 * n} unchanged files: {again:.1f} s", flush=True)
        yield Line(f"peak memory of indexing {n} small images", peak_mb, "MB", "at most", 1000)
        yield Line(f"indexing {2 * n} unchanged files", 1e6 * again / (2 * n), "us a file", "at most", 100)


def watched(place: Workspace) -> tuple[float, float]:
    """Seconds of a run, and the most memory (MB) that its processes had together: what they share is counted once."""
    start, process, most = time.perf_counter(), place.start("index"), 0
    while process.poll() is None:
        used = 0
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.getsid(int(entry.name)) == process.pid:
                    rollup = (entry / "smaps_rollup").read_text()
                    used += int(rollup.partition("Pss:")[2].split()[0])
            except (OSError, IndexError):
                continue  # it has ended
        most = max(most, used)
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError((place.root / "log").read_text()[-2000:])
    return time.perf_counter() - start, most / 1024


def link_again(directory: Path) -> None:
    """Have every file there twice, under another name."""
    for path in list(directory.rglob("*.png")):
        os.link(path, path.with_name(f"again_{path.name}"))


def make_old(files: list[str]) -> None:
    """Files changed just now are not remembered."""
    for path in files:
        os.utime(path, (LONG_AGO, LONG_AGO))


def decode_and_hash(files: list[str]) -> float:
    """Seconds, without the start of the processes."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("fork")) as pool:
        list(pool.map(one, files[:64]))
        start = time.perf_counter()
        for _ in pool.map(one, files, chunksize=32):
            pass
        return time.perf_counter() - start


def one(path: str) -> tuple[str, tuple[int, int]]:
    """Digest and size of one image."""
    content = Path(path).read_bytes()
    return decoding.sha256(content), decoding.decode(content).size


if __name__ == "__main__":
    run(measure)
