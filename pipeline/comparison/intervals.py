"""Confidence intervals of metrics. What was sampled is the unit: its influences are summed over images and seeds.

Everywhere `runs` are the outcomes of one strategy, one per seed; label, weight and unit (n_images,) are of all images.
Intervals are 95 % and conditional on the trained runs: they cover other test units, not other seeds. How well the
intervals cover is simulated by `python -m benchmarks.error_rates`.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import special

from pipeline.comparison import influence, metrics, resampling
from pipeline.comparison.influence import Influence
from pipeline.comparison.outcomes import Outcomes

T = TypeVar("T")
PSEUDO_UNITS = 0.2  # half at either end; chosen by simulation, so that few or unequal units are not taken for certainty
MAX_IMAGES_FOR_ECE = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The mean over seeds and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """How much a metric varies: the variance of one unit, and the numbers of units and images.

    `n_effective`: the number of units of equal share that would have this variance (Kish 1965, "Survey sampling").
    """

    variance: float
    n_effective: float
    n_units: int
    n_images: int

    @property
    def degrees(self) -> int:
        """Degrees of freedom of the variance."""
        return max(self.n_units - 1, 1)


def distinct(items: Iterable[T], digest: Callable[[T], bytes]) -> list[T]:
    """The first item of each digest: a given split and a convex head give the same run with every seed."""
    found: dict[bytes, T] = {}
    for item in items:
        found.setdefault(digest(item), item)
    return list(found.values())


def digest_of(run: Outcomes) -> bytes:
    """SHA-256 of the rows and of what was predicted for them."""
    arrays = (run.rows, run.predicted, run.true_log_probability)
    return b"".join(hashlib.sha256(array.tobytes()).digest() for array in arrays)


def metric_intervals(
    runs: Sequence[Outcomes], label: np.ndarray, weight: np.ndarray, unit: np.ndarray, n_classes: int
) -> dict[str, Interval | None]:
    """Every metric of metrics.score, as far as the outcomes allow, with its interval.

    None where a class does not occur (`auroc`) and above 10,000 images (`ece`).
    """
    kept = distinct(runs, digest_of)
    rows = [run.rows for run in kept]
    by_run = [influence.linearise(run, label[run.rows], weight[run.rows], unit[run.rows], n_classes) for run in kept]
    found = {name: interval([metric[name] for metric in by_run], rows, unit) for name in by_run[0]}
    if all(run.probability.shape[1] for run in kept):
        found["ece"] = ece_interval(kept, label, weight, unit)
    return found


def ece_interval(runs: Sequence[Outcomes], label: np.ndarray, weight: np.ndarray, unit: np.ndarray) -> Interval | None:
    """ECE of the probabilities of the runs, with its interval; None above 10,000 images."""
    images = np.unique(np.concatenate([run.rows for run in runs]))
    if len(images) > MAX_IMAGES_FOR_ECE:
        return None
    confidence, is_correct, weights = np.zeros((3, len(images), len(runs)))
    for s, run in enumerate(runs):
        at = np.searchsorted(images, run.rows)
        confidence[at, s], is_correct[at, s] = metrics.top_label(run.probability, label[run.rows])
        weights[at, s] = weight[run.rows]
    return Interval(*resampling.ece_interval(confidence, is_correct, weights, unit[images]))


def interval(by_run: Sequence[Influence | None], rows: Sequence[np.ndarray], unit: np.ndarray) -> Interval | None:
    """Interval of the mean over runs; None if a run has no value.

    Between 0 and `top` it is the exact interval of Clopper and Pearson for as many independent images as would have
    this variance, shortened for the few units that it is estimated from (Korn & Graubard 1998, "Confidence intervals
    for proportions with small expected number of positive counts estimated from survey data"). Where only 0 is a bound
    it is the interval of the logarithm, with two pseudo-units that vary as much as the value.
    """
    known = [metric for metric in by_run if metric is not None]
    if len(known) < len(by_run):
        return None
    top, value, spread = known[0].top, float(np.mean([metric.value for metric in known])), spread_of(known, rows, unit)
    n, t = spread.n_effective, float(special.stdtrit(spread.degrees, (1 + CONFIDENCE) / 2))
    if math.isinf(top):
        reach = t * math.sqrt((spread.variance + 2 * value**2 / n) / (n + 2)) / value if value > 0 else 0.0
        return Interval(value, value * math.exp(-reach), value * math.exp(reach))
    p, as_images = value / top, spread_of(known, rows, np.arange(len(unit)))
    effective = min(_binomial_size(p, spread, top), _binomial_size(p, as_images, top))  # units are never worth more
    effective *= (float(special.ndtri((1 + CONFIDENCE) / 2)) / t) ** 2
    hits, tail = p * effective, (1 - CONFIDENCE) / 2
    low = float(special.betaincinv(hits, effective - hits + 1, tail)) if hits > 0 else 0.0
    high = float(special.betaincinv(hits + 1, effective - hits, 1 - tail)) if hits < effective else 1.0
    return Interval(value, top * min(low, p), top * max(high, p))


def _binomial_size(p: float, spread: Spread, top: float) -> float:
    """The number of independent images whose proportion p would vary as much; with 0.2 pseudo-units, half at an end.

    At an end, where all variance is that of the pseudo-units of classes, the proportion is taken for one unit off it.
    """
    n = spread.n_effective
    if min(p, 1 - p) < 1e-12 and spread.variance > 0:
        q = 1 / (n + 2)
        return n * q * (1 - q) / max(spread.variance / top**2, q * (1 - q))
    centre = (n * p + PSEUDO_UNITS / 2) / (n + PSEUDO_UNITS)
    second_moment = (n * (spread.variance / top**2 + p**2) + PSEUDO_UNITS / 2) / (n + PSEUDO_UNITS)
    return n * centre * (1 - centre) / (second_moment - centre**2)


def spread_of(by_run: Sequence[Influence], rows: Sequence[np.ndarray], unit: np.ndarray) -> Spread:
    """The spread of the mean over runs: influences are summed over units before they are squared."""
    units = [unit[own] for own in rows]
    share = sum_by([metric.share for metric in by_run], units)
    moved = sum_by([metric.influence for metric in by_run], units)
    effective, n_units = float(share.sum() ** 2 / (share**2).sum()), int(np.count_nonzero(share))
    extra = float(np.mean([metric.extra_variance for metric in by_run]))
    variance = float((moved**2).sum()) * n_units / max(n_units - 1, 1) + extra
    n_images = int(np.count_nonzero(np.bincount(np.concatenate(rows))))
    return Spread(effective * variance, effective, n_units, n_images)


def sum_by(by_run: Sequence[np.ndarray], index: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over runs of the sums of values (n,) by index (n,) of a unit or image: (largest index + 1,)."""
    return np.bincount(np.concatenate(index), np.concatenate(by_run)) / len(by_run)
