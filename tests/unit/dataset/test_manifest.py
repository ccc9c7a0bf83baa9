"""The tables that the pipeline writes and reads."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.dataset import manifest
from pipeline.dataset.manifest import Images, Labels, Split

LABELS = Labels(
    image_id=["a,b.png", "grün.png", 'q"uote.png'],
    sha256=["1" * 64, "NA", "2" * 64],
    label=np.array([1, 0, 1]),
    weight=np.array([1 / 3, 1.0, 0.1 + 0.2]),
    group=["", "NA", "1"],
    near_duplicate_group=["", "", "x"],
    stratum=["007", "", "1e5"],
    subset=["", "a", "b"],
    given_split=["", "train", "test"],
    class_names=["NA", "null"],
)


def test_images_read_back_as_they_were_written(tmp_path: Path):
    images = Images(["a,b.png", "grün.png"], ["1e5", "NA"], [3, 4], [5, 600])
    manifest.write_images(images, tmp_path / "images.csv")
    assert manifest.read_images(tmp_path / "images.csv") == images


def test_labels_read_back_as_they_were_written(tmp_path: Path):
    manifest.write_labels(LABELS, tmp_path / "labels.csv")
    found = vars(manifest.read_labels(tmp_path / "labels.csv"))
    for name, value in vars(LABELS).items():
        assert type(found[name]) is type(value), name
        assert list(found[name]) == list(value), name
    assert found["label"].dtype == np.int64
    assert found["weight"].dtype == np.float64


def test_tables_have_the_same_bytes_on_every_system(tmp_path: Path):
    path = tmp_path / "labels.csv"
    manifest.write_labels(LABELS, path)
    content = path.read_bytes()
    assert b"\r" not in content
    assert content.decode().splitlines()[0].startswith("image_id,sha256,label,weight")


def test_a_table_of_another_version_is_refused(tmp_path: Path):
    path = tmp_path / "labels.csv"
    manifest.write_labels(LABELS, path)
    pd.read_csv(path, dtype=str).drop(columns="subset").to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"labels\.csv: column 'subset' is missing; run: dvc repro index"):
        manifest.read_labels(path)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b'a,b\n"1,2\n', b"a\n1\n2,3\n"])
def test_what_is_no_table_is_one_line_with_the_way_out(tmp_path: Path, content: bytes | None):
    path = tmp_path / "images.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^.*images\.csv: .+; run: dvc repro index$"):
        manifest.read_images(path)
    with pytest.raises(ValueError, match=r"^.*seed_0\.csv: not there; run: dvc repro split$"):
        manifest.read_split(0, [], tmp_path)


def test_splits_read_back_by_seed_as_they_were_written(tmp_path: Path):
    names = ["1", "NA", "c,d"]
    for seed, given in ((10, ["train", "val", "test"]), (2, ["unused", "test", "train"])):
        manifest.write_split(Split(seed, names, np.array(given)), tmp_path)
    second, tenth = manifest.read_splits(names, tmp_path)
    assert (second.seed, tenth.seed) == (2, 10)
    assert tenth.image_id == names
    assert list(tenth.split) == ["train", "val", "test"]
    assert list(tenth.rows("val")) == [1]
    assert list(second.rows("val")) == []


@pytest.mark.parametrize("others", [["a", "c"], ["b", "a"], ["a"], ["a", "b", "c"], []])
def test_a_split_of_other_images_is_refused(others: list[str], tmp_path: Path):
    manifest.write_split(Split(0, ["a", "b"], np.array(["train", "test"])), tmp_path)
    with pytest.raises(ValueError, match=r"seed_0\.csv: other images than in data/labels\.csv; run: dvc repro split"):
        manifest.read_split(0, others, tmp_path)
