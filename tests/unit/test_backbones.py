"""backbones: names and weights, and what is said where they do not fit together."""

import os
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from pipeline.network import backbones
from pipeline.network.backbones import Backbone
from pipeline.params import BackboneChoice

SMALL = "torchvision/squeezenet1_1"
SIZE = 64


def load(name: str = SMALL, weights: str = "random", seed: int = 0, size: int | None = SIZE) -> Backbone:
    return backbones.load(BackboneChoice(name=name, weights=weights, seed=seed), size)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """data/weights/ of an empty repository, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "weights"
    folder.mkdir(parents=True)
    return folder


def whole(name: str, **options: Any) -> torch.nn.Module:
    """A network with its classification layer, with weights that `random` does not give."""
    library, _, model = name.partition("/")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        if library == "timm":
            return timm.create_model(model, **options)
        return torchvision.models.get_model(model, **options)


def test_random_weights_are_those_of_the_seed() -> None:
    first, again, other = load(seed=0), load(seed=0), load(seed=1)
    assert first.weights_sha256 == again.weights_sha256
    assert first.weights_sha256 != other.weights_sha256


def test_loading_leaves_the_random_numbers_of_the_process_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_backbone_is_in_evaluation_mode_with_nothing_trainable() -> None:
    module = load("timm/resnet10t").module
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_width_is_measured_not_looked_up() -> None:
    assert load("timm/mobilenetv3_small_100").feature_dim == 1024  # its num_features says 576


def test_digest_sees_one_changed_number() -> None:
    module = load().module
    before = backbones.state_sha256(module)
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1
    assert backbones.state_sha256(module) != before


def test_bundled_weights_are_not_random() -> None:
    name = "timm/tf_efficientnet_lite0"
    bundled = load(name, "bundled")
    assert bundled.weights_sha256 == load(name, "bundled", seed=1).weights_sha256
    assert bundled.weights_sha256 != load(name, "random").weights_sha256


def test_bundled_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bundled exists of timm/tf_efficientnet_lite0 only, not of .*squeezenet1_1"):
        load(SMALL, "bundled")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("torchvision/resnet19", "torchvision/resnet18"), ("timm/tf_efficientnet_lit0", "timm/tf_efficientnet_lite0")],
)
def test_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"backbone\.name: {name} is not in .*; nearest: .*{nearest}") as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [SMALL, "timm/resnet10t"])
def test_image_size_replaces_the_size_and_keeps_the_rest_of_the_preprocessing(name: str) -> None:
    published, own = load(name, size=None).preprocessing, load(name, size=96).preprocessing
    assert own.crop == 96
    assert own.resize == tuple(round(side * 96 / published.crop) for side in published.resize)
    kept = {"interpolation", "mean", "std"}
    assert own.model_dump(include=kept) == published.model_dump(include=kept)


def test_image_size_that_the_network_does_not_take_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"features\.image_size: .*alexnet takes no images of 16 px") as caught:
        load("torchvision/alexnet", size=16)
    assert "\n" not in str(caught.value)


def saved(kind: str, state: dict[str, torch.Tensor], folder: Path) -> str:
    """Write a state dict as people's training programs do; the name of the file."""
    if kind == "safetensors":
        save_file(state, folder / "own.safetensors")
        return "own.safetensors"
    content: dict[str, Any] = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state, "optimizer": {"lr": 0.1}},
        "module.": {f"module.{key}": value for key, value in state.items()},
        "compiled": {"model": {f"_orig_mod.{key}": value for key, value in state.items()}},
    }[kind]
    torch.save(content, folder / "own.pth")
    return "own.pth"


@pytest.mark.parametrize("kind", ["safetensors", "plain", "state_dict", "model", "module.", "compiled"])
@pytest.mark.parametrize("name", [SMALL, "timm/resnet10t"])
def test_weights_file_gives_the_network_that_it_came_from(weights: Path, kind: str, name: str) -> None:
    network = whole(name)
    loaded = load(name, saved(kind, network.state_dict(), weights))
    network.eval()
    ours, theirs = loaded.module.state_dict(), network.state_dict()
    assert ours.keys() <= theirs.keys()
    assert ours
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    again = load(name, saved("safetensors", ours, weights))  # what is left when the classifier is gone
    assert again.weights_sha256 == loaded.weights_sha256


@pytest.mark.parametrize("name", [SMALL, "torchvision/mobilenet_v3_small", "timm/resnet10t"])
def test_classifier_of_another_width_in_the_file_does_not_matter(weights: Path, name: str) -> None:
    network = whole(name, num_classes=7)
    loaded = load(name, saved("plain", network.state_dict(), weights))
    theirs = network.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in loaded.module.state_dict().items())


def test_missing_and_unexpected_tensors_are_named(weights: Path) -> None:
    state = whole(SMALL).state_dict()
    state["features.0.extra"] = state.pop("features.0.weight")
    with pytest.raises(ValueError, match="weights of another network") as caught:
        load(SMALL, saved("plain", state, weights))
    assert "data/weights/own.pth" in str(caught.value)
    assert "missing: features.0.weight" in str(caught.value)
    assert "unexpected: features.0.extra" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_shapes_are_named_with_what_is_wanted(weights: Path) -> None:
    state = whole(SMALL).state_dict()
    state["features.0.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"wrong shape: features\.0\.bias \(3,\) instead of \(64,\)"):
        load(SMALL, saved("plain", state, weights))


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("wrapped", [False, True])
def test_pickle_with_code_is_refused_and_not_run(weights: Path, wrapped: bool) -> None:
    torch.save({"state_dict": whole(SMALL).state_dict(), "x": Code()} if wrapped else Code(), weights / "own.pth")
    with pytest.raises(
        ValueError, match=r"data/weights/own\.pth: no weights file, or one that holds more than tensors"
    ):
        load(SMALL, "own.pth")
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["own.safetensors", "own.pth"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02K\x01.", b"\xff" * 100])
def test_file_that_holds_no_weights_is_one_line(weights: Path, name: str, content: bytes) -> None:
    (weights / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"data/weights/{name}: no ") as caught:
        load(SMALL, name)
    assert "\n" not in str(caught.value)


def test_other_endings_are_refused(weights: Path) -> None:
    (weights / "own.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"own\.bin: expected \.safetensors, \.pth or \.pt"):
        load(SMALL, "own.bin")


@pytest.mark.parametrize("is_link", [False, True])
def test_weights_outside_the_weights_directory_are_refused(weights: Path, is_link: bool) -> None:
    save_file(whole(SMALL).state_dict(), weights.parent / "own.safetensors")
    (weights / "link.safetensors").symlink_to("../own.safetensors")
    with pytest.raises(ValueError, match="is no file below data/weights/"):
        load(SMALL, "link.safetensors" if is_link else "../own.safetensors")


@pytest.mark.parametrize("error", [OSError("no route to host"), urllib.error.URLError("no\nroute to host")])
@pytest.mark.parametrize(
    ("name", "loader"), [(SMALL, "torchvision.models.get_model"), ("timm/resnet10t", "timm.create_model")]
)
def test_published_weights_without_a_network_are_one_line_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, name: str, loader: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loader, fail)
    with pytest.raises(ValueError, match=rf"the published weights of {name} could not be had .*no route") as caught:
        load(name, "default")
    assert "data/weights/" in str(caught.value)
    assert "\n" not in str(caught.value)
