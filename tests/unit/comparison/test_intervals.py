"""Confidence intervals: what must hold for any runs, and the edge cases."""

import numpy as np
import pytest
from scipy import stats

from pipeline.comparison.intervals import Interval, digest_of, distinct, ece_interval, metric_intervals
from pipeline.comparison.metrics import score
from pipeline.comparison.outcomes import Outcomes
from pipeline.comparison.paired import Study
from tests.factories import outcomes_of, outcomes_with, two_strategies


def intervals_of(runs: list[Outcomes], study: Study, n_classes: int) -> dict[str, Interval | None]:
    return metric_intervals(runs, study.label, study.weight, study.unit, n_classes)


def accuracy_of(hits: np.ndarray, weight: np.ndarray | None = None) -> Interval:
    weight = np.ones(len(hits)) if weight is None else weight
    label, unit = np.zeros(len(hits), int), np.arange(len(hits))
    found = metric_intervals([outcomes_with(hits)], label, weight, unit, 2)["accuracy"]
    assert found is not None
    return found


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("n_classes", [2, 4, 12])
def test_intervals_are_of_the_mean_of_metrics_score(n_classes: int, seeds: int):
    runs, _, study = two_strategies(n_classes, seeds)
    found = intervals_of(runs, study, n_classes)
    scores = [score(run, study.label[run.rows], study.weight[run.rows], n_classes) for run in runs]
    assert set(found) == set(scores[0])
    for name, interval in found.items():
        assert interval is not None
        assert interval.value == pytest.approx(np.mean([result[name] or 0.0 for result in scores]), abs=1e-9)
        assert 0 <= interval.low < interval.value < interval.high


def test_identical_runs_count_once():
    runs, _, study = two_strategies(2, 2)
    again = runs[0][np.full(len(runs[0].rows), True)]
    assert again.rows is not runs[0].rows
    assert distinct([runs[0], runs[1], again], digest_of) == runs
    assert intervals_of([runs[0], again], study, 2) == intervals_of(runs[:1], study, 2)


def test_all_right_leaves_room_below_and_all_wrong_above():
    for n in range(1, 100):
        effective = n * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, max(n - 1, 1))) ** 2
        low = float(0.025 ** (1 / effective))  # Clopper and Pearson
        right, wrong = (accuracy_of(np.full(n, is_right)) for is_right in (True, False))
        assert vars(right) == pytest.approx({"value": 1.0, "low": low, "high": 1.0}, abs=1e-9)
        assert vars(wrong) == pytest.approx({"value": 0.0, "low": 0.0, "high": 1 - low}, abs=1e-9)


def test_one_error_of_hardly_any_weight_is_not_taken_for_certainty():
    hits, weight = np.arange(100) > 0, np.where(np.arange(100) > 0, 1.0, 0.001)
    assert accuracy_of(hits, weight).low == pytest.approx(accuracy_of(np.full(100, True)).low, abs=2e-3)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("n_classes", [2, 3, 11])
def test_few_images_of_one_class_give_numbers(n: int, n_classes: int):
    label, weight = np.zeros(n, int), np.full(n, 0.5)
    logits = np.zeros((n, n_classes))
    for answer in (0, 1):
        logits[:, :2] = [[5.0, 0.0], [0.0, 5.0]][answer]
        found = metric_intervals([outcomes_of(logits, label)], label, weight, np.arange(n), n_classes)
        assert found.pop("auroc") is None
        for interval in found.values():
            assert interval is not None
            assert np.isfinite([interval.low, interval.high]).all()
            assert 0 <= interval.low <= interval.value <= interval.high


def test_classes_of_one_image_each_leave_as_much_room_as_there_is_in_all():
    label, said = np.arange(50), np.where(np.arange(50) < 35, np.arange(50), np.arange(50) - 35)
    found = metric_intervals([outcomes_of(np.eye(50)[said], label)], label, np.ones(50), label, 50)
    accuracy, balanced, f1 = (found[name] for name in ("accuracy", "balanced_accuracy", "macro_f1"))
    assert accuracy is not None
    assert balanced is not None
    assert f1 is not None
    assert vars(balanced) == pytest.approx(vars(accuracy), abs=0.005)
    assert f1.high - f1.low > 0.9 * (accuracy.high - accuracy.low)


@pytest.mark.parametrize(("n_classes", "top"), [(2, 1), (3, 2)])
def test_the_brier_score_of_the_sure_and_wrong_is_the_most_there_is(n_classes: int, top: int):
    logits = np.zeros((20, n_classes))
    logits[:, 1] = 50
    label = np.zeros(20, int)
    found = metric_intervals([outcomes_of(logits, label)], label, np.ones(20), np.arange(20), n_classes)["brier"]
    assert found is not None
    assert (found.value, found.high) == pytest.approx((top, top))
    assert found.low == pytest.approx(top * accuracy_of(np.full(20, True)).low)


def test_no_more_than_so_many_images_for_the_ece(monkeypatch: pytest.MonkeyPatch):
    runs, _, study = two_strategies(2, 1)
    monkeypatch.setattr("pipeline.comparison.intervals.MAX_IMAGES_FOR_ECE", 149)
    assert ece_interval(runs, study.label, study.weight, study.unit) is None
    assert intervals_of(runs, study, 2)["ece"] is None


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "macro_f1"])
@pytest.mark.parametrize(("n_classes", "n_each"), [(2, 20), (3, 8), (3, 50), (10, 20)])
def test_predictions_without_an_error_have_an_interval_that_is_near_1(metric: str, n_classes: int, n_each: int):
    label = np.repeat(np.arange(n_classes), n_each)
    perfect = outcomes_of(np.eye(n_classes)[label] * 4.0, label)
    found = metric_intervals([perfect], label, np.ones(len(label)), np.arange(len(label)), n_classes)[metric]
    assert found is not None
    assert (found.value, found.high) == pytest.approx((1, 1))
    assert 1 - 4 / n_each < found.low < 1
