"""fine_tune: training from cached activations is training through the whole network, on the stages' own path."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.dataset import manifest
from pipeline.features import hdf5
from pipeline.features.hdf5 import Row
from pipeline.network import backbones, cuts
from pipeline.params import BackboneChoice
from pipeline.stages import extract, fine_tune, index, split, train_head
from pipeline.tools import predict
from pipeline.training import fit, models
from pipeline.training.models import Run

REPOSITORY = Path(__file__).parents[2]
SIZE = 32
COLOURS = {"blue": (90, 100, 140), "green": (90, 140, 100), "red": (140, 100, 90)}
N_IMAGES = 30
TINY, MOBILENET = "timm/test_resnet", "torchvision/mobilenet_v3_small"
SWIN = "timm/swin_tiny_patch4_window7_224"
PRETRAINED = {"kind": "pretrained", "standardize": False, "dropout": 0.2}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Grows by the loss of every training step."""
    losses: list[float] = []
    step = training._step

    def recorded(*arguments: Any) -> tuple[float, float]:
        sums = step(*arguments)
        losses.append(sums[0])
        return sums

    monkeypatch.setattr(training, "_step", recorded)
    return losses


def make_weights(name: str) -> None:
    """Random weights whose BatchNorm statistics fit them, more or less: neither 0 and 1, nor those of a batch."""
    network = backbones.load(BackboneChoice(name=name, weights="random", seed=0), SIZE).module
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


STRATEGY = {
    "init": "cached_head",
    "freeze_until": "none",
    "boundary_cache": "on",
    "batchnorm": "frozen",
    "views": 2,
    "epochs": 3,
    "patience": 3,
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
    "threads": 1,
}
Tune = Callable[..., Run]


