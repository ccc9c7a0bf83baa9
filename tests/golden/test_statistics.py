"""Intervals and tests against published figures, closed forms, scipy and statsmodels."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax, softmax
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from pipeline.comparison import intervals
from pipeline.comparison.influence import Influence, linearise, mean
from pipeline.comparison.intervals import (
    Predictions,
    corrected_t,
    ece_interval,
    gain,
    holm,
    images_needed,
    intervals,
    lower_bound,
)
from pipeline.comparison.metrics import expected_calibration_error
from pipeline.comparison.resampling import sign_flip

N_TRIALS = 2000

Answers = tuple[np.ndarray, np.ndarray, np.ndarray]


def answers(n_classes: int, n: int, key: int = 0) -> Answers:
    """Logits, labels and weights; an image's weight says something of how hard it is."""
    random = np.random.default_rng(key)
    label, weight = random.integers(0, n_classes, n), random.choice([1 / 3, 2 / 3, 1.0], n)
    logits = random.normal(size=(n, n_classes))
    logits[np.arange(n), label] += 2 * weight
    return logits, label, weight


def run_of(hits: np.ndarray, rows: np.ndarray | None = None) -> Predictions:
    """Images of class 0, seen as class 0 or 1."""
    return Predictions(np.arange(len(hits)) if rows is None else rows, np.stack([hits, ~hits], axis=1).astype(float))


def accuracy_interval(runs: list[Predictions], weight: np.ndarray) -> tuple[float, float]:
    found = intervals(runs, np.zeros(len(weight), int), weight)["accuracy"]
    assert found is not None
    return found.low, found.high


