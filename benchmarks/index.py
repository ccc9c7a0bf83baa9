"""Indexing against decoding and hashing alone, and its memory: `python -m benchmarks.index [--quick]`.

Whole runs of `python -m pipeline.stages.index` on generated images, start-up included. The pure rate is that of
SHA-256 and a full decode in as many processes as there are cores, on the same files, which lie in the page cache; the
seconds that the stage needs beside reading are those of a run in which it knows every file. Peak memory is that of its
largest process.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.common import EMPTY, Line, generate, run, workspace
from pipeline.dataset import decoding

LONG_AGO = 1_600_000_000  # s; files that changed just now are not remembered


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Rate on images of the default data's size; memory on small ones, and the time for twice as many known names."""
    n_large, n_small = (1200, 5000) if is_quick else (4000, 50_000)
    with tempfile.TemporaryDirectory() as folder, workspace(EMPTY, Path(folder)) as place:
        files = make_files(n_large, 300, Path(folder))
        decode_and_hash(files)  # into the page cache
        pure = decode_and_hash(files)
        whole, again = place.run("index").seconds, place.run("index").seconds
    print(f"  {n_large} images of 300 px: {n_large / pure:.0f} images/s alone; {whole:.1f} s, again {again:.1f} s")
    yield Line("indexing / decoding and hashing alone", pure / (whole - again), "times", "at least", 0.9)
    with tempfile.TemporaryDirectory() as folder, workspace(EMPTY, Path(folder)) as place:
        files = make_files(n_small, 24, Path(folder))
        first = place.run("index")
        for path in files:
            os.link(path, path.with_name(f"again_{path.name}"))
        place.run("index")
        again = place.run("index").seconds
    print(f"  {n_small} images of 24 px: {first.seconds:.1f} s; {2 * n_small} unchanged files: {again:.1f} s")
    yield Line(f"peak memory of indexing {n_small} small images", first.peak_mb, "MB", "at most", 1000)
    yield Line(f"indexing {2 * n_small} unchanged files", 1e6 * again / (2 * n_small), "us a file", "at most", 100)


def make_files(n: int, side: int, directory: Path) -> list[Path]:
    """Write images of two classes that have not changed for a long time; their paths."""
    files = [directory / name for name in generate(n, directory, side).image_id]
    for path in files:
        os.utime(path, (LONG_AGO, LONG_AGO))
    return files


def decode_and_hash(files: list[Path]) -> float:
    """Seconds, without the start of the processes."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("fork")) as pool:
        list(pool.map(one, files[:64]))
        start = time.perf_counter()
        list(pool.map(one, files, chunksize=32))
        return time.perf_counter() - start


def one(path: Path) -> tuple[str, tuple[int, int]]:
    """Digest and size of one image."""
    content = path.read_bytes()
    return decoding.sha256(content), decoding.decode(content).size


if __name__ == "__main__":
    run(measure)
