"""Confidence intervals of metrics. The unit is the image: its contributions are summed over the seeds.

Everywhere `runs` are the predictions of one strategy, one per seed; label and weight (n_images,) are of all images.
Intervals are 95 % and conditional on the trained runs: they cover other test images, not other seeds. Images of weight
0 are left out.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from pipeline.comparison import influence, metrics, resampling
from pipeline.comparison.influence import Influence
from pipeline.training.runs import Predictions

T = TypeVar("T")
Z = float(stats.norm.ppf(0.975))
MAX_IMAGES_FOR_ECE = 10_000


@dataclass(frozen=True)
class Interval:
    """The mean over seeds and its 95 % interval."""

    value: float
    low: float
    high: float


def distinct(items: Iterable[T], digest: Callable[[T], bytes]) -> list[T]:
    """The first item of each digest: a given split and a convex head give the same run with every seed."""
    found: dict[bytes, T] = {}
    for item in items:
        found.setdefault(digest(item), item)
    return list(found.values())


def digest_of(run: Predictions) -> bytes:
    """SHA-256 of the rows and of the log-probabilities."""
    return b"".join(hashlib.sha256(array.tobytes()).digest() for array in (run.rows, run.log_probability))


def with_weight(run: Predictions, weight: np.ndarray) -> Predictions:
    """The predictions for images whose weight is above 0."""
    kept = weight[run.rows] > 0
    return run if kept.all() else Predictions(run.rows[kept], run.log_probability[kept])


def metric_intervals(runs: Sequence[Predictions], label: np.ndarray, weight: np.ndarray) -> dict[str, Interval | None]:
    """Every metric of metrics.score with its interval.

    None where a class does not occur (`auroc`) and above 10,000 images (`ece`).
    """
    kept = [with_weight(run, weight) for run in distinct(runs, digest_of)]
    rows = [run.rows for run in kept]
    by_run = [influence.linearise(run.log_probability, label[run.rows], weight[run.rows]) for run in kept]
    found = {name: _interval([metric[name] for metric in by_run], rows) for name in by_run[0]}
    return found | {"ece": ece_interval(runs, label, weight)}


def ece_interval(runs: Sequence[Predictions], label: np.ndarray, weight: np.ndarray) -> Interval | None:
    """ECE with its interval (resampling.ece_interval); None above 10,000 images."""
    kept = [with_weight(run, weight) for run in distinct(runs, digest_of)]
    images = np.unique(np.concatenate([run.rows for run in kept]))
    if len(images) > MAX_IMAGES_FOR_ECE:
        return None
    confidence, is_correct, weights = np.zeros((3, len(images), len(kept)))
    for s, run in enumerate(kept):
        at = np.searchsorted(images, run.rows)
        confidence[at, s], is_correct[at, s] = metrics.top_label(run.log_probability, label[run.rows])
        weights[at, s] = weight[run.rows]
    return Interval(*resampling.ece_interval(confidence, is_correct, weights))


def _interval(by_run: Sequence[Influence | None], rows: Sequence[np.ndarray]) -> Interval | None:
    """Interval of the mean over runs; None if a run has no value.

    Between 0 and `top` it is Wilson's score interval, with the number of correct and wrong images that would give this
    variance (Kish 1965, "Survey sampling"; Franco et al. 2019, "Comparative study of confidence intervals for
    proportions in complex sample surveys"). Where only 0 is a bound it is the normal interval of the logarithm. The
    variance includes two more images, one at either end, so that few images, or images that are all alike, do not look
    certain.
    """
    known = [metric for metric in by_run if metric is not None]
    if len(known) < len(by_run):
        return None
    top, value = known[0].top, float(np.mean([metric.value for metric in known]))
    spread, n = spread_and_n(known, rows)
    if math.isinf(top):
        reach = Z * math.sqrt((spread + 2 * value**2 / n) / (n + 2)) / value if value > 0 else 0.0
        return Interval(value, value * math.exp(-reach), value * math.exp(reach))
    p = value / top
    with_two = (n * p + 1) / (n + 2)
    variance = (n * (spread / top**2 + p**2) + 1) / (n + 2) - with_two**2
    effective = n * with_two * (1 - with_two) / variance
    low, high = np.asarray(proportion_confint(p * effective, effective, method="wilson")).tolist()
    return Interval(value, top * min(low, p), top * max(high, p))


def spread_and_n(by_run: Sequence[Influence], rows: Sequence[np.ndarray]) -> tuple[float, float]:
    """Variance of one image over all images, and the effective number of images (Kish), which weights lower."""
    n = 1 / float((by_image([metric.share for metric in by_run], rows) ** 2).sum())
    variance = float((by_image([metric.influence for metric in by_run], rows) ** 2).sum())
    return max(n - 1, 0.0) * variance, n


def by_image(by_run: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over runs of a value (n,) for each row of a run, 0 for other images: (up to the largest row,)."""
    return np.bincount(np.concatenate(rows), np.concatenate(by_run)) / len(by_run)
