"""reports/details.json and the rows of DVC's plots -> the page's tables and charts, and figures as text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.comparison import tables
from pipeline.params import HEAD_ALL_SEEDS, HEAD_ONLY
from pipeline.report import charts
from pipeline.report.charts import Rows, Spec
from pipeline.report.provenance import Timing

Json = dict[str, Any]
PERCENT = ("accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy")
METRICS = tables.METRIC_NAMES | {"nll": "NLL (nats)"}
NONE, TO = "\u2013", "\u2009\u2013\u2009"  # dashes: for no value, and between the ends of an interval
COSTS = {
    "trainable_params": "trained parameters",
    "train_flops": "training FLOPs",
    "base_passes": "images through the base",
    "cached_bytes": "cached",
}
PREFIXES = ("", "k", "M", "G", "T", "P", "E")
AT_REST = (0, "none", False, [1.0, 1.0])  # of an augmentation
OPTIONAL = ("mixup", "dropout", "ema", "gradient_clipping", "label_smoothing", "patience")  # of a recipe
MAX_CLASSES = 20  # with a bar each
MAX_MATRIX = 40  # classes of a confusion matrix


@dataclass(frozen=True)
class Figure:
    """A chart, its caption, and the number of each colour in it; `spec` None: `caption` says why there is none."""

    title: str
    caption: str
    spec: Spec | None = None
    key: dict[str, int] = field(default_factory=dict)


def numbered(names: Sequence[str]) -> dict[str, int]:
    """Names with the numbers of their colours."""
    return {name: i for i, name in enumerate(names)}


def label(name: str) -> str:
    """The name of a strategy on the page."""
    return f"{HEAD_ONLY}, all seeds" if name == HEAD_ALL_SEEDS else name


def shown(metric: str, value: float | None) -> str:
    """A metric as text."""
    if value is None:
        return NONE
    return f"{100 * value:.1f}\u2009%" if metric in PERCENT else f"{value:.3f}"


def cell(metric: str, estimate: Json | None) -> Json:
    """A metric and its 95 % interval, as text."""
    estimate = estimate or {"value": None, "low": None, "high": None}
    scale, digits = (100, 1) if metric in PERCENT else (1, 3)
    ends = [estimate["low"], estimate["high"]]
    note = "" if None in ends else TO.join(f"{scale * end:.{digits}f}" for end in ends)
    return {"metric": metric, "value": estimate["value"], "text": shown(metric, estimate["value"]), "note": note}


def measured(strategies: Json, split: str) -> list[str]:
    """The metrics that have a value for some strategy."""
    found = [strategy[split]["metrics"] for strategy in strategies.values()]
    return [name for name in METRICS if any(metrics.get(name, {}).get("value") is not None for metrics in found)]


def table(details: Json) -> Json:
    """The main table: its columns, and the cells of each reference classifier and each strategy."""
    strategies = details["references"] | details["strategies"]
    metrics = [name for name in measured(strategies, "test") if name != "ece_scaled"]
    rows = []
    for name, strategy in strategies.items():
        found = strategy["test"]["metrics"]
        cells = [cell(metric, found.get(metric)) for metric in metrics]
        if found["accuracy"]["sd"] is not None:
            cells[0]["note"] += f" · sd {100 * found['accuracy']['sd']:.1f}"
        counts = {"seeds": strategy["distinct_runs"], "n_candidates": strategy["n_candidates"]}
        counts["is_reference"] = name in details["references"]
        compared = difference(strategy, details["metric"])
        rows.append({"name": name, **counts, "cells": cells, "difference": compared})
    return {"metrics": [METRICS[name] for name in metrics], "rows": rows}


def difference(strategy: Json, metric: str) -> Json | None:
    """Difference from the baseline, with its interval and p-value, as numbers and text; None for itself."""
    if not strategy["vs_baseline"]:
        return None
    found = strategy["vs_baseline"]["test"]
    value, _, note = tables.range_of(found, metric, " | {}\u2009to\u2009{}").partition(" | ")
    shown = {"value": found["difference"], "text": value, "note": note}
    return shown | {"p_value": found["p_value"], "p": tables.p_value(found["p_value"])}


def minutes(timings: Sequence[Timing], strategies: Json) -> dict[str, str]:
    """Measured minutes of one seed of each strategy, and of `extract`, as far as the stages ran on this machine."""
    seconds = {timing.stage: timing.wall_seconds for timing in timings}
    stages = {name: [f"fine_tune-{name}-{seed}" for seed in strategy["seeds"]] for name, strategy in strategies.items()}
    if "train_head" in seconds:  # the stage trains the heads of all seeds
        seconds["train_head"] /= len(strategies[HEAD_ALL_SEEDS]["seeds"])
    stages |= {HEAD_ONLY: ["train_head"], "extract": ["extract"]}
    measured = {name: [seconds[stage] for stage in these if stage in seconds] for name, these in stages.items()}
    return {name: f"{sum(values) / len(values) / 60:.1f}" for name, values in measured.items() if values}


def cost_text(key: str, value: int) -> str:
    """A cost as text."""
    unit = {"train_flops": "FLOP", "cached_bytes": "B"}.get(key)
    return scaled(value, unit) if unit else f"{value:,}"


def scaled(value: float, unit: str) -> str:
    """5.2e12 -> 5.2 TFLOP."""
    power = min(int(math.log10(max(float(f"{value:.3g}"), 1)) // 3), len(PREFIXES) - 1)
    return f"{value / 1000**power:.3g}\u00a0{PREFIXES[power]}{unit}"


def class_rows(strategies: Json, names: Sequence[str]) -> Rows:
    """Rows of strategy, class, support, precision, recall and F1."""
    return [{"strategy": name} | row for name in names for row in strategies[name]["test"]["classes"]]


def against_cost(rows: Rows, names: Sequence[str]) -> Figure:
    """Accuracy against training FLOPs, from reports/cost.json."""
    caption = "The upper left is best: accurate and cheap. Bars: 95 % interval."
    return Figure("Accuracy against cost", caption, charts.from_template("cost", rows, names), numbered(names))


def learning(rows: Rows, names: Sequence[str]) -> Figure:
    """Loss by epoch of every run, from reports/curves.json; the head, which has no epochs, is a horizontal line."""
    runs = {(row["strategy"], row["seed"]) for row in rows if row["train_loss"] is not None}
    others = " Faint: learning rates that it did not select." if any(row["not_chosen"] for row in rows) else ""
    if not runs:
        return Figure("Learning curves", "No strategy was fine-tuned (fine_tune.run is empty), so there is no curve.")
    caption = (
        f"{_n(len(runs), 'run')}. Solid: validation; a level line: a head without epochs. Dotted: training. Dot: the "
        f"epoch that validation selected.{others}"
    )
    return Figure("Learning curves", caption, charts.from_template("curves", rows, names), numbered(names))


def recipes(strategies: Json) -> dict[str, str]:
    """How each fine-tuned strategy was trained, in one line."""
    return {
        name: recipe(strategy["runs"][0]["network"], [run["chosen"].get("learning_rates") for run in strategy["runs"]])
        for name, strategy in strategies.items()
        if "recipe" in strategy["runs"][0]["network"]
    }


def recipe(network: Json, chosen: Sequence[list[float] | None]) -> str:
    """What is not at rest of a recipe: from where, until where, which images, which optimizer, at which rates."""
    given = network["recipe"]
    augmentation, epochs = given["augmentation"], _n(given["epochs"], "epoch")
    amounts = [name for name, value in augmentation.items() if name != "seed" and value not in AT_REST]
    rates = [given["learning_rate_base"], given["learning_rate_head"]]
    tried, used = (
        ["/".join(f"{rate:g}" for rate in dict.fromkeys(pair)) for pair in pairs if pair]  # of base/head
        for pairs in (given["learning_rates"] or [rates], chosen)
    )
    n_views = network["n_views"]  # flips alone are few, however many epochs there are
    shown = "a new view in every epoch" if n_views == given["epochs"] > 1 else _n(n_views, "view")
    shown = shown if given["views"] else "view 0 only"
    if given["views"] and amounts:
        shown += f" ({', '.join(f'{name} {_plain(augmentation[name])}' for name in amounts)})"
    words = [
        "from the cached head" if given["init"] == "cached_head" else "from random weights",
        "nothing frozen" if network["boundary"] == "none" else f"frozen until {network['boundary']}",
        f"{epochs}, {given['warmup_epochs']} of warm-up, then a cosine",
        given["optimizer"]
        + (f" (momentum {given['momentum']:g})" if given["optimizer"] == "sgd" else "")
        + f" in batches of {given['batch_size']}",
        f"learning rate {', '.join(tried)}" + (f" (chosen: {', '.join(used)})" if len(tried) > 1 else ""),
        f"weight decay {given['weight_decay']:g}",
        f"BatchNorm {'frozen' if given['batchnorm'] == 'frozen' else 'trained'}",
        shown,
        *([f"drop path {given['drop_path']:g}"] if given["drop_path"] is not None else []),
        *(f"{name.replace('_', ' ')} {given[name]:g}" for name in OPTIONAL if given[name]),
        *([f"{given['class_weights']} class weights"] if given["class_weights"] != "none" else []),
        *([given["precision"]] if given["precision"] != "fp32" else []),
    ]
    return "; ".join(words) + "."


def _plain(value: object) -> str:
    ends = value if isinstance(value, list) else [value]
    return " to ".join(f"{end:g}" if isinstance(end, float) else str(end) for end in ends)


def penalty(strategies: Json) -> Figure:
    """Validation NLL of the head by regularization strength."""
    runs, title = strategies[HEAD_ALL_SEEDS]["runs"], "Regularization of the head"
    rows = [
        {"seed": run["seed"], "strength": text, "val_nll": nll, "is_selected": float(text) == run["chosen"]["strength"]}
        for run in runs
        for text, nll in run["chosen"]["val_nll"].items()
    ]
    if len({row["strength"] for row in rows}) < 2:
        return Figure(title, "The head was trained with one regularization strength, so there is nothing to select.")
    rows.sort(key=lambda row: float(row["strength"]))
    caption = f"One line per seed ({_n(len(runs), 'seed')}). Dot: the strength that validation selected."
    if any(run["chosen"]["at_end"] for run in runs):
        caption += " Some seed selected an end of the range, so head.regularization_strengths may be too narrow."
    return Figure(title, caption, charts.penalty_path(rows))


def confusion(name: str, rows: Rows, n_classes: int) -> Figure:
    """The confusion matrix of a strategy, from reports/confusion/<name>.json."""
    wrong = [row for row in rows if row["actual"] != row["predicted"]]
    worst = max(wrong, key=lambda row: row["count"], default=None)
    caption = f"{sum(row['count'] for row in rows):,} predictions. " + (
        f"Most frequent error: {worst['actual']} predicted as {worst['predicted']} ({worst['count']:,})."
        if worst
        else "No errors."
    )
    if n_classes > MAX_MATRIX:
        return Figure(name, f"{caption} {n_classes} classes are too many for a matrix.")
    spec = charts.from_template("confusion", rows, [name], min(420, max(150, 48 * n_classes)))
    for axis in ("x", "y"):
        spec["encoding"][axis]["title"] = None  # the page has one explanation for all matrices
    return Figure(name, caption, spec)


def reliability(rows: Rows, names: Sequence[str]) -> Figure:
    """Accuracy against confidence, from reports/reliability.json."""
    caption = (
        "On the dashed line, confidence equals accuracy; below it, the network is overconfident. Size of a dot: share "
        "of the images."
    )
    return Figure("Reliability", caption, charts.from_template("reliability", rows, names), numbered(names))


def per_class(rows: Rows, names: Sequence[str]) -> Figure:
    """F1 by class, from what class_rows gives; classes with the lowest F1 of the last strategy come first."""
    last = sorted((row for row in rows if row["strategy"] == names[-1]), key=lambda row: row["f1"])
    classes = [row["class"] for row in last[:MAX_CLASSES]]
    kept = [row for row in rows if row["class"] in set(classes)]
    caption = f"F1 on the test images, lowest for {names[-1]} first."
    if len(last) > MAX_CLASSES:
        caption = f"The {MAX_CLASSES} hardest of {len(last)} classes. {caption} The table below has all."
    return Figure("Results by class", caption, charts.per_class(kept, classes, names), numbered(names))


def depth(found: Json) -> Figure:
    """Accuracy of heads by block, from reports/advice.json."""
    kinds = {"linear": "linear head", "nearest": "nearest neighbours"}
    rows = [
        {"block": block["cut"], "place": place, "kind": kind} | block[key]
        for place, block in enumerate(found["blocks"], 1)
        for key, kind in kinds.items()
    ]
    text = f"Cross-validated on {found['images']:,} images of train and validation, with 95 % intervals. Dashed: "
    caption = f"{text}naming the largest class always ({shown('accuracy', found['majority_class']['value'])})."
    spec = charts.accuracy_by_depth(rows, [*kinds.values()], found["majority_class"]["value"])
    return Figure("Accuracy by depth", caption, spec, numbered([*kinds.values()]))


def more_images(found: Json) -> Figure:
    """The learning curve and its extrapolation, from reports/advice.json."""
    title = "Would more images help?"
    if not found["curve"]:
        return Figure(title, "There are too few images for a learning curve.")
    rows = [
        row | {"kind": kind}
        for kind, key in (("measured", "sizes"), ("expected", "expected"))
        for row in found["curve"][key]
    ]
    caption = "A linear head on frozen features. Measured on nested subsets; expected with 1, 2 and 4 times the images."
    return Figure(title, caption, charts.accuracy_by_images(rows), numbered(["measured", "expected"]))


def _n(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
