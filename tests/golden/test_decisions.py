"""The rule that recommends holds its error rates: a few rows of benchmarks/decisions.py, with wide (99.9 %) bounds."""

import pytest

from benchmarks.decisions import Case, simulate

N = 300


@pytest.mark.parametrize(
    "case", [Case(300, 0.1, (0.0, 0.0)), Case(100, 0.2, (0.0,) * 3), Case(300, 0.04, (0.0,) * 3, 1, 10)]
)
def test_of_equal_strategies_the_cheapest_is_named_and_in_the_set(case: Case):
    found = simulate(case, N)
    assert found["best in the set"] >= 0.91  # 0.95, less 3.1 standard errors
    assert found["cheapest chosen"] >= 0.91
    assert found["cheapest chosen by the old rule"] < 0.8


@pytest.mark.parametrize("case", [Case(200, 0.04, (-3.01, 0.0)), Case(300, 0.1, (-3.01, 0.0), kind="weighted")])
def test_a_strategy_that_is_worse_by_more_than_the_margin_is_seldom_settled(case: Case):
    found = simulate(case, N)
    assert found["settled wrongly"] <= 0.09  # 0.05, and 3.1 standard errors
    assert found["settled"] > 0.2, "the rule settles what it can"
