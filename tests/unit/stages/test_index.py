"""The stage: what it refuses, what it leaves out by option, and what it writes."""

import csv
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset import manifest
from pipeline.features import extraction
from pipeline.params import load_params
from pipeline.stages import index
from tests import factories

Index = Callable[..., None]


def picture(seed: int, quality: int = 90) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(small).resize((63, 49), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


@pytest.fixture
def index_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """Run the stage on `set/`: five cats and five dogs, and whatever a test has changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(sys, "argv", ["index"])
    for number in range(10):
        path = Path("set", ("cat", "dog")[number % 2], f"{number}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))

    def run(**dataset: Any) -> None:
        params = factories.params_document()
        params["dataset"].update({"fetch": [], "path": "set"} | dataset)
        params["runtime"]["workers"] = 0
        factories.write_params(params)
        index.main()

    return run


def rejected() -> dict[str, str]:
    with Path("reports/data/rejected.csv").open(newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def test_conflicting_labels_are_an_error_that_names_the_files(index_with: Index):
    Path("set/dog/copy.jpg").write_bytes(picture(0))
    with pytest.raises(ValueError, match=r"2 images have other labels than images with the same bytes") as error:
        index_with()
    assert "set/cat/0.jpg (labelled 'cat', but 'dog/copy.jpg' with the same bytes 'dog')" in str(error.value)
    assert "dataset.on_conflict: drop" in str(error.value)
    assert set(rejected()) == {"cat/0.jpg", "dog/copy.jpg"}
    assert not manifest.IMAGES.exists()


def test_conflicting_images_are_dropped_if_so_chosen_and_do_not_count_as_unreadable(index_with: Index):
    Path("set/dog/copy.jpg").write_bytes(picture(0))
    index_with(on_conflict="drop", max_rejected_fraction=0.0)
    kept = manifest.read_images().image_id
    assert len(kept) == 9
    assert not {"cat/0.jpg", "dog/copy.jpg"} & set(kept)
    assert set(rejected()) == {"cat/0.jpg", "dog/copy.jpg"}


def test_a_class_all_of_whose_images_are_dropped_is_an_error(index_with: Index):
    Path("set/owl").mkdir()
    Path("set/owl/copy.jpg").write_bytes(picture(0))
    with pytest.raises(ValueError, match=r"set: no image of class 'owl' can be used; see reports/data/rejected\.csv"):
        index_with(on_conflict="drop")


@pytest.mark.parametrize(
    "path", ["absolute", "../other/set", "./set", "linked", "a set/of  mine", "set/", "./x/../set"]
)
def test_the_data_set_may_lie_anywhere(path: str, index_with: Index, monkeypatch: pytest.MonkeyPatch):
    index_with()
    expected = [file.read_bytes() for file in (manifest.IMAGES, manifest.LABELS)]
    Path("x").mkdir()
    Path("linked").symlink_to("set")
    for place in ("a set/of  mine", "other/set"):
        shutil.copytree("set", place)
    if path.startswith(".."):
        monkeypatch.chdir("x")
    index_with(path=str(Path("set").resolve()) if path == "absolute" else path)
    assert [file.read_bytes() for file in (manifest.IMAGES, manifest.LABELS)] == expected
    images = manifest.read_images()
    assert all(found.is_file() for found in extraction.locate(images, load_params().dataset.path).values())


@pytest.mark.parametrize("choice", ["report", "group"])
def test_near_duplicates_are_reported_and_grouped_only_if_so_chosen(choice: str, index_with: Index):
    Path("set/cat/again.jpg").write_bytes(picture(0, quality=60))
    index_with(near_duplicates=choice)
    labels = manifest.read_labels()
    group = dict(zip(labels.image_id, labels.near_duplicate_group, strict=True))
    pair = {group.pop("cat/again.jpg"), group.pop("cat/0.jpg")}
    assert len(pair) == 1
    assert (pair == {""}) == (choice == "report")
    assert set(group.values()) == {""}
    assert '"n_near_duplicates": 1,' in Path("reports/data/summary.json").read_text()


def test_near_duplicates_have_at_least_the_chosen_correlation(index_with: Index):
    Path("set/cat/again.jpg").write_bytes(picture(0, quality=5))
    index_with(near_duplicates="group", near_duplicate_correlation=1.0)
    few = [group for group in manifest.read_labels().near_duplicate_group if group]
    index_with(near_duplicates="group", near_duplicate_correlation=0.95)
    assert (len(few), len([group for group in manifest.read_labels().near_duplicate_group if group])) == (0, 2)
    for path in (manifest.NEAR_DUPLICATES, Path("reports/data/near_duplicates.csv")):
        header, line = path.read_text().splitlines()
        assert header == "a,b,correlation"
        assert line.startswith("cat/0.jpg,cat/again.jpg,0.9") or line.startswith("cat/again.jpg,")


def test_too_many_bad_files_are_an_error_and_the_list_is_complete(index_with: Index):
    for number in range(2):
        Path(f"set/cat/bad_{number}.jpg").write_bytes(b"no image")
    Path("set/dog/link.jpg").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"3 of 13 images cannot be read, first set/cat/bad_0\.jpg \(not an image"):
        index_with(max_rejected_fraction=0.2)
    assert set(rejected()) == {"cat/bad_0.jpg", "cat/bad_1.jpg", "dog/link.jpg"}
    index_with(max_rejected_fraction=0.25)
    assert len(manifest.read_images().image_id) == 10


def test_one_class_is_an_error(index_with: Index):
    for path in Path("set/dog").iterdir():
        path.unlink()
    Path("set/dog").rmdir()
    with pytest.raises(ValueError, match=r"set: one class only \(cat\); expected two or more"):
        index_with()


def test_verify_is_an_option_and_nothing_else_is(index_with: Index, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["index", "--verify"])
    index_with()
    monkeypatch.setattr(sys, "argv", ["index", "--everything"])
    with pytest.raises(SystemExit):
        index_with()


def test_files_beside_images_do_not_count_and_hide_no_broken_image(index_with: Index):
    for path in [*Path("set").rglob("*.jpg")]:
        path.with_suffix(".xml").write_text("<annotation/>")
        path.with_name(f"{path.name}:Zone.Identifier").write_text("[ZoneTransfer]")
    index_with(max_rejected_fraction=0.0)
    assert len(manifest.read_images().image_id) == 10
    assert rejected() == {}
    Path("set/cat/0.jpg").write_bytes(picture(0)[:200])
    with pytest.raises(ValueError, match=r"1 of 10 images cannot be read, first set/cat/0\.jpg"):
        index_with(max_rejected_fraction=0.05)


def test_a_class_of_files_that_are_no_images_is_an_error_that_shows_the_tree(index_with: Index):
    Path("set/labels").mkdir()
    Path("set/labels/0.txt").write_text("0 0.5 0.5 0.1 0.1")
    with pytest.raises(ValueError, match=r"set: no image of class 'labels' can be used; its files are no images") as e:
        index_with()
    assert ": .txt (1); found cat/ (5 .jpg), dog/ (5 .jpg), labels/ (1 .txt); expected each directory" in str(e.value)
    index_with(exclude=["labels"])
    assert len(manifest.read_images().image_id) == 10


def test_classes_around_the_classes_are_one_class_and_the_error_says_which_path_to_set(index_with: Index):
    Path("outer").mkdir()
    Path("set").rename("outer/set")
    with pytest.raises(ValueError, match=r"one class only \(set\).* set dataset\.path: outer/set"):
        index_with(path="outer")


@pytest.mark.parametrize("choice", ["error", "drop"])
def test_small_classes_are_refused_or_left_out_by_choice(choice: str, index_with: Index):
    Path("set/owl").mkdir()
    Path("set/owl/1.jpg").write_bytes(picture(77))
    index_with()
    assert "owl" in manifest.read_labels().class_names
    if choice == "error":
        with pytest.raises(
            ValueError, match=r"1 classes have fewer images than dataset\.min_class_size \(5\): owl \(1\)"
        ):
            index_with(min_class_size=5)
    else:
        index_with(min_class_size=5, small_classes="drop", max_rejected_fraction=0.0)
        assert manifest.read_labels().class_names == ["cat", "dog"]
        assert rejected() == {"owl/1.jpg": "of class 'owl', which has 1 images"}


def test_small_classes_all_dropped_is_an_error(index_with: Index):
    with pytest.raises(ValueError, match="no class with enough images; expected two or more"):
        index_with(min_class_size=50, small_classes="drop")


def test_columns_and_similar_classes_are_those_of_the_parameters(index_with: Index):
    rows = [f"{path.stem},{path.parent.name}" for path in sorted(Path("set").rglob("*.jpg"))]
    Path("set/labels.csv").write_text("\n".join(["id,kind", *rows, ""]).replace("0,cat", "0,Cat"))
    with pytest.raises(ValueError, match="classes 'Cat' and 'cat' differ by case"):
        index_with(columns={"path": "id", "label": "kind"})
    index_with(columns={"path": "id", "label": "kind"}, similar_classes="merge")
    assert manifest.read_labels().class_names == ["cat", "dog"]
    assert manifest.read_images().image_id[0] == "cat/0.jpg"
