"""The stage `compare`: `python -m benchmarks.compare [--quick]`.

On synthetic predictions for 100,000 test images, 100 classes and 3 strategies. Seconds are those of the whole process,
imports included.
"""

from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import numpy as np
from scipy.special import log_softmax

from benchmarks.common import EMPTY, Line, run, workspace
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Labels, Split
from pipeline.params import HEAD_ONLY
from pipeline.training.runs import Cost, Predictions, Run, make_candidates, save_run

N_CLASSES, N_VAL = 100, 10_000
STRATEGIES = ("partial_freeze", "full_retrain")


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Seconds and memory."""
    n_test = 5_000 if is_quick else 100_000
    with workspace(EMPTY, Path("none"), strategies=STRATEGIES) as place:
        with chdir(place.root):
            write_study(n_test)
        ran = place.run("compare")
    what = f"compare: {n_test:,} images x {N_CLASSES} classes x 3"
    yield Line(what, ran.seconds, "s", "at most", 120)
    yield Line(f"{what}, peak memory", ran.peak_mb, "MB", "at most", 4000)


def write_study(n_test: int) -> None:
    """What `compare` reads of three strategies that are right on 70 to 80 % of the images, with one seed."""
    n, random = N_VAL + n_test, np.random.default_rng(0)
    label = random.integers(0, N_CLASSES, n)
    names, empty = [f"{number:06}.png" for number in range(n)], [""] * n
    classes = [f"class {number:02}" for number in range(N_CLASSES)]
    manifest.write_labels(Labels(names, names, label, np.ones(n), empty, empty, empty, empty, empty, classes))
    split = Split(0, names, np.where(np.arange(n) < N_VAL, "val", "test"))
    manifest.write_split(split)
    for place, strategy in enumerate((HEAD_ONLY, *STRATEGIES)):
        logits = random.standard_normal((n, N_CLASSES), np.float32)
        logits[np.arange(n), label] += 3.2 + 0.2 * place
        log_probability = log_softmax(logits, axis=1)
        cost = Cost(trainable_params=1, train_flops=10 ** (12 + place), base_passes=1, cached_bytes=1)
        val, test = (Predictions(rows, log_probability[rows]) for rows in map(split.rows, ("val", "test")))
        candidates = make_candidates({"epoch 0": val.log_probability}, label[val.rows])
        save_run(Run(strategy, 0, cost, {}, {}, [], val, test, candidates))


if __name__ == "__main__":
    run(measure)
