"""comparison.md and the numbers in it."""

import re
from dataclasses import replace

from pipeline.comparison import tables
from pipeline.comparison.paired import CORRECTED_T, SIGN_FLIP
from tests.factories import FORTY, FULL_RUNS, HEAD_RUNS, forty_details


def sections(text: str) -> tuple[str, list[str]]:
    """Everything above the first table, and the lines of this table."""
    above, _, rest = text.partition("\n| strategy")
    return above, f"| strategy{rest}".split("\n\n")[0].splitlines()


def test_the_table_has_figures_with_their_uncertainty():
    text = tables.as_markdown(forty_details())
    above, (columns, _, reference, baseline, full) = sections(text)
    assert above.startswith("**Recommendation: feature_extraction, provisional.**")
    head = next(line for line in above.splitlines() if line.startswith("Test accuracy"))
    assert "on 16 test images a seed" in head
    assert "interval over images" in head
    assert "Compared on seeds 0, 1. This is a result of these 2 runs of each strategy" in head
    assert "Validation figures are cross-fitted" in head
    assert "Difference in accuracy from feature_extraction; p: sign-flip permutation by unit, Holm-corrected." in head
    assert columns.startswith("| strategy | n | candidates | validation accuracy, cross-fitted | accuracy | difference")
    assert reference.startswith("| *majority_class* | 2 | 1 | 60.0 | 60.0 ")
    assert baseline.split(" | ")[:4] == ["| feature_extraction", "2", "1", "95.0"]
    assert baseline.split(" | ")[4].startswith("77.5 ± 3.5 (")
    assert baseline.split(" | ")[5:7] == ["", ""]
    assert full.split(" | ")[5].startswith("+15.0 (-")
    assert full.split(" | ")[-2:] == ["100", "9.5 |"]
    assert "\nfeature_extraction over all its seeds (n = 2): accuracy 77.5 ± 3.5 (" in text


def test_one_seed_has_no_deviation_and_a_loss_has_its_sign():
    above, (*_, baseline, other) = sections(tables.as_markdown(forty_details(FULL_RUNS[:1], HEAD_RUNS[:1])))
    assert "Compared on seed 0. This is a result of this one run of each strategy" in above
    assert baseline.split(" | ")[4].startswith("90.0 (")
    assert other.split(" | ")[5].startswith("-15.0 (")


def test_another_decision_metric_has_a_column_of_its_own():
    text = tables.as_markdown(forty_details(metric="nll"))
    above, (columns, _, _, baseline, full) = sections(text)
    assert "Difference in NLL from feature_extraction" in above
    assert re.search(r"full \([+-]0\.\d{3} nats, between", above)
    assert "| validation NLL, cross-fitted | accuracy | NLL | difference from feature_extraction |" in columns
    assert baseline.split(" | ")[5] == "0.600 nats"
    assert full.split(" | ")[6].startswith("-0.330 (")


def test_folds_are_described_as_one_test_of_every_unit():
    details = forty_details() | {"folds": 2}
    above, _ = sections(tables.as_markdown(details))
    assert "on 16 test images, with its 95 % interval" in above
    assert "The 2 folds of one partition: each unit is tested once, by a run that never saw it." in above


def test_what_near_duplicates_change_has_a_table_of_its_own():
    details = forty_details()
    assert "near-duplicate" not in tables.as_markdown(details)
    figure = {"value": 0.5, "low": 0.4, "high": 0.6}
    clean = {"n": 12, "n_twins": 4, "metrics": {"accuracy": figure}}
    for name in ("feature_extraction", "full"):
        details["strategies"][name]["test"]["without_twins"] = clean
    text = tables.as_markdown(details)
    assert "with and without the 4 test images of 16 that have a near-duplicate in train or validation:" in text
    assert (
        "| strategy | accuracy, all | accuracy, without | balanced accuracy, all | balanced accuracy, without |" in text
    )
    assert re.search(r"\| full \| 92.5 .* \| 50.0 \(40.0 to 60.0\) \| .* \|  \|", text)


def test_from_five_seeds_on_the_result_is_of_the_strategies():
    assert tables.of_runs({}, 5, "test") == ""
    by_seed, by_unit = ({"a": {"vs_baseline": {"test": {"method": method}}}} for method in (CORRECTED_T, SIGN_FLIP))
    seeds = {"common_seeds": [1, 2, 3, 4, 5], "folds": 0}
    assert tables.compared_on(seeds | {"strategies": by_seed}) == "Compared on seeds 1, 2, 3, 4, 5."
    assert "This is a result of these 5 runs" in tables.compared_on(seeds | {"strategies": by_unit})


def test_sizes_are_counted_in_units_where_a_unit_is_more_than_an_image():
    strategies = {"a": {"test": {"n": [660, 650], "n_units": [66, 66]}}}
    assert tables.sampled(strategies, "test") == "66 test units (650 to 660 images)"
    assert tables.sampled({"a": {"val": {"n": [1295], "n_units": [1295]}}}, "val") == "1,295 validation images"


def test_units_and_operating_points_have_tables_of_their_own():
    paired = replace(FORTY, group=[f"patient {i // 4 * 2 + i % 2}" for i in range(40)])  # two images of one class each
    text = tables.as_markdown(forty_details(labels=paired))
    assert "on 8 test units (16 images) a seed, with its 95 % interval over units" in text
    _, per_unit, by_image, by_unit = re.split(r"\n\n(?=One vote|Sensitivity)", text)
    assert per_unit.startswith("One vote per unit, from the mean probability of its images (12 test units):")
    assert "| strategy | accuracy, % | balanced accuracy, % | AUROC, % |" in per_unit
    assert "Sensitivity (for cat) and specificity on test per image, in %, at the default threshold" in by_image
    assert "a specificity of 90 % on validation" in by_image
    assert by_image.count("| full |") == 1
    assert "specificity on test per unit" in by_unit
    assert "One vote" not in tables.as_markdown(forty_details())


def test_cuts_that_carry_the_weight_of_the_head_have_a_table_where_there_are_several():
    heads = [
        replace(run, network=run.network | {"widths": {"early": 32, "all": 1280}, "weight_shares": shares})
        for run, shares in zip(HEAD_RUNS, ({"early": 0.25, "all": 0.75}, {"early": 0.35, "all": 0.65}), strict=True)
    ]
    table = tables.as_markdown(forty_details(head=heads)).split("Which cuts carry the weight of the head")[1]
    assert "means over the seeds" in table
    assert table.endswith(
        "| strategy | early | all |\n|---|---|---|\n| number of features | 32 | 1,280 |\n"
        "| feature_extraction_all_seeds | 30.0 | 70.0 |\n"
    )
    assert "Which cuts" not in tables.as_markdown(forty_details())


def test_numbers_are_written_with_the_digits_that_are_needed():
    assert [tables.p_value(value) for value in (0.04, 0.002, 0.0004, 1.0)] == ["0.040", "0.002", "< 0.001", "1.000"]
    assert [tables.teraflops(flops) for flops in (435_806_787_365_040, 9_540_000_000_000, 15_000_000)] == [
        *("436", "9.5", "1.5e-05")
    ]
