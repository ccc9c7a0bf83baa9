"""reports/details.json and the short metrics file of each strategy, assembled from runs.

Fractions, never percent. Values are means over the seeds; runs with identical predictions count once. Intervals (see
intervals.py) are over test images, conditional on the trained runs.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipeline.comparison import influence, intervals, metrics, outcomes, paired, recommendation
from pipeline.comparison.intervals import Interval
from pipeline.comparison.outcomes import Outcomes
from pipeline.comparison.paired import Study
from pipeline.dataset.manifest import Labels
from pipeline.dataset.units import FEW_UNITS
from pipeline.params import HEAD_ALL_SEEDS, HEAD_ONLY, Compare
from pipeline.training import calibration
from pipeline.training.runs import Cost, Run

SPLITS = ("val", "test")
MAX_GROUPS = 50  # groups with figures of their own: those with the most test images
Json = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """What all figures share. `twins`: by seed, bool (n_images,) of test images with a near-duplicate in train or val.

    `n_folds`: of the partition whose folds the seeds are, 0 where each seed is a split of its own. The test images of
    folds are pooled: each is predicted once, by the run that never saw it, and the pool counts as one run.
    """

    labels: Labels
    unit: np.ndarray
    options: Compare
    twins: Mapping[int, np.ndarray]
    n_folds: int = 0

    def pooled(self, runs: Sequence[Outcomes]) -> list[Outcomes]:
        """Outcomes of folds as those of one run."""
        return [outcomes.pooled(runs)] if self.n_folds else [*runs]


@dataclass(frozen=True)
class Judged:
    """A run and its outcomes: cross-fitted on validation; on test as predicted, and after temperature scaling.

    `scores`: its part of details.json.
    """

    run: Run
    val: Outcomes
    test: Outcomes
    scaled: Outcomes
    scores: Json


def assemble(
    runs: Mapping[str, Sequence[Run]],
    every_head: Sequence[Run],
    references: Mapping[str, Sequence[Run]],
    data: Data,
    n_train: Mapping[str, float],
) -> Json:
    """details.json: the strategies on their common seeds, the head on all of its seeds, and the recommendation.

    `references`: the reference classifiers on the common seeds. `n_train`: images, mean over the common seeds, that
    were used before judging on `val` (train), and on `test` (train and validation).
    """
    options, labels = data.options, data.labels
    positive = positive_class(labels, options)
    every = {**runs, HEAD_ALL_SEEDS: every_head, **references}
    by_key = {(run.strategy, run.seed): run for these in every.values() for run in these}
    judged = {key: judge(run, labels, data.unit) for key, run in by_key.items()}
    groups = {name: [judged[run.strategy, run.seed] for run in these] for name, these in every.items()}
    described = {name: describe(these, data) for name, these in groups.items()}
    beside = {name: described.pop(name) for name in references}
    trained = dict.fromkeys(SPLITS, 0.0) if data.n_folds else n_train
    studies = {split: Study(labels.label, labels.weight, data.unit, trained[split], options.metric) for split in SPLITS}
    by_split = {
        "val": {name: [one.val for one in these] for name, these in groups.items()},
        "test": {name: data.pooled([one.test for one in these]) for name, these in groups.items()},
    }
    for name, differences in against_baseline([*runs], options.baseline, by_split, studies).items():
        described[name]["vs_baseline"] = differences
    chosen = recommendation.recommend(
        {name: by_split["val"][name] for name in runs},
        {name: described[name]["cost"]["train_flops"] for name in runs},
        studies["val"],
        getattr(options.practical_margin, options.metric),
        options.confidence,
        {name: by_split["val"][name] for name in references},
    )
    return {
        "baseline": options.baseline,
        "metric": options.metric,
        "common_seeds": [run.seed for run in runs[HEAD_ONLY]],
        "folds": data.n_folds,
        "class_names": labels.class_names,
        "has_groups": len(np.unique(data.unit)) < len(data.unit),
        "positive_class": None if positive is None else labels.class_names[positive],
        "stated_specificity": options.specificity,
        "notes": notes(described),
        "recommendation": asdict(chosen) | {"text": recommendation.in_words(chosen, described, beside)},
        "strategies": described,
        "references": beside,
    }


def judge(run: Run, labels: Labels, unit: np.ndarray) -> Judged:
    """Metrics of one run on validation (cross-fitted) and test, its temperature and cost, and what was selected."""
    val = outcomes.cross_fitted(run.val.rows, run.candidates, labels.weight, unit)
    test = outcomes.of_predictions(run.test, labels.label)
    rows = run.val.rows
    temperature = calibration.temperature(run.val.log_probability, labels.label[rows], labels.weight[rows])
    scaled = replace(test, probability=calibration.scaled(run.test.log_probability, temperature))
    scores = {
        "seed": run.seed,
        "val": _score(val, labels, unit),
        "test": _score(test, labels, unit, scaled),
        "temperature": temperature,
        "cost": run.cost.model_dump(),
        "chosen": run.chosen,
        "n_candidates": len(run.candidates.names),
        "network": run.network,
    }
    return Judged(run, val, test, scaled, scores)


def _score(found: Outcomes, labels: Labels, unit: np.ndarray, scaled: Outcomes | None = None) -> Json:
    """Metrics of some outcomes, and their numbers; `scaled`: the same after temperature scaling."""
    data = labels.label[found.rows], labels.weight[found.rows]
    figures = {"n": len(found.rows), "n_units": len(np.unique(unit[found.rows]))}
    figures |= metrics.score(found, *data, len(labels.class_names))
    if scaled is not None:
        figures["ece_scaled"] = metrics.expected_calibration_error(scaled.probability, *data)
    return figures


def describe(judged: Sequence[Judged], data: Data) -> Json:
    """One strategy in details.json, without differences from the baseline."""
    kept = intervals.distinct(judged, lambda one: intervals.digest_of(one.test))
    labels, unit = data.labels, data.unit
    arrays = labels.label, labels.weight, unit
    tests, scaled = data.pooled([one.test for one in kept]), data.pooled([one.scaled for one in kept])
    scores, of_distinct = (
        {split: [one.scores[split] for one in these] for split in SPLITS} for these in (judged, kept)
    )
    if data.n_folds:
        scores["test"] = of_distinct["test"] = [_score(tests[0], labels, unit, scaled[0])]
    runs = {"val": [one.val for one in kept], "test": tests}
    splits: Json = {}
    for split, these in runs.items():
        found = intervals.metric_intervals(these, *arrays, len(labels.class_names))
        if split == "test":
            found["ece_scaled"] = intervals.ece_interval(scaled, *arrays)
        splits[split] = {
            "n": [one["n"] for one in scores[split]],
            "n_units": [one["n_units"] for one in scores[split]],
            "n_distinct_units": len(np.unique(np.concatenate([unit[one.rows] for one in these]))),
            "metrics": {
                name: _figure([one[name] for one in of_distinct[split]], interval) for name, interval in found.items()
            },
        }
    splits["test"]["temperature"] = [one.scores["temperature"] for one in judged]
    splits["test"] |= break_down(tests, data)
    splits["test"]["without_twins"] = without_twins(kept, data)
    images = [(outcomes.of_predictions(one.run.val, labels.label), one.test) for one in kept]
    splits["test"]["operating_points"] = operating_points(images, data, positive_class(labels, data.options))
    splits["test"]["per_unit"] = per_unit(images, data)
    return {
        "seeds": [one.run.seed for one in judged],
        "distinct_runs": len(kept),
        "n_candidates": max(one.scores["n_candidates"] for one in judged),
        **splits,
        "vs_baseline": None,
        "cost": {name: round(np.mean([one.scores["cost"][name] for one in judged])) for name in Cost.model_fields},
        "runs": [{key: value for key, value in one.scores.items() if key != "temperature"} for one in judged],
    }


def without_twins(judged: Sequence[Judged], data: Data) -> Json | None:
    """Test metrics without the images that have a near-duplicate in train or validation; None if there are none.

    `n` and `n_twins` are numbers of images, means over the seeds (of `n_twins` rounded up), and sums over folds.
    """
    is_twin = [data.twins[one.run.seed][one.test.rows] for one in judged]
    n_twins = sum(map(np.count_nonzero, is_twin))
    if not n_twins:
        return None
    clean = data.pooled([one.test[~mask] for one, mask in zip(judged, is_twin, strict=True)])
    kept = [one for one in clean if len(one.rows)]
    return {
        "n": math.floor(np.mean([len(one.rows) for one in clean])),
        "n_twins": math.ceil(n_twins / len(clean)),
        "metrics": _estimates(kept, data) if kept else {},
    }


def break_down(tests: Sequence[Outcomes], data: Data) -> Json:
    """Test figures by class, confidence, subset and group, and the confusion matrix, over all runs."""
    labels = data.labels
    rows = np.concatenate([test.rows for test in tests])
    predicted = np.concatenate([test.predicted for test in tests])
    probability = np.concatenate([test.probability for test in tests])
    label, weight = labels.label[rows], labels.weight[rows]
    sizes = Counter(labels.group[row] for row in np.unique(rows).tolist() if labels.group[row])
    largest = {group for group, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:MAX_GROUPS]}
    return {
        "classes": _by_class(tests, labels),
        "confusion": metrics.confusion(predicted, label, len(labels.class_names)).tolist(),
        "reliability": metrics.reliability(probability, label, weight),
        "subsets": _by_value(labels.subset, tests, data),
        "groups": _by_value([group if group in largest else "" for group in labels.group], tests, data),
        "n_groups": len(sizes),
    }


def operating_points(runs: Sequence[tuple[Outcomes, Outcomes]], data: Data, positive: int | None) -> Json | None:
    """Sensitivity and specificity on test, of two classes: as predicted, and at a threshold chosen on validation.

    `runs` are validation and test. The threshold is the lowest probability of the class `positive` at which validation
    has at least the specificity `compare.specificity`. None where there are not two classes, or a split has one only.
    """
    label, weight = data.labels.label, data.labels.weight
    tests, found = [test for _, test in runs], {}
    judged = [val for val, _ in runs] + data.pooled(tests)
    if positive is None or any(len(np.unique(label[one.rows])) < 2 for one in judged):
        return None
    thresholds = [_threshold(val, positive, label, weight, data.options.specificity) for val, _ in runs]
    at_chosen = [
        replace(test, predicted=np.where(test.probability[:, positive] >= threshold, positive, 1 - positive))
        for test, threshold in zip(tests, thresholds, strict=True)
    ]
    for name, threshold, decided in (("default", 0.5, tests), ("chosen", float(np.mean(thresholds)), at_chosen)):
        found[name] = {"threshold": threshold}
        for figure, own in (("sensitivity", positive), ("specificity", 1 - positive)):
            of_class = [run[label[run.rows] == own] for run in data.pooled(decided)]
            shares = [influence.mean(run.predicted == own, weight[run.rows]) for run in of_class]
            estimate = intervals.interval(shares, [run.rows for run in of_class], data.unit)
            found[name][figure] = estimate and asdict(estimate)
    return found


def positive_class(labels: Labels, options: Compare) -> int | None:
    """The index of `compare.positive_class`, by default that of the rarer class; ValueError for an unknown class.

    None where there are not two classes: then an error for a class that is named.
    """
    choices = labels.class_names if len(labels.class_names) == 2 else []
    if options.positive_class is None:
        return int(np.bincount(labels.label, minlength=2).argmin()) if choices else None
    if options.positive_class not in choices:
        expected = " or ".join(["null", *choices])
        raise ValueError(f"params.yaml: compare.positive_class: found {options.positive_class}, expected {expected}")
    return choices.index(options.positive_class)


def per_unit(runs: Sequence[tuple[Outcomes, Outcomes]], data: Data) -> Json | None:
    """Test figures with one vote per unit: probabilities are averaged over its images, and units count alike.

    `runs` are validation and test. Units whose images have several labels are left out. None where every unit is one
    image, or none is left.
    """
    labels, unit = data.labels, data.unit
    rows = np.unique(np.concatenate([test.rows for _, test in runs]))
    votes = [
        (outcomes.by_unit(val, labels.label, unit), outcomes.by_unit(test, labels.label, unit)) for val, test in runs
    ]
    n_units = len(np.unique(unit[rows]))
    if n_units == len(rows) or not all(len(test.rows) for _, test in votes):
        return None
    label = outcomes.unit_labels(labels.label, unit)
    by_unit = replace(data, labels=replace(labels, label=label, weight=np.ones(len(label))), unit=np.arange(len(label)))
    n_voting = len(np.unique(np.concatenate([test.rows for _, test in votes])))
    tests = data.pooled([test for _, test in votes])
    return {
        "n_units": n_voting,
        "n_left_out": n_units - n_voting,
        "metrics": _estimates(tests, by_unit, (*influence.METRICS, "brier")),
        "operating_points": operating_points(votes, by_unit, positive_class(labels, data.options)),
    }


def notes(strategies: Mapping[str, Json]) -> list[str]:
    """Warnings that belong beside the figures."""
    found = []
    for split, title in (("val", "validation"), ("test", "test")):
        fewest = min(strategy[split]["n_distinct_units"] for strategy in strategies.values())
        if fewest < FEW_UNITS:
            found.append(
                f"there are {fewest} different {title} units (groups, or images that belong to none): with fewer than "
                f"{FEW_UNITS}, intervals are rough"
            )
    twins = [clean["n_twins"] for one in strategies.values() if (clean := one["test"]["without_twins"])]
    if twins:
        found.append(
            f"up to {max(twins):,} test images have a near-duplicate in train or validation, so test figures may be "
            "too good; a table below leaves them out; `dataset.near_duplicates: group` keeps them in one split"
        )
    return found


def against_baseline(
    names: Sequence[str],
    baseline: str,
    runs: Mapping[str, Mapping[str, Sequence[Outcomes]]],
    studies: Mapping[str, Study],
) -> dict[str, Json]:
    """Every other strategy on the same seeds and images; p-values are corrected over the strategies (Holm).

    `runs`: outcomes by split and strategy.
    """
    found: dict[str, Json] = {name: {} for name in names if name != baseline}
    for split, by_name in runs.items():
        differences = {name: paired.compare(by_name[name], by_name[baseline], studies[split]) for name in found}
        p_values = paired.holm([difference.p_value for difference in differences.values()])
        for (name, difference), p_value in zip(differences.items(), p_values, strict=True):
            corrected = {"p_value": p_value, "p_value_uncorrected": difference.p_value}
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


def _threshold(val: Outcomes, positive: int, label: np.ndarray, weight: np.ndarray, specificity: float) -> float:
    """The lowest probability of the positive class at which validation has this specificity, weighted."""
    negatives = val[label[val.rows] != positive]
    probability = negatives.probability[:, positive]
    order = np.argsort(probability, kind="stable")
    below = np.cumsum(weight[negatives.rows][order]) / weight[negatives.rows].sum()
    reached = probability[order][np.searchsorted(below, specificity - 1e-12)]
    return float(np.nextafter(reached, 2))


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


def _by_class(runs: Sequence[Outcomes], labels: Labels) -> list[Json]:
    """By class, means over the runs, and the support summed over them."""
    n_classes = len(labels.class_names)
    by_run = [
        metrics.per_class(run.predicted, labels.label[run.rows], labels.weight[run.rows], n_classes) for run in runs
    ]
    means = {key: np.mean([found[key] for found in by_run], axis=0) for key in ("precision", "recall", "f1")}
    support = np.sum([found["support"] for found in by_run], axis=0)
    return [
        {"class": name, "support": int(support[k]), **{key: float(mean[k]) for key, mean in means.items()}}
        for k, name in enumerate(labels.class_names)
    ]


def _by_value(column: Sequence[str], runs: Sequence[Outcomes], data: Data) -> dict[str, Json]:
    """Test figures by value of a column of labels.csv; `n` counts each image once, whatever the number of seeds."""
    found, values = {}, np.array(column)
    for value in sorted(set(column) - {""}):
        chosen = [run[mask] for run in runs if (mask := values[run.rows] == value).any()]
        if chosen:
            rows = np.unique(np.concatenate([run.rows for run in chosen]))
            counts = {"n": len(rows), "n_units": len(np.unique(data.unit[rows]))}
            found[value] = counts | _estimates(chosen, data)
    return found


def _estimates(runs: Sequence[Outcomes], data: Data, names: Sequence[str] = influence.METRICS) -> dict[str, Json]:
    """Those of these metrics that exist; no macro F1 where a class is absent, which would count as 0."""
    labels, n_classes = data.labels, len(data.labels.class_names)
    found = intervals.metric_intervals(runs, labels.label, labels.weight, data.unit, n_classes)
    occurring = np.unique(labels.label[np.concatenate([run.rows for run in runs])])
    lacks = {"macro_f1"} if len(occurring) < n_classes else set()
    return {name: asdict(one) for name in names if name not in lacks and (one := found[name]) is not None}
