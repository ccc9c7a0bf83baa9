"""fine_tune: training from cached activations is training through the whole network, on the stages' own path."""

import logging
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from pipeline.dataset import manifest
from pipeline.dataset.units import unit_of
from pipeline.features import engine, hdf5
from pipeline.features.hdf5 import Row
from pipeline.features.loading import Loader
from pipeline.features.views import AUGMENTED
from pipeline.fine_tuning import fit, learning_rates
from pipeline.network import backbones, cuts, plans
from pipeline.params import BackboneChoice, HeadOptions
from pipeline.stages import extract, fine_tune, index, plan, split, train_head
from pipeline.tools import inference
from pipeline.training import calibration, heads, saved_networks
from pipeline.training.heads import Examples
from pipeline.training.runs import Run, read_run
from tests import factories

SIZE = 32
COLOURS = {"blue": (90, 100, 140), "green": (90, 140, 100), "red": (140, 100, 90)}
N_IMAGES = 30
TINY, MOBILENET = "timm/test_resnet", "torchvision/mobilenet_v3_small"
SEVERAL = {"cut": ["layer1", "layer3", "all"], "pool": "avg"}  # of TINY
OF_VIT = {"cut": ["blocks.1", "blocks.3", "all"], "pool": "cls+avg"}
SWIN, VIT = "timm/swin_tiny_patch4_window7_224", "timm/test_vit"
PRETRAINED = {"kind": "pretrained", "standardize": False, "dropout": 0.2}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Grows by the loss of every training step."""
    losses: list[float] = []
    step = fit._step

    def recorded(*arguments: Any) -> torch.Tensor:
        sums = step(*arguments)
        losses.append(sums[0].item())
        return sums

    monkeypatch.setattr(fit, "_step", recorded)
    return losses


def make_weights(name: str) -> None:
    """Random weights whose BatchNorm statistics fit them, more or less: neither 0 and 1, nor those of a batch."""
    network = backbones.load(BackboneChoice.of(name, "random", 0), SIZE).module
    normalising = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for module in normalising:
            module.momentum = None
        network.train()(torch.randn(16, 3, SIZE, SIZE))
        for module in normalising:
            mean, variance = module.get_buffer("running_mean"), module.get_buffer("running_var")
            mean += 0.2 * variance.sqrt() * torch.randn_like(mean)
            variance *= torch.empty_like(variance).uniform_(0.7, 1.4)
    Path("data/weights").mkdir(parents=True)
    save_file(network.state_dict(), "data/weights/own.safetensors")


def make_images(directory: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(N_IMAGES):
        name = sorted(COLOURS)[number % 3]
        (directory / name).mkdir(parents=True, exist_ok=True)
        pixels = random.normal(COLOURS[name], 60, (36, 36, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(directory / name / f"{number:02}.png")


EXPERT = {"mixup": 0.2, "ema": 0.9, "gradient_clipping": 0.5, "dropout": 0.1}
STRATEGY = {
    "init": "cached_head",
    "freeze_until": "none",
    "boundary_cache": "on",
    "batchnorm": "frozen",
    "views": 2,
    "epochs": 3,
    "patience": None,
    "batch_size": 6,
    "optimizer": "sgd",
    "momentum": 0.9,
    "learning_rate_base": 3e-4,
    "learning_rate_head": 3e-4,
    "warmup_epochs": 0,
    "weight_decay": 0.01,
    "label_smoothing": 0.1,
    "class_weights": "balanced",
    "precision": "fp32",
}
Tune = Callable[..., Run]


def configure(name: str, **changes: Any) -> None:
    """params.yaml of the repository, with sizes for which the stages take seconds, and sections changed."""
    params = factories.params_document()
    sections: dict[str, dict[str, Any]] = {
        "dataset": {"fetch": [], "path": "images"},
        "split": {"seeds": [0], "test_fraction": 0.2, "val_fraction": 0.2},
        "backbone": {"name": name, "weights": "own.safetensors"},
        "features": {"views": 2, "image_size": SIZE, "engine": "torch"},
        "evaluation": {"views": ["identity", "flip_horizontal"]},
        "head": {"regularization_strengths": [0.1], "epochs": 2},
        "fine_tune": {"run": ["tuned"], "seeds": [0], "strategies": {"tuned": STRATEGY}},
        "compare": {"guard": {}},
        "runtime": {"device": "cpu", "workers": 0},
    }
    for section, values in sections.items():
        params[section].update(values | changes.get(section, {}))
    params["threads"] = 1
    factories.write_params(params)


@pytest.fixture(scope="module")
def heads_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Directories in which every stage before fine_tune has run, by the network and what params.yaml changes."""
    made: dict[str, Path] = {}
    yield made
    for directory in made.values():
        shutil.rmtree(directory)


