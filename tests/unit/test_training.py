"""training: the seam between cached head and network, what stays frozen, what is restored."""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline import backbones, cuts, engine, heads, training
from pipeline.backbones import Backbone
from pipeline.heads import Examples
from pipeline.params import BackboneChoice, HeadOptions, Strategy
from pipeline.training import Batch, Load, Task

CPU = torch.device("cpu")
SIZE, N_CLASSES, N_IMAGES = 32, 3, 36
TRAIN, VAL = np.arange(24), np.arange(24, N_IMAGES)
LABEL = np.arange(N_IMAGES) % N_CLASSES
WEIGHT = np.where(np.arange(N_IMAGES) % 5, 1.0, 0.5)
RESNET = "timm/test_resnet"
MIDDLE = {RESNET: "layer2", "torchvision/resnet18": "layer3", "torchvision/mobilenet_v3_small": "features.6"}

HEAD = HeadOptions(
    kind="linear",
    hidden=(),
    dropout=0.0,
    standardize=True,
    penalty="l2",
    l1_ratio=0.5,
    strengths=(0.1, 0.01),
    max_iterations=200,
    learning_rate=1e-3,
    epochs=1,
    batch_size=8,
    threads=1,
)
STRATEGY = Strategy(
    init="cached_head",
    freeze_until="none",
    boundary_cache="off",
    batchnorm="frozen",
    views=0,
    epochs=2,
    patience=2,
    batch_size=8,
    optimizer="adamw",
    momentum=0.9,
    learning_rate_base=1e-3,
    learning_rate_head=1e-3,
    warmup_epochs=0,
    weight_decay=0.01,
    label_smoothing=0.0,
    precision="fp32",
    threads=1,
)


def strategy(**changes: Any) -> Strategy:
    return Strategy.model_validate(STRATEGY.model_dump() | changes)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_images() -> torch.Tensor:
    """Noise (n, size, size, 3) uint8 around a grey level that tells the class, not perfectly."""
    random = np.random.default_rng(0)
    level = 100 + 12 * LABEL[:, None, None, None] + random.normal(0, 6, (N_IMAGES, 1, 1, 3))
    pixels = random.normal(level, 30, (N_IMAGES, SIZE, SIZE, 3))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))


IMAGES = make_images()


def from_memory(inputs: torch.Tensor) -> Load:
    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        return (inputs[[row for row, _ in batch]] for batch in batches)

    return load


def task(inputs: torch.Tensor = IMAGES, load: Load | None = None) -> Task:
    return Task(load or from_memory(inputs), LABEL, WEIGHT, TRAIN, VAL, 1, "torch")


@pytest.fixture(scope="module")
def prepared() -> dict[str, tuple[Backbone, np.ndarray, heads.Fitted]]:
    """For each network: the backbone, its features (n, 1, d) and the head fitted on them."""
    return {name: prepare(name) for name in MIDDLE}


def prepare(name: str) -> tuple[Backbone, np.ndarray, heads.Fitted]:
    backbone = backbones.load(BackboneChoice(name=name, weights="random", seed=0), SIZE)
    give_statistics(backbone)
    whole = nn.Sequential(backbones.Normalize(backbone.preprocessing), backbone.module)
    features = np.concatenate(list(engine.run(whole, IMAGES.split(8), "torch", "fp32", CPU)))[:, None]
    train, val = (Examples(features[rows], LABEL[rows], WEIGHT[rows]) for rows in (TRAIN, VAL))
    return backbone, features, heads.fit(train, val, N_CLASSES, 1, HEAD, 0, CPU)


def give_statistics(backbone: Backbone) -> None:
    """Random BatchNorm statistics, which those of a batch are not, as with pretrained weights."""
    random = torch.Generator().manual_seed(3)
    for module in backbone.module.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1, generator=random)
            module.running_var.uniform_(0.5, 2, generator=random)


Prepared = dict[str, tuple[Backbone, np.ndarray, heads.Fitted]]


def build(prepared: Prepared, name: str, freeze_until: str) -> nn.Sequential:
    """Sequential(frozen, body, head), all its own."""
    backbone, _, fitted = prepared[name]
    module, head = copy.deepcopy(backbone.module), copy.deepcopy(fitted.head)
    prefix, body = cuts.split(module, name, freeze_until)
    return nn.Sequential(nn.Sequential(backbones.Normalize(backbone.preprocessing), prefix), body, head)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def is_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def batchnorms(module: nn.Module) -> dict[str, torch.Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value for name, value in state(module).items() if name.endswith(names)}


