"""weights: files from anywhere give the network that they come from, or one line that says why not."""

import argparse
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from pipeline.network import backbones
from pipeline.network.backbones import Backbone
from pipeline.params import BackboneChoice

SMALL, TINY = "torchvision/squeezenet1_1", "timm/test_resnet"
SIZE = 64


def load(name: str, weights: str, size: int | None = SIZE, **changes: Any) -> Backbone:
    choice = BackboneChoice.of(name, weights, 0).model_copy(update=changes)
    return backbones.load(choice, size)


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
    assert bundled.weights_sha256 == backbones.load(BackboneChoice.of(name, "bundled", 1), SIZE).weights_sha256
    assert bundled.weights_sha256 != load(name, "random").weights_sha256


def test_bundled_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bundled exists of timm/tf_efficientnet_lite0 only, not of .*squeezenet1_1"):
        load(SMALL, "bundled")


State = dict[str, torch.Tensor]


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def other(state: State) -> State:
    """The same tensors with other numbers: of another network in the same file."""
    return {key: value.to_dense() + 1 for key, value in state.items()}


def contents(s: State) -> dict[str, Any]:
    """Checkpoints as people's training programs write them, by the name of the file; each holds the network `s`."""
    loop: dict[str, Any] = {"state_dict": s}
    loop["loop"] = loop
    return {
        "plain.pth": s,
        "epoch.pth": {"state_dict": s, "epoch": 3},
        "optimizer.pt": {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "lr": 0.1}},
        "parallel.pth": under("module.", s),
        "compiled.pth": {"model": under("_orig_mod.", s)},
        "arguments.pth": {"epoch": 3, "state_dict": s, "args": argparse.Namespace(lr=1.0, inner=argparse.Namespace())},
        "model_best.pth.tar": {"epoch": 3, "state_dict": s},
        "checkpoint.tar": {"model_state_dict": s},
        "lightning.ckpt": {"state_dict": under("net.", s), "hyper_parameters": {"lr": 0.1}, "callbacks": {}},
        "PYTORCH_MODEL.BIN": s,
        "backbone.pth": {"state_dict": under("backbone.", s)},
        "projector.pth": {"state_dict": under("encoder.", s) | {"projector.0.weight": torch.zeros(2, 2)}},
        "queue.pth": {
            "state_dict": under("module.encoder_k.", other(s))
            | under("module.encoder_q.", s)
            | {"module.queue": torch.zeros(2), "module.encoder_q.fc.2.weight": torch.zeros(2)}
        },
        "distilled.pth": {
            "student": under("module.backbone.", other(s)),
            "teacher": under("backbone.", s) | {"head.mlp.0.weight": torch.zeros(2)},
        },
        "mask.pth": s | {"mask_token": torch.zeros(1, 8)},
        "wrapped.pth": {"model": under("model.", s), "epoch": 1},
        "average.pth": {"state_dict_ema": other(s), "state_dict": s},
        "only_average.pth": {"epoch": 1, "model_ema": s},
        "own_words.pth": {"content": {"of_ours": under("detector.trunk.body.", s)}, "note": "x"},
        "another_first.pth": {"model": {"conv1.weight": torch.zeros(3)}, "ema": s},
        "in_itself.pth": loop,
        "parameters.pth": {key: torch.nn.Parameter(v) if v.is_floating_point() else v for key, v in s.items()},
    }


def saved(kind: str, state: State, folder: Path) -> str:
    """Write one of `contents`, or a .safetensors file; the name of the file."""
    if kind.endswith(".safetensors"):
        save_file(state, folder / kind)
    else:
        torch.save(contents(state)[kind], folder / kind)
    return kind


@pytest.mark.parametrize(
    ("name", "kind"), [(SMALL, "plain.pth"), (TINY, "own.safetensors"), *((TINY, kind) for kind in contents({}))]
)
def test_weights_file_gives_the_network_that_it_came_from(weights: Path, name: str, kind: str) -> None:
    network = whole(name)
    loaded = load(name, saved(kind, network.state_dict(), weights))
    network.eval()
    ours, theirs = loaded.module.state_dict(), network.state_dict()
    assert ours.keys() <= theirs.keys()
    assert ours
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    again = load(name, saved("own.safetensors", ours, weights))  # what is left when the classifier is gone
    assert again.weights_sha256 == loaded.weights_sha256


