"""What details.json and comparison.json say of runs, checked by hand on a few images."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.comparison import details, plots, tables
from pipeline.dataset.manifest import Labels
from pipeline.params import HEAD_ALL_SEEDS, Compare
from pipeline.training.models import Cost, Run

N = 40
OPTIONS = Compare(baseline="feature_extraction", practical_margin=0.01, confidence=0.95, guard={})
SPLITS = {0: (np.arange(8), np.arange(8, 24)), 1: (np.arange(32, 40), np.arange(16, 32))}  # val, test


def labels(**columns: Any) -> Labels:
    text: dict[str, Any] = {
        name: [""] * N
        for name in ("image_id", "sha256", "group", "near_duplicate_group", "stratum", "subset", "given_split")
    }
    numbers = {"label": np.arange(N) % 2, "weight": np.where(np.arange(N) % 4 == 0, 2.0, 1.0)}
    return Labels(**{**text, **numbers, "class_names": ["cat", "dog"], **columns})


LABELS = labels()


def run_of(strategy: str, seed: int, wrong: list[int], flops: int = 10**12, curve: list | None = None) -> Run:
    """A run that is wrong on the images `wrong` and right on the others, with a confidence of 0.9."""
    said = np.where(np.isin(np.arange(N), wrong), 1 - LABELS.label, LABELS.label)
    logits = np.log(np.where(np.eye(2)[said] > 0, 0.9, 0.1)).astype(np.float32)
    cost = Cost(trainable_params=100, train_flops=flops, base_passes=2, cached_bytes=8)
    chosen, network = {"strength": 0.1}, {"params": 1000, "boundary": "all", "largest_rounding": 0.0}
    val, test = SPLITS[seed]
    return Run(strategy, seed, cost, chosen, network, curve or [], val, logits[val], test, logits[test])


HEAD = [run_of("feature_extraction", 0, [1, 8, 9, 10, 11]), run_of("feature_extraction", 1, [16, 17, 18])]
TUNED = [run_of("full", 0, [8], 9 * 10**12), run_of("full", 1, [17], 10 * 10**12)]


@pytest.fixture(scope="module")
def details() -> dict[str, Any]:
    return comparison.assemble({"feature_extraction": HEAD, "full": TUNED}, HEAD, LABELS, 8, OPTIONS)


def test_a_run_is_scored_on_validation_and_test_with_weights():
    found = comparison.score(HEAD[0], LABELS)
    assert (found["seed"], found["chosen"], found["network"]) == (0, HEAD[0].chosen, HEAD[0].network)
    assert found["cost"] == {"trainable_params": 100, "train_flops": 10**12, "base_passes": 2, "cached_bytes": 8}
    assert (found["val"]["n"], found["test"]["n"]) == (8, 16)
    assert found["val"]["accuracy"] == pytest.approx(1 - 1 / 10)  # two of eight images weigh 2
    assert found["test"]["accuracy"] == pytest.approx(1 - 5 / 20)
    assert found["test"]["ece"] == pytest.approx(0.9 - 0.75)


def test_calibration_after_scaling_uses_the_temperature_of_validation():
    found = comparison.score(HEAD[0], LABELS)
    # right on 9/10 of the validation weight, with a confidence of 0.9: nothing to scale
    assert found["temperature"] == pytest.approx(1.0, abs=1e-3)
    assert found["test"]["ece_scaled"] == pytest.approx(found["test"]["ece"], abs=1e-3)
    sure = run_of("full", 0, [1, 2, 8, 9, 10, 11])
    scaled = comparison.score(sure, LABELS)  # right on 8/10
    assert scaled["temperature"] == pytest.approx(np.log(9) / np.log(4), abs=1e-3)
    assert scaled["test"]["ece_scaled"] == pytest.approx(0.8 - 0.75, abs=1e-3)


def test_details_hold_every_strategy_and_what_the_head_gives_on_all_seeds(details: dict[str, Any]):
    assert details["baseline"] == "feature_extraction"
    assert details["common_seeds"] == [0, 1]
    assert details["class_names"] == ["cat", "dog"]
    assert list(details["strategies"]) == ["feature_extraction", "full", HEAD_ALL_SEEDS]
    head = details["strategies"]["feature_extraction"]
    assert (head["seeds"], head["distinct_runs"]) == ([0, 1], 2)
    assert (head["val"]["n"], head["test"]["n"]) == ([8, 8], [16, 16])
    assert [run["seed"] for run in head["runs"]] == [0, 1]
    assert details["strategies"]["full"]["cost"]["train_flops"] == 9_500_000_000_000
    assert details["recommendation"]["strategy"] == "full"


def test_a_metric_is_the_mean_over_seeds_with_interval_and_deviation(details: dict[str, Any]):
    accuracy = details["strategies"]["feature_extraction"]["test"]["metrics"]["accuracy"]
    seeds = [1 - 5 / 20, 1 - 4 / 20]
    assert accuracy["value"] == pytest.approx(np.mean(seeds))
    assert accuracy["sd"] == pytest.approx(np.std(seeds, ddof=1))
    assert 0 < accuracy["low"] < accuracy["value"] < accuracy["high"] < 1
    scaled = details["strategies"]["feature_extraction"]["test"]["metrics"]["ece_scaled"]
    assert scaled["low"] <= scaled["value"] <= scaled["high"]


def test_gain_over_the_baseline_is_on_the_same_images_and_corrected_over_strategies():
    runs = {"feature_extraction": HEAD, "full": TUNED, "other": HEAD}
    found = comparison.against_baseline(runs, "feature_extraction", LABELS, 8)
    assert list(found) == ["full", "other"]
    full, other = found["full"]["test"], found["other"]["test"]
    assert full["baseline_accuracy"] == pytest.approx((15 / 20 + 16 / 20) / 2)
    assert full["gain"] == pytest.approx((3 / 20 + 3 / 20) / 2)
    assert full["low"] < full["gain"] < full["high"]
    assert (other["gain"], other["p_value"]) == (0, 1)
    assert full["p_value"] == pytest.approx(min(1, 2 * full["p_value_uncorrected"]))
    assert full["seeds"] == 2


def test_another_baseline_turns_the_gain_round():
    runs = {"feature_extraction": HEAD, "full": TUNED}
    found = comparison.assemble(runs, HEAD, LABELS, 8, OPTIONS.model_copy(update={"baseline": "full"}))["strategies"]
    assert found["full"]["vs_baseline"] is None
    assert found["feature_extraction"]["vs_baseline"]["test"]["gain"] == pytest.approx(-3 / 20)
    assert found[HEAD_ALL_SEEDS]["vs_baseline"] is None


def test_identical_runs_count_once():
    same = run_of("feature_extraction", 0, [8, 9])
    scored = [comparison.score(same, LABELS)] * 3
    found = comparison.describe([same] * 3, scored, LABELS)
    assert (found["distinct_runs"], len(found["runs"]), len(found["test"]["n"])) == (1, 3, 3)
    assert found["test"]["metrics"]["accuracy"]["sd"] is None
    assert comparison.summarise(found)["seeds"] == 1
    assert np.sum(found["test"]["confusion"]) == 16


def test_classes_and_confusion_are_those_of_all_seeds(details: dict[str, Any]):
    test = details["strategies"]["feature_extraction"]["test"]
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
    data = labels(subset=subset, group=group)
    found = comparison.describe(HEAD, [comparison.score(run, data) for run in HEAD], data)["test"]
    assert {name: row["n"] for name, row in found["subsets"].items()} == {"mono": 12, "poly": 12}
    mono = found["subsets"]["mono"]["accuracy"]  # 8 to 19 of the first seed, 16 to 19 of the second
    assert mono["value"] == pytest.approx((1 - 5 / 15 + 1 - 4 / 5) / 2)
    assert mono["low"] < mono["value"] < mono["high"]
    assert set(found["groups"]) == {f"patient {i}" for i in range(8, 32)}
    assert found["n_groups"] == 24


def test_of_many_groups_those_with_the_most_test_images_have_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comparison, "MAX_GROUPS", 3)
    # Tested are images 8 to 31: three of a, one each of the others
    data = labels(group=["a" if i in (9, 10, 30) else f"b{i:02}" for i in range(N)])
    found = comparison._of_test(HEAD, data)
    assert list(found["groups"]) == ["a", "b08", "b11"]
    assert [row["n"] for row in found["groups"].values()] == [3, 1, 1]
    assert found["n_groups"] == 22


def test_a_metric_that_one_seed_lacks_is_none():
    only_cats = labels(label=np.where(np.arange(N) < 24, 0, np.arange(N) % 2))
    found = comparison.describe(HEAD, [comparison.score(run, only_cats) for run in HEAD], only_cats)
    assert found["test"]["metrics"]["auroc"] == {"value": None, "low": None, "high": None, "sd": None}
    assert comparison.summarise(found)["test"]["auroc"] is None


def test_a_summary_is_what_metrics_show(details: dict[str, Any]):
    found = comparison.rounded({name: comparison.summarise(one) for name, one in details["strategies"].items()})
    test = {
        *("accuracy", "accuracy_low", "accuracy_high", "balanced_accuracy", "macro_f1", "auroc", "nll", "brier", "ece")
    }
    assert all(set(one["test"]) == test for one in found.values())
    assert {name for name, one in found.items() if "vs_baseline" in one} == {"full"}
    assert found["full"]["vs_baseline"] == {
        "baseline_accuracy": 0.775,
        "accuracy_gain": 0.15,
        "gain_low": round(details["strategies"]["full"]["vs_baseline"]["test"]["low"], 6),
        "gain_high": round(details["strategies"]["full"]["vs_baseline"]["test"]["high"], 6),
        "p_value": round(details["strategies"]["full"]["vs_baseline"]["test"]["p_value"], 6),
        "seeds": 2,
    }


def test_floats_are_rounded_to_six_digits_wherever_they_stand():
    assert comparison.rounded({"a": [1 / 3, (2 / 3, 1)], "b": None}) == {"a": [0.333333, [0.666667, 1]], "b": None}


def test_the_table_says_what_is_known_and_how_sure_it_is(details: dict[str, Any]):
    text = tables.as_markdown(details)
    head, *lines = text.splitlines()
    assert "on 16 test images a seed" in head
    assert "Compared on seeds 0, 1." in head
    assert head.endswith("p: sign-flip permutation by image, Holm-corrected.")
    assert "| strategy | n | accuracy | gain over feature_extraction | p |" in lines[1]
    baseline, full = lines[3].split(" | "), lines[4].split(" | ")
    assert baseline[:2] == ["| feature_extraction", "2"]
    assert baseline[2].startswith("77.5 ± 3.5 (")
    assert baseline[3:5] == ["", ""]
    assert full[3].startswith("+15.0 (-0.9 to +28.0)")
    assert full[-2:] == ["100", "9.5 |"]
    assert lines[6].startswith("feature_extraction over all its seeds (n = 2): accuracy 77.5 ± 3.5 (")
    assert lines[8].startswith("**Recommendation: full**")


def test_one_seed_has_no_deviation_and_a_loss_has_its_sign():
    runs = {"feature_extraction": TUNED[:1], "full": HEAD[:1]}
    lines = tables.as_markdown(comparison.assemble(runs, TUNED[:1], LABELS, 8, OPTIONS)).splitlines()
    assert "Compared on seed 0." in lines[0]
    assert lines[4].split(" | ")[2].startswith("90.0 (")
    assert lines[5].split(" | ")[3].startswith("-15.0 (")


def test_numbers_are_written_with_the_digits_that_are_needed():
    assert [tables.p_value(value) for value in (0.04, 0.002, 0.0004, 1.0)] == ["0.040", "0.002", "< 0.001", "1.000"]
    assert [tables.teraflops(flops) for flops in (435_806_787_365_040, 9_540_000_000_000, 15_000_000)] == [
        *("436", "9.5", "1.5e-05")
    ]


def test_curves_are_those_of_every_strategy_and_a_line_where_there_are_no_epochs():
    line = {"epoch": 0, "train_loss": None, "val_loss": 0.5}
    tuned = run_of("full", 0, [8], curve=[line, {**line, "epoch": 3, "val_loss": 0.4}])
    runs = {"feature_extraction": HEAD[:1], "full": [tuned]}
    strategies = {"feature_extraction": {"runs": [{"val": {"nll": 0.6, "accuracy": 0.7}}]}}
    strategies["full"] = {"runs": [{"val": {"nll": 0.4, "accuracy": 0.8}}]}
    rows = plots.curves(runs, strategies)
    assert [(row["strategy"], row["seed"], row["epoch"], row["val_loss"]) for row in rows] == [
        ("feature_extraction", 0, 0, 0.6),
        ("feature_extraction", 0, 3, 0.6),
        ("full", 0, 0, 0.5),
        ("full", 0, 3, 0.4),
    ]
    assert {tuple(row) for row in rows} == {("strategy", "seed", *plots.CURVE)}, "DVC would draw nothing"


def test_plots_hold_counts_and_bins_rather_than_images(details: dict[str, Any]):
    strategies = details["strategies"]
    assert plots.confusion("full", strategies["full"], ["cat", "dog"]) == [
        {"strategy": "full", "actual": "cat", "predicted": "cat", "count": 15},
        {"strategy": "full", "actual": "cat", "predicted": "dog", "count": 1},
        {"strategy": "full", "actual": "dog", "predicted": "cat", "count": 1},
        {"strategy": "full", "actual": "dog", "predicted": "dog", "count": 15},
    ]
    without = {"test": {"confusion": [[3, 0], [0, 4]]}}
    assert [row["count"] for row in plots.confusion("full", without, ["cat", "dog"])] == [3, 4]
    assert [row["strategy"] for row in plots.reliability(strategies)] == list(strategies)
    costs = {
        row["strategy"]: (row["low"] < row["accuracy"] < row["high"], row["train_flops"])
        for row in plots.cost(strategies)
    }
    assert costs["full"] == (True, 9_500_000_000_000)


def test_images_that_are_not_used_do_not_count_as_training():
    runs, heads = ([run_of(name, seed, [8 + seed]) for seed in (0, 1) * 3] for name in ("full", "feature_extraction"))
    runs = [replace(run, test_logits=run.test_logits * (1 + i)) for i, run in enumerate(runs)]
    runs[1] = replace(runs[1], test_logits=-runs[1].test_logits)
    found = [
        comparison.against_baseline({"feature_extraction": heads, "full": runs}, "feature_extraction", LABELS, n_train)
        for n_train in (8, 24)
    ]
    few, many = (one["full"]["test"]["corrected_t_p_value"] for one in found)
    assert many < few < 1


def test_the_table_says_what_the_corrected_t_says(details: dict[str, Any]):
    assert "corrected t" not in tables.tested(details)
    test = {**details["strategies"]["full"]["vs_baseline"]["test"], "corrected_t_p_value": 0.248}
    strategies = {**details["strategies"], "full": {**details["strategies"]["full"], "vs_baseline": {"test": test}}}
    assert tables.tested({**details, "strategies": strategies}).endswith("(Nadeau and Bengio): full 0.248.")
