"""Listing a user's directory, and the tables that the pipeline writes and reads."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline import manifest
from pipeline.manifest import Images, Labels, Split, find_images


def touch(directory: Path, *names: str) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def with_table(directory: Path, table: str) -> Path:
    touch(directory, "a.png", "b.png")
    (directory / "labels.csv").write_bytes(table.encode())
    return directory


# class directories


def test_each_sub_directory_is_a_class_and_its_files_are_sorted_by_path(tmp_path: Path):
    touch(tmp_path, "dog/2.png", "cat/z.png", "dog/1.png", "dog/deep/er/3.png")
    found = find_images(tmp_path)
    assert list(found["path"]) == ["cat/z.png", "dog/1.png", "dog/2.png", "dog/deep/er/3.png"]
    assert list(found["label"]) == ["cat", "dog", "dog", "dog"]
    assert set(found["weight"]) == {"1"}
    assert set(found["group"]) | set(found["stratum"]) | set(found["subset"]) | set(found["split"]) == {""}


def test_hidden_files_links_pipes_and_loose_files_are_no_images(tmp_path: Path):
    touch(tmp_path, "cat/1.png", "cat/.DS_Store", "cat/.thumbs/2.png", ".git/3.png", "README.md")
    (tmp_path / "cat/link.png").symlink_to(tmp_path / "cat/1.png")
    (tmp_path / "linked").symlink_to(tmp_path / "cat")
    os.mkfifo(tmp_path / "cat/pipe")
    assert list(find_images(tmp_path)["path"]) == ["cat/1.png"]


def test_an_empty_class_directory_is_named(tmp_path: Path):
    touch(tmp_path, "cat/1.png", "dog/.hidden")
    with pytest.raises(ValueError, match=r"dog: class without an image"):
        find_images(tmp_path)


@pytest.mark.parametrize("name", ["NA", "null", "1", "1.0", "True"])
def test_a_class_may_be_called_anything(name: str, tmp_path: Path):
    touch(tmp_path, f"{name}/1.png")
    assert list(find_images(tmp_path)["label"]) == [name]


def test_a_directory_without_images_says_what_is_expected(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no image found; expected a sub-directory per class, or a labels\.csv"):
        find_images(tmp_path)


def test_a_missing_directory_names_the_key(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"dataset\.path: .*nowhere is not a directory"):
        find_images(tmp_path / "nowhere")


# labels.csv


def test_a_table_decides_over_directories_and_its_rows_are_sorted_by_path(tmp_path: Path):
    touch(tmp_path, "unlisted/1.png")
    found = find_images(with_table(tmp_path, "path,label,weight,note\nb.png,dog,0.5,x\na.png,cat,2,y\n"))
    assert found.to_dict("list") == {
        "path": ["a.png", "b.png"],
        "label": ["cat", "dog"],
        "weight": ["2", "0.5"],
        "group": ["", ""],
        "stratum": ["", ""],
        "subset": ["", ""],
        "split": ["", ""],
    }


def test_every_optional_column_is_taken_over(tmp_path: Path):
    table = "subset,split,stratum,group,weight,label,path\nsun,test,s,g,3,cat,a.png\n"
    (found,) = find_images(with_table(tmp_path, table)).to_dict("records")
    assert found == {
        "path": "a.png",
        "label": "cat",
        "weight": "3",
        "group": "g",
        "stratum": "s",
        "subset": "sun",
        "split": "test",
    }


def test_a_table_as_excel_saves_it_is_read(tmp_path: Path):
    found = find_images(with_table(tmp_path, "\ufeffpath,label\r\na.png,grün\r\nb.png,NA\r\n"))
    assert list(found["path"]) == ["a.png", "b.png"]
    assert list(found["label"]) == ["grün", "NA"]


@pytest.mark.parametrize("weight", ["nan", "0", "-1", "inf", "", "heavy", "1,5"])
def test_a_weight_is_a_number_above_zero(weight: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"labels\.csv: row 3: weight '.*'; expected a number above 0"):
        find_images(with_table(tmp_path, f'path,label,weight\na.png,cat,1\nb.png,dog,"{weight}"\n'))


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("c.png", "does not exist"),
        ("", "expected a plain path"),
        ("../a.png", "expected a plain path"),
        ("x/../a.png", "expected a plain path"),
        ("./a.png", "expected a plain path"),
        ("a.png/", "expected a plain path"),
        ("/etc/passwd", "expected a plain path"),
        ("x\\a.png", "expected a plain path"),
        ("folder", "does not exist"),
        ("out.png", "a link that leads out of the directory"),
        ("out/secret.png", "a link that leads out of the directory"),
    ],
)
def test_a_path_that_is_absent_or_leads_out_is_named_with_its_row(path: str, problem: str, tmp_path: Path):
    directory, outside = tmp_path / "data", tmp_path / "outside"
    touch(outside, "secret.png")
    touch(directory, "folder/x.png")
    (directory / "out.png").symlink_to(outside / "secret.png")
    (directory / "out").symlink_to(outside)
    with pytest.raises(ValueError, match=r"labels\.csv: row 3: path ") as error:
        find_images(with_table(directory, f"path,label\na.png,cat\n{path},dog\n"))
    assert repr(path) in str(error.value)
    assert problem in str(error.value)


def test_a_link_within_the_directory_is_an_image(tmp_path: Path):
    (tmp_path / "c.png").symlink_to("a.png")
    assert list(find_images(with_table(tmp_path, "path,label\nc.png,cat\n"))["path"]) == ["c.png"]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("file,label\na.png,cat\n", "column 'path' is missing; found file, label; expected path and label"),
        ("path,class\na.png,cat\n", "column 'label' is missing; found path, class; expected path and label"),
        ("path,label\na.png,cat\nb.png,dog\na.png,dog\n", "'a.png' is listed twice; expected one row per image"),
        ("path,label\na.png,\n", "row 2: label is empty"),
        ("path,label,split\na.png,cat,dev\n", "row 2: split 'dev'; expected train, val, test, unused or nothing"),
        ("", "not a CSV file in UTF-8"),
        ("path,label\na.png,cat\nb.png,dog,1,2\n", "not a CSV file in UTF-8"),
    ],
)
def test_a_table_with_a_mistake_is_refused(table: str, problem: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"labels\.csv: ") as error:
        find_images(with_table(tmp_path, table))
    assert problem in str(error.value)


def test_a_table_in_another_encoding_is_refused(tmp_path: Path):
    with_table(tmp_path, "")
    (tmp_path / "labels.csv").write_bytes("path,label\na.png,grün\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.csv: not a CSV file in UTF-8"):
        find_images(tmp_path)


# the pipeline's own tables


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


def test_splits_read_back_by_seed_as_they_were_written(tmp_path: Path):
    names = ["1", "NA", "c,d"]
    for seed, parts in ((10, ["train", "val", "test"]), (2, ["unused", "test", "train"])):
        manifest.write_split(Split(seed, names, np.array(parts)), tmp_path)
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
