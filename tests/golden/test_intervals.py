"""Metrics' influences and intervals against published figures, closed forms, scipy and statsmodels."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax, softmax
from sklearn.metrics import roc_auc_score, roc_curve
from statsmodels.stats.proportion import proportion_confint

from pipeline.comparison import influence
from pipeline.comparison.details import operating_points
from pipeline.comparison.influence import Influence
from pipeline.comparison.intervals import ece_interval, metric_intervals
from pipeline.comparison.metrics import expected_calibration_error
from pipeline.comparison.outcomes import Outcomes
from tests.factories import FORTY, forty_data, outcomes_of, outcomes_with

Answers = tuple[np.ndarray, np.ndarray, np.ndarray]


def answers(n_classes: int, n: int, key: int = 0) -> Answers:
    """Logits, labels and weights; an image's weight says something of how hard it is."""
    random = np.random.default_rng(key)
    label, weight = random.integers(0, n_classes, n), random.choice([1 / 3, 2 / 3, 1.0], n)
    logits = random.normal(size=(n, n_classes))
    logits[np.arange(n), label] += 2 * weight
    return logits, label, weight


def linearise(logits: np.ndarray, label: np.ndarray, weight: np.ndarray) -> dict[str, Influence | None]:
    return influence.linearise(outcomes_of(logits, label), label, weight, np.arange(len(label)), logits.shape[1])


def accuracy_interval(runs: list[Outcomes], weight: np.ndarray, unit: np.ndarray | None = None) -> tuple[float, float]:
    unit = np.arange(len(weight)) if unit is None else unit
    found = metric_intervals(runs, np.zeros(len(weight), int), weight, unit, 2)["accuracy"]
    assert found is not None
    return found.low, found.high


def values(logits: np.ndarray, label: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """Every smooth metric of metrics.score."""
    return {name: linear.value for name, linear in linearise(logits, label, weight).items() if linear is not None}


def standard_error(found: Influence | None) -> float:
    assert found is not None
    return float(np.sqrt((found.influence**2).sum()))


@pytest.mark.parametrize(("n_right", "n"), [(0, 7), (1, 7), (85, 100), (170, 200), (655, 656), (1, 1)])
def test_accuracy_with_equal_weights_has_the_interval_of_clopper_and_pearson_for_fewer_images(n_right: int, n: int):
    p, size = n_right / n, (stats.norm.ppf(0.975) / stats.t.ppf(0.975, max(n - 1, 1))) ** 2
    with_pseudo = (n * p + 0.1) / (n + 0.2)  # 0.1 images more at either end
    variance = (n * (p * (1 - p) * n / max(n - 1, 1) + p**2) + 0.1) / (n + 0.2) - with_pseudo**2
    size *= n * with_pseudo * (1 - with_pseudo) / variance
    low = stats.beta.ppf(0.025, p * size, size - p * size + 1) if p > 0 else 0.0
    high = stats.beta.ppf(0.975, p * size + 1, size - p * size) if p < 1 else 1.0
    found = accuracy_interval([outcomes_with(np.arange(n) < n_right)], np.full(n, 0.3))
    assert found == pytest.approx((low, high), abs=1e-9)
    exact = np.asarray(proportion_confint(n_right, n, method="beta")).tolist()
    assert found == pytest.approx(exact, abs=0.005 if n > 50 else 1)
    assert found[1] - found[0] >= exact[1] - exact[0]


def test_accuracy_over_disjoint_seeds_is_one_accuracy_over_all_images():
    hits = np.random.default_rng(0).random(900) < 0.9
    runs = [outcomes_with(hits[part], part) for part in np.arange(900).reshape(3, 300)]
    once = accuracy_interval([outcomes_with(hits)], np.ones(900))
    assert accuracy_interval(runs, np.ones(900)) == pytest.approx(once, abs=2e-4)  # each with a mean of its own


@pytest.mark.parametrize("n_classes", [2, 4])
def test_influence_is_the_derivative_by_the_weight(n_classes: int):
    n, step = 60, 1e-6
    logits, label, weight = answers(n_classes, n)
    # Balanced accuracy and macro F1 are moved where every class has two images more, one right, one wrong in all ways
    mean_weight, (actual, predicted) = np.bincount(label, weight) / np.bincount(label), np.indices((n_classes,) * 2)
    more = np.concatenate([logits, np.eye(n_classes)[predicted.ravel()]]), np.append(label, actual.ravel())
    pseudo = (mean_weight[actual] * np.where(actual == predicted, 1, 1 / (n_classes - 1))).ravel()

    def moved(i: int, by: float) -> dict[str, float]:
        changed = weight + by * (np.arange(n) == i)
        with_pseudo = values(*more, np.append(changed, pseudo))
        return values(logits, label, changed) | {name: with_pseudo[name] for name in ("balanced_accuracy", "macro_f1")}

    ups, downs = ([moved(i, by) for i in range(n)] for by in (step, -step))
    size = np.bincount(label)[label]
    for name, linear in linearise(logits, label, weight).items():
        if name == "auroc" and n_classes > 2:
            continue  # corrected in parts, by class
        derivative = weight * [(up[name] - down[name]) / (2 * step) for up, down in zip(ups, downs, strict=True)]
        correction = np.sqrt(size / (size - 1)) if name == "auroc" else 1.0
        if name in ("balanced_accuracy", "macro_f1"):
            correction = np.sqrt((size + 2) / size)
        assert linear is not None
        np.testing.assert_allclose(linear.influence, correction * derivative, atol=1e-7)
        assert np.all(np.abs(derivative) <= (2 if name == "auroc" else 1) * linear.top * linear.share + 1e-7)


@pytest.mark.parametrize("n_classes", [2, 4, 12])
def test_standard_errors_and_widths_are_those_of_a_bootstrap(n_classes: int):
    logits, label, weight = answers(n_classes, 600)
    random = np.random.default_rng(1)
    resampled = [values(logits[i], label[i], weight[i]) for i in random.integers(0, 600, (400, 600))]
    found = metric_intervals([outcomes_of(logits, label)], label, weight, np.arange(600), n_classes)
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
    found = metric_intervals([outcomes_of(logits, label)], label, np.ones(400), np.arange(400), 3)["nll"]
    assert found is not None
    variance = (
        loss.var(ddof=1) + 2 * loss.mean() ** 2 / 400
    ) / 402  # with two images, of no loss and of twice the mean
    reach = stats.t.ppf(0.975, 399) * np.sqrt(variance) / loss.mean()
    assert (found.value, np.log(found.high / found.value)) == pytest.approx((loss.mean(), reach))
    assert found.low * found.high == pytest.approx(found.value**2)


def test_ece_has_the_basic_bootstrap_interval_of_scipy():
    logits, label, weight = answers(3, 300)
    probability = softmax(4 * logits, axis=1)  # too sure

    def ece(drawn: np.ndarray) -> float:
        return expected_calibration_error(probability[drawn], label[drawn], weight[drawn])

    rows = np.arange(300)
    expected = stats.bootstrap(
        (rows,), ece, method="basic", n_resamples=1000, vectorized=False, rng=np.random.default_rng(1)
    ).confidence_interval
    found = ece_interval([outcomes_of(4 * logits, label)], label, weight, rows)
    assert found is not None
    assert found.value == pytest.approx(ece(rows))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.005)


