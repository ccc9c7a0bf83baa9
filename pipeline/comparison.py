"""Runs -> what reports/details.json says of every strategy, and comparison.json.

Fractions, never percent. Figures are means over the seeds; runs that say the same of every image
count once. Intervals are those of `statistics`: over test images, conditional on the trained runs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.special import log_softmax

from pipeline import metrics, recommendation, statistics
from pipeline.artifacts import Cost, Run
from pipeline.manifest import Labels
from pipeline.params import HEAD_ALL_SEEDS, HEAD_ONLY, Compare
from pipeline.statistics import Interval, Predictions

PARTS = ("val", "test")
SUMMARY = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll", "brier", "ece")
ROW_METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll")  # of a subset or a group
MAX_GROUPS = 50  # of which there are rows; those with the most test images
Json = dict[str, Any]


def assemble(
    runs: Mapping[str, Sequence[Run]], every_head: Sequence[Run], labels: Labels, n_train: float, options: Compare
) -> Json:
    """details.json: the strategies on their common seeds, what the head gives on all of its own, and the choice.

    `n_train`: images that train and validate, mean over the common seeds.
    """
    distinct = {(run.strategy, run.seed): run for these in (*runs.values(), every_head) for run in these}
    scored = {key: score(run, labels) for key, run in distinct.items()}
    described = {
        name: describe(these, [scored[run.strategy, run.seed] for run in these], labels)
        for name, these in (*runs.items(), (HEAD_ALL_SEEDS, every_head))
    }
    for name, gains in against_baseline(runs, options.baseline, labels, n_train).items():
        described[name]["vs_baseline"] = gains
    chosen = recommendation.recommend(
        {name: [said(run, "val") for run in these] for name, these in runs.items()},
        {name: described[name]["cost"]["train_flops"] for name in runs},
        labels.label,
        labels.weight,
        options.practical_margin,
        options.confidence,
    )
    return {
        "baseline": options.baseline,
        "common_seeds": [run.seed for run in runs[HEAD_ONLY]],
        "class_names": labels.class_names,
        "recommendation": recommendation.as_json(chosen, described),
        "strategies": described,
    }


def said(run: Run, part: str) -> Predictions:
    """What a run says of the images of one part."""
    return Predictions(getattr(run, f"{part}_rows"), getattr(run, f"{part}_logits"))


def score(run: Run, labels: Labels) -> Json:
    """Metrics of one run on validation and test, its cost and what was chosen."""
    scores = {}
    for part in PARTS:
        rows, logits = said(run, part).rows, said(run, part).logits
        scores[part] = {"n": len(rows), **metrics.score(logits, labels.label[rows], labels.weight[rows])}
    temperature = metrics.temperature(run.val_logits, labels.label[run.val_rows], labels.weight[run.val_rows])
    scaled = np.exp(log_softmax(run.test_logits / temperature, axis=1))
    rows = run.test_rows
    scores["test"]["ece_scaled"] = metrics.expected_calibration_error(scaled, labels.label[rows], labels.weight[rows])
    said_of_itself = {"cost": run.cost.model_dump(), "chosen": run.chosen, "network": run.network}
    return {"seed": run.seed, **scores, "temperature": temperature, **said_of_itself}


def describe(runs: Sequence[Run], scored: Sequence[Json], labels: Labels) -> Json:
    """All of one strategy but the comparison with the baseline; `scored` is what `score` says of each run."""
    predictions = [said(run, "test") for run in runs]
    distinct = statistics.distinct(predictions)
    kept = [i for i, prediction in enumerate(predictions) if any(prediction is one for one in distinct)]
    parts = {part: _part(part, [runs[i] for i in kept], [scored[i] for i in kept], labels) for part in PARTS}
    for part in PARTS:
        parts[part]["n"] = [result[part]["n"] for result in scored]
    parts["test"]["temperature"] = [result["temperature"] for result in scored]
    parts["test"] |= _of_test([runs[i] for i in kept], labels)
    scaled = [Predictions(runs[i].test_rows, runs[i].test_logits / scored[i]["temperature"]) for i in kept]
    values = [scored[i]["test"]["ece_scaled"] for i in kept]
    parts["test"]["metrics"]["ece_scaled"] = _figure(
        values, statistics.ece_interval(scaled, labels.label, labels.weight)
    )
    return {
        "seeds": [run.seed for run in runs],
        "distinct_runs": len(kept),
        **parts,
        "vs_baseline": None,
        "cost": {name: round(np.mean([result["cost"][name] for result in scored])) for name in Cost.model_fields},
        "runs": [{key: value for key, value in result.items() if key != "temperature"} for result in scored],
    }


def against_baseline(
    runs: Mapping[str, Sequence[Run]], baseline: str, labels: Labels, n_train: float
) -> dict[str, Json]:
    """The gain of every other strategy on the same seeds and images, p-values corrected over the strategies (Holm)."""
    found: dict[str, Json] = {name: {} for name in runs if name != baseline}
    for part in PARTS:
        said_of = {name: [said(run, part) for run in these] for name, these in runs.items()}
        data = labels.label, labels.weight, n_train
        gains = {name: statistics.gain(said_of[name], said_of[baseline], *data) for name in found}
        corrected = statistics.holm([gain.p_value for gain in gains.values()])
        by_t = {name: gain.corrected_t_p_value for name, gain in gains.items() if part == "test"}
        by_t = {name: p_value for name, p_value in by_t.items() if p_value is not None}
        by_t = dict(zip(by_t, statistics.holm([*by_t.values()]), strict=True))
        for (name, gain), p_value in zip(gains.items(), corrected, strict=True):
            p_values = {"p_value": p_value, "p_value_uncorrected": gain.p_value, "corrected_t_p_value": by_t.get(name)}
            found[name][part] = asdict(gain) | p_values
    return found


def summarise(strategy: Json) -> Json:
    """What comparison.json says of a strategy: few figures, so that `dvc metrics diff` stays one screen."""
    figures = strategy["test"]["metrics"]
    test = {name: figures[name]["value"] for name in SUMMARY}
    test |= {f"accuracy_{end}": figures["accuracy"][end] for end in ("low", "high")}
    summary = {"test": test, "cost": strategy["cost"], "seeds": strategy["distinct_runs"]}
    if strategy["vs_baseline"]:
        gain = strategy["vs_baseline"]["test"]
        summary["vs_baseline"] = {
            "baseline_accuracy": gain["baseline_accuracy"],
            "accuracy_gain": gain["gain"],
            "gain_low": gain["low"],
            "gain_high": gain["high"],
            "p_value": gain["p_value"],
            "seeds": gain["seeds"],
        }
    return summary


def rounded(value: Any) -> Any:  # noqa: ANN401
    """JSON with every float to 6 digits, of small ones the first that are not 0."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return round(value, 6) if abs(value) >= 1e-3 else float(f"{value:.4g}")
    return value


