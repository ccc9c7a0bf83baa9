"""How many of labels that were flipped come first among the suspects: `python -m benchmarks.label_suspects [--quick]`.

5 % of the labels become another class, at random; of as many suspects, the share that was flipped. Labels that were
wrong before count as misses. For scikit-learn's digits (features are computed here, one view, EfficientNet-Lite0) and
for the data set of the repository, all views (needs `dvc repro extract`).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from benchmarks.common import EMPTY, Line, run, workspace
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Labels
from pipeline.dataset.units import make_units
from pipeline.features import hdf5
from pipeline.features.hdf5 import Features
from pipeline.params import load_params
from pipeline.stages import label_suspects

SHARE = 0.05
N_FLIPS = 5


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Mean over flips of either data set; what it would be by guessing is 0.05."""
    n_flips = 2 if is_quick else N_FLIPS
    with workspace(EMPTY, Path("data/raw/digits")) as place:
        for stage in (("fetch", "digits"), ("index",), ("plan",), ("extract",)):
            place.run(*stage)
        labels = manifest.read_labels(place.root / manifest.LABELS)
        features = hdf5.read_features(place.features)
        features = replace(features, values=np.array(features.values), evaluation=np.array(features.evaluation))
    digits = precision(features, labels, n_flips, "digits")
    yield Line("suspects: flipped labels among the first, digits", digits, "of as many", "at least", 0.5)
    features, labels = hdf5.read_features(), manifest.read_labels()
    if is_quick:
        features = replace(features, values=features.values[:, :1], evaluation=features.evaluation[:, :1])
    own = precision(features, labels, n_flips, "this data set")
    yield Line("suspects: flipped labels among the first, this data set", own, "of as many", "at least", 2 * SHARE)


def precision(features: Features, labels: Labels, n_flips: int, title: str) -> float:
    """Mean over `n_flips` flips; prints it with its 95 % interval (t) over them."""
    found, params = [], load_params()
    torch.set_num_threads(params.threads)
    options = make_units(labels), params.label_suspects, torch.device("cpu")
    for seed in range(n_flips):
        label, rows = flip(labels.label, len(labels.class_names), seed)
        flipped = replace(labels, label=label)
        listed = label_suspects.find(features.values, features.evaluation, flipped, *options).rows
        found.append(np.isin(listed[: len(rows)], rows).sum() / len(rows))
    mean, error = float(np.mean(found)), float(stats.sem(found))
    half = float(stats.t.ppf(0.975, n_flips - 1)) * error
    print(
        f"  {title}: {round(SHARE * len(labels.label))} of {len(labels.label)} labels flipped, n = {n_flips} flips: "
        f"{mean:.3f} ± {half:.3f} (95 %), least {min(found):.3f}",
        flush=True,
    )
    return mean


def flip(label: np.ndarray, n_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which a share, at random, are another class; the rows of these."""
    random = np.random.default_rng(seed)
    rows = random.choice(len(label), round(SHARE * len(label)), replace=False)
    wrong = label.copy()
    wrong[rows] = (label[rows] + random.integers(1, n_classes, len(rows))) % n_classes
    return wrong, rows


if __name__ == "__main__":
    run(measure)
