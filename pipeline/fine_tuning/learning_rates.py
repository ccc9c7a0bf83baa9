"""Choose the learning rates of a strategy: many by halving on images set aside from training, the rest by validation.

Halving: Jamieson & Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization". What it
drops has seen no validation image, so that the validation figures of what is left are judged as those of its epochs.
Nothing that it starts from has seen the images that judge: a head that was fitted on them favours small learning rates.
"""

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.fine_tuning import fit
from pipeline.fine_tuning.fit import NotFiniteError, Task
from pipeline.params import Strategy
from pipeline.training.runs import Candidates, join_candidates

Curve = list[dict[str, Any]]
State = dict[str, torch.Tensor]
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

    label, unit (n,): of all images. Whole units in random order, `halving_share` of those of each class, which is that
    of their first image; one of each class stays in training. Where a class has too few for a whole one, as many are
    taken of several classes together. Raises ValueError if there are too few units.
    """
    if len(strategy.learning_rates) <= strategy.halving_keeps:
        return rows[:0]
    units, first = np.unique(unit[rows], return_index=True)
    order, taken, n_seen = np.random.default_rng(seed).permutation(len(units)), [], 0
    for index in np.unique(label[rows][first]):
        own = order[label[rows][first][order] == index]
        due = round(strategy.halving_share * (n_seen + len(own))) - round(strategy.halving_share * n_seen)
        taken.extend(own[: min(due, len(own) - 1)])
        n_seen += len(own)
    aside = np.isin(unit[rows], units[taken])
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
    refit: Callable[[Task], State] | None,
) -> Trained:
    """Train with each learning rate, in place, and restore the epoch and the rate of the lowest validation NLL.

    `aside`: rows as `set_aside` gives them. `locate`: where the checkpoint of a training is. `refit`: the state of a
    head for halving, fitted on `train` of a task and selected on its `val`; None: halving starts from `network`. A rate
    whose loss is not finite is left out with a warning; raises NotFiniteError if that happens to all of them, and as
    fit.train does.
    """
    n_steps, checkpoints, is_one = 0, [], len(strategy.learning_rates) < 2

    def train_one(pair: Rates, recipe: Strategy, task: Task, start: State) -> tuple[int, Curve, Candidates] | None:
        nonlocal n_steps
        network.load_state_dict(start)
        recipe = recipe.with_rates(*pair)
        checkpoints.append(locate(recipe, task))
        try:
            found = fit.train(
                network, task, recipe, seed, name if is_one else f"{name} at {_words(pair)}", checkpoints[-1]
            )
        except NotFiniteError as error:
            n_steps += error.epoch * len(task.train)
            failures.append(error.with_traceback(None))  # whose frames would keep the network's gradients
            return None
        n_steps += (len(found[1]) - 1) * len(task.train)
        return found

    rates = [*strategy.learning_rates] or [(strategy.learning_rate_base, strategy.learning_rate_head)]
    start, failures = copy.deepcopy(network.state_dict()), []
    if len(rates) > strategy.halving_keeps:
        inner = replace(task, train=np.setdiff1d(task.train, aside), val=aside)
        if refit is not None:
            network[-1].load_state_dict(refit(inner))
        inner_start, epochs = copy.deepcopy(network.state_dict()), strategy.halving_epochs
        while len(rates) > strategy.halving_keeps:
            epochs = min(epochs, strategy.epochs)
            changes = {"epochs": epochs, "patience": None, "warmup_epochs": min(strategy.warmup_epochs, epochs - 1)}
            short = strategy.model_copy(update=changes)
            tried = [train_one(pair, short, inner, inner_start) for pair in rates]
            loss = [math.inf if one is None else one[1][-1]["val_loss"] for one in tried]
            order = sorted(range(len(rates)), key=lambda i: (loss[i], i))
            kept = order[: max(strategy.halving_keeps, math.ceil(len(rates) / 2))]
            rates, epochs = [rates[i] for i in sorted(kept)], 2 * epochs
            left = "; ".join(_words(pair).removeprefix("learning ") for pair in rates)
            log.info("%s: of %d learning rates, %d are left: %s", name, len(tried), len(rates), left)

    found: dict[Rates, tuple[int, Curve, Candidates]] = {}
    best, best_state = rates[0], start
    for pair in rates:
        one = train_one(pair, strategy, task, start)
        if one is None:
            continue
        found[pair] = one
        if len(found) == 1 or _loss(one) < _loss(found[best]):
            best, best_state = pair, copy.deepcopy(network.state_dict())
    if not found:
        raise failures[-1]
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
