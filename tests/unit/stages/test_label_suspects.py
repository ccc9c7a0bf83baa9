"""The stage label_suspects: what it reads, writes and says."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

from pipeline.dataset import manifest
from pipeline.dataset.manifest import Labels
from pipeline.features import hdf5
from pipeline.stages import label_suspects

REPOSITORY = Path(__file__).parents[2]
CLASSES = ["birch, white", "oak", "yew"]


@pytest.fixture
def labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Labels:
    """Sixty features around a point for each of three classes, image 7 with a wrong label; a single image of "yew"."""
    monkeypatch.chdir(tmp_path)
    yaml = YAML()
    params = yaml.load(REPOSITORY / "params.yaml")
    params["label_suspects"]["threads"] = 1
    yaml.dump(params, Path("params.yaml"))
    random, true = np.random.default_rng(0), np.arange(61) % 2
    features = (10 * np.eye(2, 4)[true][:, None] + random.normal(size=(61, 2, 4))).astype(np.float32)
    sha256 = [f"{row:064x}" for row in range(61)]
    hdf5.write_features(hdf5.FEATURES, features.shape, features.dtype, [features], sha256, {})
    label = true.copy()
    label[7], label[60] = 0, 2
    names, empty = [f"{CLASSES[index]}/{row:02}.png" for row, index in enumerate(label)], [""] * 61
    made = Labels(names, sha256, label, np.full(61, 0.5), empty, empty, empty, empty, empty, CLASSES)
    manifest.write_labels(made)
    return made


def test_the_wrong_label_stands_first_with_what_is_suggested(labels: Labels, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "pipeline")
    label_suspects.main()
    frame = pd.read_csv(label_suspects.REPORT)
    columns = ["rank", "image_id", "label", "suggested", "self_confidence", "suggested_confidence", "weight"]
    assert list(frame) == columns
    assert frame["rank"].tolist() == list(range(1, len(frame) + 1))
    first = frame.iloc[0]
    assert (first["image_id"], first["label"], first["suggested"]) == (labels.image_id[7], "birch, white", "oak")
    assert first["self_confidence"] < 0.2 < 0.8 < first["suggested_confidence"]
    assert first["weight"] == 0.5
    assert "yew" not in {*frame["label"], *frame["suggested"]}
    assert caplog.messages[0].startswith("left out: yew: fewer images than label_suspects.folds (5)")
    assert caplog.messages[-1] == f"{len(frame)} of 61 labels are suspects: reports/label_suspects.csv"


def test_it_writes_the_same_bytes_again(labels: Labels):
    label_suspects.main()
    first = label_suspects.REPORT.read_bytes()
    shutil.rmtree("reports")
    label_suspects.main()
    assert label_suspects.REPORT.read_bytes() == first


def test_without_two_classes_the_list_is_empty(labels: Labels, caplog: pytest.LogCaptureFixture):
    manifest.write_labels(replace(labels, label=np.where(np.arange(61) < 2, labels.label, 1)))
    label_suspects.main()
    assert "left out: birch, white: " in caplog.text
    assert label_suspects.REPORT.read_text().count("\n") == 1, "the names of the columns alone"


def test_features_of_other_images_are_refused(labels: Labels):
    manifest.write_labels(replace(labels, sha256=labels.sha256[::-1]))
    with pytest.raises(ValueError, match=r"^data/features\.h5: other images than in data/labels\.csv; run: dvc repro$"):
        label_suspects.main()
