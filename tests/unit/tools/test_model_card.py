"""model-card: what is known of a network is in its README.md, nothing else, and users' names do no harm there."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from ruamel.yaml import YAML
from torch import nn

from pipeline.__main__ import cli
from pipeline.files import write_text
from pipeline.report.provenance import digest
from pipeline.tools import model_card
from pipeline.training import heads, saved_networks
from pipeline.training.saved_networks import Card
from tests import factories
from tests.factories import HOSTILE, LINEAR, backbone_plan

STRATEGY = "partial_freeze"
RUN = Path(f"models/{STRATEGY}/seed_0.json")
HEADINGS = ["Data", "Training", "Results on the test images", "Calibration", "Limits", "Licences", "Use"]
LISTED = (
    *("data/images.csv", "data/labels.csv", "data/splits", "reports/data", "reports/details.json"),
    *("reports/splits.json", str(RUN), str(RUN.with_suffix(".safetensors")), f"reports/runs/{STRATEGY}/seed_0"),
)

READ = ("data/labels.csv", "data/splits", "data/splits/seed_0.csv")


def lock(root: Path, path: str = "data/mine") -> None:
    """dvc.lock of the outputs as they are now."""
    outs = [{"path": name, "md5": digest(root / name), "size": 1} for name in LISTED]
    splitting = {"method": "stratified", "seeds": [0, 1], "test_fraction": 0.25, "val_fraction": 0.25}
    params: dict[str, Any] = {"index": {"dataset.path": path}, "split": {"split": splitting}}
    stages = {name: {"outs": [], "params": {"params.yaml": values}} for name, values in params.items()}
    deps = [{"path": name, "md5": digest(root / name), "size": 1} for name in READ]
    every = {"outs": outs, "deps": deps}
    write_text(root / "dvc.lock", json.dumps({"schema": "2.0", "stages": {**stages, "all": every}}))


def save(root: Path, **changes: Any) -> Card:
    """The run that the study's reports are of, unless it is changed."""
    details = json.loads((root / "reports/details.json").read_text(encoding="utf-8"))
    plain: dict[str, Any] = {
        "strategy": STRATEGY,
        "class_names": tuple(details["class_names"]),
        "cost": factories.cost(trainable_params=51, train_flops=10**11, base_passes=8, cached_bytes=1536),
        "temperature": details["strategies"][STRATEGY]["test"]["temperature"][0],
        "evaluation_views": ("identity",),
        "backbone": backbone_plan(licence="cc-by-nc-4.0"),
    }
    card = factories.card(**plain | changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        torch.manual_seed(0)
        head = heads.build(card.backbone.feature_shape, len(card.class_names), LINEAR, nn.Identity())
        saved_networks.save_model(card, head, None)
        return saved_networks.read_card(RUN)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    factories.make_study(root)
    write_text(root / "dvc.yaml", "stages: {}\n")
    save(root)
    lock(root)
    return root


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "study"))