def configure(name: str, **changes: Any) -> None:
    """params.yaml of the repository, with sizes for which the stages take seconds, and sections changed."""
    yaml = YAML()
    params = yaml.load(REPOSITORY / "params.yaml")
    sections: dict[str, dict[str, Any]] = {
        "dataset": {"fetch": [], "path": "images"},
        "split": {"seeds": [0], "test_fraction": 0.2, "val_fraction": 0.2},
        "backbone": {"name": name, "weights": "own.safetensors"},
        "features": {"views": 2, "image_size": SIZE, "engine": "torch"},
        "evaluation": {"views": 2},
        "head": {"strengths": [0.1], "threads": 1, "epochs": 2},
        "fine_tune": {"run": ["tuned"], "seeds": [0], "strategies": {"tuned": STRATEGY}},
        "compare": {"guard": {}},
        "runtime": {"device": "cpu", "workers": 0},
    }
    for section, values in sections.items():
        params[section].update(values | changes.get(section, {}))
    yaml.dump(params, Path("params.yaml"))


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tune:
    """Run every stage up to fine_tune in a directory of its own, whatever was done before included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)

    def run(name: str, strategy: dict[str, Any], **changes: Any) -> Run:
        fine_tuning = {"strategies": {"tuned": STRATEGY | strategy}}
        is_new = not Path("images").exists()
        configure(name, **changes, fine_tune=fine_tuning)
        if is_new:
            make_images(Path("images"))
            make_weights(name)
            monkeypatch.setattr(sys, "argv", ["index"])
            for stage in (index, split, extract, train_head):
                stage.main()
        monkeypatch.setattr(sys, "argv", ["fine_tune", "tuned", "0"])
        fine_tune.main()
        return artifacts.read_run("tuned", 0)

    return run


DENSENET = ("torchvision/densenet121", "features.norm0")  # with BatchNorm on both sides
BOUNDARIES = [  # with a learning rate
    ("torchvision/resnet18", "layer3", 1e-3),
    ("timm/tf_efficientnet_lite0", "blocks.5", 3e-3),
    (*DENSENET, 1e-3),
    (MOBILENET, "features.9", 3e-4),  # with dropout behind
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
    assert abs(whole.curve[3]["val_loss"] - whole.curve[0]["val_loss"]) > 0.01, "nothing is learnt"
    np.testing.assert_allclose(steps, expected, rtol=1e-3)
    assert cached.chosen == whole.chosen
    for key in ("train_loss", "val_loss"):
        curves = [[line[key] for line in run.curve[1:]] for run in (cached, whole)]
        # Where a kernel of this CPU rounds otherwise, training lets it grow; the logits below may differ as much
        np.testing.assert_allclose(*curves, rtol=1e-3, atol=1e-3)
    for of_cached, of_whole in ((cached.val_logits, whole.val_logits), (cached.test_logits, whole.test_logits)):
        np.testing.assert_allclose(of_cached, of_whole, atol=2e-3)
        assert np.array_equal(of_cached.argmax(1), of_whole.argmax(1))
    # Two views to train on and two to look at, each once; whole: every image in every epoch
    assert len(computed) == len({*computed}) == N_IMAGES * 2
    head_passes = 18 * 2
    assert (cached.cost.base_passes, whole.cost.base_passes) == (head_passes + 18 * 2, head_passes + 18 * 3)
    backbone = backbones.load(BackboneChoice(name=name, weights="random", seed=0), SIZE)
    prefix, *_ = cuts.split(backbone, cuts.resolve(backbone, boundary))
    with torch.no_grad():
        row_bytes = prefix(torch.zeros(1, 3, SIZE, SIZE)).numel() * 4
    head_bytes = N_IMAGES * 2 * hdf5.read_features().values[0, 0].nbytes
    read_bytes = (cached.cost.cached_bytes, whole.cost.cached_bytes)
    assert read_bytes == (head_bytes + N_IMAGES * 2 * row_bytes, head_bytes)


def test_boundary_of_densenet_has_batchnorm_on_both_sides() -> None:
    name, boundary = DENSENET
    backbone = backbones.load(BackboneChoice(name=name, weights="random", seed=0), SIZE)
    before, behind = (
        [module for module in piece.modules() if not any(module.children()) and any(True for _ in module.parameters())]
        for piece in cuts.split(backbone, boundary)
    )
    assert isinstance(before[-1], _BatchNorm)
    assert isinstance(behind[0], _BatchNorm)


def rows_of(part: str, views: Sequence[int]) -> list[Row]:
    images = manifest.read_images()
    rows = manifest.read_split(0, images.image_id).rows(part)
    return [(images.sha256[row], view) for row in rows for view in views]


@pytest.mark.parametrize("cut", ["all", "layer3"])
def test_all_frozen_is_feature_extraction_with_augmentation_from_the_same_rows(
    cut: str, tune: Tune, computed: list[Row]
) -> None:
    features = {"cut": cut, "pool": "none" if cut == "all" else "avg"}
    first = tune(TINY, {"freeze_until": "all", "views": 1, "epochs": 1}, features=features)
    extracted = [row for part in ("train", "val", "test") for row in rows_of(part, range(2))]
    assert sorted(computed) == sorted(extracted)  # by extract, and none by fine_tune
    assert first.cost.trainable_params == sum(parameter.numel() for parameter in head_of_run().parameters())
    computed.clear()
    tune(TINY, {"freeze_until": "all", "views": 3}, features=features)
    assert sorted(computed) == sorted(rows_of("train", (2, 3)))


def head_of_run() -> nn.Module:
    network, _ = artifacts.load_network(Path("models/tuned/seed_0.json"))
    return network[1]


@pytest.mark.parametrize(
    ("name", "features", "head", "strategy"),
    [
        (TINY, {"cut": "all"}, {}, {"freeze_until": 5}),
        (TINY, {"cut": "all"}, {}, {"init": "random", "batchnorm": "train"}),
        (TINY, {"cut": "layer3", "pool": "avg"}, {}, {"freeze_until": "layer2"}),
        (TINY, {"cut": 8, "pool": "flatten", "store_dtype": "fp16"}, {}, {"freeze_until": "all"}),
        (TINY, {"cut": "layer3", "pool": "avg"}, {}, {"init": "random", "batchnorm": "train"}),
        (MOBILENET, {"cut": "flatten"}, PRETRAINED, {"freeze_until": "features.9"}),
        (SWIN, {"cut": "all"}, {}, {"freeze_until": "layers.2"}),  # its graph holds constants
        (MOBILENET, {"cut": "flatten"}, PRETRAINED, {"init": "random", "batchnorm": "train"}),
    ],
)
def test_saved_runs_load_and_say_what_they_said(
    name: str, features: dict[str, Any], head: dict[str, Any], strategy: dict[str, Any], tune: Tune
) -> None:
    tune(name, strategy, features=features, head=head)
    labels = manifest.read_labels()
    for run in (artifacts.read_run("feature_extraction", 0), artifacts.read_run("tuned", 0)):
        paths = [Path("images", labels.image_id[row]) for row in run.test_rows]
        predictions, failures = predict.predict(Path("models", run.strategy, "seed_0.json"), paths)
        assert failures == []
        found = [entry["probability"] for entry in predictions]
        np.testing.assert_allclose(found, np.exp(run.test_logits).max(1), atol=1e-3)
        assert [entry["class"] for entry in predictions] == [labels.class_names[i] for i in run.test_logits.argmax(1)]


def test_rounding_of_the_cache_is_reported(tune: Tune) -> None:
    run = tune(TINY, {"freeze_until": "layer2"}, features={"store_dtype": "fp16"})
    assert 0 < run.network["largest_rounding"] < 1e-3
    assert run.network["boundary"].startswith("layer2.")
    assert 0 < artifacts.read_run("feature_extraction", 0).network["largest_rounding"] < 1e-3
    assert tune(TINY, {"freeze_until": "layer2", "boundary_cache": "off"}).network["largest_rounding"] == 0


@pytest.mark.parametrize(
    ("features", "strategy", "expected"),
    [
        ({}, {"freeze_until": "layer9"}, "fine_tune.strategies.tuned.freeze_until: 'layer9' holds no cut point"),
        ({}, {"freeze_until": 4}, "fine_tune.strategies.tuned.freeze_until: no cut point of timm/test_resnet has"),
        (
            {"cut": "layer2", "pool": "avg"},
            {"freeze_until": "layer3"},
            "fine_tune.strategies.tuned.freeze_until: layer3",
        ),
        ({"cut": "layer9"}, {}, "features.cut: 'layer9' holds no cut point"),
        ({"cut": "layer3"}, {}, "features.pool: the features at features.cut have the shape"),
        ({"pool": "avg"}, {}, "features.pool: avg, but features.cut gives vectors; expected none"),
    ],
)
def test_boundary_that_makes_no_sense_is_one_line_with_its_key(
    features: dict[str, Any], strategy: dict[str, Any], expected: str, tune: Tune
) -> None:
    with pytest.raises(ValueError, match=r"^params\.yaml: ") as caught:
        tune(TINY, strategy, features=features)
    assert str(caught.value).startswith(f"params.yaml: {expected}")
    assert "\n" not in str(caught.value)


def test_cache_over_the_budget_is_refused_with_the_ways_out(tune: Tune, computed: list[Row]) -> None:
    tune(TINY, {"freeze_until": "all"})
    computed.clear()
    with pytest.raises(ValueError, match=r"store_max_gb: 1e-06, but the cache at layer1.* needs .* GB; .* off"):
        tune(TINY, {"freeze_until": "layer1"}, runtime={"store_max_gb": 1e-6})
    assert computed == []