@pytest.mark.parametrize("cut", ["none", "middle", "all"])
@pytest.mark.parametrize("name", MIDDLE)
def test_network_says_what_the_cached_head_says_before_the_first_step(prepared: Prepared, name: str, cut: str) -> None:
    _, features, fitted = prepared[name]
    network = build(prepared, name, MIDDLE[name] if cut == "middle" else cut)
    expected = heads.predict(fitted.head, features, 1)
    found = training.predict(network, task(), np.arange(N_IMAGES), "fp32", CPU)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(expected) > 0.1

    _, curve = training.fit(network, task(), strategy(epochs=1, learning_rate_base=1e-9), 0, CPU, "run")
    assert curve[0]["val_loss"] == pytest.approx(fitted.val_nll[fitted.strength], abs=1e-4)


def test_first_training_loss_is_that_of_the_cached_head_with_frozen_batchnorm(prepared: Prepared) -> None:
    _, features, fitted = prepared[RESNET]
    network = build(prepared, RESNET, "none")
    rates = {"learning_rate_base": 1e-12, "learning_rate_head": 1e-12}
    _, curve = training.fit(network, task(), strategy(epochs=1, **rates), 0, CPU, "run")
    log_probability = heads.predict(fitted.head, features[TRAIN], 1)
    nll = -log_probability[np.arange(len(TRAIN)), LABEL[TRAIN]]
    assert curve[1]["train_loss"] == pytest.approx(np.average(nll, weights=WEIGHT[TRAIN]), abs=1e-4)


@pytest.mark.parametrize("cut", ["none", "layer2", "all"])
def test_frozen_batchnorm_keeps_every_statistic_and_the_frozen_part_keeps_everything(
    prepared: Prepared, cut: str
) -> None:
    network = build(prepared, RESNET, cut)
    before, frozen, head = batchnorms(network), state(network[0]), state(network[2])
    final = finish(network, strategy())
    assert is_same(batchnorms(final), before)
    assert is_same(state(final[0]), frozen)
    assert not is_same(state(final[2]), head)


def test_trained_batchnorm_moves_the_statistics_of_the_body_and_not_of_the_frozen_part(prepared: Prepared) -> None:
    network = build(prepared, RESNET, "layer2")
    frozen, body = state(network[0]), batchnorms(network[1])
    final = finish(network, strategy(batchnorm="train"))
    assert is_same(state(final[0]), frozen)
    after = batchnorms(final[1])
    assert not [name for name in body if torch.equal(after[name], body[name])]


def finish(network: nn.Sequential, options: Strategy, seed: int = 0) -> nn.Sequential:
    """The network as it is in its last validation, before the best epoch is restored."""
    seen: list[nn.Sequential] = []
    inputs = from_memory(IMAGES)

    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        if batches[0][0][0] in VAL:
            seen.append(copy.deepcopy(network))
        return inputs(batches)

    training.fit(network, task(load=load), options, seed, CPU, "run")
    return seen[-1]


def test_everything_behind_the_boundary_learns(prepared: Prepared) -> None:
    network = build(prepared, RESNET, "layer2")
    before = copy.deepcopy(network)
    final = finish(network, strategy())
    for part in (1, 2):
        old = dict(before[part].named_parameters())
        assert old
        assert not [name for name, value in final[part].named_parameters() if torch.equal(value, old[name])]


def test_standardisation_of_the_head_is_no_parameter(prepared: Prepared) -> None:
    network = build(prepared, RESNET, "all")
    before = state(cast(nn.Sequential, network[2])[0])
    training.fit(network, task(), strategy(), 0, CPU, "run")
    assert is_same(state(cast(nn.Sequential, network[2])[0]), before)
    assert before.keys() == {"mean", "deviation"}


@pytest.mark.parametrize("batchnorm", ["frozen", "train"])
def test_cached_activations_give_the_losses_of_the_whole_network(prepared: Prepared, batchnorm: str) -> None:
    options = strategy(batchnorm=batchnorm, epochs=3, patience=3)
    whole = build(prepared, RESNET, "layer2")
    cached = copy.deepcopy(whole)
    activations = np.concatenate(list(engine.run(whole[0], IMAGES.split(8), "torch", "fp32", CPU)))
    cached[0] = nn.Identity()
    _, expected = training.fit(whole, task(), options, 0, CPU, "whole")
    _, found = training.fit(cached, task(torch.from_numpy(activations)), options, 0, CPU, "cached")
    for key in ("train_loss", "val_loss"):
        values = [[line[key] for line in curve[1:]] for curve in (found, expected)]
        np.testing.assert_allclose(*values, rtol=1e-3)


def is_one_line_that_names_the_run(error: pytest.ExceptionInfo) -> bool:
    line = str(error.value)
    return line.startswith("full_retrain-7: ") and "\n" not in line and "learning_rate_base" in line


