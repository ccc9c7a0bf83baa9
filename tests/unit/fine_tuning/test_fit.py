"""fit: the network starts as the cached head, what is frozen stays frozen, and the best epoch is restored."""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from timm.models.vgg import VGG
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.vgg import make_layers

from pipeline.features import engine
from pipeline.fine_tuning import fit
from pipeline.fine_tuning.fit import Batch, Load, Task
from pipeline.network import backbones, cuts
from pipeline.network.backbones import Backbone
from pipeline.network.device import place
from pipeline.network.preprocessing import Normalize
from pipeline.params import BackboneChoice, HeadOptions, Strategy
from pipeline.training import heads
from pipeline.training.heads import Examples
from tests import factories
from tests.factories import LINEAR, PREPROCESSING

CPU = torch.device("cpu")
N_CLASSES, N_IMAGES = 3, 36
TRAIN, VAL = np.arange(24), np.arange(24, N_IMAGES)
LABEL = np.arange(N_IMAGES) % N_CLASSES
WEIGHT = np.where(np.arange(N_IMAGES) % 5, 1.0, 0.5)
RESNET, RESNET18, MOBILENET = "timm/test_resnet", "torchvision/resnet18", "torchvision/mobilenet_v3_small"
VIT = "timm/test_vit"
ALEXNET, VGG_LINEAR, VGG_CONVOLUTIONS = "torchvision/alexnet", "vgg as in torchvision", "timm/vgg in small"

HEAD = LINEAR.model_copy(update={"regularization_strengths": (0.1, 0.01), "max_iterations": 200})
MLP = HEAD.model_copy(update={"kind": "mlp", "hidden": (8,), "dropout": 0.5})
PRETRAINED = HEAD.model_copy(update={"kind": "pretrained", "dropout": 0.5, "standardize": False})
STRATEGY = factories.strategy(boundary_cache="off", views=0, patience=None, weight_decay=0.01)


def strategy(**changes: Any) -> Strategy:
    return Strategy.model_validate(STRATEGY.model_dump() | changes)


@cache
def make_images(size: int) -> torch.Tensor:
    """Noise (n, size, size, 3) uint8 around a grey level that tells the class, not perfectly."""
    random = np.random.default_rng(0)
    level = 100 + 12 * LABEL[:, None, None, None] + random.normal(0, 6, (N_IMAGES, 1, 1, 3))
    pixels = random.normal(level, 30, (N_IMAGES, size, size, 3))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))


IMAGES = make_images(32)


def from_memory(inputs: torch.Tensor) -> Load:
    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        return (inputs[[row for row, _ in batch]] for batch in batches)

    return load


def task(inputs: torch.Tensor = IMAGES, load: Load | None = None, **changes: Any) -> Task:
    return replace(Task(load or from_memory(inputs), LABEL, WEIGHT, TRAIN, VAL, [0], [0], "torch", 8), **changes)


