"""Paired comparison of two strategies on the same images: intervals, tests, one-sided bounds, sample sizes.

As in intervals.py, what was sampled is the unit. A pair is a run of each of the two strategies with the same seed. From
five seeds on that test on different images, the variance is that over the seeds (Nadeau & Bengio 2003); with fewer it
is that over the test units of these runs. The metric is any of influence.METRICS, linearised: of each unit, the sum of
its images' influences on the difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import special, stats
from statsmodels.stats.multitest import multipletests

from pipeline.comparison import influence, resampling
from pipeline.comparison.influence import Influence
from pipeline.comparison.intervals import CONFIDENCE, PSEUDO_UNITS, Spread, digest_of, distinct, spread_of, sum_by
from pipeline.comparison.outcomes import Outcomes

MIN_SEEDS_FOR_T = 5
CROSS_FITTED = 1.07  # standard error of a cross-fitted difference: folds choose for one another; found by simulation
POWER = 0.8  # with which `units_needed` units show a difference
AT_MARGIN = 1.05  # standard error of a difference that is truly the margin, see contrast; found by simulation
MCNEMAR, SIGN_FLIP, CORRECTED_T = "exact McNemar", "sign-flip permutation by unit", "corrected t over seeds"


@dataclass(frozen=True)
class Study:
    """What all pairs of runs share: label, weight, unit (n_images,) of all images, the metric, `n_train` images a seed.

    `n_train` counts images that train and validate; 0: the variance over seeds is not used.
    """

    label: np.ndarray
    weight: np.ndarray
    unit: np.ndarray
    n_train: float = 0
    metric: str = "accuracy"

    @property
    def n_classes(self) -> int:
        """Every class occurs in the labels of all images."""
        return int(self.label.max()) + 1


@dataclass(frozen=True)
class Difference:
    """The metric minus that of the baseline, on the same images of the common seeds.

    `by_seed` has one difference per distinct pair of runs, and `seeds` is their number. `method` names the test.
    """

    baseline_value: float
    value: float
    difference: float
    low: float
    high: float
    p_value: float
    method: str
    by_seed: list[float]
    seeds: int


@dataclass(frozen=True)
class Contrast:
    """A difference with a one-sided bound on either side, and the number of units that shows a difference `margin`.

    `margin_low`, `margin_high`: bounds by which a difference of the margin is excluded; they lie outside the others.
    """

    difference: float
    low: float
    high: float
    margin_low: float
    margin_high: float
    units_needed: int

    def reversed(self) -> "Contrast":
        """The same with the two strategies exchanged."""
        return Contrast(-self.difference, -self.high, -self.low, -self.margin_high, -self.margin_low, self.units_needed)


def compare(runs: Sequence[Outcomes], baseline: Sequence[Outcomes], study: Study) -> Difference:
    """The difference from the baseline, its interval and p-value; runs[i] and baseline[i] are of the same images.

    From five seeds on that test on different images: the corrected resampled t-test. Else the accuracy of one distinct
    pair of runs whose units are single images of equal weight is tested by McNemar's exact test (McNemar 1947, "Note on
    the sampling error of the difference between correlated proportions"), everything else by flipping the signs of the
    units' contributions. ValueError if two paired runs are of other images, or the metric is undefined for one.
    """
    pairs = _pairs(runs, baseline, study)
    if pairs.standard_error_over_seeds is not None:
        t = -abs(pairs.difference) / pairs.standard_error_over_seeds
        method, p_value = CORRECTED_T, float(2 * special.stdtr(len(pairs.rows) - 1, t))
    elif len(pairs.rows) == 1 and study.metric == "accuracy" and pairs.has_equal_single_images():
        is_correct = (one.predicted == study.label[one.rows] for one in pairs.first)
        method, p_value = MCNEMAR, exact_mcnemar(*is_correct)
    else:
        method, p_value = SIGN_FLIP, resampling.sign_flip(pairs.by_unit())
    low, high = (pairs.bound(probability) for probability in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    ours, theirs = (float(np.mean([one.value for one in these])) for these in (pairs.ours, pairs.theirs))
    by_seed = [difference.value for difference in pairs.differences]
    return Difference(theirs, ours, pairs.difference, low, high, p_value, method, by_seed, len(by_seed))


def lower_bound(runs: Sequence[Outcomes], others: Sequence[Outcomes], study: Study, confidence: float) -> float:
    """One-sided lower bound of metric(runs) - metric(others) at this confidence (0 to 1)."""
    return _pairs(runs, others, study).bound(1 - confidence)


def contrast(
    runs: Sequence[Outcomes], others: Sequence[Outcomes], study: Study, confidence: float, margin: float
) -> Contrast:
    """The difference, its one-sided bounds at this confidence, and how many units would show a difference `margin`.

    So many units show, with power 0.8, that a strategy which is truly better by `margin` is better. Their number
    depends on how often the two runs differ, not on which of them is ahead. A difference of the margin is excluded with
    the variance that it has at least, as in a score test (Tango 1998, "Equivalence test and confidence interval for the
    difference in proportions for the paired-sample design"): few runs that differ could be luck.
    """
    pairs = _pairs(runs, others, study)
    centre, _, degrees = pairs.estimate()
    quantiles = special.stdtrit(degrees, [confidence, POWER])
    wider = CROSS_FITTED if pairs.is_cross_fitted and pairs.standard_error_over_seeds is None else 1.0
    reach = wider * float(quantiles.sum()) / margin
    needed = pairs.second_moment * pairs.spread.n_units / pairs.spread.n_effective * reach**2
    low, high = pairs.bound(1 - confidence), pairs.bound(confidence)
    at_margin = AT_MARGIN * float(special.ndtri(confidence)) * math.sqrt(margin * pairs.largest_share)
    excluded = min(low, centre - at_margin), max(high, centre + at_margin)
    return Contrast(pairs.difference, low, high, *excluded, max(1, math.ceil(needed)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979, "A simple sequentially rejective multiple test procedure")."""
    return np.asarray(multipletests(p_values, method="holm")[1]).tolist() if len(p_values) else []


def exact_mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Two-sided p-value of which predictions of two strategies are correct, bool (n,) each, on the same images."""
    better, worse = int(np.sum(ours & ~theirs)), int(np.sum(theirs & ~ours))
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


@dataclass(frozen=True)
class _Pairs:
    """Distinct pairs of runs: their rows, the metric of either strategy, and its differences; `first`: one pair."""

    study: Study
    first: tuple[Outcomes, Outcomes]
    rows: list[np.ndarray]
    ours: list[Influence]
    theirs: list[Influence]
    differences: list[Influence]
    is_cross_fitted: bool

    @property
    def difference(self) -> float:
        return float(np.mean([difference.value for difference in self.differences]))

    @cached_property
    def spread(self) -> Spread:
        return spread_of(self.differences, self.rows, self.study.unit)

    @property
    def second_moment(self) -> float:
        """The mean square of a unit's difference, with two more units, one in favour of either strategy.

        A pseudo-unit differs by one of its images (Agresti & Min 2005, "Simple improved confidence intervals for
        comparing matched proportions"), but by at least the 0.2 units of intervals.PSEUDO_UNITS, chosen by simulation.
        """
        n, pseudo = self.spread.n_effective, max((self.spread.n_units / self.spread.n_images) ** 2, PSEUDO_UNITS)
        return (n * (self.spread.variance + self.difference**2) + pseudo) / (n + 2)

    @property
    def largest_share(self) -> float:
        """Of a unit in the metric, over all seeds."""
        shares = [difference.share for difference in self.differences]
        return float(sum_by(shares, [self.study.unit[rows] for rows in self.rows]).max())

    def has_equal_single_images(self) -> bool:
        rows = self.rows[0]
        return np.ptp(self.study.weight[rows]) == 0 and len(np.unique(self.study.unit[rows])) == len(rows)

    def by_unit(self) -> np.ndarray:
        """The contribution of each unit to the difference, over all seeds."""
        values = [one.influence + one.share * one.value for one in self.differences]
        summed = sum_by(values, [self.study.unit[rows] for rows in self.rows])
        return np.where(np.abs(summed) > 1e-14, summed, 0.0)  # shares that cancel leave a rounding error

    def estimate(self) -> tuple[float, float, float]:
        """Centre of the interval, standard error, and degrees of freedom: over seeds, or else over units."""
        if self.standard_error_over_seeds is not None:
            return self.difference, self.standard_error_over_seeds, len(self.rows) - 1
        wider = CROSS_FITTED if self.is_cross_fitted else 1.0
        n = self.spread.n_effective
        centre = n * self.difference / (n + 2)
        variance = (self.second_moment - centre**2) / (n + 2)
        return centre, wider * math.sqrt(variance), self.spread.degrees

    @cached_property
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
        largest = max(one.top for one in self.ours)
        found = centre + float(special.stdtrit(degrees, probability)) * standard_error
        return min(max(found, -largest), largest)


def _pairs(runs: Sequence[Outcomes], others: Sequence[Outcomes], study: Study) -> _Pairs:
    pairs = distinct(zip(runs, others, strict=True), lambda pair: digest_of(pair[0]) + digest_of(pair[1]))
    if not all(np.array_equal(run.rows, other.rows) for run, other in pairs):
        raise ValueError("two runs are of other images, or in another order; expected pairs on the same images")
    ours, theirs = ([_measure(run, study) for run in these] for these in zip(*pairs, strict=True))
    differences = [
        Influence(own.value - other.value, own.influence - other.influence, own.share, own.top)
        for own, other in zip(ours, theirs, strict=True)
    ]
    is_cross_fitted = any(not run.probability.shape[1] and run.fold.any() for run in (*runs, *others))
    return _Pairs(study, pairs[0], [run.rows for run, _ in pairs], ours, theirs, differences, is_cross_fitted)


def _measure(run: Outcomes, study: Study) -> Influence:
    data = study.label[run.rows], study.weight[run.rows], study.unit[run.rows]
    found = influence.of(study.metric, run, *data, study.n_classes)
    if found is None:
        raise ValueError(
            f"params.yaml: compare.metric: {study.metric} is undefined for these predictions (AUROC needs two classes, "
            "and both of them in some fifth of the validation units); choose another metric"
        )
    return found
