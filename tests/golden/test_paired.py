"""Paired comparisons against published figures, closed forms, scipy and statsmodels, and their error rates."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from pipeline.comparison import intervals
from pipeline.comparison.influence import mean
from pipeline.comparison.outcomes import Outcomes
from pipeline.comparison.paired import Study, compare, contrast, holm, lower_bound
from tests.factories import ones_study, outcomes_with

N_TRIALS = 400  # wide bounds below: they hold with a probability of 99.9 % each


def pair(both: int, ours: int, theirs: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits of two strategies with these numbers of images."""
    counts = [both, ours, theirs, neither]
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


@pytest.mark.parametrize("counts", [(60, 25, 10, 5), (80, 0, 0, 20), (5, 3, 0, 0), (0, 9, 0, 1)])
def test_difference_has_the_interval_of_agresti_and_min(counts: tuple[int, int, int, int]):
    hits = pair(*counts)
    found = compare([outcomes_with(hits[0])], [outcomes_with(hits[1])], ones_study(sum(counts)))
    n, better, worse = sum(counts) + 2, counts[1] + 0.5, counts[2] + 0.5  # half an image more in each of four cells
    variance = better + worse - (better - worse) ** 2 / n
    differ = counts[1] + counts[2] - (counts[1] - counts[2]) ** 2 / sum(counts)
    variance += differ / (sum(counts) - 1)  # of a sample, not of a population
    half = stats.t.ppf(0.975, sum(counts) - 1) * np.sqrt(variance) / n
    expected = max((better - worse) / n - half, -1.0), min((better - worse) / n + half, 1.0)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-9)
    assert found.difference == pytest.approx((counts[1] - counts[2]) / sum(counts))


def test_the_interval_of_a_weighted_difference_is_that_of_a_bootstrap():
    random = np.random.default_rng(2)
    ours, theirs, weight = random.random(800) < 0.85, random.random(800) < 0.8, random.choice([1 / 3, 1.0], 800)
    found = compare([outcomes_with(ours)], [outcomes_with(theirs)], ones_study(800, weight=weight))
    drawn = random.integers(0, 800, (4000, 800))
    by_sample = (weight * (ours * 1.0 - theirs))[drawn].sum(axis=1) / weight[drawn].sum(axis=1)
    assert (found.low, found.high) == pytest.approx(np.quantile(by_sample, [0.025, 0.975]), abs=0.004)


@pytest.mark.parametrize("counts", [(60, 25, 10, 5), (10, 3, 3, 0), (80, 0, 0, 20), (0, 1, 0, 0), (500, 90, 60, 6)])
def test_one_run_with_equal_weights_has_the_p_value_of_statsmodels(counts: tuple[int, int, int, int]):
    hits = pair(*counts)
    study = ones_study(sum(counts), weight=np.full(sum(counts), 0.7))
    found = compare([outcomes_with(hits[0])], [outcomes_with(hits[1])], study)
    expected = min(1.0, vars(mcnemar(np.reshape(counts, (2, 2)), exact=True))["pvalue"])
    assert found.p_value == pytest.approx(expected)
    if any(counts[1:3]):
        assert found.p_value == pytest.approx(stats.binomtest(counts[1], counts[1] + counts[2]).pvalue)


def test_holm_by_hand():
    # Times 4, 3, 2 and 1 from the smallest, never below one before
    assert holm([0.005, 0.04, 0.011, 0.03]) == pytest.approx([0.02, 0.06, 0.033, 0.06])


def test_nadeau_and_bengio_by_hand():
    # Mean 0.02, variance 5e-5; t = 0.02 / sqrt((1/5 + 100/300) 5e-5) = sqrt(15), with four degrees of freedom
    rows = np.arange(500).reshape(5, 100)
    ours = [outcomes_with(np.full(100, True), row) for row in rows]
    theirs = [outcomes_with(np.arange(100) >= n, row) for n, row in zip((1, 2, 3, 2, 2), rows, strict=True)]
    u, half = np.sqrt(15 / (15 + 4)), stats.t.ppf(0.975, 4) * np.sqrt((1 / 5 + 100 / 300) * 5e-5)
    found = compare(ours, theirs, ones_study(500, n_train=300))
    assert (found.method, found.by_seed) == ("corrected t over seeds", pytest.approx([0.01, 0.02, 0.03, 0.02, 0.02]))
    assert found.p_value == pytest.approx(1 - u * (3 - u**2) / 2)
    assert (found.low, found.high) == pytest.approx((0.02 - half, 0.02 + half))
    bound = lower_bound(ours, theirs, ones_study(500, n_train=300), 0.95)
    assert bound == pytest.approx(0.02 - stats.t.ppf(0.95, 4) * np.sqrt((1 / 5 + 100 / 300) * 5e-5))
    four = compare(ours[:4], theirs[:4], ones_study(500, n_train=300))
    assert four.method == "sign-flip permutation by unit"


