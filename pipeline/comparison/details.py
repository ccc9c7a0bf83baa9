"""reports/details.json and the short metrics file of each strategy, assembled from runs.

Fractions, never percent. Values are means over the seeds; runs with identical predictions count once. Intervals (see
intervals.py) are over test images, conditional on the trained runs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.comparison import intervals, metrics, paired, recommendation
from pipeline.comparison.intervals import Interval
from pipeline.dataset.manifest import Labels
from pipeline.params import HEAD_ALL_SEEDS, HEAD_ONLY, Compare
from pipeline.training.runs import Cost, Predictions, Run

SPLITS = ("val", "test")
SUBSET_METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll")  # of a subset or a group
MAX_GROUPS = 50  # groups with figures of their own: those with the most test images
Json = dict[str, Any]


def assemble(
    runs: Mapping[str, Sequence[Run]], every_head: Sequence[Run], labels: Labels, n_train: float, options: Compare
) -> Json:
    """details.json: the strategies on their common seeds, the head on all of its seeds, and the recommendation.

    `n_train`: images that train and validate, mean over the common seeds.
    """
    by_key = {(run.strategy, run.seed): run for these in (*runs.values(), every_head) for run in these}
    scored = {key: score(run, labels) for key, run in by_key.items()}
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
    """Metrics of one run on validation and test, its temperature and cost, and what validation selected."""
    val, test = _arrays(run.val, labels), _arrays(run.test, labels)
    temperature = metrics.temperature(*val)
    ece_scaled = metrics.expected_calibration_error(*_arrays(_scaled(run.test, temperature), labels))
    return {
        "seed": run.seed,
        "val": {"n": len(run.val.rows), **metrics.score(*val)},
        "test": {"n": len(run.test.rows), **metrics.score(*test), "ece_scaled": ece_scaled},
        "temperature": temperature,
        "cost": run.cost.model_dump(),
        "chosen": run.chosen,
        "network": run.network,
    }


def describe(runs: Sequence[Run], scored: Sequence[Json], labels: Labels) -> Json:
    """One strategy in details.json, without differences from the baseline; `scored`: the result of `score` per run."""
    pairs = intervals.distinct(zip(runs, scored, strict=True), lambda pair: intervals.digest_of(pair[0].test))
    kept, results = [run for run, _ in pairs], [result for _, result in pairs]
    splits: Json = {}
    for split in SPLITS:
        found = intervals.metric_intervals([getattr(run, split) for run in kept], labels.label, labels.weight)
        if split == "test":
            scaled = [_scaled(run.test, result["temperature"]) for run, result in pairs]
            found["ece_scaled"] = intervals.ece_interval(scaled, labels.label, labels.weight)
        values = {name: [result[split][name] for result in results] for name in found}
        splits[split] = {
            "n": [result[split]["n"] for result in scored],
            "metrics": {name: _figure(values[name], interval) for name, interval in found.items()},
        }
    splits["test"]["temperature"] = [result["temperature"] for result in scored]
    splits["test"] |= break_down(kept, labels)
    return {
        "seeds": [run.seed for run in runs],
        "distinct_runs": len(kept),
        **splits,
        "vs_baseline": None,
        "cost": {name: round(np.mean([result["cost"][name] for result in scored])) for name in Cost.model_fields},
        "runs": [{key: value for key, value in result.items() if key != "temperature"} for result in scored],
    }


def break_down(runs: Sequence[Run], labels: Labels) -> Json:
    """Test figures by class, confidence, subset and group, and the confusion matrix, over all runs."""
    rows = np.concatenate([run.test.rows for run in runs])
    pooled = Predictions(rows, np.concatenate([run.test.log_probability for run in runs]))
    log_probability, label, weight = _arrays(pooled, labels)
    sizes = Counter(labels.group[row] for row in np.unique(rows).tolist() if labels.group[row])
    largest = {group for group, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:MAX_GROUPS]}
    return {
        "classes": _by_class(runs, labels),
        "confusion": metrics.confusion(log_probability, label).tolist(),
        "reliability": metrics.reliability(log_probability, label, weight),
        "subsets": _by_value(labels.subset, runs, labels),
        "groups": _by_value([group if group in largest else "" for group in labels.group], runs, labels),
        "n_groups": len(sizes),
    }


def against_baseline(
    runs: Mapping[str, Sequence[Run]], baseline: str, labels: Labels, n_train: float
) -> dict[str, Json]:
    """Every other strategy on the same seeds and images; p-values are corrected over the strategies (Holm)."""
    found: dict[str, Json] = {name: {} for name in runs if name != baseline}
    for split in SPLITS:
        predictions = {name: [getattr(run, split) for run in these] for name, these in runs.items()}
        data = labels.label, labels.weight, n_train if split == "test" else 0
        differences = {name: paired.compare(predictions[name], predictions[baseline], *data) for name in found}
        p_values = paired.holm([difference.p_value for difference in differences.values()])
        t_p_values = paired.holm([difference.corrected_t_p_value for difference in differences.values()])
        for (name, difference), p_value, by_t in zip(differences.items(), p_values, t_p_values, strict=True):
            corrected = {"p_value": p_value, "p_value_uncorrected": difference.p_value, "corrected_t_p_value": by_t}
            found[name][split] = asdict(difference) | corrected
    return found


def summarise(strategy: Json) -> Json:
    """reports/metrics/<strategy>.json: the few figures that `dvc metrics diff` shows on one screen."""
    test, val = strategy["test"]["metrics"], strategy["val"]["metrics"]
    found = {
        "test_accuracy": test["accuracy"]["value"],
        "test_accuracy_low": test["accuracy"]["low"],
        "test_accuracy_high": test["accuracy"]["high"],
        "test_balanced_accuracy": test["balanced_accuracy"]["value"],
        "test_nll": test["nll"]["value"],
        "val_accuracy": val["accuracy"]["value"],
        "train_flops": strategy["cost"]["train_flops"],
        "seeds": strategy["distinct_runs"],
    }
    if strategy["vs_baseline"]:
        difference = strategy["vs_baseline"]["test"]
        found["difference"] = difference["difference"]
        found |= {f"difference_{key}": difference[key] for key in ("low", "high", "p_value")}
    return found


def round_floats(value: Any) -> Any:  # noqa: ANN401
    """The JSON value with every float rounded to 6 digits, or to 4 significant digits below 0.001."""
    if isinstance(value, dict):
        return {key: round_floats(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [round_floats(inner) for inner in value]
    if isinstance(value, float):
        return round(value, 6) if abs(value) >= 1e-3 else float(f"{value:.4g}")
    return value


def _arrays(predictions: Predictions, labels: Labels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities, and the labels and weights of their images."""
    return predictions.log_probability, labels.label[predictions.rows], labels.weight[predictions.rows]


