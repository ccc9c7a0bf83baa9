"""The dense head against scikit-learn's LogisticRegression: `python -m benchmarks.head [--quick]`.

A grid of 12 L2 strengths on one view of the training images of seed 0 (needs `dvc repro extract split`), weighted,
standardised, float32. scikit-learn goes through the same grid with `warm_start`, to the loosest tolerance with which
its validation NLLs are ours; where its line search ends too early for that, they are compared with those of float64,
which is not timed. It is timed as it comes, and once more with one BLAS thread: on few rows its threads cost more than
they give.
"""

import statistics
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from threadpoolctl import threadpool_limits
from torch import nn

from benchmarks.common import Line, run, took
from pipeline.dataset import manifest
from pipeline.features import hdf5
from pipeline.params import load_params
from pipeline.training import heads
from pipeline.training.heads import Examples

STRENGTHS = tuple(float(strength) for strength in np.geomspace(10, 1e-3, 12))
APART = 3e-4  # nats, by which validation NLLs may differ


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Time, the median of three, of one if `is_quick`; scikit-learn's time and results over ours."""
    values, labels, params = hdf5.read_features().values, manifest.read_labels(), load_params()
    split, n_classes = manifest.read_split(0, labels.image_id), len(labels.class_names)
    train, val = (
        Examples(np.array(values[rows, :1]), labels.label[rows], labels.weight[rows])
        for rows in (split.rows("train"), split.rows("val"))
    )
    torch.set_num_threads(params.threads)
    changes = {"kind": "linear", "penalty": "l2", "standardize": True, "regularization_strengths": STRENGTHS}
    options = params.head.model_copy(update=changes)

    def fit() -> heads.Fitted:
        return heads.fit(heads.build(values.shape[2:], n_classes, options, nn.Identity()), train, val, options)

    ours = fit()
    seconds = statistics.median(took(fit) for _ in range(1 if is_quick else 3))
    size = f"{len(train.label):,} x {values.shape[-1]:,}"
    yield Line(f"head: {len(STRENGTHS)} strengths on {size}", seconds, "s", "at most", 1)

    standardized = [ours.head[0](torch.from_numpy(part.features[:, 0])).numpy() for part in (train, val)]

    def reference(dtype: type, tolerance: float) -> tuple[float, float]:
        """Seconds, and the largest difference of the validation NLLs from ours."""
        x, x_val = (part.astype(dtype) for part in standardized)
        model, apart, elapsed = LogisticRegression(tol=tolerance, max_iter=10_000, warm_start=True), 0.0, 0.0
        for strength in STRENGTHS:
            # Of two classes it has one weight vector, the difference of ours, and so half the penalty
            model.C = (2 if n_classes == 2 else 1) / (strength * train.weight.sum())
            elapsed += took(partial(model.fit, x, train.label, train.weight))
            nll = log_loss(val.label, model.predict_proba(x_val), sample_weight=val.weight)
            apart = max(apart, abs(nll - ours.path.val_nll[strength]))
        return elapsed, apart

    for tolerance in (1e-4, 1e-5, 1e-6):
        theirs, apart = reference(np.float32, tolerance)
        if apart <= APART:
            break
    with threadpool_limits(1, "blas"):
        alone, _ = reference(np.float32, tolerance)
        if apart > APART:
            _, apart = reference(np.float64, 1e-8)
    print(f"  scikit-learn: {theirs:.2f} s, {alone:.2f} s with one BLAS thread (tol {tolerance:g})", flush=True)
    yield Line("scikit-learn as it comes / head", theirs / seconds, "times", "at least", 10)
    yield Line("validation NLL apart from scikit-learn's", apart, "nats", "at most", APART)


if __name__ == "__main__":
    run(measure)