class Vgg(nn.Module):
    """VGG of torchvision in small, without its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = make_layers([8, "M", 16, "M"])
        self.classifier = nn.Sequential(nn.Linear(16 * 8 * 8, 12), nn.ReLU(inplace=True), nn.Dropout(), nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def load(name: str) -> Backbone:
    """A backbone with random weights, whose BatchNorm statistics are not those of a batch."""
    if name in (VGG_LINEAR, VGG_CONVOLUTIONS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = Vgg() if name == VGG_LINEAR else VGG([8, "M", 16, "M", 16, "M"], num_classes=0, mlp_ratio=0.002)
        geometry = PREPROCESSING.model_copy(update={"resize": (32,), "crop": 32})
        return Backbone(name, network.eval().requires_grad_(False), geometry, "", 0, None)
    size = 64 if name == ALEXNET else 32
    backbone = backbones.load(BackboneChoice.of(name, "random", 0), size)
    give_statistics(backbone.module)
    return backbone


def give_statistics(network: nn.Module) -> None:
    """Random BatchNorm statistics, which those of a batch are not, as with pretrained weights."""
    random = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1, generator=random)
            module.running_var.uniform_(0.5, 2, generator=random)


@dataclass(frozen=True)
class Prepared:
    """A backbone, the poolings at its cuts, its features (n, 1, *shape) and the head fitted on them."""

    backbone: Backbone
    pools: dict[str, cuts.Pool]
    features: np.ndarray
    fitted: heads.Fitted
    images: torch.Tensor


class Beside(nn.Module):
    """Vectors of several modules for the same images, concatenated."""

    def __init__(self, parts: list[nn.Sequential]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


@cache
def prepare(name: str, cut: str | tuple[str, ...] = "all", pool: str = "none", head: HeadOptions = HEAD) -> Prepared:
    backbone = load(name)
    images = make_images(backbone.preprocessing.crop)
    names = cuts.resolve_cuts(backbone, cut, pool)
    pools = {names[-1]: cuts.Pool(pool, 0)}
    if len(names) > 1:
        layout = cuts.lay_out(backbone, names, pool)
        pools = {tap.cut: cuts.Pool(tap.pool, tap.prefix_tokens) for tap in layout}
    _, dense = cuts.split(backbone, names[-1])
    bases = [
        nn.Sequential(Normalize(backbone.preprocessing), cuts.split(backbone, name)[0], pools[name]) for name in pools
    ]
    whole = bases[0] if len(bases) == 1 else Beside(bases)
    features = np.concatenate(list(engine.run(whole, images.split(8), "torch", "fp32", CPU, 8)))[:, None]
    train, val = (Examples(features[rows], LABEL[rows], WEIGHT[rows]) for rows in (TRAIN, VAL))
    torch.manual_seed(0)
    fitted = heads.fit(heads.build(features.shape[2:], N_CLASSES, head, dense), train, val, head)
    return Prepared(backbone, pools, features, fitted, images)


def build(prepared: Prepared, freeze_until: str | int) -> nn.Sequential:
    """Sequential(prefix, suffix, head) as fine_tune makes it, from copies."""
    backbone = replace(prepared.backbone, module=copy.deepcopy(prepared.backbone.module))
    boundary = cuts.resolve(backbone, freeze_until)
    boundary = [*prepared.pools][-1] if boundary == cuts.ALL else boundary
    prefix, suffix = cuts.prefix_and_suffix(backbone, boundary, prepared.pools)
    network = nn.Sequential(prefix.module, suffix, copy.deepcopy(prepared.fitted.head))
    place(network, CPU)
    return network


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def is_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def batchnorms(module: nn.Module) -> dict[str, torch.Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value for name, value in state(module).items() if name.endswith(names)}


MIDDLES: dict[str, str | int] = {
    RESNET: "layer2",
    RESNET18: 8,
    MOBILENET: "features.6",
    ALEXNET: "features.5",
    VGG_LINEAR: 1,
    VGG_CONVOLUTIONS: "features.2",
}


@pytest.mark.parametrize("freeze_until", ["none", "middle", "all"])
@pytest.mark.parametrize(
    ("name", "cut", "pool", "head"),
    [
        (RESNET, "all", "none", HEAD),
        (RESNET, "layer3", "avg", HEAD),
        (RESNET, "layer3", "flatten", HEAD),
        (RESNET, "layer3", "avg", MLP),
        (RESNET, "layer2", "avg", HEAD),  # the middle is where the base ends
        (RESNET18, "all", "none", HEAD),
        (MOBILENET, "all", "none", HEAD),
        (MOBILENET, "features.10", "avg", MLP),
        (MOBILENET, "flatten", "none", PRETRAINED),
        (ALEXNET, "all", "none", HEAD),
        (ALEXNET, "features", "avg", HEAD),
        (VGG_LINEAR, "all", "none", MLP),
        (VGG_LINEAR, "features", "flatten", HEAD),
        (VGG_LINEAR, "features", "none", PRETRAINED),
        (VGG_LINEAR, "classifier.0", "none", HEAD),
        (VGG_CONVOLUTIONS, "features", "avg", HEAD),
        (VGG_CONVOLUTIONS, "features", "none", PRETRAINED),
    ],
    ids=lambda value: value.kind if isinstance(value, HeadOptions) else value,
)
def test_network_predicts_what_the_cached_head_predicts_before_the_first_step(
    name: str, cut: str, pool: str, head: HeadOptions, freeze_until: str
) -> None:
    prepared = prepare(name, cut, pool, head)  # pyright: ignore[reportArgumentType] (it is hashable)
    network = build(prepared, MIDDLES[name] if freeze_until == "middle" else freeze_until)
    expected = heads.predict(prepared.fitted.head, prepared.features)
    found = fit.predict(network, task(prepared.images), np.arange(N_IMAGES), "fp32")
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(expected) > 0.01


SEVERAL = {  # by network: cuts, pooling, and boundaries before, at, between and behind them
    RESNET: (("layer1", "layer3", "all"), "avg", ["none", "conv1", "layer1", "layer2", "layer3", "layer4", "all"]),
    VIT: (("blocks.1", "blocks.3", "norm"), "cls+avg", ["none", "blocks.0", "blocks.1", "blocks.2", "blocks.4", "all"]),
}


@pytest.mark.parametrize(
    ("name", "freeze_until", "engine_name", "kind"),
    [
        *(
            (name, at, "torch", kind)
            for name, (*_, all_) in SEVERAL.items()
            for at in all_
            for kind in ("whole", "cached")
        ),
        *((name, all_[i], "openvino", "cached") for name, (*_, all_) in SEVERAL.items() for i in (1, 3, -1)),
    ],
)
def test_network_on_several_cuts_predicts_what_the_cached_head_predicts_before_the_first_step(
    name: str, freeze_until: str, engine_name: str, kind: str
) -> None:
    cut, pool, _ = SEVERAL[name]
    prepared = prepare(name, cut, pool)
    network, images = build(prepared, freeze_until), prepared.images
    expected = heads.predict(prepared.fitted.head, prepared.features)
    if kind == "cached":
        images = torch.from_numpy(
            np.concatenate([*engine.run(network[0], images.split(8), engine_name, "fp32", CPU, 8)])
        )
        network[0] = nn.Identity()
    given = task(images, evaluation_engine=engine_name)
    np.testing.assert_allclose(fit.predict(network, given, np.arange(N_IMAGES), "fp32"), expected, atol=1e-4)
    assert np.ptp(expected) > 0.01


@pytest.mark.parametrize("name", SEVERAL)
def test_features_before_the_boundary_stay_and_those_behind_it_are_trained(name: str) -> None:
    cut, pool, (*_, boundary, _, _) = SEVERAL[name]
    network = build(prepare(name, cut, pool), boundary)  # behind two cuts
    images = prepare(name, cut, pool).images
    n = sum(tap.width for tap in cuts.lay_out(prepare(name).backbone, [*prepare(name, cut, pool).pools], pool)[:1])
    with torch.no_grad():
        before = network[1](network[0](images))
    final = finish(network, strategy(), images=images)
    with torch.no_grad():
        after = final[1](final[0](images))
    assert torch.equal(after[:, :n], before[:, :n])
    assert not torch.allclose(after[:, -n:], before[:, -n:])
    assert all(not parameter.requires_grad for parameter in final[0].parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERAL)
def test_cached_rows_of_several_cuts_give_the_losses_of_the_whole_network(name: str) -> None:
    cut, pool, boundaries = SEVERAL[name]
    prepared = prepare(name, cut, pool)
    for boundary in boundaries[1:]:
        whole = build(prepared, boundary)
        cached = copy.deepcopy(whole)
        rows = np.concatenate(list(engine.run(whole[0], prepared.images.split(8), "torch", "fp32", CPU, 8)))
        cached[0] = nn.Identity()
        _, expected, _ = fit.train(whole, task(prepared.images), strategy(), 0, "whole")
        _, found, _ = fit.train(cached, task(torch.from_numpy(rows)), strategy(), 0, "cached")
        for key in ("train_loss", "val_loss"):
            values = [[line[key] for line in curve[1:]] for curve in (found, expected)]
            np.testing.assert_allclose(*values, rtol=1e-3, err_msg=boundary)


def test_first_validation_loss_is_that_of_the_cached_head() -> None:
    fitted, network = prepare(RESNET).fitted, build(prepare(RESNET), "layer2")
    _, curve, _ = fit.train(network, task(), strategy(epochs=1), 0, "run")
    assert curve[0]["val_loss"] == pytest.approx(fitted.path.val_nll[fitted.path.strength], abs=1e-4)


@pytest.mark.parametrize(("cut", "behind"), [("layer2", "layer3"), ("layer2", 12), ("conv1", "layer1.0")])
def test_nothing_can_be_frozen_behind_the_end_of_the_base(cut: str, behind: str | int) -> None:
    with pytest.raises(ValueError, match=r"lies behind .*, where the backbone ends"):
        build(prepare(RESNET, cut, "avg"), behind)


@pytest.mark.parametrize(
    ("name", "cut", "pool", "head", "reason"),
    [
        (RESNET, "layer4", "none", PRETRAINED, "has no dense layers of its own behind features.cut but the last"),
        (RESNET, "layer2", "none", PRETRAINED, "behind features.cut there is more than dense layers"),
        (VGG_LINEAR, 1, "none", PRETRAINED, "behind features.cut there is more than dense layers"),
        (VGG_CONVOLUTIONS, 1, "none", PRETRAINED, "behind features.cut there is more than dense layers"),
        (VGG_LINEAR, "features", "none", HEAD, "`head.kind: linear` needs vectors; expected avg or flatten"),
        (VGG_LINEAR, "features", "none", MLP, "`head.kind: mlp` needs vectors; expected avg or flatten"),
    ],
)
def test_cuts_and_heads_that_do_not_go_together_are_refused(
    name: str, cut: str, pool: str, head: HeadOptions, reason: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        prepare(name, cut, pool, head)  # pyright: ignore[reportArgumentType] (it is hashable)
    assert str(caught.value).startswith("params.yaml: ")
    assert "\n" not in str(caught.value)


def test_first_training_loss_is_that_of_the_cached_head_with_frozen_batchnorm() -> None:
    features, fitted = prepare(RESNET).features, prepare(RESNET).fitted
    network = build(prepare(RESNET), "none")
    rates = {"learning_rate_base": 1e-12, "learning_rate_head": 1e-12}
    _, curve, _ = fit.train(network, task(), strategy(epochs=1, **rates), 0, "run")
    log_probability = heads.predict(fitted.head, features[TRAIN])
    nll = -log_probability[np.arange(len(TRAIN)), LABEL[TRAIN]]
    assert curve[1]["train_loss"] == pytest.approx(np.average(nll, weights=WEIGHT[TRAIN]), abs=1e-4)


@pytest.mark.parametrize("cut", ["none", "layer2", "all"])
def test_frozen_batchnorm_keeps_every_statistic_and_the_frozen_part_keeps_everything(cut: str) -> None:
    network = build(prepare(RESNET), cut)
    before, frozen, head = batchnorms(network), state(network[0]), state(network[2])
    final = finish(network, strategy())
    assert is_same(batchnorms(final), before)
    assert is_same(state(final[0]), frozen)
    assert not is_same(state(final[2]), head)


def test_trained_batchnorm_moves_the_statistics_of_the_body_and_not_of_the_frozen_part() -> None:
    network = build(prepare(RESNET), "layer2")
    frozen, body = state(network[0]), batchnorms(network[1])
    final = finish(network, strategy(batchnorm="train"))
    assert is_same(state(final[0]), frozen)
    after = batchnorms(final[1])
    assert not [name for name in body if torch.equal(after[name], body[name])]


def finish(network: nn.Sequential, options: Strategy, seed: int = 0, images: torch.Tensor = IMAGES) -> nn.Sequential:
    """The network as it is in its last validation, before the best epoch is restored."""
    seen: list[nn.Sequential] = []
    inputs = from_memory(images)

    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        if batches[0][0][0] in VAL:
            seen.append(copy.deepcopy(network))
        return inputs(batches)

    fit.train(network, task(load=load), options, seed, "run")
    return seen[-1]


def test_everything_behind_the_boundary_learns() -> None:
    network = build(prepare(RESNET), "layer2")
    before = copy.deepcopy(network)
    final = finish(network, strategy())
    for part in (1, 2):
        old = dict(before[part].named_parameters())
        assert old
        assert not [name for name, value in final[part].named_parameters() if torch.equal(value, old[name])]


def test_standardisation_of_the_head_is_no_parameter() -> None:
    network = build(prepare(RESNET), "all")
    before = state(cast(nn.Sequential, network[2])[0])
    fit.train(network, task(), strategy(), 0, "run")
    assert is_same(state(cast(nn.Sequential, network[2])[0]), before)
    assert before.keys() == {"mean", "deviation"}


@pytest.mark.parametrize("batchnorm", ["frozen", "train"])
def test_cached_activations_give_the_losses_of_the_whole_network(batchnorm: str) -> None:
    options = strategy(batchnorm=batchnorm, epochs=3)
    whole = build(prepare(RESNET), "layer2")
    cached = copy.deepcopy(whole)
    activations = np.concatenate(list(engine.run(whole[0], IMAGES.split(8), "torch", "fp32", CPU, 8)))
    cached[0] = nn.Identity()
    _, expected, _ = fit.train(whole, task(), options, 0, "whole")
    _, found, _ = fit.train(cached, task(torch.from_numpy(activations)), options, 0, "cached")
    for key in ("train_loss", "val_loss"):
        values = [[line[key] for line in curve[1:]] for curve in (found, expected)]
        np.testing.assert_allclose(*values, rtol=1e-3)


def is_one_line_that_names_the_run(error: pytest.ExceptionInfo) -> bool:
    line = str(error.value)
    return line.startswith("full_retrain-7: ") and "\n" not in line and "lower its learning rates" in line


@pytest.mark.parametrize("batch_size", [8, len(TRAIN)])
def test_exploding_learning_rate_is_one_line_that_names_the_run(batch_size: int) -> None:
    network = build(prepare(RESNET), "layer2")
    rates = {"learning_rate_base": 1e30, "learning_rate_head": 1e30, "optimizer": "sgd"}
    options = strategy(**rates, epochs=1, batch_size=batch_size)
    with pytest.raises(ValueError, match="loss") as caught:
        fit.train(network, task(), options, 0, "full_retrain-7")
    assert is_one_line_that_names_the_run(caught)


def test_loss_that_is_not_a_number_is_one_line_that_names_the_run() -> None:
    network = build(prepare(RESNET), "all")
    with torch.no_grad():
        cast(nn.Linear, cast(nn.Sequential, network[2])[-1]).bias.fill_(math.nan)
    with pytest.raises(ValueError, match="the validation loss is nan in epoch 0") as caught:
        fit.train(network, task(), STRATEGY, 0, "full_retrain-7")
    assert is_one_line_that_names_the_run(caught)


HARMFUL = {"learning_rate_base": 1e-6, "learning_rate_head": 3.0, "epochs": 9}


@pytest.mark.parametrize("patience", [1, 3])
def test_training_that_only_hurts_stops_by_patience_and_leaves_the_cached_head(patience: int) -> None:
    network = build(prepare(RESNET), "layer3")
    before = state(network)
    best_epoch, curve, _ = fit.train(network, task(), strategy(**HARMFUL, patience=patience), 0, "run")
    assert best_epoch == 0
    assert [line["epoch"] for line in curve] == list(range(patience + 1))
    assert min(line["val_loss"] for line in curve[1:]) > curve[0]["val_loss"]
    assert is_same(state(network), before)
    assert not any(module.training for module in network.modules())


def test_without_patience_every_epoch_is_trained_whatever_validation_says() -> None:
    best_epoch, curve, _ = fit.train(build(prepare(RESNET), "layer3"), task(), strategy(**HARMFUL), 0, "run")
    assert best_epoch == 0
    assert len(curve) == 1 + HARMFUL["epochs"]


def test_every_epoch_is_a_candidate_with_what_it_predicts() -> None:
    network = build(prepare(RESNET), "layer3")
    best_epoch, curve, candidates = fit.train(network, task(), strategy(epochs=3), 0, "run")
    assert candidates.names == ["epoch 0", "epoch 1", "epoch 2", "epoch 3"]
    assert candidates.nll(WEIGHT[VAL]) == [line["val_loss"] for line in curve]
    is_right = candidates.predicted == LABEL[VAL]
    assert np.average(is_right, axis=1, weights=WEIGHT[VAL]).tolist() == [line["val_accuracy"] for line in curve]
    log_probability = fit.predict(network, task(), VAL, "fp32")
    assert np.array_equal(candidates.predicted[best_epoch], log_probability.argmax(1))
    assert np.array_equal(candidates.true_log_probability[best_epoch], log_probability[np.arange(len(VAL)), LABEL[VAL]])


def test_best_epoch_is_the_one_of_the_lowest_validation_loss_and_is_restored() -> None:
    network = build(prepare(RESNET), "layer3")
    best_epoch, curve, _ = fit.train(network, task(), strategy(epochs=4), 0, "run")
    losses = [line["val_loss"] for line in curve]
    assert best_epoch == int(np.argmin(losses))
    log_probability = fit.predict(network, task(), VAL, "fp32")
    nll = -log_probability[np.arange(len(VAL)), LABEL[VAL]]
    assert np.average(nll, weights=WEIGHT[VAL]) == pytest.approx(min(losses), rel=1e-6)


def test_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    states = []
    for seed in (4, 4, 5):
        torch.rand(3)  # what the process drew before does not matter
        states.append(state(finish(build(prepare(RESNET), "layer3"), strategy(epochs=1), seed)))
    assert is_same(states[0], states[1])
    assert not is_same(states[0], states[2])


@pytest.mark.parametrize(("views", "expected"), [([0], [0, 0, 0]), ([1, 9], [1, 9, 1]), ([1, 2, 3, 0], [1, 2, 3])])
def test_epochs_cycle_through_the_views_and_see_every_training_image_once(
    views: list[int], expected: list[int]
) -> None:
    seen: list[list[tuple[int, int]]] = []
    inputs = from_memory(IMAGES)

    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        seen.append([pair for batch in batches for pair in batch])
        return inputs(batches)

    each = task(load=load, train_views=views, evaluation_views=[0, 5])
    fit.train(build(prepare(RESNET), "all"), each, strategy(epochs=3), 0, "run")
    epochs = [pairs for pairs in seen if pairs[0][0] in TRAIN]
    assert [sorted(row for row, _ in pairs) for pairs in epochs] == [list(TRAIN)] * 3
    assert [{view for _, view in pairs} for pairs in epochs] == [{view} for view in expected]
    assert epochs[0] != epochs[1]
    assert {view for pairs in seen if pairs[0][0] in VAL for _, view in pairs} == {0, 5}


def test_images_count_by_their_weight_in_the_losses() -> None:
    light = Task(from_memory(IMAGES), LABEL, 0.25 * WEIGHT, TRAIN, VAL, [0], [0], "torch", 8)
    curves, states = [], []
    for each in (task(), light):
        network = build(prepare(RESNET), "all")
        _, curve, _ = fit.train(network, each, STRATEGY, 0, "run")
        curves.append([line["val_loss"] for line in curve] + [line["train_loss"] for line in curve[1:]])
        states.append(network[2].state_dict())
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)  # only ratios of weights matter
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-6)


def test_balanced_class_weights_are_weights_of_the_training_loss_alone() -> None:
    rare = np.where(LABEL == 0, 0.1, 1.0)
    counted = rare.copy()
    counted[TRAIN] *= rare[TRAIN].sum() / (3 * np.bincount(LABEL[TRAIN], rare[TRAIN])[LABEL[TRAIN]])
    as_weights, balanced = (
        Task(from_memory(IMAGES), LABEL, weight, TRAIN, VAL, [0], [0], "torch", 8) for weight in (counted, rare)
    )
    found = []
    for each, options in ((as_weights, STRATEGY), (balanced, strategy(class_weights="balanced"))):
        network = build(prepare(RESNET), "all")
        _, curve, _ = fit.train(network, each, options, 0, "run")
        found.append(([line["train_loss"] for line in curve[1:]], curve, network[2].state_dict()))
    (losses, _, state), (balanced_losses, curve, balanced_state) = found
    np.testing.assert_allclose(losses, balanced_losses, rtol=1e-5)
    for name in state:
        torch.testing.assert_close(state[name], balanced_state[name], rtol=1e-4, atol=1e-6)
    _, plain, _ = fit.train(build(prepare(RESNET), "all"), balanced, STRATEGY, 0, "run")
    assert curve[0] == plain[0], "validation goes by the images' weights"
    assert abs(curve[1]["train_loss"] - plain[1]["train_loss"]) > 1e-4


def one_image(n_train: int = 24) -> Task:
    return task(train=TRAIN[:n_train])


@pytest.mark.parametrize(("changes", "n_train"), [({"batch_size": 1}, 24), ({"batch_size": 8}, 1)])
def test_batchnorm_that_would_see_one_value_is_refused_before_training(changes: dict[str, Any], n_train: int) -> None:
    network = build(prepare(RESNET), "layer2")  # 1 x 1 px at the end, of 32
    before, seen = state(network), []

    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        seen.extend(batches)
        return from_memory(IMAGES)(batches)

    with pytest.raises(ValueError, match="`batchnorm: train` with a batch of one image") as caught:
        fit.train(network, replace(one_image(n_train), load=load), strategy(batchnorm="train", **changes), 0, "run")
    line = str(caught.value)
    assert line.startswith(f"run: `batchnorm: train` with a batch of one image (batch_size {changes['batch_size']}, ")
    assert f"{n_train} training images" in line
    assert "layer 1.0.layer4.0.bn1 gets (1, 96, 1, 1)" in line
    assert "or `batchnorm: frozen`" in line
    assert "\n" not in line
    assert len(seen) == 1, "no epoch was evaluated"
    assert is_same(state(network), before)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (64, {"batch_size": 1, "batchnorm": "train"}),  # 2 x 2 px at the end
        (32, {"batch_size": 1, "batchnorm": "frozen"}),
        (32, {"batch_size": 8, "batchnorm": "train"}),
    ],
)
def test_batches_that_batchnorm_can_be_trained_on_are_not_refused(size: int, changes: dict[str, Any]) -> None:
    inputs = make_images(size)
    _, curve, _ = fit.train(build(prepare(RESNET), "layer2"), task(inputs), strategy(epochs=1, **changes), 0, "run")
    assert len(curve) == 2


def test_mixed_images_have_the_loss_of_both_labels_and_the_inputs_of_both_at_the_boundary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = build(prepare(RESNET), "layer2")
    before, losses = copy.deepcopy(network).eval(), []
    step = fit._step

    def recorded(*arguments: Any) -> torch.Tensor:
        losses.append((arguments[1], arguments[2], step(*arguments)))
        return losses[-1][-1]

    monkeypatch.setattr(fit, "_step", recorded)
    fit.train(network, task(), strategy(mixup=0.3, epochs=1, label_smoothing=0.1), 0, "run")
    inputs, mixed, sums = losses[0]
    assert mixed.order is not None
    assert 0 < mixed.share < 1
    with torch.no_grad():
        x = before[0](inputs)
        logits = before[2](before[1](mixed.share * x + (1 - mixed.share) * x[mixed.order]))
    one_hot = nn.functional.one_hot(mixed.target.label, N_CLASSES).float()
    weighted = mixed.target.in_loss[:, None] * (0.9 * one_hot + 0.1 / N_CLASSES)
    wanted = mixed.share * weighted + (1 - mixed.share) * weighted[mixed.order]
    assert sums[0].item() == pytest.approx(-(wanted * logits.log_softmax(1)).sum().item(), rel=1e-5)
    shares = [mixed.share for _, mixed, _ in losses]
    assert len({*shares}) == len(shares), "each batch has its own"


def test_shares_of_mixup_are_from_its_beta_distribution() -> None:
    target, random = cast(Any, SimpleNamespace(label=torch.zeros(4))), np.random.default_rng(0)
    shares = [fit._mix(target, strategy(mixup=0.2), random).share for _ in range(4000)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(0.25 / 1.4, abs=0.01)  # of Beta(a, a): 1 / (4 (2a + 1))


def test_the_moving_average_is_validated_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(prepare(RESNET), "layer2")
    with torch.no_grad():
        cast(nn.Linear, cast(nn.Sequential, network[2])[-1]).weight.zero_()  # so that there is something to learn
    steps, step = [], fit._step

    def recorded(*arguments: Any) -> torch.Tensor:
        sums = step(*arguments)
        steps.append(state(network[1:]))
        return sums

    monkeypatch.setattr(fit, "_step", recorded)
    average = state(network[1:])
    best, curve, _ = fit.train(network, task(), strategy(ema=0.6, epochs=4), 0, "run")
    assert best > 0
    for number, values in enumerate(steps[: best * 3]):  # batches of 8 of 24 images
        decay = min(0.6, 1 - (1 + number) ** -0.75)
        average = {name: decay * average[name] + (1 - decay) * value for name, value in values.items()}
    for name, value in state(network[1:]).items():
        torch.testing.assert_close(value, average[name].to(value.dtype), rtol=1e-4, atol=1e-6)
    log_probability = fit.predict(network, task(), VAL, "fp32")
    nll = -log_probability[np.arange(len(VAL)), LABEL[VAL]]
    assert curve[best]["val_loss"] == pytest.approx(np.average(nll, weights=WEIGHT[VAL]), abs=1e-5)


@pytest.mark.parametrize("largest", [0.05, 1e6])
def test_the_norm_of_the_gradient_is_limited(largest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    network, moved = build(prepare(RESNET), "layer2"), []
    step = fit._step

    def recorded(*arguments: Any) -> torch.Tensor:
        before = state(network)
        sums = step(*arguments)
        changes = [(value - before[name]).square().sum() for name, value in network.named_parameters()]
        moved.append(torch.stack(changes).sum().sqrt().item())
        return sums

    monkeypatch.setattr(fit, "_step", recorded)
    rates = {"learning_rate_base": 0.1, "learning_rate_head": 0.1, "weight_decay": 0.0}
    options = strategy(optimizer="sgd", momentum=0.0, gradient_clipping=largest, epochs=1, batch_size=24, **rates)
    fit.train(network, task(), options, 0, "run")
    assert len(moved) == 1
    assert (moved[0] == pytest.approx(0.1 * largest, rel=1e-3)) == (largest < 1)
