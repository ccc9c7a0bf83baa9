"""statistics: what must hold for any runs, and for the odd ones."""

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from pipeline.comparison.intervals import (
    Interval,
    Predictions,
    corrected_t,
    distinct,
    ece_interval,
    gain,
    holm,
    images_needed,
    intervals,
    lower_bound,
)
from pipeline.comparison.metrics import score
from pipeline.comparison.resampling import sign_flip

Answers = tuple[list[Predictions], list[Predictions], np.ndarray, np.ndarray]


def runs_of(n_classes: int, seeds: int, n_images: int = 400, n_test: int = 150, key: int = 0) -> Answers:
    """A better and a worse strategy on overlapping test images, their labels and their weights."""
    random = np.random.default_rng(key)
    label, weight = random.integers(0, n_classes, n_images), random.choice([1 / 3, 2 / 3, 1.0], n_images)
    rows = [np.sort(random.permutation(n_images)[:n_test]) for _ in range(seeds)]

    def run(row: np.ndarray, strength: float) -> Predictions:
        logits = random.normal(size=(len(row), n_classes))
        logits[np.arange(len(row)), label[row]] += strength
        return Predictions(row, logits.astype(np.float32))

    return [run(row, 2.0) for row in rows], [run(row, 1.0) for row in rows], label, weight


def hits_as_run(hits: np.ndarray) -> Predictions:
    """Images of class 0, seen as class 0 or 1."""
    return Predictions(np.arange(len(hits)), np.where(hits[:, None], [[1.0, 0.0]], [[0.0, 1.0]]))


def accuracy_of(hits: np.ndarray, weight: np.ndarray | None = None) -> Interval:
    n = len(hits)
    found = intervals([hits_as_run(hits)], np.zeros(n, int), np.ones(n) if weight is None else weight)["accuracy"]
    assert found is not None
    return found


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("n_classes", [2, 4, 12])
def test_intervals_are_of_the_mean_of_what_metrics_says(n_classes: int, seeds: int):
    runs, _, label, weight = runs_of(n_classes, seeds)
    found = intervals(runs, label, weight)
    scores = [score(run.logits, label[run.rows], weight[run.rows]) for run in runs]
    assert set(found) == set(scores[0])
    for name, interval in found.items():
        assert interval is not None
        assert interval.value == pytest.approx(np.mean([result[name] or 0.0 for result in scores]), abs=1e-9)
        assert 0 <= interval.low < interval.value < interval.high


def test_identical_runs_count_once():
    runs, others, label, weight = runs_of(2, 2)
    again = Predictions(runs[0].rows.copy(), runs[0].logits.copy())
    assert distinct([runs[0], runs[1], again]) == runs
    assert intervals([runs[0], again], label, weight) == intervals(runs[:1], label, weight)
    once = gain(runs[:1], others[:1], label, weight)
    assert gain([runs[0], again], [others[0], others[0]], label, weight) == once
    assert once.seeds == 1
    assert len(once.by_seed) == 1


def test_a_baseline_that_is_the_same_with_every_seed_leaves_the_pairs_distinct():
    runs, others, label, weight = runs_of(2, 1)
    other = Predictions(runs[0].rows, runs[0].logits[::-1])
    assert gain([runs[0], other], [others[0]] * 2, label, weight).seeds == 2


def test_the_same_answers_to_the_same_images_with_another_seed_are_no_more_evidence():
    runs, others, label, weight = runs_of(3, 1)
    louder = [Predictions(run.rows, 2 * run.logits) for run in runs]  # other logits, the same answers
    once, twice = gain(runs, others, label, weight), gain(runs + louder, others * 2, label, weight)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    assert twice.p_value == pytest.approx(once.p_value)
    assert twice.seeds == 2


def test_gain_is_between_pairs_on_the_same_images():
    runs, others, label, weight = runs_of(2, 2)
    with pytest.raises(ValueError, match="other images"):
        gain(runs, others[::-1], label, weight)


def test_all_right_leaves_room_below_and_all_wrong_above():
    for n in range(1, 100):
        for is_right in (True, False):
            low, high = np.asarray(proportion_confint(n * is_right, n, method="wilson")).tolist()
            assert vars(accuracy_of(np.full(n, is_right))) == pytest.approx(
                {"value": float(is_right), "low": low, "high": high}, abs=1e-9
            )


def test_one_error_of_hardly_any_weight_is_not_taken_for_certainty():
    hits, weight = np.arange(100) > 0, np.where(np.arange(100) > 0, 1.0, 0.001)
    assert accuracy_of(hits, weight).low == pytest.approx(accuracy_of(np.full(100, True)).low, abs=2e-3)


