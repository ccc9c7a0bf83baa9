"""Names of classes that mean the same."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.ingest.listing import Listing, find_images

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def folders(directory: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (directory / name).mkdir(parents=True)
        (directory / name / f"{number}.png").write_bytes(b"")
    return directory


def table(directory: Path, labels: Sequence[str], column: str = "", values: Sequence[str] = ()) -> Listing:
    rows = [f"path,label{column and ','}{column}"]
    for number, label in enumerate(labels):
        (directory / f"{number}.png").write_bytes(b"")
        rows.append(f'{number}.png,"{label}"' + (f',"{values[number]}"' if values else ""))
    (directory / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    return find_images(directory)


@pytest.mark.parametrize("names", [(NFC, NFD, "other"), (f"train/{NFC}", f"test/{NFD}", "train/other", "test/other")])
def test_one_name_in_two_spellings_of_unicode_is_one_class(names: Sequence[str], tmp_path: Path):
    found = find_images(folders(tmp_path, *names))
    assert set(found.images["label"]) == {NFC, "other"}
    assert found.warnings == [f"label {NFC!r} is spelled in two ways of Unicode: taken as one"]


ALIKE = [
    ("Cat", "cat"),
    ("cat", "cat "),
    ("hot  dog", "hot dog"),
    ("cat", "c\u200bat"),
    ("\uff43at", "cat"),
    ("a", "A"),
]


@pytest.mark.parametrize("names", ALIKE)
@pytest.mark.parametrize("place", ["", "train/"])
def test_names_that_differ_by_case_or_blanks_are_an_error_that_shows_both(
    names: tuple[str, str], place: str, tmp_path: Path
):
    second = place.replace("train", "test")
    folders(tmp_path, f"{place}{names[0]}", f"{second}{names[1]}", f"{place}x", *([f"{second}x"] if second else []))
    with pytest.raises(ValueError, match=r"differ by case or blanks only; rename one, or set dataset\.similar_classes"):
        find_images(tmp_path)
    merged = find_images(tmp_path, similar="merge")
    assert set(merged.images["label"]) in ({names[0], "x"}, {names[1], "x"})
    kept = find_images(tmp_path, similar="keep")
    assert set(kept.images["label"]) == {*names, "x"}
    assert "taken as different" in kept.warnings[0]


def test_the_most_frequent_name_is_that_of_the_one_class(tmp_path: Path):
    folders(tmp_path, "Cat", "dog", "cat")
    (tmp_path / "cat/2.png").write_bytes(b"")
    assert set(find_images(tmp_path, similar="merge").images["label"]) == {"cat", "dog"}


def test_labels_are_text_as_written_and_those_that_are_one_number_are_a_warning(tmp_path: Path):
    found = table(tmp_path, ["1", "1.0", "01", "2", "nan", "None", "hot_dog", "hot-dog"])
    assert list(found.images["label"]) == ["1", "1.0", "01", "2", "nan", "None", "hot_dog", "hot-dog"]
    assert found.warnings == [
        "classes '01' and '1' and '1.0' are the same number: taken as different",
        "classes 'hot-dog' and 'hot_dog' differ by the signs between words only: taken as different",
        "1 images have the label 'None', as programs write a missing one: taken as a class",
        "1 images have the label 'nan', as programs write a missing one: taken as a class",
    ]


def test_groups_are_of_one_spelling_and_those_that_differ_by_case_are_a_warning(tmp_path: Path):
    found = table(tmp_path, ["a", "b", "a"], "group", [NFC, NFD, "CAFÉ"])
    assert list(found.images["group"]) == [NFC, NFC, "CAFÉ"]
    assert found.warnings == [
        f"group {NFC!r} is spelled in two ways of Unicode: taken as one",
        f"groups 'CAFÉ' and {NFC!r} differ by case or blanks only: taken as different",
    ]
