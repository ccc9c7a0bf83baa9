"""statistics: intervals are those of the textbooks, and cover what they say."""

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from pipeline.statistics import accuracy_interval


def wilson(count: int, n: int) -> np.ndarray:
    return np.array(proportion_confint(count, n, method="wilson"))


def test_unit_weights_and_one_seed_give_the_wilson_interval() -> None:
    hits = np.arange(200) < 170
    found = accuracy_interval([hits], [np.arange(200)], np.ones(200))
    np.testing.assert_allclose(found, wilson(170, 200), atol=1e-3)  # n - 1 for n


@pytest.mark.parametrize("is_right", [True, False])
def test_all_right_or_all_wrong_leaves_room(is_right: bool) -> None:
    for n in range(10, 200):  # whatever the rounding
        found = accuracy_interval([np.full(n, is_right)], [np.arange(n)], np.ones(n))
        np.testing.assert_allclose(found, wilson(n * is_right, n), atol=1e-9)


def test_scale_of_the_weights_does_not_matter_and_zero_weight_is_absence() -> None:
    random = np.random.default_rng(0)
    hits, weight = random.random(300) < 0.8, random.choice([0.0, 0.5, 1.0], 300)
    rows = np.arange(300)
    found = accuracy_interval([hits], [rows], weight)
    np.testing.assert_allclose(accuracy_interval([hits], [rows], 7 * weight), found, rtol=1e-9)
    kept = weight > 0
    np.testing.assert_allclose(accuracy_interval([hits[kept]], [rows[kept]], weight), found, rtol=1e-9)


def test_the_same_answers_on_the_same_images_twice_are_no_more_evidence() -> None:
    hits = np.random.default_rng(1).random(300) < 0.8
    rows = np.arange(300)
    once = accuracy_interval([hits], [rows], np.ones(300))
    np.testing.assert_allclose(accuracy_interval([hits, hits], [rows, rows], np.ones(300)), once, rtol=1e-9)


def test_interval_covers_the_truth_on_overlapping_splits_with_easy_and_hard_images() -> None:
    random, n_covered, n_trials = np.random.default_rng(2), 0, 1500
    for _ in range(n_trials):
        easiness = random.beta(6, 1, 1200)  # the mean is 6 / 7
        weight = random.choice([1 / 3, 2 / 3, 1.0], 1200)
        rows = [random.permutation(1200)[:300] for _ in range(3)]
        low, high = accuracy_interval([random.random(300) < easiness[row] for row in rows], rows, weight)
        n_covered += low <= 6 / 7 <= high
    assert 0.93 < n_covered / n_trials < 0.97
