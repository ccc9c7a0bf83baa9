"""The sign-flip permutation test: the edge cases."""

import numpy as np

from pipeline.comparison.resampling import sign_flip


def test_permutations_are_never_impossible_and_the_same_every_time():
    difference = np.full(500, 0.002)
    assert sign_flip(difference) == sign_flip(difference) == 1e-4
    assert sign_flip(np.zeros(5)) == 1
