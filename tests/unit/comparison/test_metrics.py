"""Metrics by hand, and what must hold for all logits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax

from pipeline.comparison.influence import is_among_top
from pipeline.comparison.metrics import bin_of, confusion, expected_calibration_error, per_class, reliability
from pipeline.comparison.metrics import score as score_outcomes
from pipeline.training.calibration import temperature
from tests.factories import outcomes_of

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def score(logits: np.ndarray, label: np.ndarray, weight: np.ndarray) -> dict[str, float | None]:
    return score_outcomes(outcomes_of(logits, label), label, weight, logits.shape[1])


def score_of(probability: list[list[float]], label: list[int], weight: list[float]) -> dict[str, float | None]:
    return score(np.log(probability), np.array(label), np.array(weight))


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """Logits, labels in which every class occurs, and integer weights."""
    n_classes = draw(st.integers(2, 4))
    n = draw(st.integers(n_classes, 20))
    logits = draw(arrays(np.float32, (n, n_classes), elements=st.floats(-6, 6, width=32)))
    label = [*range(n_classes), *draw(st.lists(st.integers(0, n_classes - 1), min_size=n, max_size=n))][:n]
    weight = draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
    return logits, np.array(label), np.array(weight, float)


@settings(deadline=None, max_examples=50)
@given(rows(), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(given_rows: Rows, random):
    order = list(range(len(given_rows[0])))
    random.shuffle(order)
    logits, label, weight = (column[order] for column in given_rows)
    assert score(logits, label, weight) == pytest.approx(score(*given_rows), abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(rows())
def test_a_weight_of_k_is_a_row_that_occurs_k_times(given_rows: Rows):
    times = given_rows[2].astype(int)
    logits, label, weight = (np.repeat(column, times, axis=0) for column in given_rows)
    assert score(logits, label, np.ones_like(weight)) == pytest.approx(score(*given_rows), abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(rows(), st.floats(0.01, 100))
def test_only_ratios_of_weights_matter(given_rows: Rows, factor: float):
    logits, label, weight = given_rows
    assert score(logits, label, factor * weight) == pytest.approx(score(*given_rows), abs=1e-9)


def test_correct_and_certain_predictions_have_the_best_scores():
    found = score(np.array([[50.0, -50.0], [-50.0, 50.0]]), np.array([0, 1]), np.ones(2))
    best = {"accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1, "auroc": 1, "nll": 0, "brier": 0, "ece": 0}
    assert found == pytest.approx(best, abs=1e-12)


def test_logits_of_any_size_give_finite_metrics():
    found = score(np.array([[1e4, -1e4], [1e4, -1e4]], np.float32), np.array([0, 1]), np.ones(2))
    assert found["nll"] == 1e4
    assert found["accuracy"] == 0.5


def test_metrics_are_plain_numbers_that_json_can_hold():
    found = score(np.zeros((4, 2), np.float32), np.array([0, 1, 0, 1]), np.ones(4, np.float32))
    assert {type(value) for value in found.values()} == {float}


def test_accuracy_recall_and_f1_by_hand():
    found = score_of([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], [0, 0, 1, 1], [1, 1, 1, 3])
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["balanced_accuracy"] == pytest.approx((2 / 2 + 1 / 4) / 2)
    assert found["macro_f1"] == pytest.approx((2 * 2 / (2 * 2 + 3) + 2 * 1 / (2 * 1 + 3)) / 2)


def test_balanced_accuracy_is_over_the_classes_that_occur():
    found = score_of([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]], [0, 1, 1], [1, 1, 1])
    assert found["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)


def test_nll_by_hand_is_in_nats_and_weighted():
    found = score_of([[0.5, 0.5], [0.2, 0.8]], [0, 0], [3, 1])
    assert found["nll"] == pytest.approx((3 * np.log(2) + np.log(5)) / 4)


def test_brier_by_hand():
    two = [[0.2, 0.8], [0.7, 0.3], [0.4, 0.6]]
    assert score_of(two, [1, 0, 0], [1, 1, 1])["brier"] == pytest.approx((0.04 + 0.09 + 0.36) / 3)
    assert score_of(two, [1, 0, 0], [1, 2, 1])["brier"] == pytest.approx((0.04 + 0.18 + 0.36) / 4)
    three = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]
    assert score_of(three, [0, 1], [1, 1])["brier"] == pytest.approx((0.38 + 1.46) / 2)


def test_ece_by_hand():
    # Bins of 1/15: 0.95 and 0.85 are alone in theirs, 0.65 and 0.62 share one
    probability, label = [[0.95, 0.05], [0.15, 0.85], [0.35, 0.65], [0.62, 0.38]], [0, 0, 1, 1]
    assert score_of(probability, label, [1, 1, 1, 1])["ece"] == pytest.approx((0.05 + 0.85 + (0.62 - 0.35)) / 4)
    weighted = (2 * 0.05 + 0.85 + (4 * 0.62 - 0.35)) / 8
    assert score_of(probability, label, [2, 1, 1, 4])["ece"] == pytest.approx(weighted)


def test_a_confidence_on_a_border_falls_into_the_lower_bin():
    assert bin_of(np.array([0.55, 0.6, 0.61, 1.0, 0.0])).tolist() == [8, 8, 9, 14, 0]
    probability, label = np.array([[0.59, 0.41], [0.55, 0.45], [1.0, 1e-300]]), np.array([0, 1, 0])
    expected = (0.55 - 0.41) / 3  # the first two share a bin
    assert expected_calibration_error(probability, label, np.ones(3)) == pytest.approx(expected)


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    found = score_of([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.3, 0.7]], [0, 0, 1, 1], [1, 2, 1, 3])
    # Pairs weigh the product of their weights; a tie is half
    assert found["auroc"] == pytest.approx((1 * 1 + 1 * 3 + 2 * 1 / 2 + 2 * 3) / (3 * 4))


@pytest.mark.parametrize("n_classes", [2, 4])
def test_auroc_is_none_where_a_class_does_not_occur(n_classes: int):
    logits = np.random.default_rng(0).normal(size=(6, n_classes))
    found = score(logits, np.array([0, 0, 0, 0, 0, n_classes - 2]), np.ones(6))
    assert found.pop("auroc") is None
    assert all(value is not None and np.isfinite(value) for value in found.values())


def test_reliability_by_hand():
    # The bins of test_ece_by_hand
    probability, label = [[0.95, 0.05], [0.15, 0.85], [0.35, 0.65], [0.62, 0.38]], [0, 0, 1, 1]
    found = reliability(np.array(probability), np.array(label), np.array([2.0, 1.0, 1.0, 4.0]))
    filled = {index: row for index, row in enumerate(found) if row["weight"]}
    assert len(found) == 15
    assert filled == {
        9: pytest.approx({"confidence": (0.65 + 4 * 0.62) / 5, "accuracy": 1 / 5, "weight": 5 / 8}),
        12: pytest.approx({"confidence": 0.85, "accuracy": 0.0, "weight": 1 / 8}),
        14: pytest.approx({"confidence": 0.95, "accuracy": 1.0, "weight": 2 / 8}),
    }
    assert found[0] == {"confidence": None, "accuracy": None, "weight": 0.0}


@settings(deadline=None, max_examples=50)
@given(rows())
def test_the_ece_is_the_gap_of_the_reliability_bins(given_rows: Rows):
    logits, label, weight = given_rows
    gaps = [
        row["weight"] * abs(row["accuracy"] - row["confidence"])
        for row in reliability(softmax(logits.astype(float), axis=1), label, weight)
        if row["weight"] and row["accuracy"] is not None and row["confidence"] is not None
    ]
    assert sum(gaps) == pytest.approx(score(*given_rows)["ece"], abs=1e-9)


def test_top_5_is_there_above_ten_classes_and_a_tie_goes_to_the_lower_class():
    logits = np.zeros((11, 11))
    np.testing.assert_array_equal(is_among_top(logits, np.arange(11), 5), np.arange(11) < 5)
    np.testing.assert_array_equal(is_among_top(logits, np.arange(11), 1), logits.argmax(axis=1) == np.arange(11))
    assert score(logits, np.arange(11), np.ones(11))["top5_accuracy"] == pytest.approx(5 / 11)
    assert "top5_accuracy" not in score(logits[:10, :10], np.arange(10), np.ones(10))


def test_classes_and_confusion_by_hand():
    predicted, label = np.array([0, 0, 1, 0]), np.array([0, 0, 1, 1])
    assert confusion(predicted, label, 2).tolist() == [[2, 0], [1, 1]]
    found = per_class(predicted, label, np.array([1.0, 1.0, 1.0, 3.0]), 2)
    expected = {"precision": [2 / 5, 1], "recall": [1, 1 / 4], "f1": [4 / 7, 2 / 5], "support": [2, 2]}
    assert {name: values.tolist() for name, values in found.items()} == {
        name: pytest.approx(values) for name, values in expected.items()
    }


def test_a_class_that_neither_occurs_nor_is_predicted_has_zeros():
    predicted = np.array([0])
    found = per_class(predicted, np.array([0]), np.ones(1), 3)
    assert {name: values[2] for name, values in found.items()} == dict.fromkeys(found, 0)
    assert confusion(predicted, np.array([0]), 3).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


@settings(deadline=None, max_examples=50)
@given(rows())
def test_the_temperature_is_within_bounds_and_never_raises_the_nll(given_rows: Rows):
    logits, label, weight = given_rows
    found = temperature(*given_rows)
    assert 0.05 <= found <= 20
    before, after = (score(scaled, label, weight)["nll"] for scaled in (logits, logits / found))
    assert after is not None
    assert before is not None
    assert after <= before + 1e-6


def test_nothing_is_scaled_where_all_are_correct():
    logits = np.array([[3.0, 0.0], [0.0, 1.0], [5.0, 0.0]])
    assert temperature(logits, np.array([0, 1, 0]), np.ones(3)) == 1
    assert temperature(logits, np.array([0, 1, 1]), np.array([1.0, 1.0, 0.0])) == 1
    assert temperature(logits, np.array([0, 1, 1]), np.ones(3)) > 1
