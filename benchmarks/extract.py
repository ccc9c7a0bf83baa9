"""Extraction against the plain loop: `python -m benchmarks.extract [--quick]`.

From PNG files of dataset.path to data/features.h5, one view, start-up of the process included on both sides. Needs an
indexed data set (`dvc repro index`). The rate of the plain loop does not depend on the number of images, so it runs on
every fifth and its loop is extended to all. With --quick few images are taken, of which start-up is a larger part.
"""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from benchmarks.common import LITE, RESNET50, Line, Workspace, run, workspace
from pipeline.dataset import manifest
from pipeline.params import load_params

QUICK = {LITE: 4, RESNET50: 16}  # of how many images one is taken
TARGETS = {(LITE, "fp32"): 7, (LITE, "bf16"): 9, (RESNET50, "fp32"): 3, (RESNET50, "bf16"): 6}


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Lines of both networks and precisions."""
    listed, directory, step = manifest.read_images(), Path(load_params().dataset.path).resolve(), 5
    for name in (LITE, RESNET50):
        n = len(listed.sha256) // (QUICK[name] if is_quick else 1)
        with workspace(directory, name) as place:
            place.list_images(listed, slice(0, n, step))
            plain = place.run("benchmarks.plain_loop")
            loop, theirs = float(plain.printed), read(place)
        slow = plain.seconds + loop * (n / len(theirs) - 1)
        for precision in ("fp32", "bf16"):
            title = f"{name.split('/')[1]}, {precision}"
            with workspace(directory, name, precision) as place:
                place.list_images(listed, slice(n))
                place.run("pipeline.stages.plan")
                fast, ours = place.run("pipeline.stages.extract").seconds, read(place)
                size = place.features.stat().st_size / ours.nbytes
            print(f"  {n / fast:.0f} against {n / slow:.0f} images/s", flush=True)
            yield Line(f"extraction / plain loop, {title}", slow / fast, "times", "at least", TARGETS[name, precision])
            if precision == "fp32":
                apart = float(np.abs(ours[::step] - theirs).max() / np.abs(theirs).max())
                yield Line(f"largest difference from the plain loop, {title}", apart, "of the largest", "at most", 1e-4)
                yield Line(f"size of features.h5 / payload, {title}", size, "times", "at most", 1.02)


def read(place: Workspace) -> np.ndarray:
    """What a run wrote."""
    with h5py.File(place.features) as file:
        return np.array(file["features"])[:, 0]


if __name__ == "__main__":
    run(measure)
