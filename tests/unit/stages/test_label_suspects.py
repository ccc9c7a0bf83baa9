"""The stage label_suspects: folds, predictions of images by heads that were fitted without them, and the list."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from pipeline.dataset import manifest
from pipeline.dataset.manifest import Labels
from pipeline.dataset.units import make_units
from pipeline.features import hdf5
from pipeline.features.hdf5 import Features
from pipeline.params import SuspectOptions
from pipeline.stages import label_suspects
from pipeline.stages.label_suspects import Suspects
from tests import factories

CLASSES = ["birch, white", "oak", "yew"]
CPU = torch.device("cpu")
QUALITY = label_suspects.REPORT.with_suffix(".json")


@pytest.fixture
def labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Labels:
    """Sixty features around a point for each of three classes, image 7 with a wrong label; a single image of "yew"."""
    monkeypatch.chdir(tmp_path)
    params = factories.params_document()
    params["threads"] = 1
    factories.write_params(params)
    random, true = np.random.default_rng(0), np.arange(61) % 2
    features = (10 * np.eye(2, 4)[true][:, None] + random.normal(size=(61, 2, 4))).astype(np.float32)
    sha256 = [f"{row:064x}" for row in range(61)]
    hdf5.write_features(hdf5.FEATURES, [features], None, sha256, factories.provenance())
    label = true.copy()
    label[7], label[60] = 0, 2
    names = [f"{CLASSES[index]}/{row:02}.png" for row, index in enumerate(label)]
    columns = {"image_id": names, "sha256": sha256, "label": label, "weight": np.full(61, 0.5)}
    made = factories.labels(61, class_names=CLASSES, **columns)
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
    assert caplog.messages[0].startswith("left out: yew: fewer images than label_suspects.folds (5); ")
    assert caplog.messages[-1] == f"{len(frame)} of 61 labels are suspects: reports/label_suspects.csv"


def test_good_heads_come_without_a_caution(labels: Labels, caplog: pytest.LogCaptureFixture):
    label_suspects.main()
    found = json.loads(QUALITY.read_text())
    assert found == {"accuracy": pytest.approx(59 / 60, abs=1e-5), "largest_class": 0.516667, "caution": None}
    assert "caution" not in caplog.text


def test_heads_that_know_nothing_come_with_a_caution(labels: Labels, caplog: pytest.LogCaptureFixture):
    noise = np.random.default_rng(1).normal(size=(61, 2, 4)).astype(np.float32)
    hdf5.write_features(hdf5.FEATURES, [noise], None, labels.sha256, factories.provenance())
    label_suspects.main()
    found = json.loads(QUALITY.read_text())
    assert found["accuracy"] < 0.7
    assert (
        f"right for {100 * found['accuracy']:.1f} % of the images, and naming the largest class always"
        in found["caution"]
    )
    assert f"caution: {found['caution']}" in caplog.messages


@pytest.mark.parametrize(
    ("accuracy", "largest_class", "is_cautious"),
    [
        (0.34, 0.25, True),
        (0.85, 0.58, False),
        (0.96, 0.95, True),
        (0.98, 0.95, False),
        (0.5, 0.02, True),
        (0.6, 0.1, False),
    ],
)
def test_a_caution_stands_where_less_than_half_of_the_errors_are_avoided(
    accuracy: float, largest_class: float, is_cautious: bool
):
    assert bool(Suspects(np.zeros(0), np.zeros((0, 2)), accuracy, largest_class).caution) == is_cautious


def test_weights_count_in_the_quality():
    features, label = blobs(90, 3)
    wrong = np.where(np.arange(90) < 30, (label + 1) % 3, label)
    weight = np.where(np.arange(90) < 30, 1e-3, 1.0)
    assert find(features, labels_of(wrong, weight=weight)).accuracy > 0.95
    assert find(features, labels_of(wrong)).accuracy < 0.8


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
    assert json.loads(QUALITY.read_text()) == {"accuracy": 0.0, "largest_class": 0.0, "caution": None}
    assert label_suspects.REPORT.read_text().count("\n") == 1, "the names of the columns alone"


def test_features_of_other_images_are_refused(labels: Labels):
    manifest.write_labels(replace(labels, sha256=labels.sha256[::-1]))
    with pytest.raises(ValueError, match=r"^data/features\.h5: other images than in data/labels\.csv; run: dvc repro$"):
        label_suspects.main()


# functions


def options(**changes: Any) -> SuspectOptions:
    chosen: dict[str, Any] = {"folds": 3, "seed": 0, "regularization_strengths": (0.1,), "max_iterations": 100}
    return SuspectOptions(**chosen | changes)


def labels_of(label: np.ndarray, **columns: Any) -> Labels:
    names = [f"{row:04}.png" for row in range(len(label))]  # the folds depend on them
    return factories.labels(len(label), int(label.max()) + 1, label=label, image_id=names, sha256=names, **columns)


def blobs(n: int, n_classes: int, width: int = 8, n_views: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, n_views, width) float32 around a point for each class, and the class (n,)."""
    random = np.random.default_rng(0)
    true = np.arange(n) % n_classes
    centres = 5 * random.normal(size=(n_classes, width))
    return (centres[true][:, None] + random.normal(size=(n, n_views, width))).astype(np.float32), true


