"""Paired comparison of two strategies on the same images: intervals, tests, one-sided bounds.

As in intervals.py, what was sampled is the unit. A pair is a run of each of the two strategies with the same seed. From
five seeds on that test on different images, the variance is that over the seeds (Nadeau & Bengio 2003); with fewer it
is that over the test units of these runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats
from statsmodels.stats.multitest import multipletests

from pipeline.comparison import influence, resampling
from pipeline.comparison.influence import Influence
from pipeline.comparison.intervals import CONFIDENCE, PSEUDO_UNITS, digest_of, distinct, spread_of, sum_by, with_weight
from pipeline.comparison.outcomes import Outcomes

MIN_SEEDS_FOR_T = 5
MCNEMAR, SIGN_FLIP, CORRECTED_T = "exact McNemar", "sign-flip permutation by unit", "corrected t over seeds"


@dataclass(frozen=True)
class Study:
    """What all pairs of runs share: label, weight, unit (n_images,) of all images, and `n_train` images per seed.

    `n_train` counts images that train and validate; 0: the variance over seeds is not used.
    """

    label: np.ndarray
    weight: np.ndarray
    unit: np.ndarray
    n_train: float = 0


@dataclass(frozen=True)
class Difference:
    """Accuracy minus that of the baseline, on the same images of the common seeds.

    `by_seed` has one difference per distinct pair of runs, and `seeds` is their number. `method` names the test.
    """

    baseline_accuracy: float
    accuracy: float
    difference: float
    low: float
    high: float
    p_value: float
    method: str
    by_seed: list[float]
    seeds: int


def compare(runs: Sequence[Outcomes], baseline: Sequence[Outcomes], study: Study) -> Difference:
    """The difference from the baseline, its interval and p-value; runs[i] and baseline[i] are of the same images.

    From five seeds on that test on different images: the corrected resampled t-test. Else one distinct pair of runs
    whose units are single images of equal weight is tested by McNemar's exact test (McNemar 1947, "Note on the sampling
    error of the difference between correlated proportions"), everything else by flipping the signs of the units'
    differences. ValueError if two paired runs are of other images.
    """
    pairs = _pairs(runs, baseline, study)
    if (standard_error := pairs.standard_error_over_seeds()) is not None:
        t = -abs(pairs.difference) / standard_error
        method, p_value = CORRECTED_T, float(2 * special.stdtr(len(pairs.rows) - 1, t))
    elif len(pairs.rows) == 1 and np.ptp(pairs.differences[0].share) == 0 and pairs.has_single_images():
        method, p_value = MCNEMAR, exact_mcnemar(pairs.ours[0], pairs.theirs[0])
    else:
        method, p_value = SIGN_FLIP, resampling.sign_flip(pairs.by_unit())
    low, high = (pairs.bound(probability) for probability in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    by_seed = [difference.value for difference in pairs.differences]
    return Difference(
        baseline_accuracy=pairs.accuracy(pairs.theirs),
        accuracy=pairs.accuracy(pairs.ours),
        difference=pairs.difference,
        low=low,
        high=high,
        p_value=p_value,
        method=method,
        by_seed=by_seed,
        seeds=len(by_seed),
    )


def lower_bound(runs: Sequence[Outcomes], others: Sequence[Outcomes], study: Study, confidence: float) -> float:
    """One-sided lower bound of accuracy(runs) - accuracy(others) at this confidence (0 to 1)."""
    return _pairs(runs, others, study).bound(1 - confidence)


def images_needed(
    runs: Sequence[Outcomes],
    others: Sequence[Outcomes],
    study: Study,
    margin: float,
    confidence: float,
    power: float = 0.8,
) -> int | None:
    """Images per seed with which lower_bound would be above -margin with probability `power`.

    Assumes that the observed difference is the true one. None if it is not above -margin: then no number is enough.
    """
    pairs = _pairs(runs, others, study)
    if pairs.difference + margin <= 0:
        return None
    n_images = float(np.mean([len(rows) for rows in pairs.rows]))
    reach = float(special.ndtri(confidence) + special.ndtri(power)) / (pairs.difference + margin)
    return max(1, math.ceil(n_images * pairs.estimate()[1] ** 2 * reach**2))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979, "A simple sequentially rejective multiple test procedure")."""
    return np.asarray(multipletests(p_values, method="holm")[1]).tolist() if len(p_values) else []


