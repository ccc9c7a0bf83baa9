"""Figures of details.json as text: percentages with intervals, and the table in comparison.md."""

from collections.abc import Sequence
from typing import Any

from pipeline.params import HEAD_ALL_SEEDS, HEAD_ONLY

Json = dict[str, Any]


def as_markdown(details: Json) -> str:
    """comparison.md: the table, and the recommendation in words."""
    strategies, baseline = details["strategies"], details["baseline"]
    n_test = sorted({n for strategy in strategies.values() for n in strategy["test"]["n"]})
    methods = tested(details)
    differences = f" Difference from {baseline}; {methods}" if methods else ""
    lines = [
        f"Test accuracy in %, weighted by the images' weights, on {_range(n_test)} test images a seed, with its 95 % "
        f"interval over images; ± is the standard deviation over n seeds. Compared on "
        f"seed{'s' * (len(details['common_seeds']) > 1)} {', '.join(map(str, details['common_seeds']))}.{differences}",
        "",
        f"| strategy | n | accuracy | difference from {baseline} | p | balanced accuracy | NLL (nats) "
        "| trained parameters | training TFLOPs |",
        "|---|---|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(_cells(name, strategies[name]))} |" for name in strategies if name != HEAD_ALL_SEEDS),
        "",
        _all_seeds(strategies[HEAD_ALL_SEEDS]),
        "",
        details["recommendation"]["text"],
    ]
    return "\n".join(lines) + "\n"


def tested(details: Json) -> str:
    """The tests that gave the p-values, and the p-values of the corrected t-test where it applies; or an empty text."""
    found = {name: one["vs_baseline"]["test"] for name, one in details["strategies"].items() if one.get("vs_baseline")}
    methods = sorted({test["method"] for test in found.values()})
    by_t = [
        f"{name} {p_value(test['corrected_t_p_value'])}"
        for name, test in found.items()
        if test["corrected_t_p_value"] is not None
    ]
    over_seeds = f" By the corrected t over seeds (Nadeau and Bengio): {', '.join(by_t)}." if by_t else ""
    return f"p: {' or '.join(methods)}, Holm-corrected.{over_seeds}" if methods else ""


def percent(figure: Json) -> str:
    """`85.0 ± 1.2 (82.1 to 87.5)`: mean in %, standard deviation where there are several seeds, interval."""
    spread = f" ± {100 * figure['sd']:.1f}" if figure["sd"] is not None else ""
    return f"{100 * figure['value']:.1f}{spread} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"


def points(difference: Json) -> str:
    """`+1.4 (-0.3 to +3.1)`, in percentage points."""
    return f"{100 * difference['difference']:+.1f} ({100 * difference['low']:+.1f} to {100 * difference['high']:+.1f})"


def p_value(value: float) -> str:
    """To three digits."""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def teraflops(flops: int) -> str:
    """In 10^12, to two significant digits below 10."""
    value = flops / 1e12
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _cells(name: str, strategy: Json) -> list[str]:
    figures, cost = strategy["test"]["metrics"], strategy["cost"]
    difference = strategy["vs_baseline"] and strategy["vs_baseline"]["test"]
    return [
        name,
        f"{strategy['distinct_runs']}",
        percent(figures["accuracy"]),
        points(difference) if difference else "",
        p_value(difference["p_value"]) if difference else "",
        f"{100 * figures['balanced_accuracy']['value']:.1f}",
        f"{figures['nll']['value']:.3f}",
        f"{cost['trainable_params']:,}",
        teraflops(cost["train_flops"]),
    ]


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