def flipped(true: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which a share, at random, are another class; the rows of these."""
    random, n_classes = np.random.default_rng(seed), int(true.max()) + 1
    rows = random.choice(len(true), round(share * len(true)), replace=False)
    label = true.copy()
    label[rows] = (true[rows] + random.integers(1, n_classes, len(rows))) % n_classes
    return label, rows


def in_memory(values: np.ndarray) -> Features:
    return Features(values, values, [], factories.provenance())


def find(features: np.ndarray, labels: Labels, **changes: Any) -> Suspects:
    return label_suspects.find(in_memory(features), labels, make_units(labels), options(**changes), CPU)


# the promise


def test_half_of_the_flipped_labels_of_digits_come_first():
    pixels, true = cast(tuple[np.ndarray, np.ndarray], load_digits(return_X_y=True))
    features = pixels.astype(np.float32)[:, None]
    label, rows = flipped(true, 0.05, seed=0)
    labels = labels_of(label)
    found = find(features, labels, folds=5, regularization_strengths=(0.1, 0.01))
    hits = np.isin(found.rows[: len(rows)], rows)
    assert hits.sum() / len(rows) >= 0.5
    suggested = found.probability.argmax(1)[: len(rows)][hits]
    assert np.mean(suggested == true[found.rows[: len(rows)][hits]]) > 0.9
    self_confidence = found.probability[np.arange(len(found.rows)), label[found.rows]]
    assert (np.diff(self_confidence) >= 0).all()
    assert (found.probability.max(1) > self_confidence).all()


# folds

TABLES = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["", "", "", "g", "h", "i"])), min_size=1, max_size=60)


@settings(deadline=None)
@given(TABLES, st.integers(3, 6), st.integers(0, 2**32 - 1))
def test_every_image_of_a_kept_class_has_a_fold_that_is_its_units(table: list, folds: int, seed: int):
    labels = labels_of(np.array([index for index, _ in table]), group=[group for _, group in table])
    units, chosen = make_units(labels), options(folds=folds, seed=seed)
    fold = label_suspects.assign_folds(labels, units, chosen)
    for index in set(labels.label.tolist()):
        is_class = labels.label == index
        is_kept = sum(is_class[unit].any() for unit in units) >= folds
        assert ((fold[is_class] >= 0) == is_kept).all()
    for unit in units:
        assert len({*fold[unit].tolist()} - {-1}) <= 1
    if (fold >= 0).any():
        assert {*fold.tolist()} - {-1} == set(range(folds)), "none is empty"
    order = np.random.default_rng(seed).permutation(len(table))
    columns = {
        name: [getattr(labels, name)[i] for i in order]
        for name in ("image_id", "sha256", "group", "near_duplicate_group")
    }
    shuffled = replace(labels, label=labels.label[order], **columns)
    assert np.array_equal(label_suspects.assign_folds(shuffled, make_units(shuffled), chosen), fold[order])


def test_folds_are_stratified_and_follow_the_seed():
    labels = labels_of(np.arange(100) % 4)
    fold, other = (
        label_suspects.assign_folds(labels, make_units(labels), options(folds=5, seed=seed)) for seed in (0, 1)
    )
    assert np.array_equal(np.histogram2d(labels.label, fold, (4, 5))[0], np.full((4, 5), 5))
    assert not np.array_equal(fold, other)
    group = ["g" if row in range(0, 20, 2) else "" for row in range(40)]  # half of class 0 is in one fold
    labels = labels_of(np.arange(40) % 2, group=group)
    fold = label_suspects.assign_folds(labels, make_units(labels), options(folds=5))
    assert np.bincount(fold[labels.label == 1]).tolist() == [4] * 5, "a class is distributed whatever the others are"


# predictions


def predicted(features: np.ndarray, label: np.ndarray, fold: np.ndarray, **columns: Any):
    chosen = options(regularization_strengths=(0.3, 0.01))
    return label_suspects.predict_out_of_fold(in_memory(features), labels_of(label, **columns), fold, chosen, CPU)


@pytest.mark.parametrize("held_out", range(3))
def test_an_image_is_predicted_without_its_label_and_those_of_its_fold(held_out: int):
    features, label = blobs(90, 3)
    fold = np.arange(90) // 3 % 3
    is_held_out = fold == held_out
    other = np.where(is_held_out, (label + 1) % 3, label)
    before, after = predicted(features, label, fold), predicted(features, other, fold)
    assert np.array_equal(before[is_held_out], after[is_held_out])
    assert not np.array_equal(before[~is_held_out], after[~is_held_out])
    assert np.allclose(before.sum(1), 1, atol=1e-5)
    assert (before.argmax(1) == label).mean() > 0.95


def test_weights_count_in_the_fit():
    features, label = blobs(90, 3)
    fold, weight = np.arange(90) // 3 % 3, np.where(np.arange(90) < 45, 5.0, 1.0)
    assert not np.array_equal(predicted(features, label, fold, weight=weight), predicted(features, label, fold))


def test_maps_are_flattened_and_all_views_are_used():
    features, label = blobs(90, 3, width=8, n_views=2)
    fold = np.arange(90) // 3 % 3
    expected = predicted(features, label, fold)
    assert np.array_equal(predicted(features.reshape(90, 2, 2, 2, 2), label, fold), expected)
    assert not np.array_equal(predicted(features[:, :1], label, fold), expected)
    assert np.allclose(predicted(features[:, ::-1], label, fold), expected, atol=1e-3), "their mean is what counts"


@pytest.mark.parametrize(("n_classes", "n"), [(2, 60), (200, 1200)], ids=["two", "hundreds"])
def test_wrong_labels_are_found_among_two_and_among_hundreds_of_classes(n_classes: int, n: int):
    features, true = blobs(n, n_classes, width=32)
    label, rows = flipped(true, 0.05, seed=1)
    labels = labels_of(label)
    found = find(features, labels, folds=5, regularization_strengths=(0.003,))
    assert np.isin(rows, found.rows).mean() > 0.5
    assert np.isin(found.rows, rows).mean() > 0.5


def test_a_class_of_fewer_images_than_folds_takes_no_part():
    features, true = blobs(92, 3)
    label = np.where(np.arange(92) < 90, true, 3)
    labels = labels_of(label)
    found = find(features, labels)
    assert not set(found.rows) & {90, 91}
    assert 3 not in found.probability.argmax(1)
    assert len(find(features[:6], labels_of(label[:6])).rows) == 0


# the list


def test_the_list_by_hand():
    # Class 0: threshold 0.7; 1: 0.6. Confident are rows 0 (of 0), 1 (of 0), 3 (of 1, its label is 0), 4 and 5 (of 1):
    # one of three confident labels 0 is wrong, of 4 images with label 0 that is 1, the least confident
    of_zero = np.array([0.9, 0.9, 0.7 - 1e-3, 0.3 + 1e-3, 0.4, 0.4])
    probability = np.stack([of_zero, 1 - of_zero], 1)
    label = np.array([0, 0, 0, 0, 1, 1])
    assert label_suspects.rank(probability, label, np.ones(6)).tolist() == [3]


def test_what_is_most_probably_of_its_class_is_no_suspect():
    # Row 2 reaches the low threshold of class 1 only, and yet class 0 is more probable
    of_zero = np.array([0.9, 0.9, 0.55, 0.6, 0.6])
    probability, label = np.stack([of_zero, 1 - of_zero], 1), np.array([0, 0, 0, 1, 1])
    assert label_suspects.rank(probability, label, np.ones(5)).tolist() == []


def test_weights_move_the_thresholds():
    of_zero = np.array([0.9, 0.9, 0.35, 0.35, 0.3, 0.4])
    probability, label = np.stack([of_zero, 1 - of_zero], 1), np.array([0, 0, 0, 0, 1, 1])
    light = np.where(np.arange(6) == 5, 1e-3, 1)
    # The threshold of class 1 is 0.65, or 0.7 where the last image hardly counts: rows 2 and 3 reach the first only
    assert label_suspects.rank(probability, label, np.ones(6)).tolist() == [2, 3]
    assert label_suspects.rank(probability, label, light).tolist() == []


def test_certain_predictions_give_an_empty_list():
    probability = np.eye(3)[np.arange(9) % 3]
    assert len(label_suspects.rank(probability, np.arange(9) % 3, np.ones(9))) == 0
