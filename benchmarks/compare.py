"""The stage `compare`: `python -m benchmarks.compare [--quick]`.

On the runs of the default study (needs `make repro`), and on synthetic logits of 100,000 test images, 100 classes and
3 strategies. Seconds are those of the whole process, imports included.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML
from scipy.special import log_softmax

from benchmarks.common import REPOSITORY, Line, Workspace, run
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Labels, Split
from pipeline.params import HEAD_ONLY, load_params
from pipeline.training.runs import RUNS, Cost, Predictions, Run, make_candidates, save_run

N_CLASSES, N_VAL = 100, 10_000


def measure(*, is_quick: bool = False) -> Iterator[Line]:
    """Seconds and memory."""
    n_test = 5_000 if is_quick else 100_000
    if all((REPOSITORY / RUNS / strategy).is_dir() for strategy in (HEAD_ONLY, *load_params().fine_tune.run)):
        with tempfile.TemporaryDirectory() as folder:
            ran = default_run(Path(folder)).run("compare")
        yield Line("compare: the default run", ran.seconds, "s", "at most", 30)
    else:
        print("  the strategies have not run here: make repro, and measure again", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        ran = synthetic(Path(folder), n_test).run("compare")
    what = f"compare: {n_test:,} images x {N_CLASSES} classes x 3"
    yield Line(what, ran.seconds, "s", "at most", 120)
    yield Line(f"{what}, peak memory", ran.peak_mb, "MB", "at most", 4000)


def default_run(root: Path) -> Workspace:
    """What the stage reads of the study in this repository, copied."""
    shutil.copy(REPOSITORY / "params.yaml", root)
    for name in ("data/splits", RUNS.as_posix()):
        shutil.copytree(REPOSITORY / name, root / name)
    shutil.copy(REPOSITORY / manifest.LABELS, root / manifest.LABELS)
    return Workspace(root)


def synthetic(root: Path, n_test: int) -> Workspace:
    """Three strategies, right on 70 to 80 % of the images, with one seed."""
    yaml, random = YAML(), np.random.default_rng(0)
    params = yaml.load(REPOSITORY / "params.yaml")
    params["split"]["seeds"] = [0]
    strategies = params["fine_tune"]["run"] = ["partial_freeze", "full_retrain"]
    params["fine_tune"]["seeds"] = [0]
    yaml.dump(params, root / "params.yaml")
    n = N_VAL + n_test
    label = random.integers(0, N_CLASSES, n)
    names = [f"{number:06}.png" for number in range(n)]
    classes, empty = [f"class {number:02}" for number in range(N_CLASSES)], [""] * n
    with chdir(root):
        manifest.write_labels(Labels(names, names, label, np.ones(n), empty, empty, empty, empty, empty, classes))
        split = Split(0, names, np.where(np.arange(n) < N_VAL, "val", "test"))
        manifest.write_split(split)
        for place, strategy in enumerate((HEAD_ONLY, *strategies)):
            log_probability = random.standard_normal((n, N_CLASSES), np.float32)
            log_probability[np.arange(n), label] += 3.2 + 0.2 * place
            log_probability = log_softmax(log_probability, axis=1)
            cost = Cost(trainable_params=1, train_flops=10 ** (12 + place), base_passes=1, cached_bytes=1)
            val, test = (Predictions(rows, log_probability[rows]) for rows in map(split.rows, ("val", "test")))
            candidates = make_candidates({"epoch 0": val.log_probability}, label[val.rows])
            save_run(Run(strategy, 0, cost, {}, {}, [], val, test, candidates))
    return Workspace(root)


if __name__ == "__main__":
    run(measure)
