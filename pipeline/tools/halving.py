"""Successive halving: train all candidates for a few epochs, keep the better half, double the epochs, and so on.

Jamieson & Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization". Every training
starts anew with the schedule of its own number of epochs. Candidates stand in order of cost, the cheapest first.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Protocol, TypeVar

FINALISTS = 2  # trained with all epochs, so that the best has a runner-up


class Trained(Protocol):
    """What training a candidate gave; `nll`: its validation NLL."""

    @property
    def nll(self) -> float:
        """Lower is better."""
        ...


T = TypeVar("T")
R = TypeVar("R", bound=Trained)


def spread(candidates: Sequence[T], n: int) -> list[T]:
    """At most `n` of the candidates, evenly spread over them; the first is among them."""
    n = min(n, len(candidates))
    return [candidates[i * len(candidates) // n] for i in range(n)]


def epochs_by_rung(n: int, epochs: int, shortest: int) -> list[int]:
    """Epochs of each rung for `n` candidates: doubled from rung to rung up to `epochs`, and at least `shortest`.

    As many rungs as it takes to halve `n` to the finalists; fewer if `epochs` cannot be halved so often.
    """
    found = [epochs]
    while n > FINALISTS and max(shortest, 1) <= (half := math.ceil(found[0] / 2)) < found[0]:
        found.insert(0, half)
        n = _kept(n)
    return found


def rung_sizes(n: int, n_rungs: int) -> list[int]:
    """How many candidates each rung trains if `n` enter the first; 0 for a rung that would drop none and is skipped."""
    found, left = [n], n
    for rung in range(1, n_rungs):
        is_skipped = left <= FINALISTS and rung < n_rungs - 1
        left = _kept(left)
        found.append(0 if is_skipped else left)
    return found


def halve(
    candidates: Sequence[T],
    epochs: Sequence[int],
    train: Callable[[T, int], R],
    may_enter: Callable[[list[T], T], bool],
) -> Iterator[tuple[int, dict[int, R]]]:
    """Train the candidates with `epochs` of each rung; yield the epochs of a rung and its results, by candidate number.

    A candidate is trained in the first rung if `may_enter` of those that entered before, and itself, is true; the first
    two always are. The order spreads over the candidates, so that those that entered do, too, if time ends.
    """
    first: dict[int, R] = {}
    for number in _spreading_order(len(candidates)):
        if len(first) < FINALISTS or may_enter([candidates[i] for i in first], candidates[number]):
            first[number] = train(candidates[number], epochs[0])
    results = dict(sorted(first.items()))
    yield epochs[0], results
    for n, length in [*zip(rung_sizes(len(first), len(epochs)), epochs, strict=True)][1:]:
        if n:
            best = sorted(results, key=lambda number: results[number].nll)[:n]  # of equals, the cheaper
            results = {number: train(candidates[number], length) for number in sorted(best)}
            yield length, results


def dearest(candidates: Sequence[T], epochs: Sequence[int], cost: Callable[[T, int], float]) -> list[float]:
    """The costs of all trainings behind the first rung, if the dearest candidates are kept."""
    later = [*zip(rung_sizes(len(candidates), len(epochs)), epochs, strict=True)][1:]
    by_rung = (sorted((cost(one, length) for one in candidates), reverse=True)[:n] for n, length in later)
    return [*chain.from_iterable(by_rung)]


def estimate_seconds(timed: Sequence[tuple[float, float]], cost: float) -> float:
    """The time that a cost takes at the rate of the trainings so far, (cost, seconds) each; 0 if there are none.

    What every training takes anyway counts as if it grew with the cost: the estimate is rather too long than too short.
    """
    known, seconds = map(sum, zip(*timed, strict=True)) if timed else (1.0, 0.0)
    return seconds * cost / known


def propose(finalists: Sequence[R], is_worse: Callable[[R, R], bool]) -> R:
    """The cheapest finalist that is not shown to be worse than the one with the lowest NLL."""
    best = min(finalists, key=lambda one: one.nll)
    return next(one for one in finalists if one is best or not is_worse(one, best))


def _kept(n: int) -> int:
    return min(n, max(FINALISTS, math.ceil(n / 2)))


def _spreading_order(n: int) -> list[int]:
    """0 to n - 1, the first in the middle of the rest and so on: by their binary digits, read from the right."""
    width = max(n - 1, 1).bit_length()
    return sorted(range(n), key=lambda i: f"{i:0{width}b}"[::-1])