def test_the_ece_of_answers_as_often_right_as_confident_may_be_0():
    random, rows, n_covered = np.random.default_rng(5), np.arange(150), 0
    for _ in range(200):
        logits = 2 * random.normal(size=(150, 3))
        label = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from the softmax
        found = ece_interval([outcomes_of(logits, label)], label, np.ones(150), rows)
        assert found is not None
        n_covered += found.low == 0
    assert n_covered / 200 == pytest.approx(0.975, abs=0.025)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_groups", "rho", "accuracy"),
    [(10, 0.5, 0.95), (33, 0.5, 0.85), pytest.param(66, 0.2, 0.85, marks=pytest.mark.slow)],
)
def test_intervals_cover_the_truth_where_images_come_in_groups(n_groups: int, rho: float, accuracy: float):
    # benchmarks.error_rates has all rows with many studies; this one holds with a probability of 99.9 % at 94 %
    random, n_studies, covered, as_images = np.random.default_rng(0), 200, 0, 0
    for _ in range(n_studies):
        size = np.maximum(1, np.round(10 * random.lognormal(-0.5, 1.0, n_groups))).astype(int)
        share = random.beta(accuracy * (1 - rho) / rho, (1 - accuracy) * (1 - rho) / rho, n_groups)
        unit = np.repeat(np.arange(n_groups), size)
        hits = outcomes_with(random.random(len(unit)) < share[unit])
        low, high = accuracy_interval([hits], np.ones(len(unit)), unit)
        covered += low <= accuracy <= high
        low, high = accuracy_interval([hits], np.ones(len(unit)))
        as_images += low <= accuracy <= high
    assert covered / n_studies > 0.885
    assert as_images / n_studies < 0.85


def test_auroc_of_folds_is_the_mean_of_scikit_learns():
    logits, label, weight = answers(2, 200)
    fold = np.arange(200) % 5
    outcomes = Outcomes(np.arange(200), label, np.zeros(200), logits[:, 1:], fold, np.zeros((200, 0)))
    found = influence.linearise(outcomes, label, weight, np.arange(200), 2)["auroc"]
    areas = [roc_auc_score(label[fold == k], logits[fold == k, 1], sample_weight=weight[fold == k]) for k in range(5)]
    assert found is not None
    assert found.value == pytest.approx(np.average(areas, weights=np.bincount(fold, weight)))


@pytest.mark.parametrize("positive", [0, 1])
def test_operating_points_are_on_scikit_learns_curve(positive: int):
    logits, label, weight = answers(2, 400)
    data = replace(forty_data(), labels=replace(FORTY, label=label, weight=weight), unit=np.arange(400))
    half = np.arange(400) < 200
    val, test = (outcomes_of(logits, label)[mask] for mask in (half, ~half))
    found = operating_points([(val, test)], data, positive)
    assert found is not None
    is_positive, probability = label == positive, softmax(logits, axis=1)[:, positive]
    options = {"drop_intermediate": False}
    fpr, tpr, thresholds = roc_curve(is_positive[half], probability[half], sample_weight=weight[half], **options)
    reached = np.flatnonzero(1 - fpr >= 0.9 - 1e-12)[-1]
    # The lowest threshold with this specificity is just above the next negative
    threshold = found["chosen"]["threshold"]
    assert thresholds[reached + 1] < threshold <= thresholds[reached]
    hit = probability[half] >= threshold
    own = weight[half] * is_positive[half]
    assert (own @ hit) / own.sum() == pytest.approx(tpr[reached])
    for name, cut in (("default", 0.5), ("chosen", threshold)):
        for figure, mask in (("sensitivity", is_positive), ("specificity", ~is_positive)):
            is_right = (probability >= cut) == is_positive
            expected = np.average(is_right[~half & mask], weights=weight[~half & mask])
            assert found[name][figure]["value"] == pytest.approx(expected)
            assert found[name][figure]["low"] < expected < found[name][figure]["high"]