# Two strategies that are equally good on average, each with images of its own that it finds hard with every seed
RIGHT = np.array([[0.97, 0.97], [0.95, 0.25], [0.25, 0.95], [0.5, 0.5]])  # kind of image x strategy
SHARE = np.array([0.78, 0.06, 0.06, 0.1])
LIGHT = np.array([2 / 3, 1 / 3, 1 / 3, 1 / 3])  # half of the images weigh this, the others 1


def simulate(random: np.random.Generator, seeds: int, is_weighted: bool) -> tuple[list[list[Outcomes]], np.ndarray]:
    """Both strategies' runs on 400 of 1,200 new images a seed, and the images' weights."""
    kind = random.choice(4, 1200, p=SHARE)
    runs: list[list[Outcomes]] = [[], []]
    for _ in range(seeds):
        rows = np.sort(random.permutation(1200)[:400])
        hits = random.random((400, 2)) < RIGHT[kind[rows]]
        for which in (0, 1):
            runs[which].append(outcomes_with(hits[:, which], rows))
    return runs, np.where((random.random(1200) < 0.5) & is_weighted, LIGHT[kind], 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "is_weighted"), [(1, False), (1, True), (4, False), pytest.param(4, True, marks=pytest.mark.slow)]
)
def test_equal_strategies_are_distinguished_as_often_as_announced(seeds: int, is_weighted: bool):
    random, n_trials = np.random.default_rng(10 * seeds + is_weighted), N_TRIALS
    mean_weight = SHARE * ((LIGHT + 1) / 2 if is_weighted else 1)
    true_accuracy = mean_weight @ RIGHT[:, 0] / mean_weight.sum()
    found = np.zeros((n_trials, 4))
    for trial in range(n_trials):
        (ours, theirs), weight = simulate(random, seeds, is_weighted)
        result = compare(ours, theirs, ones_study(1200, weight=weight))
        low, high = accuracy_only(ours, weight)
        pooled = np.concatenate([b.predicted.astype(float) - a.predicted for a, b in zip(ours, theirs, strict=True)])
        p_pooled = stats.binomtest(int((pooled > 0).sum()), max(int(np.abs(pooled).sum()), 1)).pvalue
        is_covered = result.low <= 0 <= result.high, low <= true_accuracy <= high
        found[trial] = result.p_value <= 0.05, *is_covered, p_pooled <= 0.05
    rejected, difference_covered, accuracy_covered, rejected_if_pooled = found.mean(axis=0)
    assert rejected <= 0.086
    assert rejected >= 0.014 or (seeds == 1 and not is_weighted)  # McNemar's exact test may be cautious
    assert 0.914 <= difference_covered <= 0.986
    assert 0.914 <= accuracy_covered <= 0.986
    assert seeds == 1 or rejected_if_pooled > rejected  # as if the seeds' images were others each time


def accuracy_only(runs: list[Outcomes], weight: np.ndarray) -> tuple[float, float]:
    """The interval of accuracy as in metric_intervals, without the time that the other metrics take."""
    by_run = [mean(run.predicted == 0, weight[run.rows]) for run in runs]
    found = intervals.interval(by_run, [run.rows for run in runs], np.arange(len(weight)))
    assert found is not None
    return found.low, found.high


def test_as_many_units_as_needed_show_a_difference_of_the_margin_with_the_power_promised():
    random = np.random.default_rng(4)
    margin, confidence, n_discordant = 0.04, 0.9, 0.1

    def drawn(n: int, ahead: float) -> tuple[list[Outcomes], list[Outcomes], Study]:
        kind = random.choice(3, n, p=[(n_discordant + ahead) / 2, (n_discordant - ahead) / 2, 1 - n_discordant])
        return [outcomes_with(kind != 1)], [outcomes_with(kind != 0)], ones_study(n)

    # A pilot large enough to know how often the two differ; it does not matter which is ahead
    needed = contrast(*drawn(200_000, 0.0), confidence, margin).units_needed
    assert contrast(*drawn(200_000, 0.05), confidence, margin).units_needed == pytest.approx(needed, rel=0.03)
    is_shown = [contrast(*drawn(needed, margin), confidence, margin).low > 0 for _ in range(1000)]
    assert np.mean(is_shown) == pytest.approx(0.8, abs=0.05)
