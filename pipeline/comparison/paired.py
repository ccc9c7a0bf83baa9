"""Differences between two strategies on the same images: intervals, p-values, one-sided bounds.

As in intervals.py, the unit is the image. A pair is a run of each of the two strategies with the same seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from pipeline.comparison import influence, resampling
from pipeline.comparison.influence import Influence
from pipeline.comparison.intervals import Z, by_image, digest_of, spread_and_n, with_weight
from pipeline.training.runs import Predictions

FEWEST_SEEDS_FOR_T = 5


@dataclass(frozen=True)
class Difference:
    """Accuracy less that of the baseline, on the same images of the common seeds.

    `by_seed` has one difference per distinct pair of runs, and `seeds` is their number. `method`: "exact McNemar" or
    "sign-flip permutation by image". `corrected_t_p_value` is None below five seeds, and where all test on the same
    images: the variance over seeds does not know that others might have been drawn.
    """

    baseline_accuracy: float
    accuracy: float
    difference: float
    low: float
    high: float
    p_value: float
    method: str
    corrected_t_p_value: float | None
    by_seed: list[float]
    seeds: int


def compare(
    runs: Sequence[Predictions],
    baseline: Sequence[Predictions],
    label: np.ndarray,
    weight: np.ndarray,
    n_train: float = 0,
) -> Difference:
    """The difference from the baseline, its interval and p-value; runs[i] and baseline[i] are of the same images.

    `n_train`: images per seed that train and validate, for the corrected t; 0: without it.
    One distinct pair of runs and equal weights: McNemar's exact test (McNemar 1947, "Note on the sampling error of
    the difference between correlated proportions"). Otherwise the signs of the images' differences are flipped.
    """
    pairs = _pairs(runs, baseline, label, weight)
    low, high = (pairs.bound(z) for z in (-Z, Z))
    if len(pairs.hits) == 1 and np.ptp(pairs.weights[0]) == 0:
        method, p_value = "exact McNemar", exact_mcnemar(*pairs.hits[0])
    else:
        method, p_value = "sign-flip permutation by image", resampling.sign_flip(pairs.by_image())
    by_seed = [part.value for part in pairs.differences]
    n_test = float(np.mean([len(rows) for rows in pairs.rows]))
    is_redrawn = any(not np.array_equal(rows, pairs.rows[0]) for rows in pairs.rows)
    return Difference(
        baseline_accuracy=pairs.accuracy(1),
        accuracy=pairs.accuracy(0),
        difference=pairs.difference,
        low=low,
        high=high,
        p_value=p_value,
        method=method,
        corrected_t_p_value=corrected_t(by_seed, n_test, n_train) if is_redrawn else None,
        by_seed=by_seed,
        seeds=len(by_seed),
    )


def lower_bound(
    runs: Sequence[Predictions], others: Sequence[Predictions], label: np.ndarray, weight: np.ndarray, confidence: float
) -> float:
    """What accuracy(runs) - accuracy(others) is not below, with this one-sided confidence (0 to 1)."""
    return _pairs(runs, others, label, weight).bound(-float(stats.norm.ppf(confidence)))


def images_needed(
    runs: Sequence[Predictions],
    others: Sequence[Predictions],
    label: np.ndarray,
    weight: np.ndarray,
    margin: float,
    confidence: float,
    power: float = 0.8,
) -> int | None:
    """Images per seed with which lower_bound would be above -margin with probability `power`.

    As if the difference seen were the true one, and more images like these; None if it is not above -margin, where no
    number would do.
    """
    pairs = _pairs(runs, others, label, weight)
    if pairs.difference + margin <= 0:
        return None
    n_images = float(np.mean([len(rows) for rows in pairs.rows]))
    reach = float(stats.norm.ppf(confidence) + stats.norm.ppf(power)) / (pairs.difference + margin)
    return max(1, math.ceil(n_images * pairs.adjusted()[1] * reach**2))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979, "A simple sequentially rejective multiple test procedure")."""
    return np.asarray(multipletests(p_values, method="holm")[1]).tolist() if len(p_values) else []


