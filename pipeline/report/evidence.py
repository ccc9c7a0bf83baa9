"""comparison.json, details.json, curves.json -> the tables and charts of the page.

Every part copes with what is not there: it is None or empty, or a figure that says why.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.params import HEAD_ALL_SEEDS
from pipeline.report.charts import Spec
from pipeline.report.page import charts

Json = dict[str, Any]
PERCENT = ("accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy")
METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "top5_accuracy": "top-5 accuracy",
    "auroc": "AUROC",
    "nll": "NLL (nats)",
    "brier": "Brier",
    "ece": "ECE",
    "ece_scaled": "ECE, scaled",
}
NONE, TO = "\u2013", "\u2009\u2013\u2009"  # dashes: for no value, and between the ends of an interval
COSTS = {
    "trainable_params": "trained parameters",
    "train_flops": "training FLOPs",
    "base_passes": "images through the base",
    "cached_bytes": "cached",
}
PREFIXES = ("", "k", "M", "G", "T", "P", "E")
MAX_CLASSES = 20  # of which bars are drawn
MAX_MATRIX = 40  # classes of a confusion matrix


@dataclass(frozen=True)
class Figure:
    """A chart, its caption, and the number of each colour in it; `spec` None: `caption` says why there is none."""

    title: str
    caption: str
    spec: Spec | None = None
    key: dict[str, int] = field(default_factory=dict)


def numbered(names: Sequence[str], kept: Sequence[str] | None = None) -> dict[str, int]:
    """Names with the numbers of their colours; of some only, where some are `kept`."""
    return {name: i for i, name in enumerate(names) if kept is None or name in kept}


def label(name: str) -> str:
    """A strategy as it is written on the page."""
    return name.replace(HEAD_ALL_SEEDS, HEAD_ALL_SEEDS.removesuffix("_all_seeds") + ", all seeds")


def strategies(comparison: Json) -> list[str]:
    """The strategies that are compared, in the order of their colours."""
    return [name for name in comparison if name != HEAD_ALL_SEEDS]


def shown(metric: str, value: float | None) -> str:
    """A metric as text."""
    if value is None:
        return NONE
    return f"{100 * value:.1f}\u2009%" if metric in PERCENT else f"{value:.3f}"


def interval(metric: str, estimate: Json) -> str:
    """Its 95 % interval as text, or nothing."""
    low, high = estimate.get("low"), estimate.get("high")
    if low is None or high is None:
        return ""
    scale, digits = (100, 1) if metric in PERCENT else (1, 3)
    return f"{scale * low:.{digits}f}{TO}{scale * high:.{digits}f}"


def table(comparison: Json, details: Json) -> Json:
    """The main table: its columns, and of each strategy the cells; numbers are those of comparison.json."""
    metrics = [name for name in METRICS if any(name in summary["test"] for summary in comparison.values())]
    rows = []
    for name, summary in comparison.items():
        test = summary["test"]
        spread = _estimate(details, name, "accuracy").get("sd")
        notes = {"accuracy": interval("accuracy", {"low": test.get("accuracy_low"), "high": test.get("accuracy_high")})}
        if spread is not None and summary["seeds"] > 1:
            notes["accuracy"] += f" · sd {100 * spread:.1f}"
        cells = [
            {"metric": metric, "value": test.get(metric), "text": shown(metric, test.get(metric))}
            | {"note": notes.get(metric, "")}
            for metric in metrics
        ]
        rows.append({"name": name, "seeds": summary["seeds"], "cells": cells, "gain": gain(summary.get("vs_baseline"))})
    return {"metrics": [METRICS[name] for name in metrics], "rows": rows}


def gain(against: Json | None) -> Json | None:
    """The gain over the baseline in points, with its interval and p-value, as texts and as they are."""
    if not against:
        return None
    low, high, p = against.get("gain_low"), against.get("gain_high"), against.get("p_value")
    return {
        "value": against["accuracy_gain"],
        "text": f"{100 * against['accuracy_gain']:+.1f}",
        "note": "" if low is None or high is None else f"{100 * low:+.1f}\u2009to\u2009{100 * high:+.1f}",
        "p": NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
        "p_value": p,
    }


def every_metric(details: Json, names: Sequence[str]) -> list[Json]:
    """All metrics of validation and test with their intervals, a row each."""
    rows = []
    for part in ("val", "test"):
        for metric, title in METRICS.items():
            estimates = [_estimate(details, name, metric, part) for name in names]
            if any(estimates):
                cells = [
                    {"text": shown(metric, estimate.get("value")), "note": interval(metric, estimate)}
                    for estimate in estimates
                ]
                rows.append({"part": {"val": "validation"}.get(part, part), "metric": title, "cells": cells})
    return rows


def costs(comparison: Json) -> Json:
    """What each strategy costs."""
    keys = [key for key in COSTS if any(key in summary["cost"] for summary in comparison.values())]
    rows = [
        {"name": name, "cells": [cost_text(key, summary["cost"].get(key)) for key in keys]}
        for name, summary in comparison.items()
    ]
    return {"columns": [COSTS[key] for key in keys], "rows": rows}


def cost_text(key: str, value: int | None) -> str:
    """A cost as text."""
    if value is None:
        return NONE
    if key == "train_flops":
        return scaled(value, "FLOP")
    return size(value) if key == "cached_bytes" else f"{value:,}"


def scaled(value: float, unit: str) -> str:
    """5.2e12 -> 5.2 TFLOP."""
    power = min(int(math.log10(max(float(f"{value:.3g}"), 1)) // 3), len(PREFIXES) - 1)
    return f"{value / 1000**power:.3g}\u00a0{PREFIXES[power]}{unit}"


def size(n_bytes: float) -> str:
    """Bytes as text."""
    return scaled(n_bytes, "B")


def breakdown(details: Json, names: Sequence[str], kind: str) -> list[Json]:
    """Test accuracy by `subsets` or `groups`: a row each, a cell per strategy."""
    parts = {name: _test(details, name).get(kind) or {} for name in names}
    rows = []
    for value in dict.fromkeys(value for found in parts.values() for value in found):
        n = next(found[value].get("n") for found in parts.values() if value in found)
        estimates = [parts[name].get(value, {}).get("accuracy") or {} for name in names]
        cells = [
            {"text": shown("accuracy", estimate.get("value")), "note": interval("accuracy", estimate)}
            for estimate in estimates
        ]
        rows.append({"value": value, "n": n, "cells": cells})
    return rows


def calibration(details: Json, names: Sequence[str]) -> list[Json]:
    """ECE before and after temperature scaling."""
    rows = []
    for name in names:
        test = _test(details, name)
        temperatures = [value for value in test.get("temperature") or [] if value is not None]
        if not temperatures:
            continue
        before, after = (_estimate(details, name, metric).get("value") for metric in ("ece", "ece_scaled"))
        mean = sum(temperatures) / len(temperatures)
        rows.append(
            {"name": name, "before": shown("ece", before), "after": shown("ece", after), "temperature": f"{mean:.2f}"}
        )
    return rows


def class_rows(details: Json, names: Sequence[str]) -> list[Json]:
    """Precision, recall, F1 and support by class and strategy."""
    keys = ("class", "support", "precision", "recall", "f1")
    return [
        {"strategy": name} | {key: row[key] for key in keys}
        for name in names
        for row in _test(details, name).get("classes") or []
    ]


def against_cost(comparison: Json) -> Figure:
    """Accuracy against training FLOPs."""
    names = strategies(comparison)
    rows = []
    for name in names:
        test, flops = comparison[name]["test"], comparison[name]["cost"]["train_flops"]
        ends = {"low": test.get("accuracy_low"), "high": test.get("accuracy_high")}
        rows.append({"strategy": name, "train_flops": max(flops, 1), "accuracy": test["accuracy"], **ends})
    caption = "Up and to the left is better. Bars: 95 % interval over the test images, of the runs as trained."
    return Figure("Accuracy against cost", caption, charts.accuracy_against_cost(rows, names), numbered(names))


def learning(details: Json, curves: list[Json], names: Sequence[str]) -> Figure:
    """Loss by epoch of every run; the head, which has no epochs, is a line across."""
    rows = []
    for line in curves:
        name, seed, epoch = line["strategy"], line["seed"], line["epoch"]
        chosen = next((run["chosen"] for run in _of(details, name, "runs", []) if run["seed"] == seed), {})
        about = {"strategy": name, "run": f"{name}, seed {seed}", "epoch": epoch}
        for kind, key in (("validation", "val_loss"), ("training", "train_loss")):
            if line.get(key) is not None:
                is_chosen = kind == "validation" and chosen.get("epoch") == epoch
                rows.append(about | {"kind": kind, "loss": line[key], "is_chosen": is_chosen})
    title = "Learning curves"
    if not curves:
        return Figure(title, "There is no reports/curves.json; run: dvc repro.")
    if not any(row["kind"] == "training" for row in rows):
        return Figure(title, "No strategy was fine-tuned, so there is no curve: fine_tune.run is empty.")
    n = len({row["run"] for row in rows if row["kind"] == "training"})
    caption = f"{_n(n, 'run')}. Solid: validation; dotted: training; a dot marks the epoch that validation chose."
    drawn = [name for name in names if any(row["strategy"] == name for row in rows)]
    return Figure(title, caption, charts.learning_curves(rows, names), numbered(names, drawn))


def penalty(details: Json) -> Figure:
    """Validation NLL of the head by the strength of its penalty."""
    rows, title = [], "The head's penalty"
    for run in _of(details, HEAD_ALL_SEEDS, "runs", []):
        path = run["chosen"].get("val_nll") or {}
        rows += [
            {"seed": run["seed"], "strength": strength, "val_nll": nll}
            | {"is_chosen": float(strength) == run["chosen"].get("strength")}
            for strength, nll in sorted(path.items(), key=lambda item: float(item[0]))
        ]
    if not rows:
        return Figure(title, "The runs do not say what each strength of the penalty gave; run: dvc repro.")
    rows.sort(key=lambda row: float(row["strength"]))
    n = len({row["seed"] for row in rows})
    caption = f"{_n(n, 'seed')}, a line each; the dot is what validation chose."
    ends = {row["strength"] for row in rows if row["is_chosen"]} & {rows[0]["strength"], rows[-1]["strength"]}
    if ends and len({row["strength"] for row in rows}) > 1:
        caption += " Some seed chose an end of the range: head.strengths may be too short."
    return Figure(title, caption, charts.penalty_path(rows))


def confusions(details: Json, names: Sequence[str]) -> list[Figure]:
    """A matrix for each strategy."""
    class_names = details.get("class_names") or []
    figures = []
    for name in names:
        counts = _test(details, name).get("confusion")
        if not counts:
            continue
        total = sum(map(sum, counts))
        worst = _most_confused(counts, class_names)
        caption = f"{total:,} predictions. {worst}"
        if len(class_names) > MAX_MATRIX:
            figures.append(Figure(name, f"{caption} ({len(class_names)} classes are too many for a picture.)"))
        else:
            figures.append(Figure(name, caption, charts.confusion(counts, class_names)))
    return figures


def reliabilities(details: Json, names: Sequence[str]) -> Figure:
    """Accuracy against confidence."""
    rows, title = [], "Reliability"
    for name in names:
        bins = [line for line in _test(details, name).get("reliability") or [] if line.get("weight")]
        total = sum(line["weight"] for line in bins)
        rows += [{"strategy": name, **line, "weight": line["weight"] / total} for line in bins]
    rows = [row for row in rows if row.get("confidence") is not None and row.get("accuracy") is not None]
    if not rows:
        return Figure(title, "There is no reliability in reports/details.json; run: dvc repro.")
    caption = (
        "On the dashed line a confidence means what it says; below it the network is too sure. Area: share of images."
    )
    return Figure(title, caption, charts.reliability(rows, names), numbered(names))


def per_class(details: Json, names: Sequence[str]) -> Figure:
    """F1 by class."""
    rows, title = class_rows(details, names), "Class by class"
    if not rows:
        return Figure(title, "There are no classes in reports/details.json; run: dvc repro.")
    last = [row for row in rows if row["strategy"] == rows[-1]["strategy"]]
    worst_first = sorted(last, key=lambda row: row["f1"] or 0.0)
    classes = [row["class"] for row in worst_first[:MAX_CLASSES]]
    kept = [row for row in rows if row["class"] in set(classes)]
    caption = f"F1 on the test images; the classes that {rows[-1]['strategy']} finds hardest come first."
    if len(last) > MAX_CLASSES:
        caption = f"The {MAX_CLASSES} hardest of {len(last)} classes. {caption} The table below has all."
    return Figure(title, caption, charts.per_class(kept, classes, names), numbered(names))


def _most_confused(counts: list[list[int]], class_names: Sequence[str]) -> str:
    pairs = [(n, i, j) for i, line in enumerate(counts) for j, n in enumerate(line) if i != j]
    n, i, j = max(pairs, default=(0, 0, 0))
    return f"Most often {class_names[i]} taken for {class_names[j]}: {n:,}." if n else "No mistake."


def _n(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _of(details: Json, name: str, key: str, missing: Any) -> Any:  # noqa: ANN401
    return (details.get("strategies") or {}).get(name, {}).get(key) or missing


def _test(details: Json, name: str) -> Json:
    return _of(details, name, "test", {})


def _estimate(details: Json, name: str, metric: str, part: str = "test") -> Json:
    return (_of(details, name, part, {}).get("metrics") or {}).get(metric) or {}


def n_test(details: Json, name: str) -> str:
    """How many test images a seed has, as text."""
    found = sorted(set(_test(details, name).get("n") or []))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}" if found else ""
