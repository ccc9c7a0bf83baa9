"""The stage split: what it writes, which leaks it refuses or reports, and what it notes about small classes."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline import logs
from pipeline.dataset import manifest
from pipeline.stages import split
from tests import factories


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "pipeline")


def set_params(**changes: Any) -> None:
    params = factories.params_document()
    params["split"].update({"seeds": [0, 1], **changes})
    params["fine_tune"].update({"seeds": [0], "run": []})
    factories.write_params(params)


def set_labels(n: int = 40, rare: int = 20, **columns: dict[int, str]) -> None:
    """`n` images of which the first `rare` are of class x, and what some rows have in some columns."""
    made = factories.labels(n, class_names=["x", "y"], label=np.array([int(row >= rare) for row in range(n)]))
    text = {name: [columns[name].get(row, value) for row, value in enumerate(vars(made)[name])] for name in columns}
    manifest.write_labels(replace(made, **text))
    set_pairs()


def set_pairs(*pairs: tuple[str, str]) -> None:
    manifest.write_csv(manifest.NEAR_DUPLICATES, pd.DataFrame(pairs, columns=["a", "b"]))


def report() -> dict[str, Any]:
    return json.loads(Path("reports/splits.json").read_text())


def notes() -> list[str]:
    """Those in the report but for the ones on few units, of which these small data sets have few."""
    return [note for note in report()["notes"] if "confidence intervals are rough" not in note]


def mistake(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["split"])
    with pytest.raises(SystemExit) as caught:
        logs.run(split.main)
    line = str(caught.value.code)
    assert "\n" not in line
    return line


def given(**others: str) -> dict[int, str]:
    """All of train, but for test 0-3 and 20-23, val 4-7 and 24-27, and the rows that are named (r8=…)."""
    found = {row: "test" if row % 20 < 4 else "val" if row % 20 < 8 else "train" for row in range(40)}
    return found | {int(name[1:]): split for name, split in others.items()}


def test_a_split_is_written_for_each_seed_and_its_sizes_are_reported():
    set_params()
    set_labels()
    split.main()
    labels = manifest.read_labels()
    for found in manifest.read_splits(labels.image_id):
        sizes = report()["sizes"][str(found.seed)]
        assert sizes == {name: len(found.rows(name)) for name in ("train", "val", "test", "unused")}
        assert sum(sizes.values()) == 40
    assert notes() == []
    rest = {"sizes": {}, "notes": []}
    twins = {"n_near_duplicates": 0, "n_straddling": [0, 0], "straddling": [], "n_followers": []}
    assert report() | rest == {"method": "stratified", **rest, "n_leaks": 0, "leaks": [], **twins}


def test_near_duplicates_in_different_splits_are_counted_and_listed():
    set_params()
    set_labels()
    pairs = [(f"{row:03}.png", f"{row + 1:03}.png") for row in range(0, 40, 2)]
    set_pairs(*pairs)
    split.main()
    first = manifest.read_split(0, manifest.read_labels().image_id)
    split_of = dict(zip(first.image_id, first.split, strict=True))
    apart = [{"a": a, "b": b} for a, b in pairs if split_of[a] != split_of[b]]
    assert apart
    assert report()["n_straddling"][0] == len(apart)
    assert len(report()["straddling"]) == max(report()["n_straddling"]), "those of the seed that has most"
    (note,) = notes()
    assert note.startswith(f"{max(report()['n_straddling'])} of 20 pairs of near-duplicates lie in different splits")
    assert "`dataset.near_duplicates: group` keeps them together" in note


def test_hash_counts_the_images_that_follow_their_unit():
    set_params(method="hash", test_fraction=0.3, val_fraction=0.3)
    set_labels(200, rare=100, near_duplicate_group={row: f"near {row // 4}" for row in range(200)})
    split.main()
    assert len(report()["n_followers"]) == 2
    assert max(report()["n_followers"]) > 10
    assert any("images follow their unit to another split than their own digest gives" in note for note in notes())
    assert all(sizes["unused"] == 0 for sizes in report()["sizes"].values())


def test_folds_may_miss_a_rare_class_in_test_but_not_in_training():
    set_params(method="folds", val_fraction=0.2, seeds=[0, 1, 2, 3])
    set_labels(60, rare=1)
    with pytest.raises(ValueError, match=r"class 'x' has 1 images, none of them in val"):
        split.main()
    set_labels(60, rare=3)
    split.main()
    tested = [set(found.rows("test")) for found in manifest.read_splits(manifest.read_labels().image_id)]
    assert sorted(row for rows in tested for row in rows) == list(range(60))


def test_given_splits_are_those_of_every_seed():
    set_params(method="given")
    set_labels(given_split=given())
    split.main()
    first, second = manifest.read_splits(manifest.read_labels().image_id)
    assert list(first.split) == list(second.split) == [given()[row] for row in range(40)]


TIES: dict[str, dict[str, Any]] = {
    "identical bytes": {"sha256": {8: "same", 0: "same"}},
    "group": {"group": {8: "patient 1", 0: "patient 1"}},
    "near-duplicates": {"near_duplicate_group": {8: "n", 0: "n"}},
}


@pytest.mark.parametrize("tie", TIES)
def test_images_that_belong_together_in_several_splits_are_an_error_that_lists_them(
    tie: str, monkeypatch: pytest.MonkeyPatch
):
    set_params(method="given")
    set_labels(given_split=given(), **TIES[tie])
    line = mistake(monkeypatch)
    assert tie in line
    assert "1 sets of images that belong together are in several splits" in line
    assert "000.png (test), 008.png (train)" in line
    assert "split.allow_leakage: true" in line
    assert report()["n_leaks"] == 1
    (leak,) = report()["leaks"]
    assert (leak["tie"], leak["n"], leak["parts"]) == (tie, 2, {"000.png": "test", "008.png": "train"})


def test_with_allow_leakage_they_are_a_warning_and_stand_in_the_report(caplog: pytest.LogCaptureFixture):
    set_params(method="given", allow_leakage=True)
    set_labels(given_split=given(), **TIES["identical bytes"])
    split.main()
    warnings = [line.getMessage() for line in caplog.records if line.levelno == logging.WARNING]
    (warning,) = (text for text in warnings if "confidence intervals are rough" not in text)
    assert "000.png (test), 008.png (train)" in warning
    assert report()["n_leaks"] == 1


def test_an_unused_image_leaks_nothing():
    set_params(method="given")
    set_labels(given_split=given(r8="unused"), **TIES["identical bytes"])
    split.main()
    assert report()["n_leaks"] == 0
    assert report()["sizes"]["0"]["unused"] == 1


def test_what_is_tied_to_an_unused_image_can_be_drawn():
    set_params(method="given", test_fraction=0.25, val_fraction=0.25, seeds=[0])
    patients = {row: f"patient {row // 4:02}" for row in range(80)}  # one image of each is unused
    set_labels(80, group=patients, given_split={row: "unused" if row % 4 == 0 else "" for row in range(80)})
    split.main()
    (found,) = manifest.read_splits(manifest.read_labels().image_id)
    assert [(found.split == name).sum() for name in ("test", "val", "train", "unused")] == [15, 15, 30, 20]
    assert all(len({*found.split[row + 1 : row + 4]}) == 1 for row in range(0, 80, 4))
    assert report()["n_leaks"] == 0


def test_given_splits_that_another_method_ignores_are_noted(caplog: pytest.LogCaptureFixture):
    set_params(method="hash", test_fraction=0.3, val_fraction=0.3)
    set_labels(given_split=given())
    split.main()
    assert "which `split.method: hash` ignores; to use them, set it to given" in report()["notes"][0]
    assert report()["notes"][0] in caplog.messages


def test_what_is_drawn_since_the_data_set_does_not_give_it_is_noted():
    set_params(method="given")
    set_labels(given_split={row: name if name != "test" else "train" for row, name in given().items()})
    split.main()
    assert notes() == [
        "the data set has no image in test: drawn by seed from train; to test on the given val, rename it to test"
    ]


def test_one_forgotten_split_breaks_no_seed_and_is_noted():
    set_params(method="given")
    set_labels(given_split={row: name if name == "test" else "train" for row, name in given().items()} | {39: ""})
    split.main()
    (note,) = notes()
    assert note == "the data set has no image in val: drawn by seed from train and images without a split"


def test_every_class_with_few_images_is_named_with_what_to_do():
    set_params()
    set_labels(n=40, rare=12)
    split.main()
    (note,) = notes()
    assert "fewer than 10 images to train on: x (7)" in note or "x (8)" in note
    assert "`class_weights: balanced`" in note


def test_fewer_than_ten_units_are_noted():
    set_params(test_fraction=0.25, val_fraction=0.3)
    set_labels(n=48, rare=24)
    split.main()
    assert not report()["notes"]
    set_labels(n=48, rare=24, group={row: f"patient {row // 2}" for row in range(48)})
    split.main()
    assert [note.split(" units")[0] for note in report()["notes"]] == ["val has 7", "test has 6"]
    assert "with fewer than 10, confidence intervals are rough" in report()["notes"][0]


def test_shares_that_groups_cannot_meet_are_noted_with_both_figures():
    set_params(seeds=[0])
    group = {row: f"patient {row // 30}" for row in range(120)}
    set_labels(n=120, rare=60, group=group)
    with pytest.raises(ValueError, match="none of them in"):
        split.main()
    set_labels(n=120, rare=60, group={row: f"patient {row // 15}" for row in range(120)})
    split.main()
    found = [note for note in notes() if "asked for" in note]
    assert found
    sizes = report()["sizes"]["0"]
    for note in found:
        name = note.split(" ")[0]
        assert note.startswith(f"{name} has {sizes[name]} of 120 images ({sizes[name] / 120:.1%}) with seed 0, where ")
        assert note.endswith("asked for: images that stay together are not split (up to 15)")


def test_shares_that_are_met_are_not_noted():
    set_params()
    set_labels(n=120, rare=60, group={row: f"patient {row // 2}" for row in range(120)})
    split.main()
    assert notes() == []