@pytest.fixture
def tune(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    heads_alone: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Tune:
    """Run every stage up to fine_tune in a directory of its own, whatever was done before included.

    What comes before fine_tune is run once for all tests with the same network and sections, and copied.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)

    def prepare(name: str) -> None:
        make_images(Path("images"))
        make_weights(name)
        monkeypatch.setattr(sys, "argv", ["a stage"])
        for stage in (index, split, plan, extract, train_head):
            stage.main()

    def run(name: str, strategy: dict[str, Any], *, is_copied: bool = True, **changes: Any) -> Run:
        is_new, same = not Path("images").exists(), f"{name} {changes}"
        if is_new and is_copied and same in heads_alone:
            shutil.copytree(heads_alone[same], ".", dirs_exist_ok=True)
            is_new = False
        configure(name, **changes, fine_tune={"strategies": {"tuned": STRATEGY | strategy}})
        if is_new:
            prepare(name)
            if is_copied and name in (TINY, VIT):  # of other networks, the weights are large
                heads_alone[same] = tmp_path_factory.mktemp("heads_alone")
                shutil.copytree(".", heads_alone[same], dirs_exist_ok=True)
        else:
            plan.main()
        monkeypatch.setattr(sys, "argv", ["fine_tune", "tuned", "0"])
        fine_tune.main()
        return read_run("tuned", 0)

    return run


slow = partial(pytest.param, marks=pytest.mark.slow)
DENSENET = ("torchvision/densenet121", "features.norm0")  # with BatchNorm on both sides
BOUNDARIES = [  # with a learning rate
    (TINY, "layer2", 3e-3),
    slow("torchvision/resnet18", "layer3", 1e-3),
    slow("timm/tf_efficientnet_lite0", "blocks.5", 3e-3),
    slow(*DENSENET, 1e-3),
    slow(MOBILENET, "features.9", 3e-4),  # with dropout behind
]


@pytest.mark.parametrize(("name", "boundary", "rate"), BOUNDARIES)
def test_cache_gives_the_losses_of_the_whole_network_at_every_step(
    name: str, boundary: str, rate: float, tune: Tune, steps: list[float], computed: list[Row]
) -> None:
    strategy = {"freeze_until": boundary, "learning_rate_base": rate, "learning_rate_head": rate}
    whole = tune(name, strategy | {"boundary_cache": "off"})
    expected = steps.copy()
    steps.clear()
    computed.clear()
    cached = tune(name, strategy | {"boundary_cache": "on"})
    assert len(steps) == len(expected) == 3 * 3  # epochs, batches of 6 of 18 images
    assert abs(whole.curve[3]["val_loss"] - whole.curve[0]["val_loss"]) > 5e-3, "nothing is learnt"
    np.testing.assert_allclose(steps, expected, rtol=1e-3)
    assert cached.chosen == whole.chosen
    for key in ("train_loss", "val_loss"):
        curves = [[line[key] for line in run.curve[1:]] for run in (cached, whole)]
        # Where a kernel of this CPU rounds otherwise, training lets it grow; the predictions below may differ as much
        np.testing.assert_allclose(*curves, rtol=1e-3, atol=1e-3)
    for of_cached, of_whole in ((cached.val, whole.val), (cached.test, whole.test)):
        found, expected_values = of_cached.log_probability, of_whole.log_probability
        np.testing.assert_allclose(found, expected_values, atol=2e-3)
        assert np.array_equal(found.argmax(1), expected_values.argmax(1))
    # Two views to train on and two to look at, each once; whole: every image in every epoch
    assert len(computed) == len({*computed}) == N_IMAGES * 2
    head_passes = 18 * 2
    assert (cached.cost.base_passes, whole.cost.base_passes) == (head_passes + 18 * 2, head_passes + 18 * 3)
    backbone = backbones.load(BackboneChoice.of(name, "random", 0), SIZE)
    prefix, *_ = cuts.split(backbone, cuts.resolve(backbone, boundary))
    with torch.no_grad():
        row_bytes = prefix(torch.zeros(1, 3, SIZE, SIZE)).numel() * 4
    head_bytes = N_IMAGES * 2 * hdf5.read_features().values[0, 0].nbytes
    read_bytes = (cached.cost.cached_bytes, whole.cost.cached_bytes)
    assert read_bytes == (head_bytes + N_IMAGES * 2 * row_bytes, head_bytes)


def is_same_run(one: Run, other: Run) -> bool:
    curves = [[(line["epoch"], line["val_loss"]) for line in run.curve] for run in (one, other)]
    same = [
        np.array_equal(getattr(one, part).log_probability, getattr(other, part).log_probability)
        for part in ("val", "test")
    ]
    return curves[0] == curves[1] and all(same)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        {"mixup": 0.4},
        {"ema": 0.5},
        {"gradient_clipping": 0.1},
        {"views": "every_epoch", "augmentation": "medium"},
        {"learning_rates": [1e-3, [3e-4, 1e-2]]},
    ],
    ids=lambda recipe: next(iter(recipe)),
)
def test_parts_of_a_recipe_train_from_the_cache_as_through_the_whole_network(
    recipe: dict[str, Any], tune: Tune, steps: list[float]
) -> None:
    strategy = {"freeze_until": "layer2", "learning_rate_base": 3e-3, "learning_rate_head": 3e-3, "epochs": 2}
    plain = tune(TINY, strategy)
    steps.clear()
    whole = tune(TINY, strategy | recipe | {"boundary_cache": "off"})
    expected = steps.copy()
    steps.clear()
    cached = tune(TINY, strategy | recipe)
    np.testing.assert_allclose(steps, expected, rtol=1e-3, atol=1e-4)
    assert cached.chosen == whole.chosen
    np.testing.assert_allclose(cached.test.log_probability, whole.test.log_probability, atol=2e-3)
    assert is_same_run(cached, tune(TINY, strategy | recipe)), "the same bytes"
    assert not is_same_run(cached, plain), "it does nothing"
    # Before the first step the network is the cached head
    assert cached.curve[0]["val_loss"] == plain.curve[0]["val_loss"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), [(TINY, {"dropout": 0.5}), (VIT, {"drop_path": 0.5}), (TINY, EXPERT)])
def test_what_is_dropped_in_training_leaves_the_network_before_it_alone(
    name: str, recipe: dict[str, Any], tune: Tune
) -> None:
    strategy = {"freeze_until": "none", "learning_rate_base": 3e-3, "learning_rate_head": 3e-3, "epochs": 2}
    plain, dropping = tune(name, strategy), tune(name, strategy | recipe)
    assert dropping.curve[0] == plain.curve[0]
    assert not is_same_run(dropping, plain)
    assert is_same_run(dropping, tune(name, strategy | recipe))
    network, card = saved_networks.load_network(Path("models/tuned/seed_0.json"))
    assert not backbones.has_drop_path(network), "a saved network drops nothing"
    assert card.augmentation.flips == "both"


def test_every_epoch_has_a_view_of_its_own_at_boundary_zero_and_nothing_but_pixels_is_stored(
    tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(TINY, {"epochs": 1})
    shutil.rmtree("data/.feature_store")
    seen: list[set[int]] = []
    load = Loader.load

    def recorded(self: Loader, batches: Sequence[Sequence[Row]], **options: Any) -> Any:
        seen.append({view for batch in batches for _, view in batch})
        return load(self, batches, **options)

    monkeypatch.setattr(Loader, "load", recorded)
    tune(TINY, {"freeze_until": "none", "views": "every_epoch", "augmentation": "light", "epochs": 4})
    training = [views for views in seen if min(views) >= AUGMENTED]
    assert training == [{AUGMENTED + epoch} for epoch in range(1, 5)]
    (stored,) = Path("data/.feature_store").iterdir()
    assert {row for path in stored.glob("*.h5") for row in hdf5.read_shard(path).rows} == {
        (name, 0) for name in manifest.read_images().sha256
    }
    assert plans.read_strategy("tuned").recipe.augmentation.rotation_degrees == 5.0
    assert hdf5.read_features().provenance.augmentation.rotation_degrees == 0.0


@pytest.mark.slow
def test_learning_rates_are_chosen_on_validation_and_each_that_is_left_is_a_candidate(tune: Tune) -> None:
    rates, weak = [1e-5, [1e-3, 1e-2], 1e-4], {"regularization_strengths": [30.0]}  # a head from which one can learn
    alone = [
        tune(TINY, {"learning_rate_base": base, "learning_rate_head": head, "epochs": 2}, head=weak)
        for base, head in ((1e-5, 1e-5), (1e-3, 1e-2), (1e-4, 1e-4))
    ]
    best = min(alone, key=lambda run: min(line["val_loss"] for line in run.curve))
    assert alone.index(best) == 1
    assert best.chosen["epoch"] > 0
    found = tune(TINY, {"learning_rates": rates, "epochs": 2}, head=weak)
    assert is_same_run(found, best)
    assert found.chosen == best.chosen | {"learning_rates": [1e-3, 1e-2]}
    last = alone[2].curve  # each rate starts from the cached head
    assert found.other_curves == {"learning rate 1e-05": alone[0].curve, "learning rate 0.0001": last}
    assert found.candidates.names[0] == "learning rate 1e-05, epoch 0"
    assert len(found.candidates.names) == 1 + 3 * 2  # the start once
    assert len(found.other_curves) == 2
    nll = found.candidates.nll(manifest.read_labels().weight[found.val.rows])
    assert np.argmin(nll) == found.candidates.names.index(_candidate(found))
    head = read_run("feature_extraction", 0).cost
    assert found.cost.train_flops - head.train_flops > 2.5 * (best.cost.train_flops - head.train_flops)
    assert not [*Path("data/.checkpoints").iterdir()], "checkpoints of all are removed"


def _candidate(run: Run) -> str:
    base, head = run.chosen["learning_rates"]
    rates = f"learning rate {base:g}" if base == head else f"learning rates {base:g} and {head:g}"
    epoch = run.chosen["epoch"]
    return f"{rates}, epoch {epoch}" if epoch else run.candidates.names[0]


@pytest.mark.slow
def test_halving_starts_from_a_head_that_has_not_seen_what_is_set_aside(
    tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(TINY, {"epochs": 1})
    given: list[tuple[Examples, Examples]] = []
    starts: list[tuple[int, torch.Tensor]] = []
    fitted, train = heads.fit, fit.train

    def fit_head(head: nn.Sequential, one: Examples, other: Examples, options: HeadOptions) -> heads.Fitted:
        given.append((one, other))
        return fitted(head, one, other, options)

    def train_network(network: Any, task: fit.Task, *rest: Any) -> Any:
        starts.append((len(task.train), network[-1][-1].weight.clone()))
        return train(network, task, *rest)

    monkeypatch.setattr(heads, "fit", fit_head)
    monkeypatch.setattr(fit, "train", train_network)
    rates = {"learning_rates": [3e-6, 1e-4, 1e-3], "halving_keeps": 2, "halving_epochs": 1, "epochs": 1}
    tune(TINY, {"freeze_until": "layer2", **rates})
    labels, features = manifest.read_labels(), hdf5.read_features()
    rows = manifest.read_split(0, labels.image_id).rows("train")
    recipe = plans.read_strategy("tuned").recipe
    aside = learning_rates.set_aside(recipe, rows, labels.label, unit_of(labels), 0)
    ((one, other),) = given
    assert np.array_equal(one.label, labels.label[np.setdiff1d(rows, aside)])
    assert np.array_equal(other.label, labels.label[aside])
    np.testing.assert_allclose(other.features[:], features.evaluation[aside], rtol=1e-4, atol=1e-5)
    cached = load_file("models/feature_extraction/seed_0.safetensors")["head.2.weight"]
    for n, weight in starts:
        assert torch.equal(weight, cached) == (n == len(rows))
    assert [n == len(rows) for n, _ in starts] == [False] * 3 + [True] * 2


@pytest.mark.slow
def test_halving_with_a_head_that_starts_at_random_gives_the_same_bytes_again(tune: Tune) -> None:
    rates = {"learning_rates": [1e-3, 1e-2, 1e-1], "halving_keeps": 1, "halving_epochs": 1, "epochs": 2}
    found = []
    for state in (1, 2):  # of random numbers, which differs from process to process
        torch.manual_seed(state)
        found.append(tune(TINY, {"freeze_until": "layer2", **rates}, head={"kind": "mlp", "hidden": [8]}))
    assert is_same_run(*found)


@pytest.mark.slow
def test_halving_leaves_validation_untouched(tune: Tune) -> None:
    """Whatever the validation labels are, the same learning rates are left."""
    rates = [3e-6, 1e-4, 1e-3, 1e-2]
    strategy = {"freeze_until": "layer2", "learning_rates": rates, "epochs": 2, "halving_keeps": 2}

    def left() -> tuple[set[str], Run]:
        run = tune(TINY, strategy, runtime={"pixel_cache": "off"})
        return {name.partition(",")[0] for name in run.candidates.names}, run

    expected, first = left()
    assert len(expected) == 2
    labels, rows = Path("data/labels.csv"), first.val.rows
    lines = labels.read_text().splitlines()
    column = lines[0].split(",").index("label")
    changed = [line.split(",") for line in lines]
    values = [changed[row + 1][column] for row in rows]
    for row, value in zip(rows, values[1:] + values[:1], strict=True):
        changed[row + 1][column] = value
    labels.write_text("\n".join(map(",".join, changed)) + "\n")
    found, second = left()
    assert found == expected
    assert second.curve[0]["val_loss"] != first.curve[0]["val_loss"]


def test_a_learning_rate_that_explodes_is_left_out_with_a_warning_unless_it_is_the_only_one(
    tune: Tune, caplog: pytest.LogCaptureFixture
) -> None:
    found = tune(TINY, {"learning_rates": [1e30, 1e-3], "epochs": 1})
    assert found.chosen["learning_rates"] == [1e-3, 1e-3]
    assert "tuned-0 at learning rate 1e+30: the training loss is" in caplog.text
    assert found.candidates.names == ["epoch 0", "epoch 1"]
    with pytest.raises(ValueError, match=r"tuned-0 at learning rate 1e\+35: the training loss is"):
        tune(TINY, {"learning_rates": [1e30, 1e35], "epochs": 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "features", "boundary"), [(TINY, SEVERAL, "conv1"), (TINY, SEVERAL, "layer2"), (VIT, OF_VIT, "blocks.2")]
)
def test_cache_of_several_cuts_gives_the_losses_of_the_whole_network_at_every_step(
    name: str, features: dict[str, Any], boundary: str, tune: Tune, steps: list[float], computed: list[Row]
) -> None:
    strategy = {"freeze_until": boundary, "learning_rate_base": 3e-3, "learning_rate_head": 3e-3}
    whole = tune(name, strategy | {"boundary_cache": "off"}, features=features)
    expected = steps.copy()
    head = read_run("feature_extraction", 0)
    np.testing.assert_allclose(
        whole.curve[0]["val_loss"], head.candidates.nll(manifest.read_labels().weight[head.val.rows])[0], rtol=1e-4
    )
    steps.clear()
    computed.clear()
    cached = tune(name, strategy, features=features)
    assert len(steps) == len(expected) == 3 * 3
    losses = [line["val_loss"] for line in whole.curve]
    assert np.ptp(losses) > 0.05 * losses[0], "nothing is learnt"
    np.testing.assert_allclose(steps, expected, rtol=2e-3)
    for of_cached, of_whole in ((cached.val, whole.val), (cached.test, whole.test)):
        np.testing.assert_allclose(of_cached.log_probability, of_whole.log_probability, atol=2e-3)
    assert len(computed) == len({*computed}) == N_IMAGES * 2
    row_bytes = plans.read_strategy("tuned").cached_bytes_per_image
    assert cached.cost.cached_bytes - whole.cost.cached_bytes == N_IMAGES * 2 * row_bytes
    paths = [path for path in Path("data/.feature_store").glob("*/*.h5") if "pixels" not in path.parent.name]
    assert row_bytes in {4 * int(np.prod(hdf5.read_shard(path).shape)) for path in paths}


@pytest.mark.slow
def test_layout_of_several_cuts_is_in_the_provenance_and_their_shares_are_in_the_run_of_the_head(tune: Tune) -> None:
    tuned = tune(TINY, {"epochs": 1}, features=SEVERAL)
    features, head = hdf5.read_features(), read_run("feature_extraction", 0)
    backbone = backbones.load_planned(features.provenance.backbone, "the test")
    pieces = cuts.split(backbone, *(cuts.resolve(backbone, cut) for cut in SEVERAL["cut"]))
    x, widths = torch.zeros(1, 3, SIZE, SIZE), []
    for piece in pieces[:-1]:
        x = piece(x)
        widths.append(x.shape[1])
    layout = features.provenance.backbone.taps
    assert [tap.cut for tap in layout] == ["layer1.0.act2", "layer3.0.act3", "all"]
    assert [tap.width for tap in layout] == widths
    assert features.values.shape[2:] == (sum(widths),)
    assert [*head.network["widths"].values()] == widths
    assert sum(head.network["weight_shares"].values()) == pytest.approx(1)
    assert min(head.network["weight_shares"].values()) > 0
    assert "weight_shares" not in tuned.network


def test_boundary_of_densenet_has_batchnorm_on_both_sides() -> None:
    name, boundary = DENSENET
    backbone = backbones.load(BackboneChoice.of(name, "random", 0), SIZE)
    before, behind = (
        [module for module in piece.modules() if not any(module.children()) and any(True for _ in module.parameters())]
        for piece in cuts.split(backbone, boundary)
    )
    assert isinstance(before[-1], _BatchNorm)
    assert isinstance(behind[0], _BatchNorm)


@pytest.mark.parametrize("boundary", ["none", "layer2"])
@pytest.mark.parametrize("engine_name", ["torch", "openvino"])
def test_training_starts_with_the_figures_of_the_head_in_either_engine(
    boundary: str, engine_name: str, tune: Tune
) -> None:
    features = {"cut": "layer3", "pool": "avg", "engine": engine_name}
    first, *_ = tune(TINY, {"freeze_until": boundary, "epochs": 1}, features=features).curve
    (of_head,) = read_run("feature_extraction", 0).chosen["val_nll"].values()
    assert first["val_loss"] == pytest.approx(of_head, rel=1e-3)


def test_an_engine_that_gives_other_logits_than_torch_is_not_used(
    tune: Tune, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tune(TINY, {"epochs": 1})
    shutil.rmtree("reports/runs/tuned")
    run_openvino = engine._run_openvino

    def run(compiled: Any, pieces: Any) -> Iterator[np.ndarray]:
        for output in run_openvino(compiled, pieces):
            yield output if output.shape[1] > len(COLOURS) else 2 * output  # wrong logits, right features

    monkeypatch.setattr(engine, "_run_openvino", run)
    found = tune(TINY, {"epochs": 1}, features={"engine": "auto"})
    assert "torch runs it (it differs from torch by " in caplog.text
    np.testing.assert_allclose(found.val.log_probability, expected.val.log_probability, atol=1e-4)


def rows_of(part: str, views: Sequence[int]) -> list[Row]:
    images = manifest.read_images()
    rows = manifest.read_split(0, images.image_id).rows(part)
    return [(images.sha256[row], view) for row in rows for view in views]


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["all", "layer3", ["layer1", "layer3"], "every_block"])
def test_all_frozen_is_feature_extraction_with_augmentation_from_the_same_rows(
    cut: str | list[str], tune: Tune, computed: list[Row]
) -> None:
    features = {"cut": cut, "pool": "none" if cut == "all" else "avg"}
    first = tune(TINY, {"freeze_until": "all", "views": 1, "epochs": 1}, is_copied=False, features=features)
    extracted = [row for part in ("train", "val", "test") for row in rows_of(part, range(2))]
    assert sorted(computed) == sorted(extracted)  # by extract, and none by fine_tune
    assert first.cost.trainable_params == sum(parameter.numel() for parameter in head_of_run().parameters())
    computed.clear()
    tune(TINY, {"freeze_until": "all", "views": 3}, features=features)
    assert sorted(computed) == sorted(rows_of("train", (2, 3)))


def head_of_run() -> nn.Module:
    network, _ = saved_networks.load_network(Path("models/tuned/seed_0.json"))
    return network[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "features", "head", "strategy"),
    [
        (TINY, {"cut": "all"}, {}, {"freeze_until": 5}),
        (TINY, {"cut": "all"}, {}, {"init": "random", "batchnorm": "train"}),
        (TINY, {"cut": "layer3", "pool": "avg"}, {}, {"freeze_until": "layer2"}),
        (TINY, {"cut": "layer3", "pool": "avg", "engine": "openvino"}, {}, {"freeze_until": "layer2"}),
        (TINY, {"cut": 8, "pool": "flatten", "store_dtype": "fp16"}, {}, {"freeze_until": "all"}),
        (TINY, {"cut": "layer3", "pool": "avg"}, {}, {"init": "random", "batchnorm": "train"}),
        slow(MOBILENET, {"cut": "flatten"}, PRETRAINED, {"freeze_until": "features.9"}),
        (TINY, SEVERAL, {}, {"freeze_until": "layer1", "batchnorm": "train"}),
        slow(TINY, SEVERAL | {"engine": "openvino", "store_dtype": "fp16"}, {}, {"freeze_until": "layer3"}),
        (TINY, {"cut": ["layer1", "layer3"], "pool": "flatten"}, {}, {}),
        (TINY, {"cut": "every_block", "pool": "avg"}, {}, {"init": "random", "batchnorm": "train"}),
        (TINY, SEVERAL, {"kind": "mlp", "hidden": [8]}, {"freeze_until": "all"}),
        (VIT, OF_VIT, {}, {"freeze_until": "blocks.2"}),
        slow(VIT, OF_VIT | {"cut": "every_block", "engine": "openvino"}, {}, {"freeze_until": "blocks.4"}),
        slow(SWIN, {"cut": "all"}, {}, {"freeze_until": "layers.2"}),  # its graph holds constants
        slow(VIT, {"cut": "norm", "pool": "cls+avg", "resize": "squash"}, {}, {"freeze_until": "blocks.2"}),
        slow(VIT, {"cut": "norm", "pool": "avg", "resize": "pad"}, {}, {"init": "random", "batchnorm": "train"}),
        slow(MOBILENET, {"cut": "flatten"}, PRETRAINED, {"init": "random", "batchnorm": "train"}),
    ],
)
def test_saved_runs_load_and_predict_what_they_predicted(
    name: str, features: dict[str, Any], head: dict[str, Any], strategy: dict[str, Any], tune: Tune
) -> None:
    tune(name, strategy, features=features, head=head)
    labels = manifest.read_labels()
    for run in (read_run("feature_extraction", 0), read_run("tuned", 0)):
        paths = [Path("images", labels.image_id[row]) for row in run.test.rows]
        card_path = Path("models", run.strategy, "seed_0.json")
        network = inference.open_network(card_path, len(paths), has_distances=True, engine_name="torch")
        found = [answer.log_probability for answer in inference.run(network, paths, 0)]
        np.testing.assert_allclose(np.exp(np.stack(found)), np.exp(run.test.log_probability), atol=1e-3)
        validated = [Path("images", labels.image_id[row]) for row in run.val.rows]
        away = sorted(answer.distance for answer in inference.run(network, validated, 0))
        assert network.novelty is not None
        np.testing.assert_allclose(away, network.novelty.validation, rtol=0.02)
        val = run.val.log_probability, labels.label[run.val.rows], labels.weight[run.val.rows]
        assert network.card.temperature == calibration.temperature(*val)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("features", "strategy"),
    [
        ({"cut": "all"}, {"freeze_until": "layer2"}),
        ({"cut": "all"}, {"freeze_until": "layer2", "boundary_cache": "off"}),
        ({"cut": "all", "store_dtype": "fp16"}, {"freeze_until": "all", "views": 0}),
        ({"cut": "layer3", "pool": "avg"}, {"freeze_until": "none"}),
        ({"cut": "layer3", "pool": "avg"}, {"init": "random", "batchnorm": "train"}),
    ],
    ids=["cached", "not cached", "head alone", "whole base", "random"],
)
def test_cost_is_that_of_the_prefix_and_of_suffix_and_head_counted_together(
    features: dict[str, Any], strategy: dict[str, Any], tune: Tune
) -> None:
    run = tune(TINY, {"freeze_until": "none", "epochs": 2} | strategy, features=features)
    backbone = backbones.load(BackboneChoice.of(TINY, "random", 0), SIZE)
    end = cuts.resolve(backbone, features["cut"])
    boundary = cuts.resolve(backbone, strategy.get("freeze_until", "none"))
    boundary, pools = end if boundary == "all" else boundary, {end: cuts.Pool(features.get("pool", "none"), 0)}
    prefix, suffix = cuts.prefix_and_suffix(backbone, boundary, pools)
    trained = nn.Sequential(suffix, head_of_run()).eval().requires_grad_(True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        activation = prefix.module(torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8))
    prefix_flops = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        trained(activation).sum().backward()
    is_cached = strategy.get("boundary_cache") != "off" and boundary != "none"
    n_views = 1 if strategy.get("views") == 0 else 2
    passes = 18 * (n_views if is_cached else 2)
    n_read = 18 * n_views + 12 * 2 if is_cached else 0
    value_bytes = 2 if features.get("store_dtype") == "fp16" else 4
    head = read_run("feature_extraction", 0).cost
    before = (0, 0, 0) if strategy.get("init") else (head.train_flops, head.base_passes, head.cached_bytes)
    assert run.cost.trainable_params == sum(parameter.numel() for parameter in trained.parameters())
    assert run.cost.train_flops == before[0] + passes * prefix_flops + 2 * 18 * counter.get_total_flops()
    assert run.cost.base_passes == before[1] + passes
    assert run.cost.cached_bytes == before[2] + n_read * value_bytes * activation.numel()
    assert run.network["params"] == sum(p.numel() for part in (prefix.module, trained) for p in part.parameters())


def test_cost_of_the_head_is_that_of_the_base_and_of_its_products(tune: Tune) -> None:
    tune(TINY, {"epochs": 1})
    cost, features = read_run("feature_extraction", 0).cost, hdf5.read_features()
    backbone = backbones.load(BackboneChoice.of(TINY, "random", 0), SIZE)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.module(torch.zeros(1, 3, SIZE, SIZE))
    width = features.values.shape[2]
    assert cost.trainable_params == 3 * (width + 1)
    assert (cost.base_passes, cost.cached_bytes) == (18 * 2, N_IMAGES * 2 * 4 * width)
    passes, rest = divmod(cost.train_flops - 36 * counter.get_total_flops(), 2 * 2 * 3 * width * 36)
    assert (passes > 1, rest) == (True, 0), "whole passes over the rows, forward and for the gradient of the weights"


def test_runs_hold_every_candidate_and_their_validation_is_the_one_that_all_of_validation_chooses(tune: Tune) -> None:
    tuned = tune(TINY, {"epochs": 2}, head={"regularization_strengths": [0.1, 0.01]})
    head = read_run("feature_extraction", 0)
    assert tuned.candidates.names == ["epoch 0", "epoch 1", "epoch 2"]
    assert head.candidates.names == ["0.1", "0.01"]
    assert {"strength", "at_end", "val_nll", "not_converged"} == head.chosen.keys()
    weight = manifest.read_labels().weight
    for run in (tuned, head):
        best = int(np.argmin(run.candidates.nll(weight[run.val.rows])))
        assert np.array_equal(run.candidates.predicted[best], run.val.log_probability.argmax(1))


def test_every_stage_sets_its_own_number_of_threads(tune: Tune) -> None:
    tune(TINY, {"epochs": 1})  # with `threads: 1`
    for stage in (extract, train_head, fine_tune):
        torch.set_num_threads(2)  # what the environment says
        stage.main()
        assert torch.get_num_threads() == 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [{"freeze_until": "none"}, {"freeze_until": "layer2"}], ids=["images", "cached"])
def test_a_run_on_the_cpu_makes_no_context_on_a_gpu_that_is_there(
    strategy: dict[str, Any], tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("CUDA is initialised")

    monkeypatch.setattr("torch.cuda._lazy_init", refuse)  # which comes before whatever makes a context
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    tune(TINY, strategy | {"epochs": 1}, runtime={"device": "cpu", "workers": 1})
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("stage", ["extract", "fine_tune"])
def test_weights_that_differ_from_the_plan_are_refused_in_one_line(stage: str, tune: Tune) -> None:
    tune(TINY, {"epochs": 1})
    written = {path: path.read_bytes() for path in Path("models").rglob("*.json")}
    network = backbones.load(BackboneChoice.of(TINY, "random", 1), SIZE).module
    save_file(network.state_dict(), "data/weights/own.safetensors")
    main = extract.main if stage == "extract" else fine_tune.main
    with pytest.raises(
        ValueError, match=r"^data/plan/backbone\.json: made with other weights of .*run: dvc repro"
    ) as caught:
        main()
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in Path("models").rglob("*.json")} == written


def test_a_head_on_another_backbone_than_the_plans_is_refused(tune: Tune) -> None:
    tune(TINY, {"epochs": 1})
    network = backbones.load(BackboneChoice.of(TINY, "random", 1), SIZE).module
    save_file(network.state_dict(), "data/weights/own.safetensors")
    plan.main()
    with pytest.raises(
        ValueError, match=r"seed_0\.json: fitted on features of another backbone; run: dvc repro train_head"
    ):
        fine_tune.main()


@pytest.mark.slow
def test_rounding_of_the_cache_is_reported(tune: Tune) -> None:
    run = tune(TINY, {"freeze_until": "layer2"}, features={"store_dtype": "fp16"})
    assert 0 < run.network["largest_rounding"] < 1e-3
    assert run.network["boundary"].startswith("layer2.")
    assert 0 < read_run("feature_extraction", 0).network["largest_rounding"] < 1e-3
    assert tune(TINY, {"freeze_until": "layer2", "boundary_cache": "off"}).network["largest_rounding"] == 0


def test_the_store_lies_where_params_yaml_says(tune: Tune) -> None:
    tune(TINY, {"freeze_until": "all"}, runtime={"store": "elsewhere"})
    assert [*Path("elsewhere").glob("*/*.h5")]


@pytest.mark.slow
def test_the_whole_network_trains_on_pixels_without_opening_an_image_file(tune: Tune) -> None:
    model, whole = Path("models/tuned/seed_0.safetensors"), {"freeze_until": "none"}
    augmentation = {"noise_std": 3.0}
    tune(TINY, whole, augmentation=augmentation, runtime={"pixel_cache": "off"})
    expected = model.read_bytes()
    tune(TINY, whole, augmentation=augmentation)
    assert model.read_bytes() == expected
    for path in Path("images").rglob("*.*"):
        path.unlink()
    tune(TINY, whole, augmentation=augmentation)
    assert model.read_bytes() == expected
    with pytest.raises(ValueError, match="No such file"):
        tune(TINY, whole, augmentation=augmentation, runtime={"pixel_cache": "off"})


def test_cache_over_the_budget_is_refused_with_the_ways_out(tune: Tune, computed: list[Row]) -> None:
    tune(TINY, {"freeze_until": "all"})
    computed.clear()
    with pytest.raises(ValueError, match=r"store_max_gb: 1e-06, but the cache at layer1.* needs .* GB; .* off"):
        tune(TINY, {"freeze_until": "layer1"}, runtime={"store_max_gb": 1e-6})
    assert computed == []


OUTPUTS = ("models/tuned", "reports/runs/tuned")


def outputs() -> dict[str, bytes]:
    """What the stage wrote, by path; then deleted, as by DVC before a stage starts.

    Without what a kill leaves of a file that was being written, which git and DVC ignore.
    """
    paths = [path for out in OUTPUTS for path in Path(out).rglob("*") if path.is_file() and path.suffix != ".tmp"]
    found = {str(path): path.read_bytes() for path in paths}
    for out in OUTPUTS:
        shutil.rmtree(out, ignore_errors=True)
    return found


INTERRUPTED: dict[str, dict[str, Any]] = {
    "cached": {"freeze_until": "layer2"},
    "whole": {"batchnorm": "train", "optimizer": "adamw"},
    "random": {"init": "random", "batchnorm": "train", "views": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "features"),
    [*((strategy, {}) for strategy in INTERRUPTED.values()), (INTERRUPTED["cached"], SEVERAL)],
    ids=[*INTERRUPTED, "several cuts"],
)
def test_interrupted_run_goes_on_with_the_same_bytes_and_leaves_no_checkpoint(
    strategy: dict[str, Any], features: dict[str, Any], tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(TINY, strategy, features=features)
    expected, step, n_steps = outputs(), fit._step, 0

    def interrupted(*arguments: Any) -> torch.Tensor:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 8:  # in the third epoch of three steps
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(fit, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fine_tune.main()
    assert len([*Path("data/.checkpoints").iterdir()]) == 1
    fine_tune.main()
    assert outputs() == expected
    assert n_steps == 8 + 3
    assert [*Path("data/.checkpoints").iterdir()] == []


OTHER_RUNS: dict[str, dict[str, Any]] = {
    "recipe": {"fine_tune": {"strategies": {"tuned": STRATEGY | {"weight_decay": 0.02}}}},
    "split": {"split": {"val_fraction": 0.3}},
    "views of evaluation": {"evaluation": {"views": ["identity"]}},
    "engine": {"features": {"engine": "openvino"}},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [slow(each) if "features" in each else each for each in OTHER_RUNS.values()], ids=OTHER_RUNS
)
def test_checkpoint_of_another_run_is_not_used(
    changes: dict[str, Any], tune: Tune, steps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Path("data/.checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine_tune.checkpoints, "remove", lambda _: None)  # as if it were killed just before
        tune(TINY, {})
    assert len([*kept.iterdir()]) == 1
    configure(TINY, **{"fine_tune": {"strategies": {"tuned": STRATEGY}}} | changes)
    for stage in (split, plan, extract, train_head):
        monkeypatch.setattr(sys, "argv", ["a stage"])
        stage.main()
    steps.clear()
    monkeypatch.setattr(sys, "argv", ["fine_tune", "tuned", "0"])
    fine_tune.main()
    assert len(steps) >= 2 * 3, "it starts at the beginning"
    assert len([*kept.iterdir()]) == 1


def in_a_process(main: Callable[[], None]) -> int:
    """The process id of a copy of this process that runs `main`, and nothing of pytest."""
    process = os.fork()
    if not process:
        try:
            main()
            os._exit(0)
        finally:
            os._exit(1)
    return process


def killed_in_step(number: int) -> None:
    """Run the stage until it is killed in this training step; not at all for 0, which is between two steps."""
    step, n_steps = fit._step, 0

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal n_steps
        n_steps += 1
        if n_steps == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments)

    fit._step = counted
    fine_tune.main()


@pytest.mark.end_to_end
def test_run_that_is_killed_at_any_moment_ends_with_the_same_bytes(tune: Tune, steps: list[float]) -> None:
    tune(TINY, INTERRUPTED["whole"])
    expected, random_moment, n_all = outputs(), random.Random(0), len(steps)
    assert n_all == 3 * 3
    for kill in range(20):
        outputs()
        steps.clear()
        number = kill + 1 if kill < n_all else 0
        process = in_a_process(partial(killed_in_step, number))
        if not number:  # at a moment that the clock chooses: while a checkpoint is written, for example
            time.sleep(random_moment.uniform(0, 2))
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        steps.clear()
        fine_tune.main()
        assert outputs() == expected
        assert [*Path("data/.checkpoints").iterdir()] == []
        if number:
            assert len(steps) == n_all - 3 * ((number - 1) // 3), "whole epochs are not trained again"