def _part(part: str, runs: Sequence[Run], scored: Sequence[Json], labels: Labels) -> Json:
    """Mean, interval and deviation of every metric."""
    intervals = statistics.intervals([said(run, part) for run in runs], labels.label, labels.weight)
    names = [name for name in scored[0][part] if name != "n"]
    figures = {name: _figure([result[part][name] for result in scored], intervals.get(name)) for name in names}
    return {"n": [], "metrics": figures}


def _figure(values: Sequence[float | None], interval: Interval | None) -> Json:
    known = [value for value in values if value is not None]
    is_defined = len(known) == len(values)
    return {
        "value": float(np.mean(known)) if is_defined else None,
        "low": interval.low if is_defined and interval else None,
        "high": interval.high if is_defined and interval else None,
        "sd": float(np.std(known, ddof=1)) if is_defined and len(known) > 1 else None,
    }


def _of_test(runs: Sequence[Run], labels: Labels) -> Json:
    """What is said of the test images beside the metrics: by class, by subset and group, calibration."""
    rows = np.concatenate([run.test_rows for run in runs])
    logits = np.concatenate([run.test_logits for run in runs])
    label, weight = labels.label[rows], labels.weight[rows]
    groups = Counter(labels.group[row] for row in np.unique(rows).tolist() if labels.group[row])
    shown = {group for group, _ in sorted(groups.items(), key=lambda one: (-one[1], one[0]))[:MAX_GROUPS]}
    return {
        "classes": _classes(runs, labels),
        "confusion": metrics.confusion(logits, label).tolist(),
        "reliability": metrics.reliability(logits, label, weight),
        "subsets": _by(labels.subset, runs, labels),
        "groups": _by([group if group in shown else "" for group in labels.group], runs, labels),
        "n_groups": len(groups),
    }


def _classes(runs: Sequence[Run], labels: Labels) -> list[Json]:
    """Means over the runs, and the support of all of them, by class."""
    by_run = [
        metrics.per_class(run.test_logits, labels.label[run.test_rows], labels.weight[run.test_rows]) for run in runs
    ]
    found = []
    for index, name in enumerate(labels.class_names):
        values = [result[index] for result in by_run]
        means = {key: float(np.mean([value[key] for value in values])) for key in ("precision", "recall", "f1")}
        found.append({"class": name, "support": sum(value["support"] for value in values), **means})
    return found


def _by(column: Sequence[str], runs: Sequence[Run], labels: Labels) -> dict[str, Json]:
    """Figures of the test images by what stands in `column`; `n` images, each counted once however many seeds."""
    found = {}
    values = np.array(column)
    for value in sorted(set(column) - {""}):
        parts = [
            (run.test_rows[chosen], run.test_logits[chosen])
            for run in runs
            if (chosen := values[run.test_rows] == value).any()
        ]
        if not parts:
            continue
        intervals = statistics.intervals([Predictions(*part) for part in parts], labels.label, labels.weight)
        n_classes = len(np.unique(labels.label[np.concatenate([rows for rows, _ in parts])]))
        names = [name for name in ROW_METRICS if name != "macro_f1" or n_classes == len(labels.class_names)]
        figures = {name: one for name in names if (one := intervals.get(name)) is not None}
        n = len(np.unique(np.concatenate([rows for rows, _ in parts])))
        found[value] = {"n": n, **{name: asdict(interval) for name, interval in figures.items()}}
    return found
