"""choice: what is set aside are whole units of every class, from training alone; how learning rates are halved."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.fine_tuning import fit, learning_rates
from pipeline.fine_tuning.fit import NotFiniteError, Task
from pipeline.params import Strategy
from pipeline.training.runs import make_candidates
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
    aside = learning_rates.set_aside(strategy, rows, label, unit, seed)
    assert np.array_equal(aside, learning_rates.set_aside(strategy, rows, label, unit, seed))
    assert {*aside} < {*rows}
    assert not {*unit[aside]} & {*unit[np.setdiff1d(rows, aside)]}
    units, first = np.unique(unit[rows], return_index=True)
    assert abs(len({*unit[aside]}) - share * len(units)) <= 1 + n_classes / 2
    for index in range(n_classes):
        own = {*units[label[rows][first] == index]}
        n_taken = len(own & {*unit[aside]})
        assert abs(n_taken - share * len(own)) <= 1
        assert n_taken < max(len(own), 1), "each class stays in training"


def test_of_many_classes_too_small_to_be_shared_out_some_are_set_aside_and_none_is_lost() -> None:
    label = np.repeat(np.arange(500), np.where(np.arange(500) % 5, 2, 1))
    rows = np.arange(len(label))
    aside = learning_rates.set_aside(LONG, rows, label, rows, 0)
    assert 0.1 * len(rows) < len(aside) <= 0.2 * len(rows) + 1
    assert len({*label[np.setdiff1d(rows, aside)]}) == 500


@pytest.mark.parametrize("share", [0.25, 0.3, 0.35, 0.4, 0.45])
def test_any_share_is_what_it_says(share: float) -> None:
    rows = np.arange(400)
    aside = learning_rates.set_aside(LONG.model_copy(update={"halving_share": share}), rows, rows % 2, rows, 0)
    assert len(aside) == pytest.approx(400 * share, abs=2)


def test_a_short_list_sets_nothing_aside() -> None:
    rows = np.arange(20)
    short = LONG.model_copy(update={"halving_keeps": 2})
    assert len(learning_rates.set_aside(short, rows, rows % 2, rows, 0)) == 0


def test_too_few_units_are_one_line() -> None:
    rows = np.arange(20)
    with pytest.raises(ValueError, match=r"4 training units are too few") as caught:
        learning_rates.set_aside(LONG.model_copy(update={"halving_share": 0.1}), rows, rows % 2, rows // 5, 0)
    assert "\n" not in str(caught.value)


@dataclass
class Trainings:
    """Stands for fit.train: what it was called with, and the loss that each learning rate of the base then has."""

    loss: dict[float, float]
    calls: list[dict[str, Any]] = field(default_factory=list)

    def train(
        self, network: Any, task: Task, strategy: Strategy, seed: int, name: str, checkpoint: Path
    ) -> tuple[int, list[dict[str, Any]], Any]:
        rate = strategy.learning_rate_base
        called = {"rate": rate, "head": strategy.learning_rate_head, "epochs": strategy.epochs, "name": name}
        called |= {"warm_up": strategy.warmup_epochs, "patience": strategy.patience, "rates": strategy.learning_rates}
        called |= {"train": task.train.tolist(), "val": task.val.tolist(), "start": network[-1].bias.item()}
        self.calls.append(called | {"seed": seed, "checkpoint": checkpoint})
        with torch.no_grad():
            network[-1].bias.add_(100 * rate)
        loss = self.loss[rate]
        if not np.isfinite(loss):
            raise NotFiniteError(1, f"{name}: the training loss is nan in epoch 1")
        losses = [5.0, *np.linspace(loss + 1, loss, strategy.epochs)]
        curve = [{"epoch": epoch, "val_loss": one} for epoch, one in enumerate(losses)]
        log_probability = np.log(np.full((len(task.val), 2), 0.5))
        found = make_candidates(
            {f"epoch {epoch}": log_probability for epoch in range(len(curve))}, task.label[task.val]
        )
        return strategy.epochs, curve, found


RATES = tuple((rate, 10 * rate) for rate in (1e-5, 2e-5, 3e-5, 4e-5, 5e-5, 6e-5, 7e-5))
LOSS = {1e-5: 0.9, 2e-5: 0.2, 3e-5: np.inf, 4e-5: 0.1, 5e-5: 0.4, 6e-5: 0.3, 7e-5: 0.8}


def choose(trainings: Trainings, monkeypatch: pytest.MonkeyPatch, *, is_refitted: bool, **changes: Any) -> Any:
    monkeypatch.setattr(fit, "train", trainings.train)
    options = {"epochs": 9, "patience": 3, "warmup_epochs": 2, "halving_keeps": 2, "halving_epochs": 2}
    recipe = factories.strategy(learning_rates=RATES, **options | changes)
    network: Any = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(1, 1))
    nn.init.zeros_(network[-1].bias)
    label = np.arange(20) % 2
    task = Task(lambda _: iter(()), label, np.ones(20), np.arange(10), np.arange(10, 15), [0], [0], "torch", 8)

    def refit(part: Task) -> dict[str, torch.Tensor]:
        assert part.train.tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
        assert part.val.tolist() == [3, 7]
        return network[-1].state_dict() | {"bias": torch.tensor([7.0])}

    def locate(strategy: Strategy, task: Task) -> Path:
        return Path(f"{strategy.learning_rate_base:g}-{strategy.epochs}-{len(task.train)}")

    given = refit if is_refitted else None
    return learning_rates.train(network, task, recipe, 4, "tuned-4", np.array([3, 7]), locate, given), network


@pytest.mark.parametrize("is_refitted", [True, False])
def test_learning_rates_are_halved_on_what_is_set_aside_until_few_are_left_for_validation(
    is_refitted: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainings = Trainings(LOSS)
    caplog.set_level(logging.INFO, "pipeline")
    found, network = choose(trainings, monkeypatch, is_refitted=is_refitted)
    halved, rest = trainings.calls[:11], trainings.calls[11:]
    assert [round(1e5 * call["rate"]) for call in halved] == [1, 2, 3, 4, 5, 6, 7, 2, 4, 5, 6]
    assert [call["epochs"] for call in halved] == [2] * 7 + [4] * 4
    assert [call["warm_up"] for call in halved] == [1] * 7 + [2] * 4
    for call in halved:
        assert (call["train"], call["val"], call["patience"]) == ([0, 1, 2, 4, 5, 6, 8, 9], [3, 7], None)
        assert call["start"] == (7.0 if is_refitted else 0.0)
    assert [round(1e5 * call["rate"]) for call in rest] == [2, 4]
    for call in rest:
        assert (call["epochs"], call["warm_up"], call["patience"], call["start"]) == (9, 2, 3, 0.0)
        assert (call["train"], call["val"]) == ([*range(10)], [*range(10, 15)])
    for call in trainings.calls:
        assert call["head"] == 10 * call["rate"]
        assert (call["rates"], call["seed"]) == ((), 4)
        assert call["name"] == f"tuned-4 at learning rates {call['rate']:g} and {call['head']:g}"
    assert found.chosen == {"epoch": 9, "learning_rates": [4e-5, 10 * 4e-5]}
    assert found.curve[-1]["val_loss"] == 0.1
    assert [curve[-1]["val_loss"] for curve in found.others.values()] == [0.2]
    assert found.n_steps == 8 * (6 * 2 + 1 + 4 * 4) + 10 * 2 * 9  # the one that explodes ended in its first epoch
    assert found.checkpoints == [call["checkpoint"] for call in trainings.calls]
    assert network[-1].bias.item() == pytest.approx(100 * 4e-5), "the weights of the best"
    assert "of 7 learning rates, 4 are left: rates 2e-05 and 0.0002; rates 4e-05" in caplog.text
    assert "at learning rates 3e-05 and 0.0003: the training loss is nan in epoch 1; these learning" in caplog.text


def test_halving_trains_no_longer_than_the_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = Trainings(LOSS)
    choose(trainings, monkeypatch, is_refitted=False, epochs=3, halving_epochs=8)
    assert {call["epochs"] for call in trainings.calls} == {3}


def test_if_all_explode_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFiniteError, match="the training loss is nan"):
        choose(Trainings(dict.fromkeys(LOSS, np.inf)), monkeypatch, is_refitted=False)
