"""The dense head against scikit-learn's LogisticRegression: `python -m benchmarks.head`.

A grid of 12 L2 strengths on one view of the training images of seed 0 (needs `dvc repro extract split`), weighted,
standardised, float32. scikit-learn goes through the same grid with `warm_start`, to the loosest tolerance with which
its losses are as low as ours. It is timed as it comes, and once more with one BLAS thread: on few rows its threads cost
more than they give.
"""

import time
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import nn

from benchmarks.common import Line, run
from pipeline.dataset import manifest
from pipeline.features import hdf5
from pipeline.params import load_params
from pipeline.training import heads
from pipeline.training.heads import Examples

STRENGTHS = tuple(float(strength) for strength in np.geomspace(10, 1e-3, 12))
Linear = tuple[np.ndarray, np.ndarray]  # weights (n_classes, d) and biases (n_classes,)


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Time, ratio, losses and validation accuracy; the time is the median of three, of one if `is_quick`."""
    features, labels = hdf5.read_features(), manifest.read_labels()
    values = features.values
    split, n_classes = manifest.read_split(0, labels.image_id), len(labels.class_names)
    train, val = (
        Examples(np.array(values[rows, :1]), labels.label[rows], labels.weight[rows])
        for rows in (split.rows("train"), split.rows("val"))
    )
    params = load_params()
    torch.set_num_threads(params.threads)
    options = params.head.model_copy(update={"kind": "linear", "penalty": "l2", "standardize": True})

    def fit(strengths: tuple[float, ...]) -> heads.Fitted:
        chosen = options.model_copy(update={"regularization_strengths": strengths})
        torch.manual_seed(0)
        return heads.fit(heads.build(values.shape[2:], n_classes, chosen, nn.Identity()), train, val, chosen)

    ours, times = fit(STRENGTHS), []
    for _ in range(1 if is_quick else 3):
        start = time.perf_counter()
        fit(STRENGTHS)
        times.append(time.perf_counter() - start)
    seconds = float(np.median(times))
    size = f"{len(split.rows('train')):,} x {values.shape[-1]:,}"
    yield Line(f"head: {len(STRENGTHS)} strengths on {size}", seconds, "s", "at most", 1)

    x, x_val = (ours.head[0](torch.from_numpy(np.array(part.features[:, 0]))).numpy() for part in (train, val))

    def loss(linear: Linear, strength: float) -> float:
        log_probability = log_softmax(x @ linear[0].T + linear[1], axis=1)
        nll = -log_probability[np.arange(len(x)), train.label]
        return float(np.average(nll, weights=train.weight) + strength / 2 * np.square(linear[0]).sum())

    def accuracy(linear: Linear) -> float:
        is_right = (x_val @ linear[0].T + linear[1]).argmax(1) == val.label
        return float(np.average(is_right, weights=val.weight))

    def reference(tolerance: float) -> tuple[float, list[Linear]]:
        model, found = LogisticRegression(tol=tolerance, max_iter=10_000, warm_start=True), []
        start = time.perf_counter()
        for strength in STRENGTHS:
            # Of two classes it has one weight vector, the difference of ours, and so half the penalty
            model.C = (2 if n_classes == 2 else 1) / (strength * train.weight.sum())
            model.fit(x, train.label, sample_weight=train.weight)
            found.append((model.coef_.copy(), np.array(model.intercept_)))
        elapsed = time.perf_counter() - start
        halves = [(np.concatenate([-w, w]) / 2, np.concatenate([-b, b]) / 2) for w, b in found]
        return elapsed, halves if n_classes == 2 else found

    def mean_loss(found: list[Linear]) -> float:
        return float(np.mean([loss(*pair) for pair in zip(found, STRENGTHS, strict=True)]))

    layers = [cast(nn.Linear, fit((strength,)).head[-1]) for strength in STRENGTHS]
    singles = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in layers]
    for tolerance in (1e-4, 1e-5, 1e-6):
        theirs, found = reference(tolerance)
        if mean_loss(found) <= mean_loss(singles) * (1 + 1e-5):
            break
    with threadpool_limits(1, "blas"):
        alone, _ = reference(tolerance)
    print(
        f"  scikit-learn: {theirs:.2f} s as it comes, {alone:.2f} s with one BLAS thread (tol {tolerance:g})",
        flush=True,
    )
    yield Line("scikit-learn as it comes / head", theirs / seconds, "times", "at least", 10)
    yield Line("loss of the head / scikit-learn's", mean_loss(singles) / mean_loss(found), "times", "at most", 1.0001)
    best = STRENGTHS.index(ours.path.strength)
    apart = 100 * abs(accuracy(singles[best]) - accuracy(found[best]))
    yield Line("validation accuracy apart from scikit-learn's", apart, "points", "at most", 0.3)


if __name__ == "__main__":
    run(measure)
