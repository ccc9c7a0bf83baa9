"""halving: how many are trained, who survives, what a budget changes, and the rule that proposes one."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tools import halving
from pipeline.tools.halving import FINALISTS

COUNTS = st.integers(1, 40)
EPOCHS = st.integers(1, 64)


@dataclass(frozen=True)
class Trained:
    """The candidate number `candidate`, trained for so many epochs."""

    candidate: int
    epochs: int
    nll: float


def run(
    losses: Sequence[float], epochs: Sequence[int], may_enter: Callable[[list[int], int], bool] = lambda *_: True
) -> tuple[list[tuple[int, dict[int, Trained]]], list[Trained]]:
    """The rungs, and all trainings in the order in which they ran; a candidate's loss is the same in every rung."""
    trained = []

    def train(candidate: int, length: int) -> Trained:
        trained.append(Trained(candidate, length, losses[candidate]))
        return trained[-1]

    return list(halving.halve(range(len(losses)), epochs, train, may_enter)), trained


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40), EPOCHS, st.integers(1, 4))
def test_each_rung_keeps_the_better_half_and_trains_it_twice_as_long(
    losses: list[float], epochs: int, shortest: int
) -> None:
    lengths = halving.epochs_by_rung(len(losses), epochs, shortest)
    rungs, trained = run(losses, lengths)
    assert [length for length, _ in rungs] == lengths, "without a budget, none is skipped"
    assert lengths[-1] == epochs
    assert all(-(-after // 2) == before for before, after in itertools.pairwise(lengths))
    assert all(length >= min(shortest, epochs) for length in lengths)
    sizes = [len(results) for _, results in rungs]
    assert sizes[0] == len(losses)
    assert all(after == max(FINALISTS, -(-n // 2)) for n, after in itertools.pairwise(sizes))
    assert len(trained) == sum(sizes) == len({(one.candidate, one.epochs) for one in trained})
    for (_, before), (_, after) in itertools.pairwise(rungs):
        worst = max(before[number].nll for number in after)
        assert all(one.nll >= worst for number, one in before.items() if number not in after)
    assert all(list(results) == sorted(results) for _, results in rungs), "the cheapest first"


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40), EPOCHS)
def test_best_is_a_finalist_where_all_rungs_agree(losses: list[float], epochs: int) -> None:
    rungs, _ = run(losses, halving.epochs_by_rung(len(losses), epochs, 1))
    _, finalists = rungs[-1]
    assert losses.index(min(losses)) in finalists


@given(st.permutations(range(32)))
def test_two_finalists_are_left_where_the_epochs_suffice(losses: list[int]) -> None:
    lengths = halving.epochs_by_rung(32, 64, 1)
    rungs, _ = run(losses, lengths)
    assert lengths == [4, 8, 16, 32, 64]
    assert [len(results) for _, results in rungs] == [32, 16, 8, 4, 2]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40), EPOCHS, st.sets(st.integers(0, 39)))
def test_a_budget_drops_candidates_and_changes_no_training_of_the_others(
    losses: list[float], epochs: int, refused: set[int]
) -> None:
    lengths = halving.epochs_by_rung(len(losses), epochs, 1)
    rungs, trained = run(losses, lengths, lambda _, new: new not in refused)
    entered = set(rungs[0][1])
    assert entered >= {*range(len(losses))} - refused
    assert len(entered) >= min(FINALISTS, len(losses))
    assert set(trained[: len(entered)]) == {Trained(each, lengths[0], losses[each]) for each in entered}
    assert {one.epochs for one in trained} <= set(lengths), "the epochs do not depend on the budget"
    assert rungs[-1][0] == epochs, "finalists are trained as long as without a budget"
    best = min(entered, key=lambda each: (losses[each], each))
    assert best in rungs[-1][1]
    sizes = halving.rung_sizes(len(entered), len(lengths))
    assert [len(results) for _, results in rungs] == [n for n in sizes if n]
    if len(lengths) > 1:
        assert len(trained) == sum(sizes)


def test_a_rung_that_would_drop_none_is_skipped() -> None:
    rungs, trained = run([3, 2, 1, 0, 4, 5, 6, 7], [2, 4, 8], lambda _, new: new == 4)
    assert [(length, list(results)) for length, results in rungs] == [(2, [0, 4]), (8, [0, 4])]
    assert len(trained) == 4


@given(COUNTS)
def test_candidates_enter_in_an_order_that_spreads_over_them(n: int) -> None:
    entered: list[int] = []
    _, trained = run([0.0] * n, [1], lambda before, _: entered.extend(before[-1:]) is None)
    order = [one.candidate for one in trained[:n]]
    assert order[0] == 0
    assert sorted(order) == [*range(n)]
    for k in range(1, n + 1):
        gaps = [b - a for a, b in zip(sorted(order[:k]), [*sorted(order[:k])[1:], n], strict=True)]
        assert max(gaps) <= 4 * n / k


@given(COUNTS, COUNTS)
def test_spread_keeps_the_first_and_even_distances(n: int, n_kept: int) -> None:
    kept = halving.spread(range(n), n_kept)
    assert len(kept) == min(n, n_kept)
    assert kept[0] == 0
    distances = {b - a for a, b in itertools.pairwise(kept)}
    assert not distances or max(distances) - min(distances) <= 1
    assert n - kept[-1] <= n // len(kept) + 1


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20, unique=True), EPOCHS)
def test_later_rungs_are_estimated_by_the_dearest_candidates(costs: list[int], epochs: int) -> None:
    lengths = halving.epochs_by_rung(len(costs), epochs, 1)
    expected = halving.dearest(costs, lengths, lambda one, length: one * length)
    rungs, _ = run([-cost for cost in costs], lengths)  # the dearest are the best
    found = [costs[number] * length for length, results in rungs[1:] for number in results]
    assert sorted(expected) == sorted(found)


@pytest.mark.parametrize(("timed", "seconds"), [([], 0.0), ([(2.0, 10.0)], 20.0), ([(2.0, 10.0), (8.0, 20.0)], 12.0)])
def test_time_is_estimated_at_the_rate_so_far(timed: list[tuple[float, float]], seconds: float) -> None:
    assert halving.estimate_seconds(timed, 4.0) == pytest.approx(seconds)


def test_proposal_is_the_cheapest_that_is_not_shown_to_be_worse_than_the_best() -> None:
    finalists = [Trained(0, 8, 0.5), Trained(1, 8, 0.31), Trained(2, 8, 0.3), Trained(3, 8, 0.32)]
    judged: list[tuple[int, int]] = []

    def is_worse(one: Trained, best: Trained) -> bool:
        judged.append((one.candidate, best.candidate))
        return one.nll > best.nll + 0.1

    assert halving.propose(finalists, is_worse).candidate == 1
    assert judged == [(0, 2), (1, 2)]
    assert halving.propose(finalists, lambda *_: True).candidate == 2, "the best is never worse than itself"
    assert halving.propose(finalists[:1], lambda *_: True).candidate == 0
