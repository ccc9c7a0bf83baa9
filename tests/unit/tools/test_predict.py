"""predict: a saved run loads alone, predicts what the network predicts, and is refused when tampered with."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.__main__ import cli
from pipeline.dataset.decoding import sha256
from pipeline.features.views import make_views
from pipeline.network import backbones
from pipeline.network.preprocessing import Normalize
from pipeline.params import BackboneChoice
from pipeline.tools import predict
from pipeline.training import heads, models
from pipeline.training.models import Card
from tests import factories
from tests.factories import LINEAR, PLAIN, backbone_plan

CLASSES = ("cat", "dog", "long-eared hedgehog")
SIZE, VIEWS = 32, ("identity", "flip_horizontal")
CHOICE = BackboneChoice.of("timm/test_resnet", "random", 3)
HEAD = LINEAR.model_copy(update={"kind": "mlp", "hidden": (6,), "dropout": 0.5, "max_iterations": 1})
AUGMENTATION = PLAIN.model_copy(update={"crop_area": (0.3, 0.5)})  # without consequence for predictions


@pytest.fixture
def photographs(tmp_path: Path) -> list[Path]:
    random, paths = np.random.default_rng(0), []
    for number in range(5):
        paths.append(tmp_path / "new" / f"{number}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)).save(paths[-1])
    return paths


def save(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, nn.Sequential, Card]:
    """Save a run in one directory and go to another; the path of the card, the network and the card."""
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    backbone = backbones.load(CHOICE, SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = heads.build((backbone.feature_dim,), len(CLASSES), HEAD, nn.Identity())
        for value in head.state_dict().values():
            value.copy_(torch.rand_like(value) + 0.1)
        if strategy != "feature_extraction":
            for parameter in backbone.module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    plan = backbone_plan(
        choice=CHOICE,
        image_size=SIZE,
        preprocessing=backbone.preprocessing,
        weights_sha256=backbone.weights_sha256,
        feature_shape=(backbone.feature_dim,),
    )
    card = factories.card(
        strategy=strategy,
        class_names=CLASSES,
        backbone=plan,
        augmentation=AUGMENTATION,
        evaluation_views=VIEWS,
        head=HEAD,
    )
    models.save_model(card, head, None if strategy == "feature_extraction" else backbone.module)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    base = nn.Sequential(Normalize(backbone.preprocessing), backbone.module)
    network = nn.Sequential(base, head).eval()
    return tmp_path / "repository" / "models" / strategy / "seed_0.json", network, card


@pytest.mark.parametrize("strategy", ["feature_extraction", "full_retrain"])
def test_saved_run_predicts_what_the_network_predicts_from_another_directory(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: list[Path]
) -> None:
    run, network, card = save(strategy, tmp_path, monkeypatch)
    predictions, failures = predict.predict(run, photographs)
    assert failures == []
    assert [entry["path"] for entry in predictions] == [str(path) for path in photographs]
    for entry, path in zip(predictions, photographs, strict=True):
        content = path.read_bytes()
        pixels = make_views(content, sha256(content), [0, 1], card.backbone.preprocessing, PLAIN)
        assert np.array_equal(pixels[1], pixels[0][:, ::-1])
        assert not np.array_equal(pixels[0], pixels[1])
        with torch.no_grad():
            probability = network(torch.from_numpy(pixels)).softmax(1).mean(0)
        assert entry["class"] == CLASSES[int(probability.argmax())]
        assert entry["probability"] == pytest.approx(probability.max().item(), abs=2e-6)


def test_loaded_network_is_the_saved_one_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, network, card = save("full_retrain", tmp_path, monkeypatch)
    loaded, read = models.load_network(run)
    assert read.model_copy(update={"sha256": ""}) == card
    ours, theirs = loaded.state_dict(), network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(module.training for module in loaded.modules())


def test_head_on_other_published_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: list[Path]
) -> None:
    run, _, _ = save("feature_extraction", tmp_path, monkeypatch)
    described = json.loads(run.read_text())
    described["backbone"]["choice"]["seed"] += 1
    run.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="made with other weights of timm/test_resnet"):
        predict.predict(run, photographs)


@pytest.mark.parametrize("strategy", ["feature_extraction", "full_retrain"])
def test_tampered_tensors_are_refused(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: list[Path]
) -> None:
    run, _, _ = save(strategy, tmp_path, monkeypatch)
    tensors = run.with_suffix(".safetensors")
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(ValueError, match=r"seed_0\.safetensors beside it is damaged, or of another run"):
        predict.predict(run, photographs)


@pytest.mark.parametrize("content", ["", "{}", "no JSON", '{"strategy": 1}'])
def test_card_that_is_none_is_one_line(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: list[Path]
) -> None:
    run, _, _ = save("feature_extraction", tmp_path, monkeypatch)
    run.write_text(content)
    with pytest.raises(ValueError, match=r"seed_0\.json: not a run saved by this version") as caught:
        predict.predict(run, photographs)
    assert "\n" not in str(caught.value)


def test_run_that_does_not_exist_is_named(tmp_path: Path, photographs: list[Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/seed_0\.json: no such run"):
        predict.predict(tmp_path / "nowhere" / "seed_0.json", photographs)


@pytest.mark.parametrize("ending", ["", ".json", ".safetensors"])
@pytest.mark.parametrize("form", ["table", "json"])
def test_unreadable_images_are_failures_and_the_others_are_predicted(
    form: str,
    ending: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    photographs: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _, _ = save("feature_extraction", tmp_path, monkeypatch)
    broken, absent = tmp_path / "new" / "broken.png", tmp_path / "new" / "absent.png"
    broken.write_bytes(photographs[0].read_bytes()[:200])
    given = [photographs[0], broken, absent, photographs[1]]
    options = ["--json"] if form == "json" else []
    with pytest.raises(ValueError, match=r"broken\.png: .*absent\.png") as caught:
        cli(["predict", str(run.with_suffix(ending)), *map(str, given), *options], standalone_mode=False)
    assert "\n" not in str(caught.value)
    printed = capsys.readouterr().out
    if form == "json":
        entries = json.loads(printed)
        assert [entry["path"] for entry in entries] == [str(path) for path in photographs[:2]]
        assert all(entry["class"] in CLASSES and 0 < entry["probability"] <= 1 for entry in entries)
    else:
        lines = printed.splitlines()
        assert [line.split()[-1] for line in lines] == [str(path) for path in photographs[:2]]
        assert all(line.startswith(CLASSES) for line in lines)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_is_valid_whatever_the_terminal_can_show(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"class": "\u00e9t\u00e9 \u65e5\u672c \U0001f600", "probability": 0.9, "path": "x.png"}
    monkeypatch.setattr(predict, "predict", lambda *_: ([entry], []))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace"))
    predict.show("run", [], is_json=True)
    sys.stdout.flush()
    text = written.getvalue().decode(encoding)
    assert json.loads(text) == [entry]
    assert (entry["class"] in text) == (encoding == "utf-8")