def exact_mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Two-sided p-value of two strategies being right, bool (n,) each, on the same images."""
    table = [[np.sum(ours & theirs), np.sum(ours & ~theirs)], [np.sum(~ours & theirs), np.sum(~ours & ~theirs)]]
    found: Any = mcnemar(table, exact=True)
    return min(float(found.pvalue), 1.0)


def corrected_t(by_seed: Sequence[float], n_test: float, n_train: float) -> float | None:
    """Two-sided p-value of the corrected resampled t-test (Nadeau & Bengio 2003, "Inference for the generalization
    error", section 5): the variance over seeds times 1 / seeds + n_test / n_train, since splits overlap.

    None with fewer than five seeds, and where all differ by the same, not 0. `n_train` counts validation too, for it
    chooses.
    """
    if len(by_seed) < FEWEST_SEEDS_FOR_T or n_train <= 0:
        return None
    seeds, average, variance = len(by_seed), float(np.mean(by_seed)), float(np.var(by_seed, ddof=1))
    if variance < 1e-24:
        return 1.0 if abs(average) < 1e-12 else None
    t = average / math.sqrt((1 / seeds + n_test / n_train) * variance)
    return float(2 * stats.t.sf(abs(t), seeds - 1))


@dataclass(frozen=True)
class _Pairs:
    """Distinct pairs of runs: rows, which of them each of the two had right, and the difference of the two."""

    rows: list[np.ndarray]
    hits: list[tuple[np.ndarray, np.ndarray]]
    weights: list[np.ndarray]
    differences: list[Influence]

    @property
    def difference(self) -> float:
        return float(np.mean([part.value for part in self.differences]))

    def accuracy(self, which: int) -> float:
        shares = [np.average(hit[which], weights=w) for hit, w in zip(self.hits, self.weights, strict=True)]
        return float(np.mean(shares))

    def by_image(self) -> np.ndarray:
        """The contribution of each image to the difference, over all seeds."""
        parts = [
            part.share * (ours.astype(float) - theirs)
            for part, (ours, theirs) in zip(self.differences, self.hits, strict=True)
        ]
        return by_image(parts, self.rows)

    def adjusted(self) -> tuple[float, float]:
        """Difference and its variance with two more images of average weight, on one of which either side is better.

        Agresti & Min 2005, "Simple improved confidence intervals for comparing matched proportions".
        """
        spread, n = spread_and_n(self.differences, self.rows)
        centre = n * self.difference / (n + 2)
        return centre, ((n * (spread + self.difference**2) + 1) / (n + 2) - centre**2) / (n + 2)

    def bound(self, z: float) -> float:
        centre, variance = self.adjusted()
        return min(max(centre + z * math.sqrt(variance), -1.0), 1.0)


def _pairs(runs: Sequence[Predictions], others: Sequence[Predictions], label: np.ndarray, weight: np.ndarray) -> _Pairs:
    found: dict[bytes, tuple[Predictions, Predictions]] = {}
    for ours, theirs in zip(runs, others, strict=True):
        if not np.array_equal(ours.rows, theirs.rows):
            raise ValueError("two runs are about other images, or in another order; expected pairs on the same images")
        found.setdefault(digest_of(ours) + digest_of(theirs), (ours, theirs))
    kept = [(with_weight(ours, weight), with_weight(theirs, weight)) for ours, theirs in found.values()]
    rows = [ours.rows for ours, _ in kept]
    weights = [weight[row] for row in rows]
    hits = [
        (
            ours.log_probability.argmax(axis=1) == label[ours.rows],
            theirs.log_probability.argmax(axis=1) == label[ours.rows],
        )
        for ours, theirs in kept
    ]
    differences = [
        influence.mean(ours.astype(float) - theirs, share, bottom=-1.0)
        for (ours, theirs), share in zip(hits, weights, strict=True)
    ]
    return _Pairs(rows, hits, weights, differences)
