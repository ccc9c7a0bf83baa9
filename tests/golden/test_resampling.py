"""The sign-flip permutation test against closed forms and scipy."""

import numpy as np
import pytest
from scipy import stats

from pipeline.comparison.resampling import sign_flip


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
