"""The recommended strategy, by a rule on the validation images, and its explanation in words.

The rule: the cheapest strategy (training FLOPs) that is, with the given one-sided confidence, at most the margin below
the best strategy in validation accuracy. The question is undecided if a cheaper strategy is shown neither worse nor not
worse, or if a more expensive one may be better than the best by more than the margin; then the number of images that
would decide it is estimated. Test figures do not enter the choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.comparison import paired
from pipeline.comparison.outcomes import Outcomes
from pipeline.comparison.paired import Study
from pipeline.comparison.tables import of_runs, p_value, percent, points, sampled, teraflops
from pipeline.params import HEAD_ALL_SEEDS

MOST_IMAGES = 100_000  # a larger number is not worth stating
Json = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A strategy compared with the best: its accuracy minus the best one's, with a one-sided bound on either side."""

    strategy: str
    difference: float
    low: float
    high: float
    finding: str  # "not worse" | "worse" | "undecided"
    images_needed: int | None  # of validation, per seed, where undecided; None if no number is enough


@dataclass(frozen=True)
class Recommendation:
    """`is_decided` unless a strategy cheaper than `strategy` may be as good, or one of the `rivals` may be better.

    `verdicts` are about the strategies cheaper than the best, `rivals` about the more expensive ones that may be better
    than it by more than the margin; both sorted by cost. `n_val`: validation images per seed. `images_needed` would
    decide everything that is undecided; None if no number is enough.
    """

    strategy: str
    best: str
    is_decided: bool
    margin: float
    confidence: float
    images_needed: int | None
    n_val: int
    verdicts: list[Verdict]
    rivals: list[Verdict]


def recommend(
    runs: Mapping[str, Sequence[Outcomes]],
    train_flops: Mapping[str, int],
    study: Study,
    margin: float,
    confidence: float,
) -> Recommendation:
    """Apply the rule to the validation predictions of each strategy's runs, all with the same seeds."""
    accuracy = {name: _accuracy(these, study) for name, these in runs.items()}
    best = min(runs, key=lambda name: (-accuracy[name], train_flops[name]))
    by_cost = sorted((name for name in runs if name != best), key=train_flops.__getitem__)
    cheaper = [name for name in by_cost if train_flops[name] < train_flops[best]]
    verdicts, rivals = [], []
    for name in by_cost:
        low = paired.lower_bound(runs[name], runs[best], study, confidence)
        high = -paired.lower_bound(runs[best], runs[name], study, confidence)
        if name not in cheaper:
            if high > margin:
                needed = paired.images_needed(runs[best], runs[name], study, margin, confidence)
                rivals.append(Verdict(name, accuracy[name] - accuracy[best], low, high, "undecided", needed))
            continue
        finding, needed = "not worse" if low >= -margin else "worse", None
        if low < -margin <= high:  # if the observed difference is the true one, more images would decide
            finding = "undecided"
            needed = paired.images_needed(runs[name], runs[best], study, margin, confidence)
            needed = needed or paired.images_needed(runs[best], runs[name], study, -margin, confidence)
        verdicts.append(Verdict(name, accuracy[name] - accuracy[best], low, high, finding, needed))
    chosen = next((verdict.strategy for verdict in verdicts if verdict.finding == "not worse"), best)
    before = verdicts[: cheaper.index(chosen)] if chosen in cheaper else verdicts
    counts = [verdict.images_needed for verdict in (*before, *rivals) if verdict.finding == "undecided"]
    needed = None if None in counts else max((n for n in counts if n), default=None)
    n_val = round(np.mean([len(run.rows) for run in runs[best]]))
    return Recommendation(chosen, best, not counts, margin, confidence, needed, n_val, verdicts, rivals)


def as_json(recommendation: Recommendation, strategies: Mapping[str, Json]) -> Json:
    """The record and its explanation; `strategies` as in details.json."""
    return {**asdict(recommendation), "text": in_words(recommendation, strategies)}


