"""Paired comparison of two strategies on the same images: intervals, tests, one-sided bounds.

As in intervals.py, the unit is the image. A pair is a run of each of the two strategies with the same seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

from pipeline.comparison import influence, resampling
from pipeline.comparison.influence import Influence
from pipeline.comparison.intervals import Z, by_image, digest_of, distinct, spread_and_n, with_weight
from pipeline.training.runs import Predictions

MIN_SEEDS_FOR_T = 5


@dataclass(frozen=True)
class Difference:
    """Accuracy minus that of the baseline, on the same images of the common seeds.

    `by_seed` has one difference per distinct pair of runs, and `seeds` is their number. `method`: "exact McNemar" or
    "sign-flip permutation by image". `corrected_t_p_value` is None below five seeds, and where all seeds test on the
    same images: then the variance over seeds does not contain that of drawing other images.
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

    `n_train`: images per seed that train and validate, for the corrected t-test; 0: no such test. One distinct pair of
    runs with equal weights is tested by McNemar's exact test (McNemar 1947, "Note on the sampling error of the
    difference between correlated proportions"), everything else by flipping the signs of the images' differences.
    ValueError if two paired runs are of other images.
    """
    pairs = _pairs(runs, baseline, label, weight)
    if len(pairs.rows) == 1 and np.ptp(pairs.differences[0].share) == 0:
        method, p_value = "exact McNemar", exact_mcnemar(pairs.ours[0], pairs.theirs[0])
    else:
        method, p_value = "sign-flip permutation by image", resampling.sign_flip(pairs.by_image())
    by_seed = [difference.value for difference in pairs.differences]
    n_test = float(np.mean([len(rows) for rows in pairs.rows]))
    is_redrawn = any(not np.array_equal(rows, pairs.rows[0]) for rows in pairs.rows)
    return Difference(
        baseline_accuracy=pairs.accuracy(pairs.theirs),
        accuracy=pairs.accuracy(pairs.ours),
        difference=pairs.difference,
        low=pairs.bound(-Z),
        high=pairs.bound(Z),
        p_value=p_value,
        method=method,
        corrected_t_p_value=corrected_t(by_seed, n_test, n_train) if is_redrawn else None,
        by_seed=by_seed,
        seeds=len(by_seed),
    )


def lower_bound(
    runs: Sequence[Predictions], others: Sequence[Predictions], label: np.ndarray, weight: np.ndarray, confidence: float
) -> float:
    """One-sided lower bound of accuracy(runs) - accuracy(others) at this confidence (0 to 1)."""
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

    Assumes that the observed difference is the true one. None if it is not above -margin: then no number is enough.
    """
    pairs = _pairs(runs, others, label, weight)
    if pairs.difference + margin <= 0:
        return None
    n_images = float(np.mean([len(rows) for rows in pairs.rows]))
    reach = float(stats.norm.ppf(confidence) + stats.norm.ppf(power)) / (pairs.difference + margin)
    return max(1, math.ceil(n_images * pairs.adjusted()[1] * reach**2))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number (Holm 1979, "A simple sequentially rejective multiple test procedure").

    None, for no test, stays None and is not counted.
    """
    known = [value for value in p_values if value is not None]
    corrected = iter(np.asarray(multipletests(known, method="holm")[1]).tolist() if known else [])
    return [None if value is None else next(corrected) for value in p_values]


def exact_mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Two-sided p-value of which predictions of two strategies are correct, bool (n,) each, on the same images."""
    better, worse = int(np.sum(ours & ~theirs)), int(np.sum(theirs & ~ours))
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def corrected_t(by_seed: Sequence[float], n_test: float, n_train: float) -> float | None:
    """Two-sided p-value of the corrected resampled t-test (Nadeau & Bengio 2003, "Inference for the generalization
    error", section 5): the variance over seeds times 1 / seeds + n_test / n_train, since splits overlap.

    None with fewer than five seeds, and where all differences are the same and not 0. `n_train` includes validation,
    which selects.
    """
    if len(by_seed) < MIN_SEEDS_FOR_T or n_train <= 0:
        return None
    seeds, average, variance = len(by_seed), float(np.mean(by_seed)), float(np.var(by_seed, ddof=1))
    if variance < 1e-24:
        return 1.0 if abs(average) < 1e-12 else None
    t = average / math.sqrt((1 / seeds + n_test / n_train) * variance)
    return float(2 * stats.t.sf(abs(t), seeds - 1))


@dataclass(frozen=True)
class _Pairs:
    """Distinct pairs of runs: their rows, which predictions of either strategy are correct, and the differences."""

    rows: list[np.ndarray]
    ours: list[np.ndarray]
    theirs: list[np.ndarray]
    differences: list[Influence]

    @property
    def difference(self) -> float:
        return float(np.mean([difference.value for difference in self.differences]))

    def accuracy(self, is_correct: Sequence[np.ndarray]) -> float:
        return float(np.mean([one.share @ each for one, each in zip(self.differences, is_correct, strict=True)]))

    def by_image(self) -> np.ndarray:
        """The contribution of each image to the difference, over all seeds."""
        columns = zip(self.differences, self.ours, self.theirs, strict=True)
        return by_image([one.share * (ours.astype(float) - theirs) for one, ours, theirs in columns], self.rows)

    def adjusted(self) -> tuple[float, float]:
        """Difference and its variance with two more images of average weight, one in favour of either side.

        Agresti & Min 2005, "Simple improved confidence intervals for comparing matched proportions".
        """
        spread, n = spread_and_n(self.differences, self.rows)
        centre = n * self.difference / (n + 2)
        return centre, ((n * (spread + self.difference**2) + 1) / (n + 2) - centre**2) / (n + 2)

    def bound(self, z: float) -> float:
        centre, variance = self.adjusted()
        return min(max(centre + z * math.sqrt(variance), -1.0), 1.0)


def _pairs(runs: Sequence[Predictions], others: Sequence[Predictions], label: np.ndarray, weight: np.ndarray) -> _Pairs:
    found = _Pairs([], [], [], [])
    for pair in distinct(zip(runs, others, strict=True), lambda pair: digest_of(pair[0]) + digest_of(pair[1])):
        if not np.array_equal(pair[0].rows, pair[1].rows):
            raise ValueError("two runs are of other images, or in another order; expected pairs on the same images")
        rows = with_weight(pair[0], weight).rows
        ours, theirs = (with_weight(run, weight).log_probability.argmax(axis=1) == label[rows] for run in pair)
        found.rows.append(rows)
        found.ours.append(ours)
        found.theirs.append(theirs)
        found.differences.append(influence.mean(ours.astype(float) - theirs, weight[rows], bottom=-1.0))
    return found