def test_an_image_of_weight_zero_is_absent():
    runs, others, label, weight = runs_of(3, 2)
    weight[::3] = 0
    left, others_left = [
        [Predictions(run.rows[weight[run.rows] > 0], run.logits[weight[run.rows] > 0]) for run in strategy]
        for strategy in (runs, others)
    ]
    assert intervals(runs, label, weight) == intervals(left, label, weight)
    assert gain(runs, others, label, weight) == gain(left, others_left, label, weight)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("n_classes", [2, 3, 11])
def test_few_images_of_one_class_give_numbers(n: int, n_classes: int):
    label, weight = np.zeros(n, int), np.full(n, 0.5)
    logits = np.zeros((n, n_classes))
    for answer in (0, 1):
        logits[:, :2] = [[5.0, 0.0], [0.0, 5.0]][answer]
        found = intervals([Predictions(np.arange(n), logits)], label, weight)
        assert found.pop("auroc") is None
        for interval in found.values():
            assert interval is not None
            assert np.isfinite([interval.low, interval.high]).all()
            assert 0 <= interval.low <= interval.value <= interval.high


def test_classes_of_one_image_each_leave_as_much_room_as_there_is_in_all():
    label, said = np.arange(50), np.where(np.arange(50) < 35, np.arange(50), np.arange(50) - 35)
    found = intervals([Predictions(label, np.eye(50)[said])], label, np.ones(50))
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
    found = intervals([Predictions(np.arange(20), logits)], np.zeros(20, int), np.ones(20))["brier"]
    assert found is not None
    assert (found.value, found.high) == pytest.approx((top, top))
    assert found.low == pytest.approx(top * accuracy_of(np.full(20, True)).low)


@pytest.mark.parametrize("n_images", [1, 2, 20])
def test_no_difference_is_a_gain_of_0_with_p_1_and_a_finite_interval(n_images: int):
    runs = [hits_as_run(np.arange(n_images) % 3 > 0)] * 2
    found = gain(runs, runs, np.zeros(n_images, int), np.ones(n_images))
    assert (found.gain, found.p_value, found.corrected_t_p_value) == (0, 1, None)
    assert -1 < found.low < 0 < found.high < 1


def test_always_better_is_a_gain_of_1():
    label = np.zeros(30, int)
    found = gain([hits_as_run(np.full(30, True))], [hits_as_run(np.full(30, False))], label, np.ones(30))
    assert (found.gain, found.accuracy, found.baseline_accuracy, found.high) == pytest.approx((1, 1, 0, 1))
    assert found.low > 0.8
    assert found.p_value == pytest.approx(2**-29)


def test_the_method_depends_on_seeds_and_weights():
    runs, others, label, weight = runs_of(2, 5)
    same = np.full(len(weight), 0.4)
    found = [gain(runs[:n], others[:n], label, w, n_train=10) for n, w in ((1, same), (1, weight), (5, same))]
    assert [result.method for result in found] == ["exact McNemar", *["sign-flip permutation by image"] * 2]
    assert [result.corrected_t_p_value is None for result in found] == [True, True, False]


def test_permutations_are_never_impossible_and_the_same_every_time():
    difference = np.full(500, 0.002)
    assert sign_flip(difference) == sign_flip(difference) == 1e-4
    assert sign_flip(np.zeros(5)) == 1


def test_no_more_than_so_many_images_for_the_ece(monkeypatch: pytest.MonkeyPatch):
    runs, _, label, weight = runs_of(2, 1)
    monkeypatch.setattr("pipeline.comparison.intervals.MOST_IMAGES_FOR_ECE", 149)
    assert ece_interval(runs, label, weight) is None
    assert intervals(runs, label, weight)["ece"] is None


def test_holm():
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_corrected_t_where_all_seeds_say_the_same():
    assert corrected_t([0.0] * 5, 100, 300) == 1
    assert corrected_t([0.1] * 5, 100, 300) is None
    assert corrected_t([0.1, 0.2, 0.1, 0.2], 100, 300) is None


def test_a_bound_is_lower_the_more_confidence_it_has():
    runs, others, label, weight = runs_of(2, 1)
    bounds = [lower_bound(runs, others, label, weight, confidence) for confidence in (0.5, 0.9, 0.975)]
    found = gain(runs, others, label, weight)
    assert found.gain > bounds[0] > bounds[1] > bounds[2]
    assert bounds[2] == pytest.approx(found.low)


def test_images_needed_are_more_for_smaller_margins_and_none_for_what_is_worse():
    runs, others, label, weight = runs_of(2, 3)
    loss = -gain(others, runs, label, weight).gain
    needed = [images_needed(others, runs, label, weight, loss + more, 0.95) for more in (0.1, 0.01, 0.001, 0.0)]
    assert needed[0] is not None
    assert needed[1] == pytest.approx(100 * needed[0], rel=0.02)
    assert needed[2] == pytest.approx(10_000 * needed[0], rel=0.02)
    assert needed[3] is None
    assert images_needed(runs, runs, label, weight, 0.01, 0.95) is not None
