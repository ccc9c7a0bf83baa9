"""The reference classifiers: against scikit-learn, and what must hold for their probabilities."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from pipeline.dataset.manifest import Split
from pipeline.params import REFERENCES
from pipeline.stages import references
from pipeline.stages.references import average, majority_class, nearest_class_mean, nearest_neighbours, standardized
from pipeline.training.runs import read_run
from tests import factories

N, CLASSES = 120, 3
LABELS = factories.labels(N, CLASSES)
SPLIT = Split(0, LABELS.image_id, np.array(["train", "val", "test", "train"])[np.arange(N) * 7 // 3 % 4])


@pytest.fixture(scope="module")
def x() -> dict[str, np.ndarray]:
    """Features that know the class a little."""
    random = np.random.default_rng(0)
    values = random.normal(size=(N, 6)) + 1.5 * np.eye(CLASSES, 6)[LABELS.label]
    return standardized(values.astype(np.float32), values.astype(np.float32), SPLIT)


def rows(name: str) -> np.ndarray:
    return SPLIT.rows(name)


def test_features_are_scaled_by_the_training_images(x: dict[str, np.ndarray]):
    assert x["train"].mean(axis=0) == pytest.approx(np.zeros(6), abs=1e-5)
    assert 0.3 < x["train"].std(axis=0).min() <= x["train"].std(axis=0).max() <= 1.0001


def test_the_majority_class_predicts_the_weighted_shares_of_train():
    found = majority_class(LABELS, SPLIT)["shares"]
    shares = np.bincount(LABELS.label[rows("train")]) / len(rows("train"))
    assert np.exp(found["test"]) == pytest.approx(np.tile(shares, (len(rows("test")), 1)), rel=1e-5)


def test_class_means_are_those_of_scikit_learn(x: dict[str, np.ndarray]):
    expected = NearestCentroid().fit(x["train"], LABELS.label[rows("train")]).predict(x["test"])
    for found in nearest_class_mean(x, LABELS, SPLIT).values():
        assert found["test"].argmax(axis=1).tolist() == expected.tolist()
        assert np.exp(found["val"]).sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_neighbours_are_those_of_scikit_learn_and_no_probability_is_zero(x: dict[str, np.ndarray]):
    found = nearest_neighbours(x, LABELS, SPLIT, (1, 5, 1000))
    assert list(found) == ["k = 1", "k = 5"], "no k above the number of training images"
    label, shares = LABELS.label[rows("train")], np.bincount(LABELS.label[rows("train")]) / len(rows("train"))
    for k in (1, 5):
        votes = k * KNeighborsClassifier(k).fit(x["train"], label).predict_proba(x["val"])
        assert np.exp(found[f"k = {k}"]["val"]) == pytest.approx((votes + shares) / (k + 1), rel=1e-5)
    assert list(nearest_neighbours(x, LABELS, SPLIT, (1000,))) == [f"k = {len(rows('train'))}"]


@pytest.mark.parametrize(
    ("shape", "expected"), [((5,), 5), ((4, 2, 2), 4), ((2, 2, 4), 4), ((7, 4), 4), ((2, 2, 2), 2)]
)
def test_maps_and_tokens_are_pooled(shape: tuple[int, ...], expected: int):
    values = np.random.default_rng(0).normal(size=(300, 2, *shape)).astype(np.float32)
    found = average(values, 1 if shape == (7, 4) else 0)
    assert found.shape == (300, expected)
    if shape == (4, 2, 2):
        assert found == pytest.approx(values.mean(axis=(1, 3, 4)), abs=1e-6)
    if shape == (7, 4):
        assert found == pytest.approx(values[:, :, 1:].mean(axis=(1, 2)), abs=1e-6), "without the class token"


@pytest.mark.slow
def test_the_stage_writes_a_run_for_each_classifier_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    factories.make_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    references.main()
    for name in REFERENCES:
        run = read_run(name, 0)
        assert run.chosen["candidate"] in run.candidates.names
        assert run.cost.trainable_params == 0
        best = int(np.argmin(run.candidates.nll(np.ones(len(run.val.rows)))))
        assert run.chosen["candidate"] == run.candidates.names[best]
        assert np.exp(run.test.log_probability).sum(axis=1) == pytest.approx(1, abs=1e-4)
        assert Path(f"reports/runs/{name}/seed_1").is_dir()
    assert read_run("majority_class", 0).cost.train_flops == 0
    assert len(read_run("k_nearest_neighbours", 0).candidates.names) > 1
