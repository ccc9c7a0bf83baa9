"""Rows of DVC's plots, made from runs and details.json; .dvc/plots/ has the templates that draw them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.dataset.manifest import Labels
from pipeline.training.runs import Run

VEGA_LITE = "6.4"  # of the templates in .dvc/plots/
CURVE = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
Json = dict[str, Any]
Rows = list[dict[str, Any]]


def curves(runs: Mapping[str, Sequence[Run]], labels: Labels) -> Rows:
    """Learning curves, a row per epoch; a strategy without epochs is a horizontal line.

    The line is at the validation loss of what validation chose, so that epoch 0 of a strategy that starts from it is on
    the line. `is_selected` marks the epoch that validation selected. `not_chosen` names learning rates that it did not
    choose, and is empty otherwise. DVC draws rows only if all have the same fields.
    """
    last = max((line["epoch"] for these in runs.values() for run in these for line in run.curve), default=1)
    rows: Rows = []
    for name, these in runs.items():
        for run in these:
            curve = run.curve or [{"epoch": epoch, **_chosen(run, labels)} for epoch in (0, last)]
            for rates, lines in {"": curve, **run.other_curves}.items():
                for line in lines:
                    is_selected = bool(run.curve) and not rates and line["epoch"] == run.chosen.get("epoch")
                    figures = {key: line.get(key) for key in CURVE} | {"is_selected": is_selected}
                    rows.append({"strategy": name, "seed": run.seed, "not_chosen": rates, **figures})
    return rows


def _chosen(run: Run, labels: Labels) -> Json:
    """Validation loss (nats) and accuracy of the candidate that validation chose."""
    label, weight = labels.label[run.val.rows], labels.weight[run.val.rows]
    losses = run.candidates.nll(weight)
    hits = run.candidates.predicted[int(np.argmin(losses))] == label
    return {"val_loss": min(losses), "val_accuracy": float(np.average(hits, weights=weight))}


def confusion(name: str, strategy: Json, class_names: Sequence[str]) -> Rows:
    """Numbers of images by actual and predicted class, those above 0.

    DVC pastes the rows into its page unescaped, where `</script>` in the name of a class would end the script.
    """
    names = [name.replace("<", "\u2039") for name in class_names]
    return [
        {"strategy": name, "actual": names[actual], "predicted": names[predicted], "count": count}
        for actual, counts in enumerate(strategy["test"]["confusion"])
        for predicted, count in enumerate(counts)
        if count
    ]


def reliability(strategies: Mapping[str, Json]) -> Rows:
    """Accuracy by confidence, for the bins that hold images."""
    return [
        {"strategy": name, **line}
        for name, strategy in strategies.items()
        for line in strategy["test"]["reliability"]
        if line["weight"]
    ]


def cost(strategies: Mapping[str, Json]) -> Rows:
    """Test accuracy with its interval against the cost of training."""
    rows: Rows = []
    for name, strategy in strategies.items():
        accuracy = strategy["test"]["metrics"]["accuracy"]
        figures = {"accuracy": accuracy["value"], "low": accuracy["low"], "high": accuracy["high"]}
        rows.append({"strategy": name, **figures, **strategy["cost"]})
    return rows