def _scaled(predictions: Predictions, temperature: float) -> Predictions:
    return Predictions(predictions.rows, predictions.log_probability / temperature)


def _figure(values: Sequence[float | None], interval: Interval | None) -> Json:
    """Mean, interval and standard deviation over runs; None where the metric of a run is undefined."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return dict.fromkeys(("value", "low", "high", "sd"))
    return {
        "value": float(np.mean(known)),
        "low": interval and interval.low,
        "high": interval and interval.high,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
    }


def _by_class(runs: Sequence[Run], labels: Labels) -> list[Json]:
    """By class, means over the runs, and the support summed over them."""
    by_run = [metrics.per_class(*_arrays(run.test, labels)) for run in runs]
    means = {key: np.mean([found[key] for found in by_run], axis=0) for key in ("precision", "recall", "f1")}
    support = np.sum([found["support"] for found in by_run], axis=0)
    return [
        {"class": name, "support": int(support[k]), **{key: float(mean[k]) for key, mean in means.items()}}
        for k, name in enumerate(labels.class_names)
    ]


def _by_value(column: Sequence[str], runs: Sequence[Run], labels: Labels) -> dict[str, Json]:
    """Test figures by value of a column of labels.csv; `n` counts each image once, whatever the number of seeds."""
    found, values = {}, np.array(column)
    for value in sorted(set(column) - {""}):
        masks = [values[run.test.rows] == value for run in runs]
        chosen = [
            Predictions(run.test.rows[mask], run.test.log_probability[mask])
            for run, mask in zip(runs, masks, strict=True)
            if mask.any()
        ]
        if not chosen:
            continue
        estimates = intervals.metric_intervals(chosen, labels.label, labels.weight)
        rows = np.unique(np.concatenate([predictions.rows for predictions in chosen]))
        if len(np.unique(labels.label[rows])) < len(labels.class_names):
            estimates["macro_f1"] = None  # an absent class would count as 0
        figures = {name: asdict(one) for name in SUBSET_METRICS if (one := estimates[name]) is not None}
        found[value] = {"n": len(rows), **figures}
    return found