def exact_mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Two-sided p-value of which predictions of two strategies are correct, bool (n,) each, on the same images."""
    better, worse = int(np.sum(ours & ~theirs)), int(np.sum(theirs & ~ours))
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


@dataclass(frozen=True)
class _Pairs:
    """Distinct pairs of runs: their rows, which predictions of either strategy are correct, and the differences."""

    study: Study
    rows: list[np.ndarray]
    ours: list[np.ndarray]
    theirs: list[np.ndarray]
    differences: list[Influence]

    @property
    def difference(self) -> float:
        return float(np.mean([difference.value for difference in self.differences]))

    def accuracy(self, is_correct: Sequence[np.ndarray]) -> float:
        return float(np.mean([one.share @ each for one, each in zip(self.differences, is_correct, strict=True)]))

    def has_single_images(self) -> bool:
        return all(len(np.unique(self.study.unit[rows])) == len(rows) for rows in self.rows)

    def by_unit(self) -> np.ndarray:
        """The contribution of each unit to the difference, over all seeds."""
        columns = zip(self.differences, self.ours, self.theirs, strict=True)
        values = [one.share * (ours.astype(float) - theirs) for one, ours, theirs in columns]
        summed = sum_by(values, [self.study.unit[rows] for rows in self.rows])
        return np.where(np.abs(summed) > 1e-14, summed, 0.0)  # shares that cancel leave a rounding error

    def estimate(self) -> tuple[float, float, float]:
        """Centre of the interval, standard error, and degrees of freedom: over seeds, or else over units.

        Over units, with two more units, one in favour of either strategy. A pseudo-unit differs by one of its images
        (Agresti & Min 2005, "Simple improved confidence intervals for comparing matched proportions"), but by at least
        the 0.2 units of intervals.PSEUDO_UNITS, chosen by simulation.
        """
        if (standard_error := self.standard_error_over_seeds()) is not None:
            return self.difference, standard_error, len(self.rows) - 1
        spread = spread_of(self.differences, self.rows, self.study.unit)
        n = spread.n_effective
        centre = n * self.difference / (n + 2)
        pseudo = max((spread.n_units / spread.n_images) ** 2, PSEUDO_UNITS)
        variance = ((n * (spread.variance + self.difference**2) + pseudo) / (n + 2) - centre**2) / (n + 2)
        return centre, math.sqrt(variance), spread.degrees

    def standard_error_over_seeds(self) -> float | None:
        """That of Nadeau & Bengio 2003, "Inference for the generalization error", section 5: splits overlap.

        None with fewer than five seeds, where all differences are the same, and where all seeds test on the same
        images: the variance over seeds then does not contain that of drawing other images.
        """
        seeds = len(self.rows)
        is_redrawn = any(not np.array_equal(rows, self.rows[0]) for rows in self.rows)
        if seeds < MIN_SEEDS_FOR_T or self.study.n_train <= 0 or not is_redrawn:
            return None
        n_test = float(np.mean([len(rows) for rows in self.rows]))
        variance = float(np.var([difference.value for difference in self.differences], ddof=1))
        return math.sqrt((1 / seeds + n_test / self.study.n_train) * variance) if variance > 1e-24 else None

    def bound(self, probability: float) -> float:
        """The value below which the true difference lies with this probability."""
        centre, standard_error, degrees = self.estimate()
        return min(max(centre + float(special.stdtrit(degrees, probability)) * standard_error, -1.0), 1.0)


def _pairs(runs: Sequence[Outcomes], others: Sequence[Outcomes], study: Study) -> _Pairs:
    found = _Pairs(study, [], [], [], [])
    for pair in distinct(zip(runs, others, strict=True), lambda pair: digest_of(pair[0]) + digest_of(pair[1])):
        if not np.array_equal(pair[0].rows, pair[1].rows):
            raise ValueError("two runs are of other images, or in another order; expected pairs on the same images")
        rows = with_weight(pair[0], study.weight).rows
        ours, theirs = (with_weight(run, study.weight).predicted == study.label[rows] for run in pair)
        found.rows.append(rows)
        found.ours.append(ours)
        found.theirs.append(theirs)
        found.differences.append(influence.mean(ours.astype(float) - theirs, study.weight[rows], bottom=-1.0))
    return found
