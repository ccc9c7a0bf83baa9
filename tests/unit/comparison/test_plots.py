"""The templates that DVC's plots are drawn with."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_convert
from ruamel.yaml import YAML

from pipeline.comparison import plots
from pipeline.comparison.plots import VEGA_LITE
from pipeline.training.runs import Candidates
from tests.factories import FORTY, forty_details, run_wrong_on

TEMPLATES = Path(".dvc/plots")
STAGE = YAML(typ="safe", pure=True).load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]["compare"]
PLOTS = {Path(name).stem: options for plot in STAGE["plots"] for name, options in plot.items()}
COST = {"train_flops": 10**12, "trainable_params": 1, "base_passes": 1, "cached_bytes": 1}
ROWS: dict[str, list[dict[str, Any]]] = {
    "curves": [
        {"strategy": name, "seed": seed, "epoch": epoch, "train_loss": 0.4 if epoch else None, "train_accuracy": None}
        | {"val_loss": 0.5 - epoch / 10, "val_accuracy": 0.8, "is_selected": epoch == 2}
        for name in ("head", "full")
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ],
    "cost": [{"strategy": name, "accuracy": 0.85, "low": 0.8, "high": 0.9, **COST} for name in ("head", "full")],
    "reliability": [{"strategy": "full", "confidence": 0.7, "accuracy": 0.75, "weight": 1.0}],
    "confusion": [
        {"strategy": "full", "actual": "cat", "predicted": "cat", "count": 30},
        {"strategy": "full", "actual": "cat", "predicted": "dog", "count": 10},
        {"strategy": "full", "actual": "dog", "predicted": "dog", "count": 7},
    ],
}


def drawn(name: str) -> str:
    """SVG of the rows at two revisions, the template filled as DVC fills it."""
    rows = [{"rev": rev, **row} for rev in ("main", "workspace") for row in ROWS[name]]
    text = (TEMPLATES / f"{PLOTS[name]['template']}.json").read_text(encoding="utf-8")
    filled = text.replace('"<DVC_METRIC_DATA>"', json.dumps(rows)).replace("<DVC_METRIC_TITLE>", PLOTS[name]["title"])
    assert "<DVC" not in filled
    return vl_convert.vegalite_to_svg(filled, vl_version=VEGA_LITE)


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_drawn_with_its_title_and_both_revisions(name: str):
    picture = drawn(name)
    assert PLOTS[name]["title"] in picture
    assert ">main<" in picture
    assert ">workspace<" in picture


@pytest.mark.parametrize("name", PLOTS)
def test_the_fields_that_dvc_checks_are_in_the_rows(name: str):
    assert {PLOTS[name]["x"], PLOTS[name]["y"]} <= ROWS[name][0].keys()


def test_confusion_is_normalised_by_the_actual_class():
    assert sorted(re.findall(r">(\d+%)</t(?:ext|span)>", drawn("confusion"))) == sorted(
        [*("75%", "25%", "100%") * 2, *("0%", "20%", "40%", "60%", "80%", "100%")]
    )


def test_every_run_has_its_curves_and_a_dot_on_the_selected_epoch():
    picture = drawn("curves")
    assert len(re.findall(r'aria-roledescription="line mark"', picture)) == 2 * (2 * 2 * 2)  # validation and training
    assert len(re.findall(r'aria-roledescription="point"', picture)) == 2 * 2 * 2


def test_the_name_of_a_class_cannot_end_a_script():
    strategy = {"test": {"confusion": [[1, 2], [0, 3]]}}
    rows = plots.confusion("full", strategy, ["</script><script>alert(1)</script>", "a < b"])
    assert len(rows) == 3
    assert "<" not in json.dumps(rows)


def test_curves_are_those_of_every_strategy_and_a_line_where_there_are_no_epochs():
    line = {"epoch": 0, "train_loss": None, "val_loss": 0.5}
    tuned = run_wrong_on("full", 0, [8], curve=[line, {**line, "epoch": 3, "val_loss": 0.4}])
    head = run_wrong_on("feature_extraction", 0, [1, 8, 9])
    worse = run_wrong_on("feature_extraction", 0, [1, 2, 3, 8, 9]).candidates
    both = [[*vars(worse).values()][1:], [*vars(head.candidates).values()][1:]]
    head = replace(head, candidates=Candidates(["0.1", "0.3"], *map(np.concatenate, zip(*both, strict=True))))
    rows = plots.curves({"feature_extraction": [head], "full": [tuned]}, FORTY)
    wrong = np.average(np.isin(head.val.rows, [1, 8, 9]), weights=FORTY.weight[head.val.rows])
    assert 0 < wrong < 1
    assert rows[0]["val_loss"] == pytest.approx(-np.log([0.9, 0.1]) @ (1 - wrong, wrong), rel=1e-6)
    assert rows[0]["val_accuracy"] == pytest.approx(1 - wrong)
    assert [(row["strategy"], row["seed"], row["epoch"], row["val_loss"]) for row in rows] == [
        ("feature_extraction", 0, 0, rows[0]["val_loss"]),
        ("feature_extraction", 0, 3, rows[0]["val_loss"]),
        ("full", 0, 0, 0.5),
        ("full", 0, 3, 0.4),
    ]
    assert {tuple(row) for row in rows} == {("strategy", "seed", "not_chosen", *plots.CURVE, "is_selected")}, (
        "DVC would draw nothing"
    )


def test_plots_hold_counts_and_bins_rather_than_images():
    strategies = forty_details()["strategies"]
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
