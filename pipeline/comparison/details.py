"""Runs -> reports/details.json, and the short metrics file of each strategy.

Fractions, never percent. Figures are means over the seeds; runs with identical predictions count once. Intervals (see
intervals.py) are over test images, conditional on the trained runs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.special import log_softmax

from pipeline.comparison import intervals, metrics, paired, recommendation
from pipeline.comparison.intervals import Interval
from pipeline.dataset.manifest import Labels
from pipeline.params import HEAD_ALL_SEEDS, HEAD_ONLY, Compare
from pipeline.training.runs import Cost, Predictions, Run

SPLITS = ("val", "test")
ROW_METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll")  # of a subset or a group
DIFFERENCE = {
    "difference": "difference",
    "low": "difference_low",
    "high": "difference_high",
    "p_value": "difference_p_value",
}
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
    for name, differences in against_baseline(runs, options.baseline, labels, n_train).items():
        described[name]["vs_baseline"] = differences
    chosen = recommendation.recommend(
        {name: [run.val for run in these] for name, these in runs.items()},
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


def score(run: Run, labels: Labels) -> Json:
    """Metrics of one run on validation and test, its cost and what was chosen."""
    scores = {}
    for split in SPLITS:
        found: Predictions = getattr(run, split)
        label, weight = labels.label[found.rows], labels.weight[found.rows]
        scores[split] = {"n": len(found.rows), **metrics.score(found.log_probability, label, weight)}
    rows = run.val.rows
    temperature = metrics.temperature(run.val.log_probability, labels.label[rows], labels.weight[rows])
    rows, scaled = run.test.rows, np.exp(log_softmax(run.test.log_probability / temperature, axis=1))
    scores["test"]["ece_scaled"] = metrics.expected_calibration_error(scaled, labels.label[rows], labels.weight[rows])
    about = {"cost": run.cost.model_dump(), "chosen": run.chosen, "network": run.network}
    return {"seed": run.seed, **scores, "temperature": temperature, **about}


def describe(runs: Sequence[Run], scored: Sequence[Json], labels: Labels) -> Json:
    """Everything about one strategy except the comparison with the baseline; `scored`: what `score` gives per run."""
    distinct = intervals.distinct([run.test for run in runs])
    kept = [i for i, run in enumerate(runs) if any(run.test is one for one in distinct)]
    parts = {part: _part(part, [runs[i] for i in kept], [scored[i] for i in kept], labels) for part in SPLITS}
    for part in SPLITS:
        parts[part]["n"] = [result[part]["n"] for result in scored]
    parts["test"]["temperature"] = [result["temperature"] for result in scored]
    parts["test"] |= _of_test([runs[i] for i in kept], labels)
    scaled = [Predictions(runs[i].test.rows, runs[i].test.log_probability / scored[i]["temperature"]) for i in kept]
    values = [scored[i]["test"]["ece_scaled"] for i in kept]
    parts["test"]["metrics"]["ece_scaled"] = _figure(
        values, intervals.ece_interval(scaled, labels.label, labels.weight)
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
    """Every other strategy on the same seeds and images; p-values are corrected over the strategies (Holm)."""
    found: dict[str, Json] = {name: {} for name in runs if name != baseline}
    for part in SPLITS:
        predictions = {name: [getattr(run, part) for run in these] for name, these in runs.items()}
        data = labels.label, labels.weight, n_train
        differences = {name: paired.compare(predictions[name], predictions[baseline], *data) for name in found}
        corrected = paired.holm([difference.p_value for difference in differences.values()])
        by_t = {name: one.corrected_t_p_value for name, one in differences.items() if part == "test"}
        by_t = {name: p_value for name, p_value in by_t.items() if p_value is not None}
        by_t = dict(zip(by_t, paired.holm([*by_t.values()]), strict=True))
        for (name, one), p_value in zip(differences.items(), corrected, strict=True):
            p_values = {"p_value": p_value, "p_value_uncorrected": one.p_value, "corrected_t_p_value": by_t.get(name)}
            found[name][part] = asdict(one) | p_values
    return found


def summarise(strategy: Json) -> Json:
    """reports/metrics/<strategy>.json: the few figures that `dvc metrics diff` shows on one screen."""
    test, val = strategy["test"]["metrics"], strategy["val"]["metrics"]
    difference = strategy["vs_baseline"]["test"] if strategy["vs_baseline"] else {}
    return {
        "test_accuracy": test["accuracy"]["value"],
        "test_accuracy_low": test["accuracy"]["low"],
        "test_accuracy_high": test["accuracy"]["high"],
        "test_balanced_accuracy": test["balanced_accuracy"]["value"],
        "test_nll": test["nll"]["value"],
        "val_accuracy": val["accuracy"]["value"],
        **{title: difference[key] for key, title in DIFFERENCE.items() if difference},
        "train_flops": strategy["cost"]["train_flops"],
        "seeds": strategy["distinct_runs"],
    }


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
    found = intervals.metric_intervals([getattr(run, part) for run in runs], labels.label, labels.weight)
    names = [name for name in scored[0][part] if name != "n"]
    figures = {name: _figure([result[part][name] for result in scored], found.get(name)) for name in names}
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
    """Test figures beside the metrics: by class, by subset and group, confusion, calibration."""
    rows = np.concatenate([run.test.rows for run in runs])
    log_probability = np.concatenate([run.test.log_probability for run in runs])
    label, weight = labels.label[rows], labels.weight[rows]
    groups = Counter(labels.group[row] for row in np.unique(rows).tolist() if labels.group[row])
    shown = {group for group, _ in sorted(groups.items(), key=lambda one: (-one[1], one[0]))[:MAX_GROUPS]}
    return {
        "classes": _classes(runs, labels),
        "confusion": metrics.confusion(log_probability, label).tolist(),
        "reliability": metrics.reliability(log_probability, label, weight),
        "subsets": _by(labels.subset, runs, labels),
        "groups": _by([group if group in shown else "" for group in labels.group], runs, labels),
        "n_groups": len(groups),
    }


def _classes(runs: Sequence[Run], labels: Labels) -> list[Json]:
    """Means over the runs, and the support of all of them, by class."""
    by_run = [
        metrics.per_class(run.test.log_probability, labels.label[run.test.rows], labels.weight[run.test.rows])
        for run in runs
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
            Predictions(run.test.rows[chosen], run.test.log_probability[chosen])
            for run in runs
            if (chosen := values[run.test.rows] == value).any()
        ]
        if not parts:
            continue
        estimates = intervals.metric_intervals(parts, labels.label, labels.weight)
        rows = np.unique(np.concatenate([part.rows for part in parts]))
        n_classes = len(np.unique(labels.label[rows]))
        names = [name for name in ROW_METRICS if name != "macro_f1" or n_classes == len(labels.class_names)]
        figures = {name: one for name in names if (one := estimates.get(name)) is not None}
        found[value] = {"n": len(rows), **{name: asdict(interval) for name, interval in figures.items()}}
    return found
