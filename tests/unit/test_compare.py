"""What compare says of runs, and which runs it deletes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import artifacts
from pipeline.artifacts import Cost, Run
from pipeline.manifest import Labels, Split
from pipeline.params import HEAD_ALL_SEEDS
from pipeline.stages.compare import as_markdown, confusion, delete_unlisted, intervals, read_run, score, summarise

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
    cost = Cost(trainable_params=10, train_flops=4, base_passes=2)
    chosen, network = {"strength": 0.1}, {"boundary": "all"}
    return Run("feature_extraction", seed, cost, chosen, network, [], np.array([3]), val, np.array([0, 1, 2]), test)


def result(accuracy: float, auroc: float | None = 0.5, n: int = 100, cost: int = 1) -> dict[str, Any]:
    test = {"n": n, "accuracy": accuracy, "balanced_accuracy": 0.75, "nll": 0.25, "auroc": auroc}
    costs = {"trainable_params": cost, "train_flops": 3 * 10**12, "base_passes": 7}
    return {"seed": 0, "test": test, "cost": costs}


def test_a_run_is_scored_on_validation_and_test_with_weights():
    found = score(run_of([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), LABELS)
    assert found["seed"] == 0
    assert found["chosen"] == {"strength": 0.1}
    assert found["network"] == {"boundary": "all"}
    assert found["cost"] == {"trainable_params": 10, "train_flops": 4, "base_passes": 2}
    assert (found["val"]["n"], found["test"]["n"]) == (1, 3)
    assert found["val"]["nll"] == pytest.approx(-np.log(0.9))
    assert found["test"]["accuracy"] == pytest.approx(4 / 5)


def test_mean_accuracy_over_seeds_has_an_interval_around_it():
    runs = [run_of([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), run_of([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], seed=1)]
    found = intervals(runs, LABELS)["test"]
    assert found["accuracy"] == pytest.approx((4 / 5 + 1) / 2)
    assert 0 < found["accuracy_low"] < found["accuracy"] < found["accuracy_high"] <= 1


def test_a_summary_is_the_mean_over_seeds():
    found = summarise([result(0.8, auroc=0.9, cost=10), result(0.9, auroc=0.7, cost=13)])
    assert found == {
        "test": {"accuracy": 0.85, "balanced_accuracy": 0.75, "nll": 0.25, "auroc": 0.8},
        "cost": {"trainable_params": 12, "train_flops": 3 * 10**12, "base_passes": 7},
        "seeds": 2,
    }


def test_a_metric_that_one_seed_lacks_is_none():
    assert summarise([result(0.8), result(0.8, auroc=None)])["test"]["auroc"] is None


def test_a_summary_is_rounded_to_six_digits():
    assert summarise([result(1 / 3)])["test"]["accuracy"] == 0.333333


def test_the_table_says_mean_spread_and_gain_over_the_baseline():
    scored = {
        "feature_extraction": [result(0.80), result(0.84)],
        "full_retrain": [result(0.85, cost=3_000_000), result(0.90, cost=3_000_000)],
        HEAD_ALL_SEEDS: [result(0.80, n=90), result(0.84), result(0.79)],
    }
    text = as_markdown(scored, "feature_extraction", [0, 5])
    head, *table = text.splitlines()
    assert "on 90 to 100 test images" in head
    assert head.endswith("Compared on seed 0, 5.")
    assert "gain over feature_extraction" in table[1]
    assert table[3:] == [
        "| feature_extraction | 2 | 82.0 ± 2.8 |  | 75.0 | 0.250 | 1 | 3 |",
        "| full_retrain | 2 | 87.5 ± 3.5 | +5.5 | 75.0 | 0.250 | 3,000,000 | 3 |",
        "| feature_extraction, all seeds | 3 | 81.0 ± 2.6 |  | 75.0 | 0.250 | 1 | 3 |",
    ]


def test_one_seed_has_no_spread_and_a_loss_has_its_sign():
    scored = {"feature_extraction": [result(0.80)], "worse": [result(0.75)], HEAD_ALL_SEEDS: [result(0.80)]}
    lines = as_markdown(scored, "feature_extraction", [0]).splitlines()
    assert lines[-2].startswith("| worse | 1 | 75.0 | -5.0 |")
    assert "on 100 test images" in lines[0]


def test_another_baseline_turns_the_gain_round():
    scored = {"feature_extraction": [result(0.80)], "full": [result(0.85)], HEAD_ALL_SEEDS: [result(0.80)]}
    lines = as_markdown(scored, "full", [0]).splitlines()
    assert lines[-3].startswith("| feature_extraction | 1 | 80.0 | -5.0 |")
    assert lines[-2].startswith("| full | 1 | 85.0 |  |")


def test_confusion_is_a_row_for_every_test_image_of_every_seed():
    runs = [run_of([[1, 0], [1, 0], [0, 1]]), run_of([[0, 1], [0, 1], [0, 1]], seed=1)]
    pairs = [(row["actual"], row["predicted"]) for row in confusion(runs, LABELS)]
    assert pairs[:3] == [("cat", "cat"), ("dog", "cat"), ("dog", "dog")]
    assert pairs[3:] == [("cat", "dog"), ("dog", "dog"), ("dog", "dog")]


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
