"""The recommended strategy, by one rule on the validation images, and its explanation in words.

The rule. The *confidence set* holds every strategy that no other one is shown to beat, in the decision metric on
cross-fitted validation; with the given confidence it contains the best (multiple comparisons with the best: Hsu 1996,
"Multiple comparisons: theory and methods", chapter 4; one-sided bounds, corrected for the number of strategies by
Bonferroni). The cheapest strategy of the set, in training FLOPs, is recommended. The choice is *settled* once it is
shown, with the same confidence, to be at most the margin worse than every other strategy of the set; until then, and
with fewer than 10 distinct validation units, it is *provisional*. Test figures do not enter the choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from pipeline.comparison import paired
from pipeline.comparison.outcomes import Outcomes
from pipeline.comparison.paired import Contrast, Study
from pipeline.comparison.tables import METRIC_NAMES, amount, of_runs, p_value, range_of, sampled, shown, teraflops
from pipeline.dataset.units import FEW_UNITS
from pipeline.params import HEAD_ALL_SEEDS

MOST_UNITS = 100_000  # a larger number is not worth stating
Json = dict[str, Any]


@dataclass(frozen=True)
class Rival:
    """Another strategy: its metric minus that of the recommended one, with one-sided bounds.

    The bounds have the confidence that is corrected for the number of strategies. `is_excluded`: it is shown not to be
    better by more than the margin. `beaten_by`: a strategy that is shown to be better than this one, which rules it
    out; None if it is in the set.
    """

    strategy: str
    difference: float
    low: float
    high: float
    is_excluded: bool
    beaten_by: str | None


@dataclass(frozen=True)
class Recommendation:
    """The recommended `strategy`, whether the choice is settled, and what else validation says.

    `rivals` are all other strategies, by cost. `n_units`: distinct validation units, over all seeds. `units_needed`
    would show a true difference of the margin with 80 % power; None: more than 100,000, or nothing to compare.
    `not_beaten`: the reference classifiers that the strategy is not shown to beat.
    """

    strategy: str
    is_settled: bool
    metric: str
    margin: float
    confidence: float
    n_units: int
    units_needed: int | None
    rivals: list[Rival]
    not_beaten: list[str]


def recommend(
    runs: Mapping[str, Sequence[Outcomes]],
    train_flops: Mapping[str, int],
    study: Study,
    margin: float,
    confidence: float,
    references: Mapping[str, Sequence[Outcomes]],
) -> Recommendation:
    """Apply the rule to the validation outcomes of each strategy's runs, all with the same seeds.

    `references`: outcomes of classifiers on the cached features, for the same seeds; they are never recommended.
    """
    by_cost = sorted(runs, key=train_flops.__getitem__)
    level = 1 - (1 - confidence) / max(len(runs) - 1, 1)
    contrasts = {}  # by (name, other), of name - other
    for other, name in combinations(by_cost, 2):
        contrasts[name, other] = paired.contrast(runs[name], runs[other], study, level, margin)
        contrasts[other, name] = contrasts[name, other].reversed()

    def advantage(name: str, other: str) -> Contrast:
        """The contrast, positive where `name` is better."""
        return contrasts[other, name] if study.metric == "nll" else contrasts[name, other]

    beaten_by = {
        name: next((other for other in by_cost if other != name and advantage(other, name).low > 0), None)
        for name in by_cost
    }
    chosen = next(name for name in by_cost if beaten_by[name] is None)
    rivals = []
    for name in by_cost:
        if name != chosen:
            found, is_excluded = contrasts[name, chosen], advantage(name, chosen).margin_high <= margin
            rivals.append(Rival(name, found.difference, found.low, found.high, is_excluded, beaten_by[name]))
    in_set = [rival for rival in rivals if rival.beaten_by is None]
    n_units = len(np.unique(np.concatenate([study.unit[run.rows] for run in runs[chosen]])))
    needed = [contrasts[one.strategy, chosen].units_needed for one in in_set or rivals]
    units_needed = max(needed, default=MOST_UNITS + 1)
    not_beaten = []
    for name, these in references.items():
        better, worse = (these, runs[chosen]) if study.metric == "nll" else (runs[chosen], these)
        if paired.lower_bound(better, worse, study, confidence) <= 0:
            not_beaten.append(name)
    return Recommendation(
        strategy=chosen,
        is_settled=all(rival.is_excluded for rival in in_set) and n_units >= FEW_UNITS and len(runs) > 1,
        metric=study.metric,
        margin=margin,
        confidence=confidence,
        n_units=n_units,
        units_needed=units_needed if units_needed <= MOST_UNITS else None,
        rivals=rivals,
        not_beaten=not_beaten,
    )


def in_words(found: Recommendation, strategies: Mapping[str, Json], references: Mapping[str, Json]) -> str:
    """Paragraphs: a warning if there is one, the choice by validation, and its result on the test images.

    `strategies` and `references` as in details.json.
    """
    paragraphs = [
        _not_beaten(found, strategies, references),
        _choice(found, strategies) + of_runs(dict(strategies), len(strategies[found.strategy]["seeds"]), "val"),
        _tested(found, strategies),
    ]
    return "\n\n".join(filter(None, paragraphs))


def _not_beaten(found: Recommendation, strategies: Mapping[str, Json], references: Mapping[str, Json]) -> str:
    if not found.not_beaten:
        return ""
    listed = ", ".join(f"{name} ({_value(references[name], found.metric)})" for name in found.not_beaten)
    own = f"{METRIC_NAMES[found.metric]} {_value(strategies[found.strategy], found.metric)}"
    return (
        f"**First: {found.strategy} is not shown to beat what costs nothing beyond the cached features.** On "
        f"validation it has {own}; the reference classifiers have: {listed}. Where one of them is good enough, train "
        "nothing. The recommendation is among what is trained."
    )


def _choice(found: Recommendation, strategies: Mapping[str, Json]) -> str:
    names = [name for name in strategies if name != HEAD_ALL_SEEDS]
    own = _value(strategies[found.strategy], found.metric)
    val = strategies[found.strategy]["val"]
    is_several = len(val["n"]) > 1
    n_val = f"{found.n_units:,} different validation units" if is_several else sampled({"": {"val": val}}, "val")
    if len(names) == 1:
        return (
            f"**Recommendation: {found.strategy}**, because nothing was compared with it: fine_tune.run is empty. "
            f"Its {METRIC_NAMES[found.metric]} on the {n_val} is {own}."
        )
    cost = teraflops(strategies[found.strategy]["cost"]["train_flops"])
    state = "settled" if found.is_settled else "provisional"
    beaten = [rival for rival in found.rivals if rival.beaten_by]
    left = [rival for rival in found.rivals if not rival.beaten_by]
    text = f"**Recommendation: {found.strategy}, {state}.** Train {found.strategy}. "
    text += f"Among the strategies that could be the best, it is the cheapest to train ({cost} TFLOPs). "
    text += "The NLL decides: lower is better. " if found.metric == "nll" else ""
    if beaten:
        text += f"Shown to be worse than another strategy: {_listed(beaten, found)}. "
    margin = amount(found.margin, found.metric)
    needed = f"about {found.units_needed:,}" if found.units_needed else f"more than {MOST_UNITS:,}"
    power = (
        f"{needed} validation units would show a true difference of that size between two strategies (80 % power); "
        f"there are {found.n_units:,}."
    )
    if found.is_settled:
        listed = f": {_listed(left, found)}" if left else ""
        text += (
            f"With {100 * found.confidence:g} % confidence, no other strategy is better by more than {margin}{listed}. "
        )
        return f"{text}This is by the {n_val}; {power}"
    if left:
        text += f"The {n_val} cannot tell it from: {_listed(left, found)}. "
    if found.n_units < FEW_UNITS:
        text += f"With {found.n_units} different validation units, fewer than {FEW_UNITS}, nothing is settled. "
    return (
        f"{text}The choice is settled when none of them can be better by more than {margin}: {power} More images give "
        "more, and so do more seeds that draw other validation images."
    )


def _listed(rivals: Sequence[Rival], found: Recommendation) -> str:
    """`partial_freeze (+1.0 points, between -1.3 and +3.3)`: differences from the recommended strategy."""
    return "; ".join(f"{one.strategy} ({range_of(asdict(one), found.metric, ', between {} and {}')})" for one in rivals)


def _value(strategy: Json, metric: str) -> str:
    return shown(strategy["val"]["metrics"][metric]["value"], metric)


def _tested(found: Recommendation, strategies: Mapping[str, Json]) -> str:
    strategy = strategies[found.strategy]
    figure = strategy["test"]["metrics"][found.metric]
    interval = f"{shown(figure['low'], found.metric)} to {shown(figure['high'], found.metric)}"
    text = (
        f"On the test images, which took no part in the choice, {found.strategy} has {METRIC_NAMES[found.metric]} "
        f"{shown(figure['value'], found.metric)} ({interval})"
    )
    if not strategy["vs_baseline"]:
        return f"{text}; it is the baseline."
    difference = strategy["vs_baseline"]["test"]
    p = p_value(difference["p_value"])
    equal = "" if p.startswith("<") else "= "
    return f"{text}; difference from the baseline {range_of(difference, found.metric)} (p {equal}{p})."
