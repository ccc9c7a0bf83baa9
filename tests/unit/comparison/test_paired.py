"""Paired comparisons: what must hold for any runs, and the edge cases."""

import numpy as np
import pytest

from pipeline.comparison.paired import compare, corrected_t, holm, images_needed, lower_bound
from pipeline.training.runs import Predictions
from tests.factories import predictions_with, two_strategies


def test_identical_pairs_count_once():
    runs, others, label, weight = two_strategies(2, 2)
    again = Predictions(runs[0].rows.copy(), runs[0].log_probability.copy())
    once = compare(runs[:1], others[:1], label, weight)
    assert compare([runs[0], again], [others[0], others[0]], label, weight) == once
    assert once.seeds == 1
    assert len(once.by_seed) == 1


def test_a_baseline_that_is_the_same_with_every_seed_leaves_the_pairs_distinct():
    runs, others, label, weight = two_strategies(2, 1)
    other = Predictions(runs[0].rows, runs[0].log_probability[::-1])
    assert compare([runs[0], other], [others[0]] * 2, label, weight).seeds == 2


def test_the_same_answers_to_the_same_images_with_another_seed_are_no_more_evidence():
    runs, others, label, weight = two_strategies(3, 1)
    louder = [Predictions(run.rows, 2 * run.log_probability) for run in runs]  # other logits, the same answers
    once, twice = compare(runs, others, label, weight), compare(runs + louder, others * 2, label, weight)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    assert twice.p_value == pytest.approx(once.p_value)
    assert twice.seeds == 2


def test_runs_of_other_images_are_refused():
    runs, others, label, weight = two_strategies(2, 2)
    with pytest.raises(ValueError, match="other images"):
        compare(runs, others[::-1], label, weight)


def test_an_image_of_weight_zero_is_absent():
    runs, others, label, weight = two_strategies(3, 2)
    weight[::3] = 0
    left, others_left = (
        [Predictions(run.rows[weight[run.rows] > 0], run.log_probability[weight[run.rows] > 0]) for run in strategy]
        for strategy in (runs, others)
    )
    assert compare(runs, others, label, weight) == compare(left, others_left, label, weight)


@pytest.mark.parametrize("n_images", [1, 2, 20])
def test_no_difference_is_0_with_p_1_and_a_finite_interval(n_images: int):
    runs = [predictions_with(np.arange(n_images) % 3 > 0)] * 2
    found = compare(runs, runs, np.zeros(n_images, int), np.ones(n_images))
    assert (found.difference, found.p_value, found.corrected_t_p_value) == (0, 1, None)
    assert -1 < found.low < 0 < found.high < 1


def test_always_better_is_a_difference_of_1():
    label = np.zeros(30, int)
    found = compare([predictions_with(np.full(30, True))], [predictions_with(np.full(30, False))], label, np.ones(30))
    assert (found.difference, found.accuracy, found.baseline_accuracy, found.high) == pytest.approx((1, 1, 0, 1))
    assert found.low > 0.8
    assert found.p_value == pytest.approx(2**-29)


def test_the_method_depends_on_seeds_and_weights():
    runs, others, label, weight = two_strategies(2, 5)
    same = np.full(len(weight), 0.4)
    found = [compare(runs[:n], others[:n], label, w, n_train=10) for n, w in ((1, same), (1, weight), (5, same))]
    assert [result.method for result in found] == ["exact McNemar", *["sign-flip permutation by image"] * 2]
    assert [result.corrected_t_p_value is None for result in found] == [True, True, False]


def test_holm():
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_corrected_t_where_all_seeds_agree():
    assert corrected_t([0.0] * 5, 100, 300) == 1
    assert corrected_t([0.1] * 5, 100, 300) is None
    assert corrected_t([0.1, 0.2, 0.1, 0.2], 100, 300) is None


def test_a_bound_is_lower_the_more_confidence_it_has():
    runs, others, label, weight = two_strategies(2, 1)
    bounds = [lower_bound(runs, others, label, weight, confidence) for confidence in (0.5, 0.9, 0.975)]
    found = compare(runs, others, label, weight)
    assert found.difference > bounds[0] > bounds[1] > bounds[2]
    assert bounds[2] == pytest.approx(found.low)


def test_images_needed_are_more_for_smaller_margins_and_none_for_what_is_worse():
    runs, others, label, weight = two_strategies(2, 3)
    loss = -compare(others, runs, label, weight).difference
    needed = [images_needed(others, runs, label, weight, loss + more, 0.95) for more in (0.1, 0.01, 0.001, 0.0)]
    assert needed[0] is not None
    assert needed[1] == pytest.approx(100 * needed[0], rel=0.02)
    assert needed[2] == pytest.approx(10_000 * needed[0], rel=0.02)
    assert needed[3] is None
    assert images_needed(runs, runs, label, weight, 0.01, 0.95) is not None
