"""Paired comparisons: what must hold for any runs, and the edge cases."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.comparison import metrics
from pipeline.comparison.paired import compare, contrast, holm, lower_bound
from tests.factories import ones_study, outcomes_with, two_strategies


def test_identical_pairs_count_once():
    runs, others, study = two_strategies(2, 2)
    again = runs[0][np.arange(len(runs[0].rows))]
    once = compare(runs[:1], others[:1], study)
    assert compare([runs[0], again], [others[0], others[0]], study) == once
    assert once.seeds == 1
    assert len(once.by_seed) == 1


def test_a_baseline_that_is_the_same_with_every_seed_leaves_the_pairs_distinct():
    runs, others, study = two_strategies(2, 1)
    other = replace(runs[0], predicted=runs[0].predicted[::-1])
    assert compare([runs[0], other], [others[0]] * 2, study).seeds == 2


def test_the_same_answers_to_the_same_images_with_another_seed_are_no_more_evidence():
    runs, others, study = two_strategies(3, 1)
    louder = [replace(run, true_log_probability=2 * run.true_log_probability) for run in runs]  # the same answers
    once, twice = compare(runs, others, study), compare(runs + louder, others * 2, study)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    assert twice.p_value == pytest.approx(once.p_value)
    assert twice.seeds == 2


def test_runs_of_other_images_are_refused():
    runs, others, study = two_strategies(2, 2)
    with pytest.raises(ValueError, match="other images"):
        compare(runs, others[::-1], study)


@pytest.mark.parametrize("n_images", [1, 2, 20])
def test_no_difference_is_0_with_p_1_and_a_finite_interval(n_images: int):
    runs = [outcomes_with(np.arange(n_images) % 3 > 0)] * 2
    found = compare(runs, runs, ones_study(n_images))
    assert (found.difference, found.p_value) == (0, 1)
    assert -1 <= found.low < 0 < found.high <= 1
    assert n_images < 20 or found.high < 0.3


def test_always_better_is_a_difference_of_1():
    found = compare([outcomes_with(np.full(30, True))], [outcomes_with(np.full(30, False))], ones_study(30))
    assert (found.difference, found.value, found.baseline_value, found.high) == pytest.approx((1, 1, 0, 1))
    assert found.low > 0.8
    assert found.p_value == pytest.approx(2**-29)


def test_the_method_depends_on_seeds_weights_and_units():
    runs, others, study = two_strategies(2, 5)
    same = replace(study, weight=np.full(400, 0.4), n_train=10)
    found = [
        compare(runs[:n], others[:n], of)
        for n, of in (
            (1, same),
            (1, study),
            (1, replace(same, unit=np.arange(400) // 2)),  # some unit is two images of the test split
            (2, same),
            (4, same),
            (5, same),
            (5, replace(same, n_train=0)),
        )
    ]
    flips = "sign-flip permutation by unit"
    assert [result.method for result in found] == [
        *("exact McNemar", flips, flips, flips, flips, "corrected t over seeds", flips)
    ]


def test_units_of_which_each_split_holds_one_image_are_images():
    runs, others, study = two_strategies(2, 1)
    unit = np.arange(400)
    left_out = np.setdiff1d(unit, runs[0].rows)
    unit[left_out] = unit[runs[0].rows[0]]
    same = replace(study, weight=np.ones(400), unit=unit)
    assert compare(runs, others, same) == compare(runs, others, replace(same, unit=np.arange(400)))


def test_images_of_one_unit_are_one_piece_of_evidence():
    better = np.arange(40) % 8 > 0
    runs, others = [outcomes_with(np.full(40, True))], [outcomes_with(better)]
    apart, together = (compare(runs, others, ones_study(40, unit=unit)) for unit in (np.arange(40), np.arange(40) // 8))
    assert (apart.difference, apart.p_value) == (together.difference, together.p_value)  # one wrong image in each
    in_one = compare([outcomes_with(np.arange(40) > 7)], [outcomes_with(np.full(40, True))], ones_study(40))
    as_unit = compare(
        [outcomes_with(np.arange(40) > 7)], [outcomes_with(np.full(40, True))], ones_study(40, unit=np.arange(40) // 8)
    )
    assert in_one.p_value == pytest.approx(2 * 2**-8)
    assert as_unit.p_value == 1  # one unit differs, whichever its sign
    assert as_unit.high > 0 > in_one.high


def test_differences_that_cancel_within_every_unit_are_no_difference():
    ours = np.tile([True, True, True, False, False, False, True], 3)
    theirs = np.tile([False, False, False, True, True, True, True], 3)
    study = ones_study(21, unit=np.arange(21) // 7, weight=np.full(21, 0.1))
    assert compare([outcomes_with(ours)], [outcomes_with(theirs)], study).p_value == 1


@pytest.mark.parametrize("n_units", [1, 2])
def test_one_or_two_units_say_hardly_anything(n_units: int):
    study = ones_study(30, unit=np.arange(30) % n_units)
    found = compare([outcomes_with(np.arange(30) > 2)], [outcomes_with(np.arange(30) > 9)], study)
    assert found.high - found.low > 1
    assert found.p_value >= 0.5


def test_holm():
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_five_seeds_that_differ_by_the_same_are_not_tested_over_seeds():
    rows = [np.arange(start, start + 20) for start in range(0, 100, 20)]
    runs = [outcomes_with(np.full(20, True), row) for row in rows]
    others = [outcomes_with(np.arange(20) > 1, row) for row in rows]
    assert compare(runs, others, ones_study(100, n_train=50)).method == "sign-flip permutation by unit"
    others[0] = outcomes_with(np.arange(20) > 2, rows[0])
    assert compare(runs, others, ones_study(100, n_train=50)).method == "corrected t over seeds"


def test_seeds_that_test_on_the_same_images_do_not_say_what_other_images_would():
    random = np.random.default_rng(0)
    runs, others = ([outcomes_with(random.random(40) < p) for _ in range(5)] for p in (0.9, 0.6))
    assert compare(runs, others, ones_study(40, n_train=50)).method == "sign-flip permutation by unit"


def test_a_bound_is_lower_the_more_confidence_it_has():
    runs, others, study = two_strategies(2, 1)
    bounds = [lower_bound(runs, others, study, confidence) for confidence in (0.5, 0.9, 0.975)]
    found = compare(runs, others, study)
    assert found.difference > bounds[0] > bounds[1] > bounds[2]
    assert bounds[2] == pytest.approx(found.low)


def test_units_needed_are_more_for_smaller_margins_and_more_confidence_and_count_units():
    runs, others, study = two_strategies(2, 1)
    needed = [contrast(runs, others, study, 0.95, margin).units_needed for margin in (0.1, 0.05, 0.01)]
    assert needed[1] == pytest.approx(4 * needed[0], abs=4)
    assert needed[2] == pytest.approx(100 * needed[0], rel=0.02)
    assert contrast(runs, others, study, 0.99, 0.01).units_needed > needed[2]
    in_tens = replace(study, unit=study.unit // 10)
    assert contrast(runs, others, in_tens, 0.95, 0.01).units_needed < needed[2]


def test_identical_runs_need_few_units_but_some():
    runs, _, study = two_strategies(2, 1)
    found = contrast(runs, runs, study, 0.95, 0.02)
    assert found.difference == 0
    assert -0.03 < found.low < 0 < found.high < 0.03
    assert 1 < found.units_needed < 150


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll"])
def test_any_metric_is_compared_by_its_value(metric: str):
    runs, others, study = two_strategies(2, 2)
    found = compare(runs, others, replace(study, metric=metric))
    scores = []
    for these in (runs, others):
        found_in = [metrics.score(run, study.label[run.rows], study.weight[run.rows], 2)[metric] for run in these]
        scores.append(np.mean(np.array(found_in, float)))
    assert (found.value, found.baseline_value) == pytest.approx(tuple(scores))
    assert found.low < found.difference < found.high
    assert (found.difference < 0) == (metric == "nll")
    assert found.p_value < 0.05
