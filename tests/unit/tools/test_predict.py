"""predict: a saved run loads alone, predicts what the network predicts, and is refused when tampered with."""

import csv
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pipeline.__main__ import cli
from pipeline.dataset.decoding import sha256
from pipeline.features.views import make_views
from pipeline.network import backbones
from pipeline.network.preprocessing import Normalize
from pipeline.params import BackboneChoice
from pipeline.tools import inference, predict
from pipeline.tools.predict import Options
from pipeline.training import heads, saved_networks
from pipeline.training.saved_networks import Card
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


def save(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: BackboneChoice = CHOICE, **changes: Any
) -> tuple[Path, nn.Sequential, Card]:
    """Save a run in one directory and go to another; the path of the card, the network and the card."""
    (tmp_path / "repository").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "repository")
    backbone = backbones.load(choice, SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = heads.build((backbone.feature_dim,), len(CLASSES), HEAD, nn.Identity())
        for value in head.state_dict().values():
            value.copy_(torch.rand_like(value) + 0.1)
        if strategy != "feature_extraction":
            for parameter in backbone.module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    plan = backbone_plan(
        choice=choice,
        image_size=SIZE,
        preprocessing=backbone.preprocessing,
        weights_sha256=backbone.weights_sha256,
        feature_shape=(backbone.feature_dim,),
    )
    card = factories.card(
        strategy=strategy,
        **{"class_names": CLASSES, "evaluation_views": VIEWS} | changes,
        backbone=plan,
        augmentation=AUGMENTATION,
        head=HEAD,
    )
    saved_networks.save_model(card, head, None if strategy == "feature_extraction" else backbone.module)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    base = nn.Sequential(Normalize(backbone.preprocessing), backbone.module)
    network = nn.Sequential(base, head).eval()
    return tmp_path / "repository" / "models" / strategy / "seed_0.json", network, card


def predicted(run: Path, paths: list[Path], *, top: int | None = None, is_raw: bool = True, least: float = 0.0) -> list:
    """A row for each path."""
    network = inference.open_network(run, len(paths))
    options = Options("jsonl", top, is_raw, least)
    return list(predict.predict(inference.run(network, paths, 0), network.card, options))


@pytest.mark.parametrize("strategy", ["feature_extraction", "full_retrain"])
def test_saved_run_predicts_what_the_network_predicts_from_another_directory(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: list[Path]
) -> None:
    run, network, card = save(strategy, tmp_path, monkeypatch)
    predictions = predicted(run, photographs)
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
    loaded, read = saved_networks.load_network(run)
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
        predicted(run, photographs)


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
        predicted(run, photographs)


@pytest.mark.parametrize("content", ["", "{}", "no JSON", '{"strategy": 1}'])
def test_card_that_is_none_is_one_line(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: list[Path]
) -> None:
    run, _, _ = save("feature_extraction", tmp_path, monkeypatch)
    run.write_text(content)
    with pytest.raises(ValueError, match=r"seed_0\.json: not a run saved by this version") as caught:
        predicted(run, photographs)
    assert "\n" not in str(caught.value)


def test_run_that_does_not_exist_is_named(tmp_path: Path, photographs: list[Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/seed_0\.json: no such run"):
        predicted(tmp_path / "nowhere" / "seed_0.json", photographs)


@pytest.mark.parametrize(
    ("place", "form", "ending"),
    [
        *(("printed", form, "") for form in predict.FORMATS),
        *(("written", form, ".json") for form in predict.FORMATS),
        ("printed", "table", ".safetensors"),
    ],
)
@pytest.mark.usefixtures("in_torch")
def test_unreadable_images_are_failures_and_the_others_are_predicted(
    place: str,
    form: str,
    ending: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    photographs: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _, _ = save("feature_extraction", tmp_path, monkeypatch)
    broken, absent, pipe = (tmp_path / "new" / name for name in ("broken.png", "absent.png", "pipe.png"))
    broken.write_bytes(photographs[0].read_bytes()[:200])
    os.mkfifo(pipe)
    given = [broken, photographs[0], absent, pipe, photographs[1]]
    options = ["--format", form, *(["--output", "found"] if place == "written" else [])]
    expected = r"3 of 5 images cannot be read: .*broken\.png: .*absent\.png: .*pipe\.png: not a file"
    with pytest.raises(ValueError, match=expected) as caught:
        cli(["predict", str(run.with_suffix(ending)), *map(str, given), *options], standalone_mode=False)
    assert "\n" not in str(caught.value)
    text = Path("found").read_text() if place == "written" else capsys.readouterr().out
    entries = read_rows(text, form)
    assert len(entries) == (5 if form in ("jsonl", "csv") else 2)
    assert [entry["path"] for entry in entries if not entry.get("error")] == [*map(str, photographs[:2])]
    for entry in entries:
        assert entry["class"] in ([None, ""] if entry.get("error") else CLASSES)
        assert entry.get("error") or 0 < float(entry["probability"]) <= 1


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ([], "table"),
        (["--output", "found.CSV"], "csv"),
        (["--output", "found.json"], "json"),
        (["--output", "found.jsonl"], "jsonl"),
        (["--output", "found.txt"], "table"),
        (["--output", "found.csv", "--format", "jsonl"], "jsonl"),
        (["--output", "found.csv", "--format", "table"], "table"),
        (["--output", "found.csv", "--json"], "json"),
    ],
)
def test_the_ending_of_the_output_chooses_the_format_unless_one_is_given(
    options: list[str], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Options] = []
    monkeypatch.setattr(predict, "show", lambda *arguments: asked.append(arguments[3]))
    cli(["predict", "run", "photo.png", *options], standalone_mode=False)
    assert [one.form for one in asked] == [form]


def test_nothing_is_loaded_where_all_that_was_named_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, "open_network", lambda *_: pytest.fail("loaded"))
    for names, expected in (
        (["photoz"], "^photoz: not there; expected files, directories or patterns$"),
        (["a.png", "b.png"], "^a.png: not there, nor another of 2 images; expected files, directories or patterns$"),
    ):
        with pytest.raises(FileNotFoundError, match=expected):
            cli(["predict", "run", *names], standalone_mode=False)


def read_rows(text: str, form: str) -> list[dict]:
    """What was printed in one of FORMATS."""
    if form == "table":
        found = [re.fullmatch(r"(.*?)  +(0\.\d+|1\.0000)  (.*)", line) for line in text.splitlines()]
        return [dict(zip(("class", "probability", "path"), row.groups(), strict=True)) for row in found if row]
    if form == "csv":
        return list(csv.DictReader(io.StringIO(text)))
    return json.loads(text) if form == "json" else [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_probabilities_are_at_the_temperature_of_the_card_and_the_most_probable_classes_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: list[Path]
) -> None:
    run, _, card = save("feature_extraction", tmp_path, monkeypatch, temperature=3.0)
    raw, calibrated, ranked = (
        predicted(run, photographs, **options) for options in ({}, {"is_raw": False}, {"top": 2, "is_raw": False})
    )
    for before, after, shown in zip(raw, calibrated, ranked, strict=True):
        assert list(before["probabilities"]) == list(after["probabilities"]) == list(CLASSES)
        scaled = np.array([*before["probabilities"].values()]) ** (1 / card.temperature)
        assert [*after["probabilities"].values()] == pytest.approx(scaled / scaled.sum(), abs=1e-5)
        order = sorted(after["probabilities"].items(), key=lambda item: -item[1])
        assert [*shown["probabilities"].items()] == order[:2]
        assert (after["class"], after["probability"]) == order[0]


@pytest.mark.usefixtures("in_torch")
def test_what_is_below_the_confidence_is_undecided_and_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _, _ = save("feature_extraction", tmp_path, monkeypatch)
    confidence = [0.9, 0.5, 0.75, 0.74, 0.4]
    logs = [np.log(np.array([0.05, 0.95 - p, p], np.float32)) for p in confidence]
    found = [inference.Answer(path, "", log_probability=log) for path, log in zip(photographs, logs, strict=True)]
    monkeypatch.setattr(inference, "run", lambda *_: iter(found))
    command = ["predict", str(run), *map(str, photographs), "--raw", "--min-confidence", "0.75"]
    cli([*command, "--format", "jsonl"], standalone_mode=False)
    rows = read_rows(capsys.readouterr().out, "jsonl")
    assert [row["class"] for row in rows] == [CLASSES[2], None, CLASSES[2], None, None]
    assert [row["probability"] for row in rows] == pytest.approx([0.9, 0.5, 0.75, 0.74, 0.55], abs=1e-5)
    cli(command, standalone_mode=False)
    assert sum(line.startswith("undecided ") for line in capsys.readouterr().out.splitlines()) == 3
    for top, least, expected in (
        ("1", "0", f"{CLASSES[2]}  0.5000"),
        ("2", "0", f"{CLASSES[2]}  0.5000  dog 0.4500"),
        ("2", "0.75", f"{'undecided':<{len(CLASSES[2])}}  0.5000  {CLASSES[2]} 0.5000  dog 0.4500"),
    ):
        monkeypatch.setattr(inference, "run", lambda *_: iter(found[1:2]))
        cli([*command, "--top", top, "--min-confidence", least], standalone_mode=False)
        assert capsys.readouterr().out == f"{expected}  {photographs[1]}\n", "no class twice"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("form", predict.FORMATS)
@pytest.mark.usefixtures("in_torch")
def test_what_the_terminal_cannot_show_ends_nothing(
    form: str, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: list[Path]
) -> None:
    names = ("\u00e9t\u00e9 \u65e5\u672c \U0001f600", "a,\nb", 'c"')
    run, _, _ = save("feature_extraction", tmp_path, monkeypatch, class_names=names)
    path = photographs[0].rename(tmp_path / "new" / "b\udcff \u65e5.png")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace"))
    predict.show(str(run), [str(path)], None, Options(form, None, True, 0.0), None, 0)
    sys.stdout.flush()
    text = written.getvalue().decode(encoding)
    (row,) = read_rows(text, form)
    if form.startswith("json"):
        assert {row["path"], *row["probabilities"]} == {str(path), *names}
    else:
        assert row["path"].startswith(f"{tmp_path}/new/b")
    assert (names[0] in text) == (encoding == "utf-8" and (form != "table" or row["class"] == names[0]))


def test_arguments_are_files_directories_patterns_and_a_table_of_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    below = tmp_path / "new" / "sub" / "deep.JPG"
    for path in (below, tmp_path / "new" / ".hidden.png", tmp_path / "new" / "note.txt", tmp_path / "new" / "[x].png"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    plain = [Path("new", path.name) for path in photographs]
    everything = [*plain, Path("new/[x].png"), Path("new/sub/deep.JPG")]
    with caplog.at_level("INFO"):
        assert predict.find(["new"]) == everything
        Path("new/a.txt").write_bytes(b"")
        predict.find(["new"])
    one, two = caplog.messages
    assert one == "new: 1 file without an extension of images was left out: new/note.txt"
    assert two == "new: 2 files without an extension of images were left out, first new/a.txt"
    Path("new/a.txt").unlink()
    assert predict.find(["new/[0-9].png", "new/3.png"]) == plain, "each once"
    assert sorted(predict.find(["new/**"])) == sorted([*everything, Path("new/note.txt")])
    assert predict.find(["new/[x].png", "new/s*"]) == everything[-2:]  # a file of this name; a directory that fits
    assert predict.find(["new/**/*.JPG", "gone.png"]) == [everything[-1], Path("gone.png")]
    with pytest.raises(FileNotFoundError, match="no file fits"):
        predict.find(["new/*.gif"])
    table = tmp_path / "new" / "list.csv"
    table.write_text("\ufeffid,path\n1,0.png\n2,sub/deep.JPG\n", encoding="utf-8")
    assert predict.read_paths(Path("new/list.csv")) == [plain[0], everything[-1]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a;path\n", "column 'path' is missing; found a;path"),
        ("", "found nothing"),
        ("path,b\n,1\n", "line 2: path is empty"),
    ],
)
def test_a_table_without_paths_is_one_line(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=expected) as caught:
        predict.read_paths(tmp_path / "list.csv")
    assert "\n" not in str(caught.value)


def test_many_images_are_read_by_processes_and_answered_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: list[Path]
) -> None:
    run, _, _ = save("feature_extraction", tmp_path, monkeypatch)
    is_gone = [i % 7 == 0 or 8 <= i < 16 or i >= 36 for i in range(40)]  # also all of a batch, and of the last one
    given = [tmp_path / f"gone {i}.png" if is_gone[i] else photographs[i % 5] for i in range(40)]
    network = inference.open_network(run, len(given))
    found = list(inference.run(network, given, 2))
    assert [answer.path for answer in found] == given
    alone = {answer.path: answer for answer in inference.run(network, photographs, 0)}
    for i, answer in enumerate(found):
        assert bool(answer.error) == is_gone[i]
        if not is_gone[i]:
            assert np.array_equal(answer.log_probability, alone[answer.path].log_probability)


