"""What the feature store saves, and how it grows: `python -m benchmarks.store [--quick]`.

Whole runs of `python -m pipeline.stages.extract`, start-up included: from nothing, with 1 % of the images new, after a
SIGKILL when half of the shards were there. Their bound is in proportion to the rows that are missing, plus 8 seconds
of start-up. Growth is measured on generated images; times per image are those beyond a run over 8 images. `dvc repro`
is timed in this repository and must have nothing to do. Needs an indexed data set (`dvc repro index`).
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import REPOSITORY, Line, generate, run, took, workspace
from pipeline.dataset import manifest
from pipeline.features.extraction import SHARD_ROWS
from pipeline.params import load_params

START_UP = 8.0  # s
PLAN, EXTRACT = "pipeline.stages.plan", "pipeline.stages.extract"


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Increments, resume, growth, and doing nothing."""
    listed, directory = manifest.read_images(), Path(load_params().dataset.path).resolve()
    n = len(listed.sha256) // (4 if is_quick else 1)
    with workspace(directory) as place:
        place.list_images(listed, slice(n))
        place.run(PLAN)
        whole = place.run(EXTRACT).seconds

        shutil.rmtree(place.store)
        place.list_images(listed, slice(n - n // 100))
        place.run(EXTRACT)
        place.list_images(listed, slice(n))
        added = place.run(EXTRACT).seconds
        print(f"  {n} images: {whole:.1f} s from nothing, {added:.1f} s with {n // 100} new", flush=True)
        allowed = 0.03 * whole + START_UP
        yield Line("1 % more images / (3 % of the whole + 8 s)", added / allowed, "times", "at most", 1)

        shutil.rmtree(place.store)
        process = place.start(EXTRACT)
        while len(shards_of_features(place.store)) < max(1, n // (2 * SHARD_ROWS)) and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        rest = place.run(EXTRACT).seconds
        (kept,) = re.findall(r"(\d+) rows reused", (place.root / "log").read_text())[-1:]
        print(f"  killed: {kept} of {n} rows were kept, {rest:.1f} s for the others", flush=True)
        allowed = (1 - int(kept) / n) * whole + START_UP
        yield Line("resumed run / (share of rows missing x whole + 8 s)", rest / allowed, "times", "at most", 1)
    yield from growth(is_quick)
    yield from nothing_to_do()


def shards_of_features(store: Path) -> list[Path]:
    """The shards of a store without those of pixels."""
    keys = [path for path in store.glob("*/key.json") if "pixels" not in json.loads(path.read_text(encoding="utf-8"))]
    return [shard for key in keys for shard in key.parent.glob("*.h5")]


def growth(is_quick: bool) -> Iterator[Line]:
    """Peak memory and time per image over many images against few."""
    few, many = (300, 900) if is_quick else (2000, 20_000)
    with tempfile.TemporaryDirectory() as folder, workspace(Path(folder)) as place:
        generated, runs = generate(many, Path(folder)), {}
        place.run(PLAN)
        for n in (8, few, many):
            shutil.rmtree(place.store, ignore_errors=True)
            place.list_images(generated, slice(n))
            runs[n] = place.run(EXTRACT)
    each = {n: 1e3 * (runs[n].seconds - runs[8].seconds) / (n - 8) for n in (few, many)}
    peaks = f"{runs[few].peak_mb:.0f} and {runs[many].peak_mb:.0f} MB"
    print(f"  {each[few]:.2f} and {each[many]:.2f} ms an image, {peaks}", flush=True)
    title = f"{many} images / {few}"
    yield Line(f"peak memory, {title}", runs[many].peak_mb / runs[few].peak_mb, "times", "at most", 1.15)
    yield Line(f"time per image, {title}", each[many] / each[few], "times", "at most", 1.1)


def nothing_to_do() -> Iterator[Line]:
    """Seconds of `dvc repro` where nothing has changed; no line where something has."""
    dvc = [sys.executable, "-m", "dvc"]
    if subprocess.run([*dvc, "status", "--quiet"], cwd=REPOSITORY, capture_output=True).returncode:
        print("  dvc repro has something to do here: run it, and measure again", flush=True)
        return
    seconds = took(lambda: subprocess.run([*dvc, "repro"], cwd=REPOSITORY, capture_output=True, check=True))
    yield Line("dvc repro with nothing to do", seconds, "s", "at most", 2)


if __name__ == "__main__":
    run(measure)
