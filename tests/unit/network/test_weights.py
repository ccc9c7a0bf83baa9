"""weights: files from anywhere give the network that they come from, or one line that says why not."""

import os
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


def load(name: str, weights: str) -> Backbone:
    return backbones.load(BackboneChoice(name=name, weights=weights, seed=0), SIZE)


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


def test_bundled_weights_are_not_random() -> None:
    name = "timm/tf_efficientnet_lite0"
    bundled = load(name, "bundled")
    assert (
        bundled.weights_sha256
        == backbones.load(BackboneChoice(name=name, weights="bundled", seed=1), SIZE).weights_sha256
    )
    assert bundled.weights_sha256 != load(name, "random").weights_sha256


def test_bundled_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bundled exists of timm/tf_efficientnet_lite0 only, not of .*squeezenet1_1"):
        load(SMALL, "bundled")


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
