"""Figures as text, and tables and charts that are cut short."""

from typing import Any

import pytest

from pipeline.params import HEAD_ALL_SEEDS
from pipeline.report import evidence
from pipeline.report.provenance import Timing
from tests.factories import REPOSITORY, strategy


def test_many_classes_are_cut_short(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    names = [f"class {i}" for i in range(60)]
    rows = [
        {"strategy": "a", "class": name, "f1": i / 60, "precision": 0.5, "recall": 0.5, "support": 2}
        for i, name in enumerate(names)
    ]
    bars = evidence.per_class(rows, ["a"])
    assert bars.caption.startswith("The 20 hardest of 60 classes")
    assert bars.spec
    assert len(bars.spec["data"]["values"]) == 20
    counts = [{"strategy": "a", "actual": name, "predicted": name, "count": 1} for name in names]
    matrix = evidence.confusion("a", counts, 60)
    assert matrix.spec is None
    assert matrix.caption == "60 predictions. No errors. 60 classes are too many for a matrix."
    assert evidence.confusion("a", counts[:3], 3).spec


@pytest.mark.parametrize(("value", "text"), [(0, "0\u00a0B"), (999, "999\u00a0B"), (5.2e12, "5.2\u00a0TB")])
def test_sizes_are_written_with_their_unit(value: float, text: str):
    assert evidence.scaled(value, "B") == text


def test_a_metric_without_a_value_is_a_dash():
    assert evidence.cell("auroc", None) == {"metric": "auroc", "value": None, "text": "\u2013", "note": ""}


def test_minutes_are_a_mean_over_seeds_of_what_ran_on_this_machine():
    strategies: dict[str, dict[str, list[int]]] = {
        "feature_extraction": {"seeds": [0, 1]},
        "full": {"seeds": [0, 1]},
        "other": {"seeds": [0, 1]},
        HEAD_ALL_SEEDS: {"seeds": [0, 1, 2, 3]},
    }
    seconds = {"extract": 90.0, "train_head": 240.0, "fine_tune-full-0": 600.0, "fine_tune-full-1": 300.0}
    timings = [Timing(stage=stage, wall_seconds=wall, peak_memory_bytes=None) for stage, wall in seconds.items()]
    found = evidence.minutes(timings, strategies)
    assert found == {"feature_extraction": "1.0", "full": "7.5", "extract": "1.5"}
    assert evidence.minutes([], strategies) == {}


@pytest.mark.parametrize(
    ("changes", "n_views", "chosen", "expected"),
    [
        (
            {"views": 0, "optimizer": "sgd", "drop_path": 0.0},
            1,
            None,
            "from the cached head; frozen until layer3; 2 epochs, 0 of warm-up, then a cosine; sgd (momentum 0.9) "
            "in batches of 8; learning rate 0.001; weight decay 0; BatchNorm frozen; view 0 only; drop path 0; "
            "patience 2.",
        ),
        (
            {
                "learning_rates": ((1e-4, 1e-4), (1e-5, 1e-3)),
                "views": "every_epoch",
                "epochs": 9,
                "mixup": 0.2,
                "precision": "bf16",
            },
            4,
            [1e-5, 1e-3],
            "from the cached head; frozen until layer3; 9 epochs, 0 of warm-up, then a cosine; adamw in batches of 8; "
            "learning rate 0.0001, 1e-05/0.001 (chosen: 1e-05/0.001); weight decay 0; BatchNorm frozen; "
            "4 views (flips both); mixup 0.2; patience 2; bf16.",
        ),
        (
            {"views": "every_epoch", "epochs": 9},
            9,
            None,
            "from the cached head; frozen until layer3; 9 epochs, 0 of warm-up, then a cosine; adamw in batches of 8; "
            "learning rate 0.001; weight decay 0; BatchNorm frozen; a new view in every epoch (flips both); "
            "patience 2.",
        ),
    ],
)
def test_a_recipe_is_one_line(changes: dict[str, Any], n_views: int, chosen: list[float] | None, expected: str):
    recipe = strategy(**changes).model_dump(mode="json")
    network = {"boundary": "layer3", "recipe": recipe, "n_views": n_views}
    run = {"network": network, "chosen": {"epoch": 1, "learning_rates": chosen}}
    head = {"runs": [{"network": {"boundary": "all"}, "chosen": {}}]}
    assert evidence.recipes({"feature_extraction": head, "tuned": {"runs": [run]}}) == {"tuned": expected}
