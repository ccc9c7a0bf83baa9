"""What holds for intervals and paired comparisons of all runs."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.comparison.intervals import Interval, metric_intervals
from pipeline.comparison.outcomes import Outcomes, of_predictions
from pipeline.comparison.paired import Difference, Study, compare, contrast
from pipeline.comparison.resampling import sign_flip
from pipeline.training.runs import Predictions

Answers = tuple[list[Outcomes], list[Outcomes], Study]
few = settings(deadline=None, max_examples=60)


@st.composite
def answers(draw: st.DrawFn) -> Answers:
    """Two strategies' runs, on the same images for each seed, labels, weights and units; classes may be absent."""
    n_classes, n_images, seeds = draw(st.integers(2, 12)), draw(st.integers(1, 25)), draw(st.integers(1, 6))
    label = draw(arrays(np.int64, n_images, elements=st.integers(0, n_classes - 1)))
    weight = draw(arrays(np.float64, n_images, elements=st.sampled_from([0.25, 0.5, 1.0, 3.0])))
    unit = draw(arrays(np.int64, n_images, elements=st.integers(0, n_images - 1)))
    study = Study(label, weight, np.arange(n_images) if draw(st.booleans()) else unit, draw(st.sampled_from([0, 20])))
    runs: list[list[Outcomes]] = [[], []]
    for _ in range(seeds):
        rows = np.array(sorted(draw(st.sets(st.integers(0, n_images - 1), min_size=1))))
        for which in (0, 1):
            logits = draw(arrays(np.float32, (len(rows), n_classes), elements=st.floats(-8, 8, width=32)))
            runs[which].append(of_predictions(Predictions(rows, logits), label))
    return runs[0], runs[1], study


def intervals_of(runs: list[Outcomes], study: Study) -> dict[str, Interval | None]:
    n_classes = runs[0].probability.shape[1]
    return metric_intervals(runs, study.label, study.weight, study.unit, n_classes)


def same(found: dict[str, Interval | None], other: dict[str, Interval | None]) -> None:
    assert set(found) == set(other)
    for name, interval in found.items():
        assert (interval is None) == (other[name] is None)
        if interval is not None:
            assert vars(interval) == pytest.approx(vars(other[name]), rel=1e-6, abs=1e-7), name


def same_difference(found: Difference, other: Difference) -> None:
    assert found.method == other.method
    for name in ("baseline_value", "value", "difference", "low", "high", "p_value", "by_seed"):
        assert getattr(found, name) == pytest.approx(getattr(other, name), rel=1e-6, abs=1e-7), name


@few
@given(answers())
def test_intervals_contain_the_value_and_lie_in_range(given_answers: Answers):
    runs, _, study = given_answers
    for name, interval in intervals_of(runs, study).items():
        if interval is not None:
            top = {"nll": np.inf, "brier": 1 if runs[0].probability.shape[1] == 2 else 2}.get(name, 1)
            assert 0 <= interval.low <= interval.value <= interval.high <= top
            assert np.isfinite(interval.high)


@few
@given(answers())
def test_differences_contain_the_value_and_lie_in_range(given_answers: Answers):
    runs, others, study = given_answers
    found = compare(runs, others, study)
    assert -1 <= found.low <= found.difference + 1e-12
    assert found.difference - 1e-12 <= found.high <= 1
    assert found.low < found.high
    assert found.difference == pytest.approx(found.value - found.baseline_value)
    assert 0 < found.p_value <= 1
    bounds, reverse = contrast(runs, others, study, 0.9, 0.01), contrast(others, runs, study, 0.9, 0.01)
    assert bounds.low < bounds.high
    assert (reverse.difference, reverse.low, reverse.high) == pytest.approx(
        (-found.difference, -bounds.high, -bounds.low)
    )
    assert bounds.units_needed == pytest.approx(reverse.units_needed, abs=1)
    assert bounds.units_needed >= contrast(runs, others, study, 0.9, 0.02).units_needed >= 1


@few
@given(answers(), st.randoms(use_true_random=False))
def test_the_order_of_rows_and_of_runs_changes_nothing(given_answers: Answers, random):
    runs, others, study = given_answers
    order = list(range(len(runs)))
    random.shuffle(order)
    shuffled: list[list[Outcomes]] = [[], []]
    place = list(range(len(study.label)))  # one order for all seeds: equal runs stay equal, and count once
    random.shuffle(place)
    for s in order:
        for to, run in zip(shuffled, (runs[s], others[s]), strict=True):
            to.append(run[np.argsort(np.array(place)[run.rows])])
    same(intervals_of(shuffled[0], study), intervals_of(runs, study))
    mine, theirs = compare(shuffled[0], shuffled[1], study), compare(runs, others, study)
    mine.by_seed.sort()
    theirs.by_seed.sort()
    same_difference(mine, theirs)


@few
@given(answers(), st.floats(0.01, 100))
def test_only_ratios_of_weights_matter(given_answers: Answers, factor: float):
    runs, others, study = given_answers
    scaled = replace(study, weight=factor * study.weight)
    same(intervals_of(runs, scaled), intervals_of(runs, study))
    same_difference(compare(runs, others, scaled), compare(runs, others, study))


@few
@given(answers())
def test_the_other_way_round_the_difference_has_the_other_sign(given_answers: Answers):
    runs, others, study = given_answers
    found, other = compare(runs, others, study), compare(others, runs, study)
    assert (found.difference, found.low, found.high) == pytest.approx(
        (-other.difference, -other.high, -other.low), abs=1e-9
    )
    assert found.p_value == pytest.approx(other.p_value)


@few
@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(-1, 1)), st.randoms(use_true_random=False))
def test_sign_flips_depend_neither_on_order_nor_on_scale_nor_on_what_does_not_differ(difference: np.ndarray, random):
    order = list(range(len(difference)))
    random.shuffle(order)
    found = sign_flip(difference)
    assert 0 < found <= 1
    assert sign_flip(np.append(difference[order], 0.0)) == pytest.approx(found)
    assert sign_flip(-difference) == pytest.approx(found)