def written(run: Path, directory: Path) -> str:
    cli(["model-card", str(run.with_suffix("")), str(directory)], standalone_mode=False)
    return (directory / "README.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text[text.index(f"\n## {title}\n") + 4 :], maxsplit=1, flags=re.MULTILINE)[0]


def cells(text: str) -> list[list[str]]:
    """Rows of the tables of a section; an escaped bar separates nothing."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_card_states_what_the_reports_state(study: Path, tmp_path: Path) -> None:
    text = written(study / RUN, tmp_path / "published")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS
    details = json.loads((study / "reports/details.json").read_text(encoding="utf-8"))
    test = details["strategies"][STRATEGY]["test"]
    results, figure = section(text, HEADINGS[2]), test["metrics"]["accuracy"]
    value, low, high = (f"{100 * figure[key]:.1f}" for key in ("value", "low", "high"))
    assert ["accuracy", f"{value} % ({low} to {high})"] in cells(results)
    for one in test["classes"]:
        shares = [f"{100 * one[key]:.1f} %" for key in ("precision", "recall", "f1")]
        assert [model_card.plain(one["class"]), str(one["support"]), *shares] in cells(results)
    run = details["strategies"][STRATEGY]["runs"][0]["test"]
    before, after = (f"{100 * run[key]:.1f} %" for key in ("ece", "ece_scaled"))
    assert f"{before} before, {after} after" in section(text, "Calibration")
    assert f"temperature {test['temperature'][0]:.4g}" in section(text, "Calibration")
    assert "Chosen on validation: epoch 2." in section(text, "Training")
    data = section(text, "Data")
    assert ["all", "9", "9", "6"] in cells(data)
    assert "method stratified, seed 0" in data
    assert "The directory mine, 24 images" in data
    limits = section(text, "Limits")
    assert "trained on 9 images, with one split and one seed (0)" in limits
    assert "only 6 test units" in limits
    assert "Files of the data that could not be read, and are in no figure: 1." in limits
    assert "the middle of an image: on average 25.0 % of the area is cut away" in limits  # 40 x 30 px
    assert "Pretrained weights: cc-by-nc-4.0 (excludes commercial use).\n- Data: not known." in section(
        text, "Licences"
    )
    tensors = hashlib.sha256((study / RUN).with_suffix(".safetensors").read_bytes()).hexdigest()
    assert tensors in section(text, "Use")
    assert f"python -m pipeline predict {RUN.with_suffix('')} photo.jpg" in text


def test_front_matter_is_what_the_hub_reads(study: Path, tmp_path: Path) -> None:
    written(study / RUN, tmp_path / "published")
    data = ModelCard.load(tmp_path / "published/README.md").data.to_dict()
    assert data["pipeline_tag"] == "image-classification"
    assert (data["license"], data["license_name"]) == ("other", "weights-cc-by-nc-4.0-data-unknown")
    assert data["library_name"] == "freeze-depth"
    assert data["datasets"] == ["mine"]
    (result,) = data["model-index"][0]["results"]
    details = json.loads((study / "reports/details.json").read_text(encoding="utf-8"))
    own = details["strategies"][STRATEGY]["runs"][0]["test"]
    assert {"type": "accuracy", "value": own["accuracy"]} in result["metrics"]


def test_names_of_users_are_plain_text(study: Path, tmp_path: Path) -> None:
    names = ("a|b *c* `d`", "<script>alert(1)</script>\n# heading", "[x](http://y) _z_ & ~~w~~ \\")
    details = json.loads((study / "reports/details.json").read_text(encoding="utf-8"))
    details["class_names"] = [*names]
    for one, name in zip(details["strategies"][STRATEGY]["test"]["classes"], names, strict=True):
        one["class"] = name
    write_text(study / "reports/details.json", json.dumps(details))
    save(study, class_names=names)
    lock(study, "data/mi<b>ne | *x*")
    text = written(study / RUN, tmp_path / "published")
    body = text.split("\n---\n", 1)[1]
    assert "<script" not in body
    assert "<b>" not in body
    assert "\n# heading" not in body
    rows = cells(section(text, HEADINGS[2]))
    assert {len(row) for row in rows} == {2, 5}
    assert "a\\|b \\*c\\* \\`d\\`" in [row[0] for row in rows]
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\# heading" in body
    assert "\\[x\\](http://y) \\_z\\_ &amp; \\~\\~w\\~\\~ \\\\" in body
    front = YAML(typ="safe", pure=True).load(text.split("---\n")[1])
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == "mi<b>ne | *x*"
    assert "datasets" not in front, "no name that the hub knows"
    assert all(model_card.plain(name) not in HOSTILE or name not in body for name in HOSTILE[:2])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("elsewhere", "does not lie in models/partial\\_freeze of a repository"),
        ("no lock", "dvc.lock: not found"),
        ("other weights", "seed\\_0.json: not the output that dvc.lock lists"),
        ("edited reports", "reports/details.json: not the output that dvc.lock lists"),
        ("stale reports", "reports/details.json: of another training of this strategy"),
        ("other cost", "reports/details.json: of another training of this strategy"),
        ("other data", "data/labels.csv: changed since models/partial\\_freeze/seed\\_0.json was made"),
    ],
)
def test_figures_of_another_network_are_left_out_with_the_reason(
    change: str, reason: str, study: Path, tmp_path: Path
) -> None:
    run = study / RUN
    if change == "elsewhere":
        shutil.copytree(run.parent, tmp_path / "copied")
        run = tmp_path / "copied" / RUN.name
    elif change == "no lock":
        (study / "dvc.lock").unlink()
    elif change == "edited reports":
        path = study / "reports/details.json"
        path.write_text(path.read_text(encoding="utf-8").replace("0.", "0.9", 1), encoding="utf-8")
    elif change == "other data":  # a stage that prepares data ran, and nothing behind it
        before = digest(study / "data/labels.csv")
        table = pd.read_csv(study / "data/labels.csv", keep_default_na=False)
        table.assign(weight=2.0).to_csv(study / "data/labels.csv", index=False)
        lock(study)
        listed = json.loads((study / "dvc.lock").read_text(encoding="utf-8"))
        listed["stages"]["all"]["deps"][0]["md5"] = before
        write_text(study / "dvc.lock", json.dumps(listed))
    else:
        save(study, **({"cost": factories.cost()} if change == "other cost" else {"temperature": 3.21}))
        if change != "other weights":  # trained again, but compare did not run
            lock(study)
    text = written(run, tmp_path / "published")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS
    for title in HEADINGS[:5]:
        assert reason in section(text, title), title
    assert cells(section(text, HEADINGS[0])) == cells(section(text, HEADINGS[2])) == []
    assert "accuracy" not in text
    assert "model-index" not in text


def test_a_card_of_a_head_with_a_seed_of_its_own_has_the_figures_of_all_seeds(study: Path) -> None:
    details = json.loads((study / "reports/details.json").read_text(encoding="utf-8"))
    every = details["strategies"]["feature_extraction_all_seeds"]
    spent, temperature = factories.cost(**every["runs"][1]["cost"]), every["test"]["temperature"][1]
    names = tuple(details["class_names"])
    card = factories.card(seed=1, class_names=names, cost=spent, temperature=temperature, evaluation_views=())
    strategy, own = model_card._own_part(details, card)
    assert strategy == every
    assert own["seed"] == 1


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (
            {"strength": 0.1, "at_end": None, "val_nll": {"0.1": 0.6}, "not_converged": []},
            "regularization strength 0.1",
        ),
        ({"strength": 3.0, "at_end": "strongest"}, "regularization strength 3 (the strongest that was tried)"),
        ({"epoch": 0}, "epoch 0 (the network before training)"),
        ({"epoch": 5, "learning_rates": [1e-4, 0.001]}, "epoch 5, learning rates 0.0001 (base) and 0.001 (head)"),
    ],
)
def test_what_validation_chose_is_said_in_words(chosen: dict[str, Any], expected: str) -> None:
    assert model_card._chosen(chosen) == expected


def test_no_file_is_replaced_and_nothing_written_beside_outputs(study: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"README\.md: is there already; remove it, or name another directory"):
        written(study / RUN, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    for place in ("models", "models/new", "reports", "data/mine"):
        with pytest.raises(ValueError, match="holds what the stages write; expected a directory outside"):
            written(study / RUN, study / place)
    assert [*study.rglob("README.md")] == []
    (tmp_path / "link").symlink_to(study / "models")
    with pytest.raises(ValueError, match="holds what the stages write"):
        written(study / RUN, tmp_path / "link")


def test_licence_of_a_package_and_files_of_a_directory_are_named(study: Path, tmp_path: Path) -> None:
    (study / "data/mine/LICENSE.txt").write_text("do what you like")
    assert "Data: not known; see LICENSE.txt of the data." in written(study / RUN, tmp_path / "one")
    lock(study, "data/raw/elpv")
    text = written(study / RUN, tmp_path / "two")
    assert "Data: CC-BY-NC-SA-4.0 AND Apache-2.0." in text
    assert "license_name: weights-cc-by-nc-4.0-data-cc-by-nc-sa-4.0-and-apache-2.0" in text