@pytest.mark.parametrize("batch_size", [8, len(TRAIN)])
def test_exploding_learning_rate_is_one_line_that_names_the_run(prepared: Prepared, batch_size: int) -> None:
    network = build(prepared, RESNET, "layer2")
    rates = {"learning_rate_base": 1e30, "learning_rate_head": 1e30, "optimizer": "sgd"}
    options = strategy(**rates, epochs=1, batch_size=batch_size)
    with pytest.raises(ValueError, match="loss") as caught:
        training.fit(network, task(), options, 0, CPU, "full_retrain-7")
    assert is_one_line_that_names_the_run(caught)


def test_loss_that_is_not_a_number_is_one_line_that_names_the_run(prepared: Prepared) -> None:
    network = build(prepared, RESNET, "all")
    with torch.no_grad():
        cast(nn.Linear, cast(nn.Sequential, network[2])[-1]).bias.fill_(math.nan)
    with pytest.raises(ValueError, match="the training loss is nan in epoch 1") as caught:
        training.fit(network, task(), STRATEGY, 0, CPU, "full_retrain-7")
    assert is_one_line_that_names_the_run(caught)


HARMFUL = {"learning_rate_base": 1e-6, "learning_rate_head": 3.0, "epochs": 9}


@pytest.mark.parametrize("patience", [1, 3])
def test_training_that_only_hurts_stops_by_patience_and_leaves_the_cached_head(
    prepared: Prepared, patience: int
) -> None:
    network = build(prepared, RESNET, "layer3")
    before = state(network)
    best_epoch, curve = training.fit(network, task(), strategy(**HARMFUL, patience=patience), 0, CPU, "run")
    assert best_epoch == 0
    assert [line["epoch"] for line in curve] == list(range(patience + 1))
    assert min(line["val_loss"] for line in curve[1:]) > curve[0]["val_loss"]
    assert is_same(state(network), before)
    assert not any(module.training for module in network.modules())


def test_best_epoch_is_the_one_of_the_lowest_validation_loss_and_is_restored(prepared: Prepared) -> None:
    network = build(prepared, RESNET, "layer3")
    best_epoch, curve = training.fit(network, task(), strategy(epochs=4, patience=4), 0, CPU, "run")
    losses = [line["val_loss"] for line in curve]
    assert best_epoch == int(np.argmin(losses))
    log_probability = training.predict(network, task(), VAL, "fp32", CPU)
    nll = -log_probability[np.arange(len(VAL)), LABEL[VAL]]
    assert np.average(nll, weights=WEIGHT[VAL]) == pytest.approx(min(losses), rel=1e-6)


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(prepared: Prepared) -> None:
    states = []
    for seed in (4, 4, 5):
        torch.rand(3)  # what the process drew before does not matter
        states.append(state(finish(build(prepared, RESNET, "layer3"), strategy(epochs=1), seed)))
    assert is_same(states[0], states[1])
    assert not is_same(states[0], states[2])


@pytest.mark.parametrize(("views", "expected"), [(0, [0, 0, 0]), (2, [1, 2, 1]), (8, [1, 2, 3])])
def test_epochs_cycle_through_the_views_and_see_every_training_image_once(
    prepared: Prepared, views: int, expected: list[int]
) -> None:
    seen: list[list[tuple[int, int]]] = []
    inputs = from_memory(IMAGES)

    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        seen.append([pair for batch in batches for pair in batch])
        return inputs(batches)

    options = strategy(views=views, epochs=3, patience=3)
    training.fit(build(prepared, RESNET, "all"), task(load=load), options, 0, CPU, "run")
    epochs = [pairs for pairs in seen if pairs[0][0] in TRAIN]
    assert [sorted(row for row, _ in pairs) for pairs in epochs] == [list(TRAIN)] * 3
    assert [{view for _, view in pairs} for pairs in epochs] == [{view} for view in expected]
    assert epochs[0] != epochs[1]
    assert {view for pairs in seen if pairs[0][0] in VAL for _, view in pairs} == {0}


def test_images_count_by_their_weight_in_the_losses(prepared: Prepared) -> None:
    light = Task(from_memory(IMAGES), LABEL, 0.25 * WEIGHT, TRAIN, VAL, 1, "torch")
    curves, states = [], []
    for each in (task(), light):
        network = build(prepared, RESNET, "all")
        _, curve = training.fit(network, each, STRATEGY, 0, CPU, "run")
        curves.append([line["val_loss"] for line in curve] + [line["train_loss"] for line in curve[1:]])
        states.append(network[2].state_dict())
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)  # only ratios of weights matter
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-6)
