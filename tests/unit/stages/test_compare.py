"""Which runs compare reads, and what it deletes."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.dataset.manifest import Split
from pipeline.stages import compare
from pipeline.stages.compare import delete_unlisted, read_checked
from pipeline.training.runs import MODELS, RUNS, Predictions, Run, save_run
from tests import factories

NAMES = ["a", "b", "c", "d"]


def run_of(test: list[list[float]], seed: int = 0) -> Run:
    val = Predictions(np.array([3]), np.log(np.array([[0.9, 0.1]], np.float32)))
    predicted = Predictions(np.arange(3), np.array(test, np.float32))
    return factories.run("feature_extraction", seed, val, predicted, np.zeros(4, np.int64))


def test_runs_and_models_that_are_not_listed_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for strategy in ("feature_extraction", "full_retrain", "removed"):
        for seed in (0, 1, 10):
            for path in (RUNS / strategy / f"seed_{seed}/run.json", *models_of(strategy, seed)):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    delete_unlisted({"feature_extraction": {0, 1}, "full_retrain": {10}})
    left = {path for path in Path().rglob("*") if path.is_file()}
    kept = [("feature_extraction", 0), ("feature_extraction", 1), ("full_retrain", 10)]
    assert left == {
        path
        for strategy, seed in kept
        for path in (RUNS / strategy / f"seed_{seed}/run.json", *models_of(strategy, seed))
    }
    assert not (RUNS / "removed").exists()
    assert not (MODELS / "removed").exists()


def test_what_is_no_run_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    mine = RUNS / "feature_extraction" / "seed_0_backup" / "run.json"
    mine.parent.mkdir(parents=True)
    mine.touch()
    delete_unlisted({"feature_extraction": {0}})
    assert mine.exists()


@pytest.mark.slow
def test_files_of_strategies_no_longer_listed_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    factories.make_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    for directory in ("metrics", "confusion"):
        Path(f"reports/{directory}/removed.json").write_text("{}")
    compare.main()
    left = {
        directory: sorted(path.stem for path in Path(f"reports/{directory}").iterdir())
        for directory in ("metrics", "confusion")
    }
    assert left == {
        "metrics": ["feature_extraction", "feature_extraction_all_seeds", "partial_freeze"],
        "confusion": ["feature_extraction", "partial_freeze"],
    }


@pytest.mark.slow
def test_a_damaged_run_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    factories.make_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = RUNS / "partial_freeze/seed_0/run.json"
    described = json.loads(path.read_text())
    for content in ("", "[]", json.dumps({**described, "cost": {}}), json.dumps({**described, "more": 1})):
        path.write_text(content)
        with pytest.raises(
            ValueError, match=r"partial_freeze/seed_0: damaged, or of another version \(.+\); run: dvc repro$"
        ):
            compare.main()


def test_without_a_split_nothing_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    factories.make_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("data/splits/seed_1.csv").unlink()
    before = sorted(Path().rglob("*"))
    with pytest.raises(ValueError, match=r"data/splits/seed_1\.csv: not there; run: dvc repro split"):
        compare.main()
    assert sorted(Path().rglob("*")) == before


def test_predictions_that_are_not_finite_are_an_error_that_names_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    save_run(run_of([[0.0, 1.0], [0.0, -np.inf], [1.0, 0.0]]))
    split = Split(0, NAMES, np.array(["test", "test", "test", "val"]))
    with pytest.raises(ValueError, match=r"feature_extraction, seed 0: test predictions are not finite"):
        read_checked("feature_extraction", split)


def models_of(strategy: str, seed: int) -> list[Path]:
    return [MODELS / strategy / f"seed_{seed}.{kind}" for kind in ("json", "safetensors")]


def test_deleting_is_no_error_where_nothing_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    delete_unlisted({"feature_extraction": {0}})
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_other_images_than_in_the_split_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = run_of([[1, 0], [1, 0], [0, 1]], seed=4)
    save_run(run)
    split = Split(4, NAMES, np.array(["test", "test", "test", "val"]))
    assert np.array_equal(read_checked("feature_extraction", split).test.log_probability, run.test.log_probability)
    other = Split(4, NAMES, np.array(["test", "test", "train", "val"]))
    with pytest.raises(ValueError, match="feature_extraction, seed 4: other test images than in the split"):
        read_checked("feature_extraction", other)