@pytest.mark.parametrize("name", [SMALL, "torchvision/mobilenet_v3_small", TINY])
def test_classifier_of_another_width_in_the_file_does_not_matter(weights: Path, name: str) -> None:
    network = whole(name, num_classes=7)
    loaded = load(name, saved("plain.pth", network.state_dict(), weights))
    theirs = network.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in loaded.module.state_dict().items())


def test_missing_and_unexpected_tensors_are_named(weights: Path) -> None:
    state = whole(SMALL).state_dict()
    state["features.0.extra"] = state.pop("features.0.weight")
    with pytest.raises(ValueError, match="weights of another network") as caught:
        load(SMALL, saved("plain.pth", state, weights))
    assert "data/weights/plain.pth" in str(caught.value)
    assert "missing: features.0.weight" in str(caught.value)
    assert "unexpected: features.0.extra" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_shapes_are_named_with_what_is_wanted(weights: Path) -> None:
    state = whole(SMALL).state_dict()
    state["features.0.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"wrong shape: features\.0\.bias \(3,\) instead of \(64,\)"):
        load(SMALL, saved("plain.pth", state, weights))


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
    (weights / "own.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"own\.onnx: expected a name that ends with \.safetensors, \.pth, \.pt, "):
        load(SMALL, "own.onnx")


@pytest.mark.parametrize("is_link", [False, True])
def test_weights_outside_the_weights_directory_are_refused(weights: Path, is_link: bool) -> None:
    save_file(whole(SMALL).state_dict(), weights.parent / "own.safetensors")
    (weights / "link.safetensors").symlink_to("../own.safetensors")
    with pytest.raises(ValueError, match="is no file below data/weights/"):
        load(SMALL, "link.safetensors" if is_link else "../own.safetensors")


def line_of(caplog: pytest.LogCaptureFixture) -> str:
    found = [record for record in caplog.records if (record.name, record.levelno) == ("pipeline", logging.INFO)]
    (line,) = [record.getMessage() for record in found]
    return line


def test_one_line_says_what_was_used_dropped_and_missing(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = whole(TINY).state_dict()
    del state["bn1.num_batches_tracked"]
    with caplog.at_level(logging.INFO):
        loaded = load(TINY, saved("queue.pth", state, weights))
    used = len(loaded.module.state_dict()) - 1
    q, k = "state_dict.module.encoder_q", "state_dict.module.encoder_k"
    assert line_of(caplog) == (
        f"data/weights/queue.pth: used {used} tensors below {q}, the first of {q}, {k} (backbone.checkpoint_key "
        f"selects another); dropped: fc.2.weight, fc.bias, fc.weight, {k}.*, state_dict.module.queue; "
        "missing: bn1.num_batches_tracked"
    )


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("average.pth", "state_dict_ema"),
        ("queue.pth", "state_dict.module.encoder_k"),
        ("distilled.pth", "student"),
        ("distilled.pth", "student.module"),
    ],
)
def test_checkpoint_key_selects_another_network_of_the_file(weights: Path, kind: str, key: str) -> None:
    state = whole(SMALL).state_dict()
    loaded = load(SMALL, saved(kind, state, weights), checkpoint_key=key)
    assert all(torch.equal(value, state[name] + 1) for name, value in loaded.module.state_dict().items())


def test_checkpoint_key_selects_a_prefix_of_a_safetensors_file(weights: Path) -> None:
    state = whole(SMALL).state_dict()
    save_file(under("a.", state) | under("b.", other(state)), weights / "two.safetensors")
    for key, expected in (("a", state), ("b", other(state)), (None, state)):
        ours = load(SMALL, "two.safetensors", checkpoint_key=key).module.state_dict()
        assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize("key", ["techer", "teacher.back", ".", "\x1b[1m"])
def test_unknown_checkpoint_key_is_one_line_with_those_that_are_there(weights: Path, key: str) -> None:
    kind = saved("distilled.pth", whole(SMALL).state_dict(), weights)
    with pytest.raises(ValueError, match=r"^params\.yaml: backbone\.checkpoint_key: no tensor of ") as caught:
        load(SMALL, kind, checkpoint_key=key)
    assert "expected one of student, teacher" in str(caught.value)
    assert str(caught.value).isprintable()


def test_tensors_inside_the_layers_that_are_left_over_give_a_warning(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = whole(TINY).state_dict()
    load(TINY, saved("plain.pth", state, weights))
    assert not [record for record in caplog.records if record.levelno == logging.WARNING], "the classifier is expected"
    load(TINY, saved("plain.pth", state | {"layer4.1.conv1.weight": torch.zeros(2)}, weights))
    assert "1 dropped tensors belong to layers of this network (layer4.1.conv1.weight)" in caplog.text


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.full((64, 3, 3, 3), torch.nan), r"NaN or infinite: features\.0\.weight"),
        (torch.zeros(64, 3, 3, 3, dtype=torch.int8), r"wrong type: features\.0\.weight torch\.int8 instead of"),
        (torch.zeros(64, 3, 3, 3, dtype=torch.complex64), r"wrong type: features\.0\.weight torch\.complex64"),
        (torch.zeros(64, 3, 3, 3).to_sparse(), r"missing: features\.0\.weight"),
        (torch.zeros(64, 3, 3, 3, device="meta"), r"missing: features\.0\.weight"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(weights: Path, value: torch.Tensor, reason: str) -> None:
    state = whole(SMALL).state_dict() | {"features.0.weight": value}
    with pytest.raises(ValueError, match=reason) as caught:
        load(SMALL, saved("plain.pth", state, weights))
    assert "\n" not in str(caught.value)


def test_names_in_a_hostile_file_cannot_paint_the_terminal(weights: Path) -> None:
    torch.save({"\x1b[31mred\n": torch.zeros(2)}, weights / "own.pth")
    with pytest.raises(ValueError, match="weights of another network") as caught:
        load(SMALL, "own.pth")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["own.pth", "own.safetensors"])
@pytest.mark.parametrize(
    ("begin", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a pointer of Git LFS .*; run: git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "a web page; download the file itself"),
        (None, "cut short; download it again"),
    ],
)
def test_what_a_failed_download_leaves_is_named(weights: Path, name: str, begin: bytes | None, words: str) -> None:
    if begin is None:
        torch.save(whole(SMALL).state_dict(), weights / "own.pth")
        begin = (weights / "own.pth").read_bytes()[:-100]
    (weights / name).write_bytes(begin)
    with pytest.raises(ValueError, match=rf"^data/weights/{name}: no weights file.* \({words}\)"):
        load(SMALL, name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.float64(3), "Unsupported global: GLOBAL numpy._core.multiarray.scalar was not an allowed global"),
        (Path("x"), "Unsupported global: GLOBAL pathlib."),
        (argparse.Namespace(model=Code()), "unsupported GLOBAL posix.mkdir whose module posix is blocked"),
        (torch.nn.Linear(2, 2), "Unsupported global: GLOBAL torch.nn.modules.linear.Linear"),
    ],
)
def test_torch_says_in_one_line_what_it_refuses(weights: Path, content: object, words: str) -> None:
    torch.save({"state_dict": whole(SMALL).state_dict(), "x": content}, weights / "own.pth")
    with pytest.raises(ValueError, match=r"^data/weights/own\.pth: no weights file") as caught:
        load(SMALL, "own.pth")
    assert words in str(caught.value)
    assert str(caught.value).endswith("save its tensors alone: torch.save(network.state_dict(), ...)")
    assert str(caught.value).isprintable()
    assert not Path("executed").exists()


