"""Choose the learning rates of a strategy: many by halving on images set aside from training, the rest by validation.

Halving: Jamieson & Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization". What it
drops has seen no validation image, so that the validation figures of what is left are judged as those of its epochs.
"""

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pipeline.params import Strategy
from pipeline.training import fit
from pipeline.training.fit import NotFiniteError, Task
from pipeline.training.runs import Candidates, join_candidates

Curve = list[dict[str, Any]]
Rates = tuple[float, float]  # of base and head
log = logging.getLogger("pipeline")


@dataclass
class Trained:
    """What validation chose, and everything that it chose from.

    `curve` is that of the chosen learning rates, `others` those of the others that were left for validation, by name.
    `n_steps`: how often an image went through training, halving included. `checkpoints`: what an interrupted run goes
    on from.
    """

    chosen: dict[str, Any]
    curve: Curve
    others: dict[str, Curve]
    candidates: Candidates
    n_steps: int
    checkpoints: list[Path]


def set_aside(strategy: Strategy, rows: np.ndarray, label: np.ndarray, unit: np.ndarray, seed: int) -> np.ndarray:
    """The rows of `rows` whose NLL halves the learning rates; none where there are few learning rates.

    label, unit (n,): of all images. Whole units, stratified by the class of their first image: of the units in random
    order, sorted by class, every fifth where `halving_share` is 0.2. Raises ValueError if there are too few units.
    """
    if len(strategy.learning_rates) <= strategy.halving_keeps:
        return rows[:0]
    units, first = np.unique(unit[rows], return_index=True)
    order = np.random.default_rng(seed).permutation(len(units))
    order = order[np.argsort(label[rows][first][order], kind="stable")]
    every = round(1 / strategy.halving_share)
    aside = np.isin(unit[rows], units[order[every - 1 :: every]])
    if not aside.any():
        raise ValueError(
            f"learning_rates: {len(units)} training units are too few to set some aside and halve "
            f"{len(strategy.learning_rates)} learning rates; expected at most halving_keeps ({strategy.halving_keeps})"
        )
    return rows[aside]


def train(
    network: nn.Sequential,
    task: Task,
    strategy: Strategy,
    seed: int,
    name: str,
    aside: np.ndarray,
    locate: Callable[[Strategy, Task], Path],
) -> Trained:
    """Train with each learning rate, in place, and restore the epoch and the rate of the lowest validation NLL.

    `aside`: rows as `set_aside` gives them. `locate`: where the checkpoint of a training is. A rate whose loss is not
    finite is left out with a warning; raises NotFiniteError if that happens to all of them, and as fit.train does.
    """
    start, n_steps, checkpoints = copy.deepcopy(network.state_dict()), 0, []

    def train_one(recipe: Strategy, task: Task) -> tuple[int, Curve, Candidates] | NotFiniteError:
        nonlocal n_steps
        network.load_state_dict(start)
        checkpoints.append(locate(recipe, task))
        words = (
            name if len(rates) == 1 else f"{name} at {_words((recipe.learning_rate_base, recipe.learning_rate_head))}"
        )
        try:
            found = fit.train(network, task, recipe, seed, words, checkpoints[-1])
        except NotFiniteError as error:
            n_steps += error.epoch * len(task.train)
            return error
        n_steps += (len(found[1]) - 1) * len(task.train)
        return found

    rates = [*strategy.learning_rates] or [(strategy.learning_rate_base, strategy.learning_rate_head)]
    inner = replace(task, train=np.setdiff1d(task.train, aside), val=aside)
    epochs = strategy.halving_epochs
    while len(rates) > strategy.halving_keeps:
        short = {"epochs": epochs, "patience": None, "warmup_epochs": min(strategy.warmup_epochs, epochs - 1)}
        tried = [train_one(strategy.with_rates(*pair).model_copy(update=short), inner) for pair in rates]
        loss = [math.inf if isinstance(one, NotFiniteError) else one[1][-1]["val_loss"] for one in tried]
        order = sorted(range(len(rates)), key=lambda i: (loss[i], i))
        kept = order[: max(strategy.halving_keeps, math.ceil(len(rates) / 2))]
        log.info("%s: of %d learning rates, %d are left after %d epochs", name, len(rates), len(kept), epochs)
        rates, epochs = [rates[i] for i in sorted(kept)], 2 * epochs

    found: dict[Rates, tuple[int, Curve, Candidates]] = {}
    best, best_state, failures = rates[0], start, []
    for pair in rates:
        one = train_one(strategy.with_rates(*pair), task)
        if isinstance(one, NotFiniteError):
            failures.append(one)
            continue
        found[pair] = one
        if len(found) == 1 or _loss(one) < _loss(found[best]):
            best, best_state = pair, copy.deepcopy(network.state_dict())
    if not found:
        raise failures[0]
    for failure in failures:
        log.warning("%s; these learning rates are left out", failure)
    network.load_state_dict(best_state)
    network.eval()
    epoch, curve, _ = found[best]
    return Trained(
        chosen={"epoch": epoch} | ({"learning_rates": [*best]} if strategy.learning_rates else {}),
        curve=curve,
        others={_words(pair): other for pair, (_, other, _) in found.items() if pair != best},
        candidates=_join({_words(pair): candidates for pair, (_, _, candidates) in found.items()}),
        n_steps=n_steps,
        checkpoints=checkpoints,
    )


def _words(rates: Rates) -> str:
    base, head = rates
    return f"learning rate {base:g}" if base == head else f"learning rates {base:g} and {head:g}"


def _loss(trained: tuple[int, Curve, Candidates]) -> float:
    epoch, curve, _ = trained
    return curve[epoch]["val_loss"]


def _join(by_rate: dict[str, Candidates]) -> Candidates:
    """All candidates; epoch 0, the network before training, is in all parts, and counts once."""
    if len(by_rate) == 1:
        return next(iter(by_rate.values()))
    parts = []
    for words, part in by_rate.items():
        first = 1 if parts else 0
        names, *arrays = vars(part).values()
        parts.append(Candidates([f"{words}, {one}" for one in names[first:]], *(array[first:] for array in arrays)))
    return join_candidates(parts)