def pair(both: int, ours: int, theirs: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits of two strategies with these numbers of images."""
    counts = [both, ours, theirs, neither]
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


def values(logits: np.ndarray, label: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """All of metrics.score that is smooth, the same and sooner (tests/unit/test_statistics.py)."""
    return {name: linear.value for name, linear in linearise(logits, label, weight).items() if linear is not None}


def standard_error(found: Influence | None) -> float:
    assert found is not None
    return float(np.sqrt((found.influence**2).sum()))


@pytest.mark.parametrize(("n_right", "n"), [(0, 7), (1, 7), (85, 100), (170, 200), (655, 656), (1, 1)])
def test_accuracy_with_equal_weights_has_wilsons_interval(n_right: int, n: int):
    expected = np.asarray(proportion_confint(n_right, n, method="wilson")).tolist()
    assert accuracy_interval([run_of(np.arange(n) < n_right)], np.full(n, 0.3)) == pytest.approx(expected, abs=1e-9)


def test_accuracy_over_disjoint_seeds_is_one_accuracy_over_all_images():
    hits = np.random.default_rng(0).random(900) < 0.9
    runs = [run_of(hits[part], part) for part in np.arange(900).reshape(3, 300)]
    once = accuracy_interval([run_of(hits)], np.ones(900))
    assert accuracy_interval(runs, np.ones(900)) == pytest.approx(once, abs=2e-4)  # each with a mean of its own


@pytest.mark.parametrize("n_classes", [2, 4])
def test_influence_is_the_derivative_by_the_weight(n_classes: int):
    n, step = 60, 1e-6
    logits, label, weight = answers(n_classes, n)
    moved = [
        [values(logits, label, weight + sign * step * (np.arange(n) == i)) for i in range(n)] for sign in (1.0, -1.0)
    ]
    size, of_class = np.bincount(label)[label], {"balanced_accuracy", "macro_f1", "auroc"}
    for name, linear in linearise(logits, label, weight).items():
        if name == "auroc" and n_classes > 2:
            continue  # corrected in parts, by class
        derivative = weight * [(up[name] - down[name]) / (2 * step) for up, down in zip(*moved, strict=True)]
        correction = np.sqrt(size / (size - 1)) if name in of_class else np.sqrt(n / (n - 1))
        assert linear is not None
        np.testing.assert_allclose(linear.influence, correction * derivative, atol=1e-7)
        assert np.all(np.abs(derivative) <= (2 if name == "auroc" else 1) * linear.top * linear.share + 1e-7)


@pytest.mark.parametrize("n_classes", [2, 4, 12])
def test_standard_errors_and_widths_are_those_of_a_bootstrap(n_classes: int):
    logits, label, weight = answers(n_classes, 600)
    random = np.random.default_rng(1)
    resampled = [values(logits[i], label[i], weight[i]) for i in random.integers(0, 600, (400, 600))]
    found = intervals([Predictions(np.arange(600), logits)], label, weight)
    for name, linear in linearise(logits, label, weight).items():
        expected, interval = np.std([value[name] for value in resampled], ddof=1), found[name]
        assert standard_error(linear) == pytest.approx(expected, rel=0.15), name
        assert interval is not None
        assert interval.high - interval.low == pytest.approx(2 * 1.96 * expected, rel=0.17), name


def test_auroc_has_delongs_variance():
    # Figures of the R package pROC (its test of var(roc)): 113 patients by the WFNS grade, 1 to 5, and the outcome
    grade = np.repeat([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], [37, 20, 3, 8, 4, 2, 12, 1, 8, 18])
    found = linearise(np.stack([0 * grade, grade], axis=1), np.repeat([0, 1], [72, 41]), np.ones(113))["auroc"]
    assert found is not None
    assert found.value == pytest.approx(0.8236789, abs=1e-7)
    assert standard_error(found) ** 2 == pytest.approx(0.00146991470882363, rel=1e-12)


def test_auroc_of_weighted_images_by_pairs():
    logits, label, weight = answers(2, 80)
    logits = logits.round(1)  # ties
    positive = softmax(logits, axis=1)[:, 1]
    is_right = (positive[label == 1][:, None] > positive[label == 0]) + 0.5 * (
        positive[label == 1][:, None] == positive[label == 0]
    )
    ours, theirs = weight[label == 1] / weight[label == 1].sum(), weight[label == 0] / weight[label == 0].sum()
    area = float(ours @ is_right @ theirs)
    m, n = len(ours), len(theirs)
    variance = m / (m - 1) * ((ours * (is_right @ theirs - area)) ** 2).sum()
    variance += n / (n - 1) * ((theirs * (ours @ is_right - area)) ** 2).sum()
    found = linearise(logits, label, weight)["auroc"]
    assert found is not None
    assert (found.value, standard_error(found) ** 2) == pytest.approx((area, variance))


def test_nll_has_the_normal_interval_of_its_logarithm():
    logits, label, _ = answers(3, 400)
    loss = -log_softmax(logits, axis=1)[np.arange(400), label]
    found = intervals([Predictions(np.arange(400), logits)], label, np.ones(400))["nll"]
    assert found is not None
    with_two = np.append(loss, [0.0, 2 * loss.mean()])
    reach = stats.norm.ppf(0.975) * np.sqrt(with_two.var() / 400) / loss.mean()
    assert (found.value, np.log(found.high / found.value)) == pytest.approx((loss.mean(), reach))
    assert found.low * found.high == pytest.approx(found.value**2)


def test_ece_has_the_basic_bootstrap_interval_of_scipy():
    logits, label, weight = answers(3, 300)
    logits *= 4  # too sure
    probability = softmax(logits, axis=1)

    def ece(drawn: np.ndarray) -> float:
        return expected_calibration_error(probability[drawn], label[drawn], weight[drawn])

    rows = np.arange(300)
    expected = stats.bootstrap(
        (rows,), ece, method="basic", n_resamples=1000, vectorized=False, rng=np.random.default_rng(1)
    ).confidence_interval
    found = ece_interval([Predictions(rows, logits)], label, weight)
    assert found is not None
    assert found.value == pytest.approx(ece(rows))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.005)


def test_the_ece_of_answers_as_often_right_as_confident_may_be_0():
    random, n_covered = np.random.default_rng(5), 0
    for _ in range(200):
        logits = 2 * random.normal(size=(150, 3))
        label = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from the softmax
        found = ece_interval([Predictions(np.arange(150), logits)], label, np.ones(150))
        assert found is not None
        n_covered += found.low == 0
    assert n_covered / 200 == pytest.approx(0.975, abs=0.025)


@pytest.mark.parametrize("counts", [(60, 25, 10, 5), (80, 0, 0, 20), (5, 3, 0, 0), (0, 9, 0, 1)])
def test_gain_has_the_interval_of_agresti_and_min(counts: tuple[int, int, int, int]):
    hits = pair(*counts)
    found = gain([run_of(hits[0])], [run_of(hits[1])], np.zeros(sum(counts), int), np.ones(sum(counts)))
    n, better, worse = sum(counts) + 2, counts[1] + 0.5, counts[2] + 0.5  # half an image more in each of four cells
    half = stats.norm.ppf(0.975) * np.sqrt(better + worse - (better - worse) ** 2 / n) / n
    expected = (better - worse) / n - half, min((better - worse) / n + half, 1.0)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-9)
    assert found.gain == pytest.approx((counts[1] - counts[2]) / sum(counts))


def test_the_interval_of_a_weighted_gain_is_that_of_a_bootstrap():
    random = np.random.default_rng(2)
    ours, theirs, weight = random.random(800) < 0.85, random.random(800) < 0.8, random.choice([1 / 3, 1.0], 800)
    found = gain([run_of(ours)], [run_of(theirs)], np.zeros(800, int), weight)
    drawn = random.integers(0, 800, (4000, 800))
    by_sample = (weight * (ours * 1.0 - theirs))[drawn].sum(axis=1) / weight[drawn].sum(axis=1)
    assert (found.low, found.high) == pytest.approx(np.quantile(by_sample, [0.025, 0.975]), abs=0.004)


@pytest.mark.parametrize("counts", [(60, 25, 10, 5), (10, 3, 3, 0), (80, 0, 0, 20), (0, 1, 0, 0), (500, 90, 60, 6)])
def test_one_run_with_equal_weights_has_the_p_value_of_statsmodels(counts: tuple[int, int, int, int]):
    hits = pair(*counts)
    found = gain([run_of(hits[0])], [run_of(hits[1])], np.zeros(sum(counts), int), np.full(sum(counts), 0.7))
    expected = min(1.0, vars(mcnemar(np.reshape(counts, (2, 2)), exact=True))["pvalue"])
    assert found.p_value == pytest.approx(expected)
    if any(counts[1:3]):
        assert found.p_value == pytest.approx(stats.binomtest(counts[1], counts[1] + counts[2]).pvalue)


def test_flipping_the_signs_of_equal_differences_is_mcnemars_test():
    for better, worse in [(9, 2), (6, 5), (11, 0), (5, 5)]:
        difference = np.repeat([0.01, -0.01, 0.0], [better, worse, 30])
        assert sign_flip(difference) == pytest.approx(stats.binomtest(better, better + worse).pvalue)
    many = np.repeat([0.01, -0.01], [60, 38])
    assert sign_flip(many) == pytest.approx(stats.binomtest(60, 98).pvalue, abs=0.005)


@pytest.mark.parametrize("n", [5, 12, 15])
def test_sign_flips_are_those_of_an_enumeration(n: int):
    difference = np.random.default_rng(n).normal(0.4, 1.0, n)

    def total(sample: np.ndarray, axis: int) -> np.ndarray:
        return np.sum(sample, axis=axis)

    expected = stats.permutation_test(
        (difference,), total, permutation_type="samples", n_resamples=2**n, vectorized=True
    ).pvalue
    assert 0.02 < expected < 0.9
    assert sign_flip(difference) == pytest.approx(expected, abs=1e-9 if n <= 12 else 0.015)


def test_holm_by_hand():
    # Times 4, 3, 2 and 1 from the smallest, never below one before
    assert holm([0.005, 0.04, 0.011, 0.03]) == pytest.approx([0.02, 0.06, 0.033, 0.06])


def test_nadeau_and_bengio_by_hand():
    # Mean 0.02, variance 5e-5; t = 0.02 / sqrt((1/5 + 100/300) 5e-5) = sqrt(15), with four degrees of freedom
    u = np.sqrt(15 / (15 + 4))
    assert corrected_t([0.01, 0.02, 0.03, 0.02, 0.02], 100, 300) == pytest.approx(1 - u * (3 - u**2) / 2)


def test_a_gain_knows_the_sizes_of_test_and_training_part():
    random = np.random.default_rng(3)
    rows = [np.sort(random.permutation(400)[:100]) for _ in range(6)]
    runs = [[run_of(random.random(100) < accuracy, row) for row in rows] for accuracy in (0.9, 0.8)]
    found = gain(runs[0], runs[1], np.zeros(400, int), np.ones(400), n_train=300)
    plain = np.mean(found.by_seed) / np.sqrt(np.var(found.by_seed, ddof=1) / 6)
    corrected = plain * np.sqrt((1 / 6) / (1 / 6 + 100 / 300))
    assert found.corrected_t_p_value == pytest.approx(2 * stats.t.sf(abs(corrected), 5))


# Two strategies that are equally good on average, each with images of its own that it finds hard with every seed
RIGHT = np.array([[0.97, 0.97], [0.95, 0.25], [0.25, 0.95], [0.5, 0.5]])  # kind of image x strategy
SHARE = np.array([0.78, 0.06, 0.06, 0.1])
LIGHT = np.array([2 / 3, 1 / 3, 1 / 3, 1 / 3])  # half of the images weigh this, the others 1


def simulate(random: np.random.Generator, seeds: int, is_weighted: bool) -> tuple[list[list[Predictions]], np.ndarray]:
    """Both strategies' runs on 400 of 1,200 new images a seed, and the images' weights."""
    kind = random.choice(4, 1200, p=SHARE)
    runs: list[list[Predictions]] = [[], []]
    for _ in range(seeds):
        rows = np.sort(random.permutation(1200)[:400])
        hits = random.random((400, 2)) < RIGHT[kind[rows]]
        for which in (0, 1):
            runs[which].append(run_of(hits[:, which], rows))
    return runs, np.where((random.random(1200) < 0.5) & is_weighted, LIGHT[kind], 1.0)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("seeds", [1, 4])
def test_equal_strategies_are_told_apart_as_often_as_announced(seeds: int, is_weighted: bool):
    random, n_trials, label = np.random.default_rng(10 * seeds + is_weighted), N_TRIALS, np.zeros(1200, int)
    mean_weight = SHARE * ((LIGHT + 1) / 2 if is_weighted else 1)
    true_accuracy = mean_weight @ RIGHT[:, 0] / mean_weight.sum()
    found = np.zeros((n_trials, 4))
    for trial in range(n_trials):
        (ours, theirs), weight = simulate(random, seeds, is_weighted)
        result = gain(ours, theirs, label, weight)
        low, high = accuracy_only(ours, weight)
        pooled = np.concatenate([a.logits[:, 0] - b.logits[:, 0] for a, b in zip(ours, theirs, strict=True)])
        p_pooled = stats.binomtest(int((pooled > 0).sum()), max(int(np.abs(pooled).sum()), 1)).pvalue
        is_covered = result.low <= 0 <= result.high, low <= true_accuracy <= high
        found[trial] = result.p_value <= 0.05, *is_covered, p_pooled <= 0.05
    rejected, gain_covered, accuracy_covered, rejected_if_pooled = found.mean(axis=0)
    assert rejected <= 0.065
    assert rejected >= 0.035 or (seeds == 1 and not is_weighted)  # McNemar's exact test may be cautious
    assert 0.935 <= gain_covered <= 0.965
    assert 0.935 <= accuracy_covered <= 0.965
    assert seeds == 1 or rejected_if_pooled > 0.065  # as if the seeds' images were others each time


def accuracy_only(runs: list[Predictions], weight: np.ndarray) -> tuple[float, float]:
    """What `intervals` says of accuracy, without the time that the other metrics take."""
    parts = [mean(run.logits[:, 0] == 1, weight[run.rows]) for run in runs]
    found = statistics._interval(parts, [run.rows for run in runs])
    assert found is not None
    return found.low, found.high


def test_as_many_images_as_needed_decide_with_the_power_promised():
    random = np.random.default_rng(4)
    margin, confidence = 0.03, 0.9

    def pilot(n: int) -> tuple[Predictions, Predictions]:
        kind = random.choice(4, n, p=SHARE)
        hits = random.random((n, 2)) < RIGHT[kind]
        return run_of(hits[:, 0]), run_of(hits[:, 1])

    def of(function: Callable, n: int, *more: float) -> float:
        ours, theirs = pilot(n)
        return function([ours], [theirs], np.zeros(n, int), np.ones(n), *more)

    # A pilot large enough to know the variance and that there is no difference
    needed = of(images_needed, 200_000, margin, confidence)
    is_decided = [of(lower_bound, int(needed), confidence) > -margin for _ in range(1000)]
    assert np.mean(is_decided) == pytest.approx(0.8, abs=0.04)