def test_compressed_archive_is_refused(weights: Path) -> None:
    torch.save({"x": torch.zeros(10**6)}, weights / "plain.pth")
    with (
        zipfile.ZipFile(weights / "plain.pth") as plain,
        zipfile.ZipFile(weights / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for part in plain.infolist():
            bomb.writestr(part.filename, plain.read(part))
    with pytest.raises(ValueError, match=r"bomb\.pth: no weights file.*its parts are larger than the file"):
        load(SMALL, "bomb.pth")


@pytest.mark.parametrize("tracked", ["ours.pth", "team"])
def test_weights_that_dvc_tracks_and_that_are_not_here_are_pulled(weights: Path, tracked: str) -> None:
    (weights / f"{tracked}.dvc").write_text("outs:\n")
    name = "ours.pth" if tracked == "ours.pth" else "team/ours.pth"
    with pytest.raises(
        ValueError, match=rf"^data/weights/{name}: not here, .*; run: dvc pull data/weights/{tracked}\.dvc$"
    ):
        load(SMALL, name)


# Transformers at another image size: what timm itself makes of the file

VIT, REGISTERS = "timm/test_vit", "timm/vit_small_patch14_reg4_dinov2"


def as_timm_loads(name: str, file: Path, size: int) -> State:
    overlay = {"file": str(file)}
    return timm.create_model(
        name.removeprefix("timm/"), pretrained=True, img_size=size, pretrained_cfg_overlay=overlay
    ).state_dict()


@pytest.mark.parametrize(("made", "size"), [(160, 96), (160, None), (96, 160), (96, None)])
def test_position_embeddings_are_resized_as_timm_does(
    weights: Path, caplog: pytest.LogCaptureFixture, made: int, size: int | None
) -> None:
    state = whole(VIT, img_size=made).state_dict()
    with caplog.at_level(logging.INFO):
        loaded = load(VIT, saved("vit.safetensors", state, weights), size)
    ours = loaded.module.state_dict()
    theirs = as_timm_loads(VIT, weights / "vit.safetensors", size or 160)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert loaded.preprocessing.crop == (size or 160)
    assert ("resized or renamed: pos_embed;" in line_of(caplog)) == (made != (size or 160))


@pytest.mark.slow
def test_dinov2_as_its_authors_publish_it_at_518_px_is_used_at_224(weights: Path) -> None:
    state = whole(REGISTERS, num_classes=0).state_dict()
    width = state["cls_token"].shape[-1]
    first = torch.full((1, 1, width), 0.5)
    official = {key: value for key, value in state.items() if key != "reg_token"}
    official |= {"register_tokens": state["reg_token"], "mask_token": torch.zeros(1, width)}
    official |= {"pos_embed": torch.cat([first, state["pos_embed"]], 1), "cls_token": state["cls_token"] - first}
    torch.save(official, weights / "official.pth")
    torch.save({"teacher": under("backbone.", official), "student": {}}, weights / "own.pth")
    loaded = load(REGISTERS, "own.pth", 224)
    theirs = as_timm_loads(REGISTERS, weights / "official.pth", 224)
    assert all(torch.equal(value, theirs[key]) for key, value in loaded.module.state_dict().items())
    assert loaded.module.state_dict()["pos_embed"].shape == (1, 16**2, width)
    assert torch.equal(loaded.module.state_dict()["reg_token"], state["reg_token"])


def test_vit_weights_of_another_width_are_refused_in_one_line(weights: Path) -> None:
    kind = saved("vit.safetensors", whole(VIT, embed_dim=32, num_heads=2).state_dict(), weights)
    with pytest.raises(ValueError, match="weights of another network") as caught:
        load(VIT, kind)
    assert "\n" not in str(caught.value)


@pytest.mark.architectures
def test_published_weights_of_a_torchvision_transformer_fit_another_image_size(monkeypatch: pytest.MonkeyPatch) -> None:
    state = whole("torchvision/vit_b_32").state_dict()
    published = torchvision.models.ViT_B_32_Weights
    monkeypatch.setattr(published, "get_state_dict", lambda *_, **__: dict(state))
    same, small = (load("torchvision/vit_b_32", "default", size).module.state_dict() for size in (None, 64))
    assert all(torch.equal(value, state[key]) for key, value in same.items())
    assert small["encoder.pos_embedding"].shape == (1, 5, 768)
    assert torch.equal(small["encoder.pos_embedding"][:, 0], state["encoder.pos_embedding"][:, 0])
    assert all(torch.equal(small[key], state[key]) for key in small if key != "encoder.pos_embedding")
