"""details.json and the files of reports/metrics, checked by hand on a few images."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.comparison import details
from pipeline.comparison.details import Judged
from pipeline.comparison.paired import Study
from pipeline.dataset.manifest import Labels
from pipeline.dataset.units import unit_of
from pipeline.params import HEAD_ALL_SEEDS
from pipeline.training.runs import Predictions, Run
from tests.factories import FORTY, FULL_RUNS, HEAD_RUNS, forty_data, forty_details, run_wrong_on

N = 40


def judge(run: Run, data: Labels = FORTY) -> Judged:
    return details.judge(run, data, unit_of(data))


def scores_of(run: Run) -> dict[str, Any]:
    return judge(run).scores


def describe(runs: Sequence[Run], data: Labels = FORTY) -> dict[str, Any]:
    return details.describe([judge(run, data) for run in runs], forty_data(data))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return forty_details()


def test_a_run_is_scored_on_validation_and_test_with_weights():
    found = scores_of(HEAD_RUNS[0])
    assert (found["seed"], found["chosen"], found["network"]) == (0, HEAD_RUNS[0].chosen, HEAD_RUNS[0].network)
    assert found["cost"] == {"trainable_params": 100, "train_flops": 10**12, "base_passes": 2, "cached_bytes": 8}
    assert (found["val"]["n"], found["test"]["n"]) == (8, 16)
    assert found["val"]["accuracy"] == pytest.approx(1 - 1 / 10)  # two of eight images weigh 2
    assert found["test"]["accuracy"] == pytest.approx(1 - 5 / 20)
    assert found["test"]["ece"] == pytest.approx(0.9 - 0.75)


def test_calibration_after_scaling_uses_the_temperature_of_validation():
    found = scores_of(HEAD_RUNS[0])
    # right on 9/10 of the validation weight, with a confidence of 0.9: nothing to scale
    assert found["temperature"] == pytest.approx(1.0, abs=1e-3)
    assert found["test"]["ece_scaled"] == pytest.approx(found["test"]["ece"], abs=1e-3)
    sure = run_wrong_on("full", 0, [1, 2, 8, 9, 10, 11])
    scaled = scores_of(sure)  # right on 8/10
    assert scaled["temperature"] == pytest.approx(np.log(9) / np.log(4), abs=1e-3)
    assert scaled["test"]["ece_scaled"] == pytest.approx(0.8 - 0.75, abs=1e-3)


def test_details_hold_every_strategy_and_what_the_head_gives_on_all_seeds(found: dict[str, Any]):
    assert found["baseline"] == "feature_extraction"
    assert found["common_seeds"] == [0, 1]
    assert found["class_names"] == ["cat", "dog"]
    assert list(found["strategies"]) == ["feature_extraction", "full", HEAD_ALL_SEEDS]
    head = found["strategies"]["feature_extraction"]
    assert (head["seeds"], head["distinct_runs"]) == ([0, 1], 2)
    assert (head["val"]["n"], head["test"]["n"]) == ([8, 8], [16, 16])
    assert [run["seed"] for run in head["runs"]] == [0, 1]
    assert found["strategies"]["full"]["cost"]["train_flops"] == 9_500_000_000_000
    # Eight validation units a seed rule nothing out, so the cheapest is taken, and nothing is settled with 16 units
    assert (found["recommendation"]["strategy"], found["recommendation"]["is_settled"]) == ("feature_extraction", False)
    assert found["recommendation"]["n_units"] == 16
    assert found["recommendation"]["text"].startswith("**Recommendation: feature_extraction, provisional.**")
    assert {"margin", "confidence", "units_needed", "rivals", "not_beaten"} <= found["recommendation"].keys()
    assert (found["metric"], found["folds"]) == ("accuracy", 0)
    assert list(found["references"]) == ["majority_class"]
    assert found["references"]["majority_class"]["test"]["metrics"]["balanced_accuracy"]["value"] == 0.5


def test_a_metric_is_the_mean_over_seeds_with_interval_and_deviation(found: dict[str, Any]):
    accuracy = found["strategies"]["feature_extraction"]["test"]["metrics"]["accuracy"]
    seeds = [1 - 5 / 20, 1 - 4 / 20]
    assert accuracy["value"] == pytest.approx(np.mean(seeds))
    assert accuracy["sd"] == pytest.approx(np.std(seeds, ddof=1))
    assert 0 < accuracy["low"] < accuracy["value"] < accuracy["high"] < 1
    scaled = found["strategies"]["feature_extraction"]["test"]["metrics"]["ece_scaled"]
    assert scaled["low"] <= scaled["value"] <= scaled["high"]


def test_the_difference_from_the_baseline_is_on_the_same_images_and_corrected_over_strategies():
    runs = {"feature_extraction": HEAD_RUNS, "full": FULL_RUNS, "other": HEAD_RUNS}
    found = against_baseline(runs, 8)
    assert list(found) == ["full", "other"]
    full, other = found["full"]["test"], found["other"]["test"]
    assert full["baseline_value"] == pytest.approx((15 / 20 + 16 / 20) / 2)
    assert full["difference"] == pytest.approx((3 / 20 + 3 / 20) / 2)
    assert full["low"] < full["difference"] < full["high"]
    assert (other["difference"], other["p_value"]) == (0, 1)
    assert full["p_value"] == pytest.approx(min(1, 2 * full["p_value_uncorrected"]))
    assert full["seeds"] == 2


def against_baseline(runs: Mapping[str, Sequence[Run]], n_train: int) -> dict[str, Any]:
    judged = {name: [judge(run) for run in these] for name, these in runs.items()}
    by_split = {
        split: {name: [getattr(one, split) for one in these] for name, these in judged.items()}
        for split in ("val", "test")
    }
    study = Study(FORTY.label, FORTY.weight, np.arange(N), n_train)
    return details.against_baseline([*runs], "feature_extraction", by_split, {"val": study, "test": study})


def test_another_baseline_reverses_the_difference():
    found = forty_details(baseline="full")["strategies"]
    assert found["full"]["vs_baseline"] is None
    assert found["feature_extraction"]["vs_baseline"]["test"]["difference"] == pytest.approx(-3 / 20)
    assert found[HEAD_ALL_SEEDS]["vs_baseline"] is None


def test_identical_runs_count_once():
    same = run_wrong_on("feature_extraction", 0, [8, 9])
    found = describe([same] * 3)
    assert (found["distinct_runs"], len(found["runs"]), len(found["test"]["n"])) == (1, 3, 3)
    assert found["test"]["metrics"]["accuracy"]["sd"] is None
    assert details.summarise(found)["seeds"] == 1
    assert np.sum(found["test"]["confusion"]) == 16


def test_classes_and_confusion_are_those_of_all_seeds(found: dict[str, Any]):
    test = found["strategies"]["feature_extraction"]["test"]
    # cats are the even images; wrong are 8 and 10 of the first seed, 16 and 18 of the second
    assert test["confusion"] == [[12, 4], [3, 13]]
    assert [row["class"] for row in test["classes"]] == ["cat", "dog"]
    assert [row["support"] for row in test["classes"]] == [16, 16]
    assert test["classes"][1]["recall"] == pytest.approx((6 / 8 + 7 / 8) / 2)
    (bin_,) = [line for line in test["reliability"] if line["weight"]]
    assert bin_["confidence"] == pytest.approx(0.9)
    assert bin_["accuracy"] == pytest.approx(1 - 9 / 40)


def test_rows_by_subset_and_by_group_count_an_image_once():
    subset = ["mono" if i < 20 else "poly" for i in range(N - 1)] + [""]
    group = [f"patient {i % 50}" for i in range(N)]
    data = replace(FORTY, subset=subset, group=group)
    found = describe(HEAD_RUNS, data)["test"]
    assert {name: row["n"] for name, row in found["subsets"].items()} == {"mono": 12, "poly": 12}
    mono = found["subsets"]["mono"]["accuracy"]  # 8 to 19 of the first seed, 16 to 19 of the second
    assert mono["value"] == pytest.approx((1 - 5 / 15 + 1 - 4 / 5) / 2)
    assert mono["low"] < mono["value"] < mono["high"]
    assert set(found["groups"]) == {f"patient {i}" for i in range(8, 32)}
    assert found["n_groups"] == 24


def test_of_many_groups_those_with_the_most_test_images_have_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(details, "MAX_GROUPS", 3)
    # Tested are images 8 to 31: three of a, one each of the others
    data = replace(FORTY, group=["a" if i in (9, 10, 30) else f"b{i:02}" for i in range(N)])
    found = details.break_down([judge(run, data).test for run in HEAD_RUNS], forty_data(data))
    assert list(found["groups"]) == ["a", "b08", "b11"]
    assert [row["n"] for row in found["groups"].values()] == [3, 1, 1]
    assert found["n_groups"] == 22


def test_a_metric_that_one_seed_lacks_is_none():
    only_cats = replace(FORTY, label=np.where(np.arange(N) < 24, 0, np.arange(N) % 2))
    found = describe(HEAD_RUNS, only_cats)
    assert found["test"]["metrics"]["auroc"] == {"value": None, "low": None, "high": None, "sd": None}
    assert found["test"]["metrics"]["accuracy"]["sd"] is not None


def test_a_metrics_file_has_at_most_twelve_flat_keys(found: dict[str, Any]):
    files = {name: details.summarise(strategy) for name, strategy in found["strategies"].items()}
    plain = {"test_accuracy", "test_accuracy_low", "test_accuracy_high", "test_balanced_accuracy", "test_nll"}
    plain |= {"val_accuracy", "train_flops", "seeds"}
    assert files["feature_extraction"].keys() == files[HEAD_ALL_SEEDS].keys() == plain
    full, strategy = files["full"], found["strategies"]["full"]
    test, difference = strategy["test"]["metrics"], strategy["vs_baseline"]["test"]
    assert full == {
        "test_accuracy": test["accuracy"]["value"],
        "test_accuracy_low": test["accuracy"]["low"],
        "test_accuracy_high": test["accuracy"]["high"],
        "test_balanced_accuracy": test["balanced_accuracy"]["value"],
        "test_nll": test["nll"]["value"],
        "val_accuracy": strategy["val"]["metrics"]["accuracy"]["value"],
        "difference": pytest.approx(0.15),
        "difference_low": difference["low"],
        "difference_high": difference["high"],
        "difference_p_value": difference["p_value"],
        "train_flops": 9_500_000_000_000,
        "seeds": 2,
    }


def test_floats_are_rounded_to_six_digits_wherever_they_stand():
    assert details.round_floats({"a": [1 / 3, (2 / 3, 1)], "b": None}) == {"a": [0.333333, [0.666667, 1]], "b": None}


@pytest.mark.slow
def test_images_that_are_not_used_do_not_count_as_training():
    runs, heads = (
        [run_wrong_on(name, seed, [8 + seed]) for seed in (0, 1) * 3] for name in ("full", "feature_extraction")
    )
    factors = [1, -2, 3, 4, 5, 6]  # six distinct runs, one of which answers the opposite
    tests = [Predictions(run.test.rows, run.test.log_probability * k) for run, k in zip(runs, factors, strict=True)]
    runs = [replace(run, test=test) for run, test in zip(runs, tests, strict=True)]
    few, many = (
        against_baseline({"feature_extraction": heads, "full": runs}, n_train)["full"]["test"] for n_train in (8, 24)
    )
    assert few["method"] == many["method"] == "corrected t over seeds"
    assert many["p_value"] < few["p_value"] < 1
    assert few["low"] <= many["low"] < many["high"] < few["high"]
