"""Probes: against scikit-learn, and what must hold for folds, choices and predictions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from pipeline.advice import probes
from pipeline.advice.probes import Sample

STRENGTHS = (3.0, 0.3, 0.03)


def made(n: int = 120, width: int = 8, n_classes: int = 3, seed: int = 0) -> tuple[np.ndarray, Sample]:
    """Features that know the class a little, and weights that differ; every image its own unit."""
    random = np.random.default_rng(seed)
    label = np.arange(n) % n_classes
    x = random.normal(size=(n, width)) + 1.5 * np.eye(n_classes, width)[label]
    return probes.standardize(x), Sample(label, random.choice([0.5, 1.0], n), np.arange(n), n_classes)


@pytest.mark.parametrize("width", [8, 300])  # more images than features, and fewer
def test_heads_are_those_of_scikit_learn(width: int):
    x, sample = made(width=width)
    target, share = np.eye(3)[sample.label], sample.weight / sample.weight.sum()
    centred = x - share @ x
    scale = float((share @ centred**2).mean())
    fits = probes.fit_ridge(x, target.astype(np.float32), sample.weight, STRENGTHS)
    for strength, (weights, offset) in zip(STRENGTHS, fits, strict=True):
        expected = Ridge(alpha=strength * scale).fit(x.astype(float), target, sample_weight=share)
        assert weights == pytest.approx(expected.coef_.T, abs=2e-4)
        assert offset == pytest.approx(expected.intercept_, abs=2e-4)


def test_neighbours_are_those_of_scikit_learn():
    x, sample = made()
    fold = probes.assign_folds(sample, 4)
    sample = Sample(sample.label, np.ones(120), sample.unit, 3)
    found = probes.nearest(x, sample, fold, 7)
    for k in range(4):
        rows = np.flatnonzero(fold != k)
        expected = KNeighborsClassifier(7, algorithm="brute").fit(x[rows], sample.label[rows]).predict(x[fold == k])
        assert (found[fold == k] == expected).all()
    assert (probes.nearest(x, sample, fold, 1000) == probes.nearest(x, sample, fold, 90)).all()


@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(2, 6))
def test_units_stay_whole_and_folds_are_even(seed: int, n_units: int, n_folds: int):
    random = np.random.default_rng(seed)
    unit = np.unique(random.integers(0, n_units, 3 * n_units), return_inverse=True)[1]
    sample = Sample(random.integers(0, 3, len(unit)), np.ones(len(unit)), unit, 3)
    fold = probes.assign_folds(sample, n_folds)
    by_unit = [set(fold[unit == number].tolist()) for number in range(unit.max() + 1)]
    assert all(len(folds) == 1 for folds in by_unit)
    sizes = np.bincount([folds.pop() for folds in by_unit], minlength=min(n_folds, unit.max() + 1))
    assert sizes.max() - sizes.min() <= 1
    assert [*range(len(sizes))] == sorted(set(fold.tolist()))


def test_a_class_is_spread_over_all_folds():
    label = np.array([0] * 45 + [1] * 5)
    fold = probes.assign_folds(Sample(label, np.ones(50), np.arange(50), 2), 5)
    assert sorted(fold[45:].tolist()) == [0, 1, 2, 3, 4]


def test_an_image_is_predicted_without_its_own_label():
    x, sample = made()
    fold = probes.assign_folds(sample, 5)
    before = probes.predict_linear(x, sample, fold, probes.outside(fold), STRENGTHS)
    label = np.where(fold == 2, (sample.label + 1) % 3, sample.label)
    other = Sample(label, sample.weight, sample.unit, 3)
    after = probes.predict_linear(x, other, fold, probes.outside(fold), STRENGTHS)
    assert (before[:, fold == 2] == after[:, fold == 2]).all()
    assert (before != after).any()


def test_the_strength_of_a_fold_is_chosen_by_the_others():
    fold, weight = np.array([0, 0, 1, 1, 2, 2]), np.ones(6)
    hits = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]], bool)
    assert probes.choose(hits, fold, weight).tolist() == [1, 1, 0, 0, 0, 0]  # of equal ones the first


def test_a_class_that_training_lacks_is_never_predicted():
    x, sample = made(n=60)
    label = np.where(sample.label == 2, 0, sample.label)
    label[0] = 2
    lone = Sample(label, sample.weight, sample.unit, 3)
    fold = probes.assign_folds(lone, 5)
    assert probes.linear(x, lone, fold, STRENGTHS)[0] != 2


def test_features_that_do_not_vary_are_no_infinite_ones():
    assert np.isfinite(probes.standardize(np.zeros((5, 3)))).all()
    assert np.isfinite(probes.standardize(np.array([[0.0, 1.0, 5.0], [0.0, 1.0, 6.0]]))).all()
