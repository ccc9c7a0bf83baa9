"""choice: what is set aside to halve learning rates are whole units of every class, from training alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training import choice
from tests import factories

LONG = factories.strategy(learning_rates=((1e-3, 1e-3), (1e-4, 1e-4)), halving_keeps=1)


@given(
    n_units=st.integers(12, 60),
    n_classes=st.integers(1, 4),
    share=st.sampled_from([0.1, 0.2, 0.5]),
    seed=st.integers(0, 9),
)
def test_what_is_set_aside_are_whole_units_of_training_stratified_by_class(
    n_units: int, n_classes: int, share: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    unit = random.permutation(np.repeat(np.arange(n_units), random.integers(1, 4, n_units)))
    label = unit % n_classes
    rows = np.flatnonzero(unit < 0.9 * n_units)
    strategy = LONG.model_copy(update={"halving_share": share})
    aside = choice.set_aside(strategy, rows, label, unit, seed)
    assert np.array_equal(aside, choice.set_aside(strategy, rows, label, unit, seed))
    assert {*aside} < {*rows}
    assert not {*unit[aside]} & {*unit[np.setdiff1d(rows, aside)]}
    n, every = len({*unit[rows]}), round(1 / share)
    assert len({*unit[aside]}) == n // every
    for index in range(n_classes):
        wanted = len({*unit[rows[label[rows] == index]]}) / every
        assert abs(len({*unit[aside[label[aside] == index]]}) - wanted) <= 1


def test_a_short_list_sets_nothing_aside() -> None:
    rows = np.arange(20)
    short = LONG.model_copy(update={"halving_keeps": 2})
    assert len(choice.set_aside(short, rows, rows % 2, rows, 0)) == 0


def test_too_few_units_are_one_line() -> None:
    rows = np.arange(20)
    with pytest.raises(ValueError, match=r"4 training units are too few") as caught:
        choice.set_aside(LONG, rows, rows % 2, rows // 5, 0)
    assert "\n" not in str(caught.value)
