"""Extraction against the plain loop: `python -m benchmarks.extract [--quick]`.

From PNG files of dataset.path to data/features.h5, one view, start-up of the process included on both sides. Needs an
indexed data set (`dvc repro index`). The rate of the plain loop does not depend on the number of images, so it runs on
every fifth and its loop is extended to all. With --quick few images are taken, of which start-up is a larger part.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import LITE, Line, run, workspace
from pipeline.dataset import manifest
from pipeline.params import load_params

RESNET50 = "torchvision/resnet50"
QUICK = {LITE: 4, RESNET50: 16}  # of how many images one is taken
TARGETS = {(LITE, "fp32"): 5, (LITE, "bf16"): 7.5, (RESNET50, "fp32"): 3, (RESNET50, "bf16"): 6}
STEP = 5


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Lines of both networks and precisions."""
    listed, directory = manifest.read_images(), Path(load_params().dataset.path).resolve()
    for name in (LITE, RESNET50):
        n = len(listed.sha256) // (QUICK[name] if is_quick else 1)
        with workspace(directory, name) as place:
            place.list_images(listed, slice(0, n, STEP))
            plain = place.run("benchmarks.plain_loop")
        slow = plain.seconds + float(plain.printed) * (n / len(range(0, n, STEP)) - 1)
        for precision in ("fp32", "bf16"):
            with workspace(directory, name, features={"precision": precision}) as place:
                place.list_images(listed, slice(n))
                place.run("pipeline.stages.plan")
                fast = place.run("pipeline.stages.extract").seconds
            print(f"  {n / fast:.0f} against {n / slow:.0f} images/s", flush=True)
            title = f"extraction / plain loop, {name.split('/')[1]}, {precision}"
            yield Line(title, slow / fast, "times", "at least", TARGETS[name, precision])


if __name__ == "__main__":
    run(measure)
