"""Directories that may be no classes: what was found is shown, and what it can mean."""

import re
from pathlib import Path

import pytest

from pipeline.ingest.listing import find_images


def touch(directory: Path, *names: str) -> Path:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return directory


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["site A/cat/1.png", "site A/dog/1.png", "site B/cat/2.png", "site B/dog/2.png", "site B/dog/3.png"],
            "taken as the classes: site A/, site B/; they hold directories (cat/, dog/); if cat/, dog/ are the "
            "classes, move them to the top, or write a labels.csv with path, label, group; found site A/ (cat/ 1 .png, "
            "dog/ 1 .png), site B/ (cat/ 1 .png, dog/ 2 .png)",
        ),
        (["cat/train/1.png", "cat/test/2.png", "dog/train/1.png"], "if those are splits, put them above the classes"),
        (["animals/cat/1.png", "animals/dog/1.png", "plants/rose/1.png"], "if cat/, dog/, rose/ are the classes, move"),
        (["images/1.jpg", "masks/1.png"], "images/, masks/: what lies there counts as images of a class; if it is"),
        (["cat/1.png", "cat/thumbs/1.png", "dog/1.png"], "thumbs/: what lies there counts as images of a class"),
        (["cat/1.png", "dog/1.png", "test/1.png"], "test/: what lies there counts as images of a class"),
        (["cat/1.png", "New folder/1.png"], "New folder/: what lies there counts as images of a class"),
        (
            ["train/images/1.jpg", "train/labels/1.txt", "val/images/2.jpg", "val/labels/2.txt"],
            "images/, labels/: what",
        ),
    ],
)
def test_directories_that_may_be_no_classes_are_a_warning_that_shows_them(names: list[str], words: str, tmp_path: Path):
    (warning,) = find_images(touch(tmp_path, *names)).warnings
    assert words in warning
    assert f"found {names[0].split('/')[0]}/ (" in warning or "New folder/ (" in warning


@pytest.mark.parametrize(
    "names",
    [["cat/1.png", "dog/1.png"], ["cat/1.png", "cat/2019/2.png", "dog/1.png"], ["train/cat/1.png", "val/cat/1"]],
)
def test_plain_classes_are_no_reason_for_a_warning(names: list[str], tmp_path: Path):
    assert find_images(touch(tmp_path, *names)).warnings == []


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["training_set/cat/1.png", "training_set/dog/1.png", "test_set/cat/1.png"],
            "test_set/, training_set/ hold the same directories (cat/, dog/) and are called like splits; rename them "
            "to train/, val/ and test/, or write a labels.csv; found test_set/ (cat/ 1 .png), training_set/ (cat/ 1",
        ),
        (
            ["1.png", "2.png", "notes.txt"],
            "no image found; expected a sub-directory per class, or a labels.csv; found 2",
        ),
        (["1.png", "labels.xlsx"], "a table is read only if it is called labels.csv: labels.xlsx"),
        (["train/cat/1.png", "test/1.png"], "test: no class directory in it; expected one per class; keep images"),
        (["train/cat/1.png", "val/cat/1.png", "notes/n.txt"], "notes/ lies beside train/, val/; expected train/, val/"),
        (
            ["cat/1.png", "dog/.keep"],
            "dog: class without an image; add some, remove the directory, or set dataset.exclude",
        ),
    ],
)
def test_directories_that_cannot_be_classes_are_an_error_that_shows_them(names: list[str], words: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"; found .*\d \.png") as error:
        find_images(touch(tmp_path, *names))
    assert words in str(error.value)


def test_a_directory_around_the_classes_is_named_as_the_path_to_set(tmp_path: Path):
    layout = find_images(touch(tmp_path, "photos/cat/1.png", "photos/dog/1.png")).layout
    advice = f"if cat/, dog/ are the classes, set dataset.path: {tmp_path}/photos"
    assert layout == f"found photos/ (cat/ 1 .png, dog/ 1 .png); {advice}"


def test_a_table_under_another_name_is_pointed_out(tmp_path: Path):
    (warning,) = find_images(touch(tmp_path, "cat/1.png", "dog/1.png", "Labels.csv", "a.txt")).warnings
    assert warning.endswith("'Labels.csv', 'a.txt'; a table is read only if it is called labels.csv: Labels.csv")


def test_a_long_tree_is_shortened_and_names_stay_in_one_line(tmp_path: Path):
    names = [f"{top}/{number}/x.png" for top in ("a", "b\nc", "d", "e", "f") for number in range(5)]
    (warning,) = find_images(touch(tmp_path, *names)).warnings
    assert re.search(
        r"found a/ \(0/ 1 .png, 1/ 1 .png, 2/ 1 .png, …\), b\\nc/ \(.*\), d/ \(.*\), e/ \(.*\), …$", warning
    )


def test_an_error_about_a_name_with_a_line_break_is_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match=r"b\\nc: class without an image") as error:
        find_images(touch(tmp_path, "a/1.png", "b\nc/.hidden"))
    assert len(str(error.value).splitlines()) == 1