def in_words(found: Recommendation, strategies: Mapping[str, Json]) -> str:
    """Two paragraphs: the choice by validation, and the result of the chosen strategy on the test images."""
    rule = (
        f"the cheapest strategy whose cross-fitted validation accuracy is, with {100 * found.confidence:g} % "
        f"confidence, at most {_points(found.margin)} below the best"
    )
    reason = _reason(found, strategies)
    if not found.is_decided:
        reason += f" {_undecided(found, strategies)}"
    reason += of_runs(dict(strategies), len(strategies[found.strategy]["seeds"]), "val")
    return f"**Recommendation: {found.strategy}** ({rule}). {reason}\n\n{_tested(found.strategy, strategies)}"


def _reason(found: Recommendation, strategies: Mapping[str, Json]) -> str:
    accuracy = {name: strategies[name]["val"]["metrics"]["accuracy"]["value"] for name in strategies}
    if found.strategy != found.best:
        verdict = next(verdict for verdict in found.verdicts if verdict.strategy == found.strategy)
        cost, most = (teraflops(strategies[name]["cost"]["train_flops"]) for name in (found.strategy, found.best))
        return (
            f"{found.best} is best on validation, {100 * accuracy[found.best]:.1f} %; {found.strategy} is "
            f"{100 * verdict.difference:+.1f} points from it, at worst {100 * verdict.low:+.1f}, and trains with "
            f"{cost} TFLOPs in place of {most}."
        )
    best = f"It is best on validation, {100 * accuracy[found.best]:.1f} %"
    if len(strategies.keys() - {HEAD_ALL_SEEDS}) == 1:
        return f"{best}; nothing was compared with it, fine_tune.run is empty."
    if not found.verdicts:
        return f"{best}, and none is cheaper."
    worse = [verdict.strategy for verdict in found.verdicts if verdict.finding == "worse"]
    return f"{best}; shown worse by more than the margin: {', '.join(worse)}." if worse else f"{best}."


def _undecided(found: Recommendation, strategies: Mapping[str, Json]) -> str:
    """Which cheaper strategies may be as good, which more expensive ones better, and how many images would decide."""
    chosen_flops = strategies[found.strategy]["cost"]["train_flops"]
    may_be_as_good = [
        f"{verdict.strategy} ({100 * verdict.difference:+.1f} points from {found.best}, between "
        f"{100 * verdict.low:+.1f} and {100 * verdict.high:+.1f})"
        for verdict in found.verdicts
        if verdict.finding == "undecided" and strategies[verdict.strategy]["cost"]["train_flops"] < chosen_flops
    ]
    val = strategies[found.best]["val"]
    per_image = sum(val["n_units"]) / sum(val["n"])
    images = "no number of images would, if the difference is what it seems"
    if found.images_needed is not None:
        units = f" images ({round(per_image * found.images_needed):,} units)" if per_image < 1 else ""
        about = (
            f"about {found.images_needed:,}{units}"
            if found.images_needed <= MOST_IMAGES
            else f"more than {MOST_IMAGES:,}"
        )
        images = f"{about} would (80 % power)"
    may_be_better = [
        f"{rival.strategy} (up to {100 * rival.high:+.1f} points from {found.best})" for rival in found.rivals
    ]
    questions = [
        f"whether something {what}: {'; '.join(these)}"
        for what, these in (
            ("cheaper is as good", may_be_as_good),
            (f"dearer is better by more than {_points(found.margin)}", may_be_better),
        )
        if these
    ]
    n_val = sampled({found.best: strategies[found.best]}, "val")
    return f"**The {n_val} cannot decide** {'; or '.join(questions)}; {images}."


def _points(share: float) -> str:
    return f"{100 * share:g} point{'' if share == 0.01 else 's'}"


def _tested(name: str, strategies: Mapping[str, Json]) -> str:
    strategy = strategies[name]
    text = f"On the test images {name} has an accuracy of {percent(strategy['test']['metrics']['accuracy'])} %"
    if strategy["vs_baseline"]:
        difference = strategy["vs_baseline"]["test"]
        return f"{text}, {points(difference)} points from the baseline (p {_p(difference['p_value'])})."
    return f"{text}; it is the baseline."


def _p(value: float) -> str:
    text = p_value(value)
    return text if text.startswith("<") else f"= {text}"


def _accuracy(runs: Sequence[Outcomes], study: Study) -> float:
    """Mean over the seeds."""
    hits = [(run.predicted == study.label[run.rows], study.weight[run.rows]) for run in runs]
    return float(np.mean([np.average(hit, weights=weight) for hit, weight in hits]))
