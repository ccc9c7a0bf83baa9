"""evaluate: on new images, what index reads and what compare computes, and whether the model holds on them."""

import contextlib
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from sklearn.metrics import accuracy_score, log_loss

from pipeline.__main__ import cli
from pipeline.dataset import manifest
from pipeline.report import provenance
from pipeline.stages import extract, fine_tune, index, plan, split, train_head
from pipeline.tools import evaluate
from pipeline.training import novelty
from pipeline.training.runs import read_run
from tests.unit.stages.test_fine_tune import STRATEGY, TINY, configure, make_images, make_weights

HEAD, HEAD_1, TUNED = "models/feature_extraction/seed_0", "models/feature_extraction/seed_1", "models/tuned/seed_0"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with heads of two seeds and a fine-tuned network, of 30 tiny images in three classes."""
    root = tmp_path_factory.mktemp("repository")
    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATURE_STORE", "")
        patch.delenv("DVC_ROOT", raising=False)
        patch.setattr(sys, "argv", ["a stage"])
        patch.setattr(logging, "basicConfig", lambda **_: None)
        configure(TINY, fine_tune={"strategies": {"tuned": STRATEGY | {"epochs": 1}}}, split={"seeds": [0, 1]})
        make_images(Path("images"))
        make_weights(TINY)
        for stage in (index, split, plan, extract, train_head):
            stage.main()
        patch.setattr(sys, "argv", ["fine_tune", "tuned", "0"])
        fine_tune.main()
        Path("params.yaml").unlink()  # a saved network needs none
    return root


def copy_split(repository: Path, name: str, seed: int, to: Path) -> list[int]:
    """Copy the images of a split into directories of their classes; their rows, in the order of the copies."""
    labels = manifest.read_labels(repository / manifest.LABELS)
    rows = manifest.read_split(seed, labels.image_id, repository / manifest.SPLITS).rows(name)
    for row in rows:
        (to / labels.image_id[row]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / "images" / labels.image_id[row], to / labels.image_id[row])
    return sorted(rows.tolist(), key=lambda row: labels.image_id[row])


def evaluated(*arguments: str | Path, output: str = "found", fails: bool = False) -> dict[str, Any]:
    """evaluation.json of a call in the current directory, after looking at the other files.

    `fails`: because a file cannot be read; the reports are there all the same.
    """
    with contextlib.suppress(ValueError) if fails else contextlib.nullcontext():
        cli(["evaluate", *map(str, arguments), "--output", output, "--workers", "0"], standalone_mode=False)
    found = json.loads(Path(output, "evaluation.json").read_text(encoding="utf-8"))
    page, text = (Path(output, f"evaluation.{ending}").read_text(encoding="utf-8") for ending in ("html", "md"))
    assert "<script" not in page
    assert "http" not in page.partition("</head>")[2]
    for one in found["models"]:
        assert page.count("<img ") + page.count('class="gone"') >= min(len(one["mistakes"]), 24)
        assert all(row["image_id"].rsplit("/", 1)[-1] in page for row in one["mistakes"][:24])
    assert text.startswith("# Evaluation on new images")
    assert "u2009" not in text, "no escape of a sign that we wrote"
    return found


@pytest.mark.parametrize("run", [HEAD, TUNED])
def test_on_its_own_test_images_a_model_is_what_its_run_says(
    run: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = copy_split(repository, "test", 0, tmp_path / "new")
    labels = manifest.read_labels(repository / manifest.LABELS)
    found = evaluated(repository / run, "new")
    (one,) = found["models"]
    strategy = run.split("/")[1]
    test = read_run(strategy, 0, repository / "reports/runs").test
    order = [test.rows.tolist().index(row) for row in rows]
    probability = np.exp(test.log_probability[order])
    label = labels.label[rows]
    assert one["metrics"]["accuracy"]["value"] == pytest.approx(accuracy_score(label, probability.argmax(1)))
    assert one["metrics"]["nll"]["value"] == pytest.approx(log_loss(label, probability, labels=[0, 1, 2]), abs=1e-3)
    assert one["metrics"]["accuracy"]["low"] < one["metrics"]["accuracy"]["high"]
    assert one["own_test"]["metrics"]["accuracy"]["value"] == pytest.approx(one["metrics"]["accuracy"]["value"])
    assert one["differences"] == {}, "the same images are no other sample"
    assert one["seen"] == {"test": len(rows)}
    assert "All of these images are test images of the model." in found["summary"]
    assert one["distance"]["n_images"] == len(rows)
    assert np.sum(one["confusion"]) == len(rows)
    assert not (tmp_path / "data").exists()  # nothing is written but the reports
    assert {path.name for path in tmp_path.iterdir()} == {"new", "found"}


@pytest.mark.usefixtures("in_torch")
def test_images_that_the_model_was_trained_on_are_counted_and_left_out_of_the_comparison(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    n = {name: len(copy_split(repository, name, 0, tmp_path / "new")) for name in ("train", "test")}
    found = evaluated(repository / HEAD, "new")
    (one,) = found["models"]
    assert one["seen"] == n
    assert one["without_seen"]["n"] == n["test"]
    assert one["without_seen"]["metrics"]["accuracy"] == pytest.approx(one["own_test"]["metrics"]["accuracy"])
    assert one["differences"] == {}
    rest = "so that the figures are too good. Without training and validation images of the model, accuracy is "
    assert any(
        f"{n['train']} new images are training images of the model (the same bytes), {rest}" in sentence
        for sentence in found["summary"]
    )
    assert one["relabelled"] == []


@pytest.mark.parametrize("with_others", [True, False])
def test_a_training_image_with_another_label_is_named_and_makes_nothing_too_good(
    with_others: bool, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    n = len(copy_split(repository, "train", 0, tmp_path / "train"))
    copy_split(repository, "test", 0, tmp_path / "new")
    first = min(Path("train/red").iterdir())
    first.rename(Path("new/blue/other.png"))
    if with_others:
        shutil.copytree("train", "new", dirs_exist_ok=True)
    found = evaluated(repository / HEAD, "new")
    (one,) = found["models"]
    (listed,) = one["relabelled"]
    assert listed == {
        "image_id": "blue/other.png",
        "label": "blue",
        "split": "train",
        "image_of_model": f"red/{first.name}",
        "label_of_model": "red",
    }
    (sentence,) = [text for text in found["summary"] if "another label" in text]
    named = f"blue/other.png (blue; there red/{first.name}: red)"
    assert f"1 new image is a training image of the model with another label: {named}. At least one" in sentence
    assert ("too good" in sentence) == with_others
    if with_others:
        assert sentence.startswith(f"{n - 1} new images are training images of the model (the same bytes), so that ")


@pytest.mark.usefixtures("in_torch")
def test_data_that_changed_since_training_are_not_those_of_the_model(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stage that only prepares data may have run since: rows of the old predictions would mean other images."""
    root = tmp_path / "repository"
    shutil.copytree(repository, root)
    rows = copy_split(repository, "test", 0, tmp_path / "new")
    read = ("data/labels.csv", "data/splits")
    deps = [{"path": name, "md5": provenance.digest(root / name), "size": 1} for name in read]
    outs = [{"path": "models/feature_extraction", "md5": "0", "size": 1}]
    lock = {"schema": "2.0", "stages": {"train_head": {"deps": deps, "outs": outs}}}
    (root / "dvc.lock").write_text(json.dumps(lock), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (before,) = evaluated(root / HEAD, "new")["models"]
    assert before["seen"] == {"test": len(rows)}
    assert before["own_test"] is not None
    table = pd.read_csv(root / "data/labels.csv", keep_default_na=False)
    table.assign(weight=[2.0] + [1.0] * (len(table) - 1)).to_csv(root / "data/labels.csv", index=False)
    found = evaluated(root / HEAD, "new")
    (after,) = found["models"]
    assert (after["seen"], after["own_test"], after["differences"]) == ({}, None, {})
    assert "data/labels.csv: changed since models/feature_extraction was made" in caplog.text
    assert any("is not known: its labels and split are not there" in text for text in found["summary"])


@pytest.mark.usefixtures("in_torch")
def test_own_test_images_among_new_ones_are_left_out_of_the_comparison_with_them(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    n_test = len(copy_split(repository, "test", 0, tmp_path / "new"))
    random = np.random.default_rng(0)
    for number in range(4):  # of one class: what averages over classes is not compared
        Image.fromarray(random.integers(0, 256, (30, 30, 3), np.uint8)).save(f"new/red/noise{number}.png")
    found = evaluated(repository / HEAD, "new")
    (one,) = found["models"]
    alone = Path("alone/red")
    alone.mkdir(parents=True)
    for path in Path("new/red").glob("noise*"):
        shutil.copy(path, alone)
    (noise,) = evaluated(repository / HEAD, "alone")["models"]
    assert one["differences"] == noise["differences"]
    assert "balanced_accuracy" not in one["differences"]
    text = f"{n_test} of the new images are test images of the model, and are left out of this comparison"
    assert any(text in sentence for sentence in found["summary"])


@pytest.mark.usefixtures("in_torch")
def test_noise_is_far_away_and_the_model_is_worse_on_it_also_without_its_repository(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "new" / ("blue", "red")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.kron(random.integers(0, 2, (9, 9, 3)), np.ones((4, 4, 1))) * 255
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    found = evaluated(repository / HEAD, "new")
    (one,) = found["models"]
    assert one["distance"]["n_far"] > one["distance"]["expected_high"]
    assert any("these images differ from those of training" in sentence for sentence in found["summary"])
    assert found["data"]["classes"] == {"blue": 12, "green": 0, "red": 12}
    assert any(sentence.startswith("No new image is of green") for sentence in found["summary"])
    assert "macro_f1" not in one["metrics"]
    moved = tmp_path / "elsewhere" / "seed_0.json"
    moved.parent.mkdir()
    for suffix in (".json", ".safetensors"):
        shutil.copy((repository / TUNED).with_suffix(suffix), moved.with_suffix(suffix))
    (alone,) = evaluated(moved, "new")["models"]
    assert alone["own_test"] is None
    assert not alone["is_known"]
    assert alone["distance"]["n_images"] == 24


@pytest.mark.usefixtures("in_torch")
def test_two_models_are_compared_on_the_same_images(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy_split(repository, "test", 0, tmp_path / "new")
    found = evaluated(repository / HEAD, repository / HEAD_1, "new")
    first, second = (one["metrics"]["accuracy"]["value"] for one in found["models"])
    assert found["paired"]["accuracy"]["difference"] == pytest.approx(second - first)
    assert found["paired"]["accuracy"]["low"] <= second - first <= found["paired"]["accuracy"]["high"]
    same = evaluated(repository / HEAD, repository / HEAD, "new")["paired"]["accuracy"]
    assert (same["difference"], same["p_value"]) == (0, 1)


@pytest.mark.usefixtures("in_torch")
def test_a_table_gives_groups_and_weights_and_what_cannot_be_used_is_said(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = copy_split(repository, "test", 0, tmp_path / "new")
    labels = manifest.read_labels(repository / manifest.LABELS)
    names = [labels.image_id[row] for row in rows]
    table = pd.DataFrame({"file": names, "label": [name.split("/")[0] for name in names]})
    table["group"] = ["one", "one", *(f"g{i}" for i in range(2, len(names)))]
    table["weight"] = [2.0] + [1.0] * (len(names) - 1)
    broken = "<img src=x onerror=alert(1)>|.png"
    Path("new", broken).write_bytes(b"no image")
    table.loc[len(table)] = [broken, "red", "", 1.0]
    for name, label in (("a.png", "red"), ("b.png", "blue")):  # the same bytes with two labels
        Image.new("RGB", (30, 30)).save(f"new/{name}")
        table.loc[len(table)] = [name, label, "", 1.0]
    table.to_csv("new/labels.csv", index=False)
    with pytest.raises(ValueError, match=f"^1 image cannot be read, first {re.escape(broken)} .*; the figures are of"):
        evaluated(repository / HEAD, "new", "--column", "path=file")
    found = evaluated(repository / HEAD, "new", "--column", "path=file", fails=True)
    data, (one,) = found["data"], found["models"]
    assert (data["n_images"], data["n_units"], data["n_unreadable"], data["n_conflicts"]) == (
        len(names), len(names) - 1, 1, 2,
    )  # fmt: skip
    assert any(broken in sentence for sentence in found["summary"])
    assert all(broken not in Path("found", f"evaluation.{ending}").read_text() for ending in ("html", "md"))
    assert any("only the new images have weights" in text for text in found["summary"])
    wrong = {row["image_id"] for row in one["mistakes"]}
    right = sum(weight for name, weight in zip(names, table["weight"], strict=False) if name not in wrong)
    assert one["metrics"]["accuracy"]["value"] == pytest.approx(right / (len(names) + 1))
    Path("new/labels.csv").rename("new/march.csv")
    other = evaluated(repository / HEAD, "new/march.csv", "--column", "path=file", fails=True)
    assert other["models"] == found["models"]


def test_mistakes_of_the_user_are_one_line(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("red", "purple\nish"):
        Path("new", name).mkdir(parents=True)
        Image.new("RGB", (30, 30)).save(f"new/{name}/1.png")
    for arguments, expected in (
        ((HEAD, "new"), r"classes that .*seed_0 does not know: purple\\nish; it knows blue, green, red"),
        ((HEAD, "new/gone.csv"), "new/gone.csv: no such file; expected a table or a directory"),
        ((HEAD, "gone"), "gone is not a directory; expected one with a sub-directory per class"),
        (("models/none/seed_0", "new"), "no such run"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=expected) as caught:
            cli(["evaluate", str(repository / arguments[0]), arguments[1]], standalone_mode=False)
        assert "\n" not in str(caught.value)
    assert not Path("reports").exists()


@pytest.mark.usefixtures("in_torch")
def test_reports_that_are_damaged_or_of_another_run_are_not_compared_with(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy_split(repository, "test", 0, tmp_path / "new")
    shutil.copytree(repository, "copy", ignore=shutil.ignore_patterns(".feature_store", "images"))
    run = Path("copy/reports/runs/feature_extraction/seed_0/run.json")
    described = json.loads(run.read_text())
    described["cost"]["train_flops"] += 1
    run.write_text(json.dumps(described))
    (one,) = evaluated(f"copy/{HEAD}", "new")["models"]
    assert one["own_test"] is None
    assert one["is_known"]
    run.write_text("{")
    assert evaluated(f"copy/{HEAD}", "new")["models"][0]["own_test"] is None


@settings(deadline=None, max_examples=40)
@given(*(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)).map(sorted) for _ in range(2)))
def test_the_interval_of_an_unpaired_difference_holds_it_and_p_agrees(ours: list[float], theirs: list[float]) -> None:
    first, second = ({"low": low, "value": value, "high": high} for low, value, high in (ours, theirs))
    found, turned = evaluate.unpaired(first, second), evaluate.unpaired(second, first)
    assert found["low"] <= found["value"] <= found["high"]
    assert (turned["low"], turned["high"]) == pytest.approx((-found["high"], -found["low"]))
    is_shown = not found["low"] <= 0 <= found["high"]
    assert (found["p_value"] < 0.05) == is_shown or found["p_value"] == pytest.approx(0.05)


def test_an_unpaired_difference_of_large_samples_is_that_of_the_normal() -> None:
    first, second = ({"value": p, "low": p - 0.03, "high": p + 0.03} for p in (0.8, 0.86))
    error = 0.03 * np.sqrt(2) / stats.norm.ppf(0.975)
    found = evaluate.unpaired(first, second)
    assert found["p_value"] == pytest.approx(2 * stats.norm.sf(0.06 / error))
    assert (found["low"], found["high"]) == pytest.approx((-0.06 - 0.03 * np.sqrt(2), -0.06 + 0.03 * np.sqrt(2)))


@pytest.mark.parametrize("n_validation", [8, 150, 1000])
def test_as_many_images_are_far_as_chance_says(n_validation: int) -> None:
    """Simulated: new images like those of validation lie in the stated range about 95 times of 100, or more."""
    random, inside, far, expected = np.random.default_rng(0), 0, [], []
    for _ in range(300):
        validation = torch.from_numpy(np.sort(random.random(n_validation)))
        none = torch.zeros(1)
        known = novelty.Novelty(none, none, none, none, validation)
        found = evaluate.far_away(known, random.random(200), np.arange(200))
        inside += found["expected_low"] <= found["n_far"] <= found["expected_high"]
        far.append(found["n_far"])
        expected.append(found["expected"])
        assert found["n_nearer"] == {8: 8, 150: 150, 1000: 991}[n_validation]
    assert inside >= 0.92 * 300
    assert np.mean(far) == pytest.approx(np.mean(expected), rel=0.25)


def test_a_name_for_the_reports_is_that_of_models_and_data(tmp_path: Path) -> None:
    name = evaluate.default_name(["a/models/full/seed_0.json", "models/head/seed_1"], tmp_path / "new week/")
    assert re.fullmatch(r"full-seed_0_against_head-seed_1_on_new_week-[0-9a-f]{6}", name)
    places = [tmp_path / "a/test", tmp_path / "b/test", tmp_path / "b/march.csv", tmp_path / "b/april.csv"]
    assert len({evaluate.default_name(["models/head/seed_1"], place) for place in places}) == 4
    assert os.sep not in evaluate.default_name(["seed_0"], Path("/"))
