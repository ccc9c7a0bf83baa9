"""Indexing against decoding and hashing alone: `python -m benchmarks.index [--quick]`.

Whole runs of `python -m pipeline.stages.index` on generated images of the default data's size, start-up included. The
pure rate is that of SHA-256 and a full decode in as many processes as there are cores, on the same files, which lie in
the page cache; the seconds that the stage needs beside reading are those of a run in which it knows every file.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Line, generate, on_all_cores, run, workspace
from pipeline.dataset import decoding

LONG_AGO = 1_600_000_000  # s; files that changed just now are not remembered


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Files that the stage reads in a second, over those that are decoded and hashed alone."""
    n = 1200 if is_quick else 4000
    with tempfile.TemporaryDirectory() as folder, workspace(Path(folder)) as place:
        files = [Path(folder, name) for name in generate(n, Path(folder)).image_id]
        for path in files:
            os.utime(path, (LONG_AGO, LONG_AGO))
        on_all_cores(one, files)  # into the page cache
        _, pure = on_all_cores(one, files)
        whole, again = (place.run("pipeline.stages.index").seconds for _ in range(2))
    print(f"  {n} images: {n / pure:.0f} images/s alone; {whole:.1f} s, again {again:.1f} s", flush=True)
    yield Line("indexing / decoding and hashing alone", pure / (whole - again), "times", "at least", 0.9)


def one(path: Path) -> tuple[str, tuple[int, int]]:
    """Digest and size of one image."""
    content = path.read_bytes()
    return decoding.sha256(content), decoding.decode(content).size


if __name__ == "__main__":
    run(measure)