def test_a_head_on_weights_of_ones_own_finds_them_beside_its_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: list[Path]
) -> None:
    own = CHOICE.model_copy(update={"weights": "own.safetensors"})
    weights = tmp_path / "repository" / "data" / "weights" / "own.safetensors"
    weights.parent.mkdir(parents=True)
    save_file(backbones.load(CHOICE, SIZE).module.state_dict(), weights)
    run, _, _ = save("feature_extraction", tmp_path, monkeypatch, choice=own)
    first = predicted(run, photographs)
    save_file(backbones.load(CHOICE.model_copy(update={"seed": 4}), SIZE).module.state_dict(), weights)
    with pytest.raises(ValueError, match="made with other weights"):
        predicted(run, photographs)
    elsewhere = tmp_path / "elsewhere" / "data" / "weights" / "own.safetensors"
    elsewhere.parent.mkdir(parents=True)
    weights.rename(elsewhere)
    with pytest.raises(ValueError, match="made with other weights"):
        predicted(run, photographs)
    save_file(backbones.load(CHOICE, SIZE).module.state_dict(), elsewhere)
    assert predicted(run, photographs) == first
    elsewhere.unlink()
    with pytest.raises(
        ValueError, match=r"weights file own\.safetensors; looked for it in .*repository/data/weights"
    ) as caught:
        predicted(run, photographs)
    assert "\n" not in str(caught.value)
