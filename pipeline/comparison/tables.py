"""Figures of details.json as text: percentages with intervals, and the table in comparison.md."""

from collections.abc import Sequence
from typing import Any

from pipeline.comparison.paired import CORRECTED_T, MIN_SEEDS_FOR_T
from pipeline.params import HEAD_ALL_SEEDS, HEAD_ONLY

Json = dict[str, Any]
METRIC_NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "top5_accuracy": "top-5 accuracy",
    "auroc": "AUROC",
    "nll": "NLL",
    "brier": "Brier score",
    "ece": "ECE",
    "ece_scaled": "ECE, scaled",
}
PER_UNIT = {"accuracy": "accuracy, %", "balanced_accuracy": "balanced accuracy, %", "auroc": "AUROC, %"}


def as_markdown(details: Json) -> str:
    """comparison.md: the recommendation in words, notes, the table, figures per unit, and operating points."""
    strategies, baseline, metric = details["strategies"], details["baseline"], details["metric"]
    compared = {name: strategy for name, strategy in strategies.items() if name != HEAD_ALL_SEEDS}
    methods = tested(details)
    differences = f" Difference in {METRIC_NAMES[metric]} from {baseline}; {methods}" if methods else ""
    name = METRIC_NAMES[metric]
    columns = ["strategy", "n", "candidates", f"validation {name}, cross-fitted", "accuracy"]
    columns += [name] if metric != "accuracy" else []
    columns += [f"difference from {baseline}", "p", "balanced accuracy", "NLL (nats)"]
    columns += ["trained parameters", "training TFLOPs"]
    spread = "" if details["folds"] else "; ± is the standard deviation over n seeds"
    lines = [
        f"{details['recommendation']['text']}\n",
        *(f"**Note:** {note}.\n" for note in details["notes"]),
        f"Test accuracy in %, weighted by the images' weights, on {sampled(strategies, 'test')}{per_seed(details)}, "
        f"with its 95 % interval over {unit_name(details)}s{spread}. "
        f"{compared_on(details)} Validation figures are cross-fitted: each fifth of the validation units is predicted "
        f"by the candidate (epoch, regularization strength) that the other fifths choose.{differences} Rows in italics "
        "are reference classifiers, which cost nothing beyond the cached features and are never recommended.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(_cells(f'*{name}*', one, metric))} |" for name, one in details["references"].items()),
        *(f"| {' | '.join(_cells(name, strategy, metric))} |" for name, strategy in compared.items()),
        "",
        _all_seeds(strategies[HEAD_ALL_SEEDS]),
        "",
    ]
    for title, rows in further(details):
        columns = list(rows[0][1])
        lines += [f"{title}:", "", f"| strategy | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
        lines += [*(f"| {name} | {' | '.join(cells.values())} |" for name, cells in rows), ""]
    return "\n".join(lines)


def further(details: Json) -> list[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """Tables without twins, per unit, of operating points and of cuts, where they exist: a title, cells by strategy."""
    compared = {name: one["test"] for name, one in details["strategies"].items() if name != HEAD_ALL_SEEDS}
    voted = {name: test["per_unit"] for name, test in compared.items() if test.get("per_unit")}
    clean = {name: test["without_twins"] for name, test in compared.items() if test.get("without_twins")}
    tables = []
    if clean:
        first = next(iter(clean.values()))
        title = (
            f"Test figures (NLL in nats, others in %) with and without the {first['n_twins']:,} test images of "
            f"{first['n_twins'] + first['n']:,} that have a near-duplicate in train or validation"
        )
        rows = {
            name: {
                f"{METRIC_NAMES[key]}, {which}": _share(figures[key], key) if key in figures else ""
                for key in dict.fromkeys(("accuracy", "balanced_accuracy", details["metric"]))
                for which, figures in (("all", compared[name]["metrics"]), ("without", one["metrics"]))
            }
            for name, one in clean.items()
        }
        tables.append((title, [*rows.items()]))
    if voted:
        first = next(iter(voted.values()))
        left_out = f"; {first['n_left_out']} with several labels are left out" if first["n_left_out"] else ""
        title = (
            f"One vote per unit, from the mean probability of its images ({first['n_units']:,} test units{left_out})"
        )
        names = [name for name in PER_UNIT if all(name in one["metrics"] for one in voted.values())]
        rows = {name: {PER_UNIT[key]: _share(one["metrics"][key]) for key in names} for name, one in voted.items()}
        tables.append((title, [*rows.items()]))
    for of, found in (("image", compared), ("unit", voted)):
        points = {name: one["operating_points"] for name, one in found.items() if one.get("operating_points")}
        if points:
            title = (
                f"Sensitivity (for {details['positive_class']}) and specificity on test per {of}, in %, at the default "
                f"threshold and at the one that gives a specificity of {100 * details['stated_specificity']:g} % on "
                "validation"
            )
            rows = {name: _operating_cells(one) for name, one in points.items()}
            tables.append((title, [*rows.items()]))
    networks = [run["network"] for run in details["strategies"][HEAD_ALL_SEEDS]["runs"]]
    if "weight_shares" in networks[0]:
        title = (
            "Which cuts carry the weight of the head: their shares, in %, in the squared weights of its first layer, "
            "each multiplied by the variance of its feature on the training images; means over the seeds"
        )
        shares = {
            cut: f"{100 * sum(network['weight_shares'][cut] for network in networks) / len(networks):.1f}"
            for cut in networks[0]["weight_shares"]
        }
        counts = {cut: f"{width:,}" for cut, width in networks[0]["widths"].items()}
        tables.append((title, [("number of features", counts), (HEAD_ALL_SEEDS, shares)]))
    return tables


def sampled(strategies: Json, split: str) -> str:
    """`656 test images`, or `66 test units (660 images)` where a unit is more than an image."""
    found = [strategy[split] for strategy in strategies.values()]
    n, n_units = (sorted({n for one in found for n in one[key]}) for key in ("n", "n_units"))
    title = {"val": "validation", "test": "test"}[split]
    return f"{_range(n)} {title} images" if n == n_units else f"{_range(n_units)} {title} units ({_range(n)} images)"


def unit_name(details: Json) -> str:
    """What was sampled: images, or units of several."""
    return "unit" if details["has_groups"] else "image"


def per_seed(details: Json) -> str:
    """Whether sample sizes are of one seed, or of all folds together."""
    return "" if details["folds"] else " a seed"


def compared_on(details: Json) -> str:
    """The seeds or folds, and with fewer than five seeds that the result is about these runs."""
    seeds = details["common_seeds"]
    if details["folds"]:
        return f"The {details['folds']} folds of one partition: each unit is tested once, by a run that never saw it."
    about = of_runs(details["strategies"], len(seeds), "test")
    return f"Compared on seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}.{about}"


def of_runs(strategies: Json, n: int, split: str) -> str:
    """What a result of n runs of each strategy is about; an empty text where the variance over the seeds is in it."""
    methods = {one["vs_baseline"][split]["method"] for one in strategies.values() if one.get("vs_baseline")}
    if n >= MIN_SEEDS_FOR_T and methods <= {CORRECTED_T}:
        return ""
    these = f"these {n} runs" if n > 1 else "this one run"
    return f" This is a result of {these} of each strategy: runs with other training seeds may differ."


def tested(details: Json) -> str:
    """The tests that gave the p-values; or an empty text."""
    methods = {one["vs_baseline"]["test"]["method"] for one in details["strategies"].values() if one.get("vs_baseline")}
    return f"p: {' or '.join(sorted(methods))}, Holm-corrected." if methods else ""


def percent(figure: Json) -> str:
    """`85.0 ± 1.2 (82.1 to 87.5)`: mean in %, standard deviation where there are several seeds, interval."""
    spread = f" ± {100 * figure['sd']:.1f}" if figure["sd"] is not None else ""
    return f"{100 * figure['value']:.1f}{spread} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"


def shown(value: float | None, metric: str) -> str:
    """`85.0 %`, or `0.348 nats`; a dash where there is no value."""
    if value is None:
        return "\u2013"
    return f"{value:.3f} nats" if metric == "nll" else f"{100 * value:.1f} %"


def amount(size: float, metric: str) -> str:
    """A difference without sign: `2 points`, or `0.05 nats`."""
    return f"{size:g} nats" if metric == "nll" else f"{100 * size:g} point{'' if size == 0.01 else 's'}"


def range_of(difference: Json, metric: str, ends: str = " ({} to {})") -> str:
    """`+1.4 points (-0.3 to +3.1)`: a difference and its bounds."""
    scale, digits, unit = (1, 3, "nats") if metric == "nll" else (100, 1, "points")
    value, low, high = (f"{scale * difference[key]:+.{digits}f}" for key in ("difference", "low", "high"))
    return f"{value} {unit}{ends.format(low, high)}"


def p_value(value: float) -> str:
    """To three digits."""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def teraflops(flops: int) -> str:
    """In 10^12, to two significant digits below 10."""
    value = flops / 1e12
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _cells(name: str, strategy: Json, metric: str) -> list[str]:
    figures, cost = strategy["test"]["metrics"], strategy["cost"]
    difference = strategy["vs_baseline"] and strategy["vs_baseline"]["test"]
    return [
        name,
        f"{strategy['distinct_runs']}",
        f"{strategy['n_candidates']}",
        shown(strategy["val"]["metrics"][metric]["value"], metric).removesuffix(" %"),
        percent(figures["accuracy"]),
        *([shown(figures[metric]["value"], metric).removesuffix(" %")] if metric != "accuracy" else []),
        range_of(difference, metric).replace(" points", "").replace(" nats", "") if difference else "",
        p_value(difference["p_value"]) if difference else "",
        f"{100 * figures['balanced_accuracy']['value']:.1f}",
        f"{figures['nll']['value']:.3f}",
        f"{cost['trainable_params']:,}",
        teraflops(cost["train_flops"]),
    ]


def _share(figure: Json, metric: str = "") -> str:
    if metric == "nll":
        return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
    return percent({"sd": None, **figure})


def _operating_cells(found: Json) -> dict[str, str]:
    chosen = found["chosen"]
    return {
        "sensitivity": _share(found["default"]["sensitivity"]),
        "specificity": _share(found["default"]["specificity"]),
        "chosen threshold": f"{chosen['threshold']:.3f}",
        "sensitivity there": _share(chosen["sensitivity"]),
        "specificity there": _share(chosen["specificity"]),
    }


def _all_seeds(strategy: Json) -> str:
    """The line on the head over all of its seeds."""
    figures = strategy["test"]["metrics"]
    return (
        f"{HEAD_ONLY} over all its seeds (n = {strategy['distinct_runs']}): accuracy {percent(figures['accuracy'])} %, "
        f"balanced accuracy {100 * figures['balanced_accuracy']['value']:.1f} %, "
        f"NLL {figures['nll']['value']:.3f} nats."
    )


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"
