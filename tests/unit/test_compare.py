"""Which runs compare reads, and which it deletes."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.dataset.manifest import Labels, Split
from pipeline.stages.compare import compare, delete_unlisted, read_run
from pipeline.training import models
from pipeline.training.models import Cost, Run
from tests import study

LABELS = Labels(
    image_id=["a", "b", "c", "d"],
    sha256=["1", "2", "3", "4"],
    label=np.array([0, 1, 1, 0]),
    weight=np.array([1.0, 1.0, 3.0, 1.0]),
    group=[""] * 4,
    near_duplicate_group=[""] * 4,
    stratum=[""] * 4,
    subset=[""] * 4,
    given_split=[""] * 4,
    class_names=["cat", "dog"],
)


def run_of(test_logits: list[list[float]], seed: int = 0) -> Run:
    val = np.log(np.array([[0.9, 0.1]], np.float32))
    test = np.array(test_logits, np.float32)
    cost = Cost(trainable_params=10, train_flops=4, base_passes=2, cached_bytes=8)
    chosen, network = {"strength": 0.1}, {"boundary": "all"}
    return Run("feature_extraction", seed, cost, chosen, network, [], np.array([3]), val, np.array([0, 1, 2]), test)


def test_runs_and_models_that_are_not_listed_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for strategy in ("feature_extraction", "full_retrain", "removed"):
        for seed in (0, 1, 10):
            for path in (artifacts.RUNS / strategy / f"seed_{seed}/run.json", *models(strategy, seed)):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    delete_unlisted({"feature_extraction": {0, 1}, "full_retrain": {10}})
    left = {path for path in Path().rglob("*") if path.is_file()}
    kept = [("feature_extraction", 0), ("feature_extraction", 1), ("full_retrain", 10)]
    assert left == {
        path
        for strategy, seed in kept
        for path in (artifacts.RUNS / strategy / f"seed_{seed}/run.json", *models(strategy, seed))
    }
    assert not (artifacts.RUNS / "removed").exists()
    assert not (artifacts.MODELS / "removed").exists()


def test_what_is_no_run_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    mine = artifacts.RUNS / "feature_extraction" / "seed_0_backup" / "run.json"
    mine.parent.mkdir(parents=True)
    mine.touch()
    delete_unlisted({"feature_extraction": {0}})
    assert mine.exists()


def test_without_a_split_nothing_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("data/splits/seed_1.csv").unlink()
    before = sorted(Path().rglob("*"))
    with pytest.raises(ValueError, match=r"data/splits/seed_1\.csv: not there; run: dvc repro split"):
        compare()
    assert sorted(Path().rglob("*")) == before


def test_logits_that_are_not_finite_are_told_with_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    artifacts.save_run(run_of([[0.0, 1.0], [0.0, -np.inf], [1.0, 0.0]]))
    split = Split(0, LABELS.image_id, np.array(["test", "test", "test", "val"]))
    with pytest.raises(ValueError, match=r"feature_extraction, seed 0: test logits that are not finite"):
        read_run("feature_extraction", split)


def models(strategy: str, seed: int) -> list[Path]:
    return [artifacts.MODELS / strategy / f"seed_{seed}.{kind}" for kind in ("json", "safetensors")]


def test_deleting_is_no_error_where_nothing_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    delete_unlisted({"feature_extraction": {0}})
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_other_images_than_the_split_says_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = run_of([[1, 0], [1, 0], [0, 1]], seed=4)
    artifacts.save_run(run)
    split = Split(4, LABELS.image_id, np.array(["test", "test", "test", "val"]))
    assert np.array_equal(read_run("feature_extraction", split).test_logits, run.test_logits)
    other = Split(4, LABELS.image_id, np.array(["test", "test", "train", "val"]))
    with pytest.raises(ValueError, match="feature_extraction, seed 4: other test images than in the split"):
        read_run("feature_extraction", other)
