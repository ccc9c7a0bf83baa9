"""The Markdown of a pull request: what changed against another revision, the recommendation, and the guard.

DVC compares parameters and metrics. The guard compares reports/details.json and reports/outcomes.json on the disk with
those of the revision, which `git show` reads. By default it is a statement with uncertainty: it fails once a regression
larger than the tolerance is shown. Test accuracy is compared image by image, where both sides have the same images;
any other figure by the intervals of both sides, and one without an interval as it is.
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import vl_convert
from scipy.special import ndtri

from pipeline.comparison import tested_images
from pipeline.comparison.plots import VEGA_LITE
from pipeline.comparison.tested_images import Tested
from pipeline.logs import one_line
from pipeline.params import Compare, load_params
from pipeline.report.provenance import file_at, git
from pipeline.tools import experiments

DETAILS, OUTCOMES = Path("reports/details.json"), Path("reports/outcomes.json")
ACCURACY = ".test.metrics.accuracy.value"  # the figure that is compared image by image
PICTURES = ("reports/cost.json", "reports/curves.json", "reports/reliability.json", "reports/confusion")
OF_METRIC = {"difference", "by_seed", "baseline_value", "vs_baseline"}  # figures in compare.metric
HIGHER_IS_BETTER = {
    *("accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy", "auroc", "precision", "recall", "f1"),
    *OF_METRIC,
}
LOWER_IS_BETTER = {
    *("nll", "brier", "ece", "ece_scaled", "temperature", "sd", "val_nll", "largest_rounding"),
    *("p_value", "p_value_uncorrected"),
    *("cost", "trainable_params", "train_flops", "base_passes", "cached_bytes"),
}
Figures = dict[str, Any]  # by dotted name: the keys of details.json below `strategies`


@dataclass(frozen=True)
class Side:
    """What one side of the comparison has: figures, and the tested images, None if it has no outcomes.json."""

    figures: Figures
    recommendation: str
    tested: Tested | None


@dataclass(frozen=True)
class Verdict:
    """A guarded figure at the revision and here, None where there is none.

    `shown`: the regression that is shown, compared with the tolerance: a lower bound, or the plain difference. `method`
    says which.
    """

    name: str
    tolerance: float
    before: float | None
    after: float | None
    shown: float
    method: str

    def __str__(self) -> str:
        """In a line."""
        by = f"by at least {self.shown:.4g} ({self.method}; tolerance {self.tolerance:g})"
        return f"{self.name} {by if self.after is not None else 'is gone'}"

    @property
    def holds(self) -> bool:
        """Whether it is within its tolerance."""
        return self.shown <= self.tolerance


def show(revision: str, pictures: Path | None) -> None:
    """Print the Markdown; ValueError if a guarded figure got worse by more than its tolerance."""
    options = load_params().compare
    if not DETAILS.is_file():
        raise FileNotFoundError(f"{DETAILS}: not found; run: dvc repro")
    tested = OUTCOMES.read_text(encoding="utf-8") if OUTCOMES.is_file() else None
    after = parse(DETAILS.read_text(encoding="utf-8"), tested)
    before = parse(*texts_at(revision), f"--against {revision}: ")
    verdicts = judge(before, after, options)
    print(as_markdown(revision, before, after, verdicts))
    if pictures is not None:
        print(draw(revision, pictures))
    if worse := [str(verdict) for verdict in verdicts if not verdict.holds]:
        raise ValueError(f"worse than in {revision}: {'; '.join(worse)}")


def texts_at(revision: str) -> tuple[str, str | None]:
    """details.json and, if it is there, outcomes.json as git has them at `revision`; ValueError if there are none."""
    try:
        commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").strip()
        found, tested = (file_at(commit, path.as_posix()) for path in (DETAILS, OUTCOMES))
    except ValueError as error:
        nothing = "no such commit here; expected a branch, tag or hash (git fetch brings those of a remote)"
        problem = str(error).removeprefix("git rev-parse: ").strip()  # empty where there is just no such commit
        raise ValueError(f"--against {revision}: {problem or nothing}") from None
    if found is None:
        raise ValueError(f"--against {revision}: that commit has no {DETAILS}; run `dvc repro` there and commit")
    return found, tested


def parse(details: str, tested: str | None, where: str = "") -> Side:
    """Figures and recommendation of details.json, and outcomes.json; ValueError, naming the file, for another shape."""
    path = DETAILS
    try:
        found = json.loads(details)
        strategies, recommendation = dict(found["strategies"]), str(found["recommendation"]["text"])
        path = OUTCOMES
        outcomes = tested_images.decode(json.loads(tested)) if tested is not None else None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}{path}: damaged, or of another version ({one_line(error)}); run: dvc repro") from None
    return Side(dict(_flat(strategies)), recommendation, outcomes)


def judge(before: Side, after: Side, options: Compare) -> list[Verdict]:
    """A verdict on every guarded figure; a strategy that ran on neither side holds.

    ValueError for a name that its strategy has on neither side, and for what is no number or has no better direction.
    """
    known, verdicts = {**before.figures, **after.figures}, []
    for name, tolerance in options.guard.items():
        is_higher_better(name, options.metric)
        same_strategy = [other for other in known if other.partition(".")[0] == name.partition(".")[0]]
        if same_strategy and name not in known:
            near = ", ".join(difflib.get_close_matches(name, same_strategy, n=3)) or "none"
            raise ValueError(f"compare.guard: {name!r} is not in {DETAILS}; close matches: {near}")
        was, is_now = before.figures.get(name), after.figures.get(name)
        for value in (was, is_now):
            if isinstance(value, bool | str):
                raise ValueError(f"compare.guard: {name} is {value!r} in {DETAILS}; expected a number")
        verdicts.append(Verdict(name, tolerance, was, is_now, *regression(name, before, after, options)))
    return verdicts


def regression(name: str, before: Side, after: Side, options: Compare) -> tuple[float, str]:
    """The regression of a figure that is shown, and how: infinite if the figure is gone, 0 if it is new."""
    was, is_now = before.figures.get(name), after.figures.get(name)
    if was is None or is_now is None:
        return (float("inf"), "gone") if was is not None else (0.0, "new" if is_now is not None else "not run")
    difference = round((was - is_now) * (1 if is_higher_better(name, options.metric) else -1), 9) or 0.0  # never -0.0
    if options.guard_by == "difference":
        return difference, "plain difference"
    if name.endswith(ACCURACY) and before.tested and after.tested:
        found = tested_images.regression_bound(
            before.tested, after.tested, name.removesuffix(ACCURACY), options.confidence
        )
        if found:
            return found[0], f"paired on {found[1]:,} images"
    stem = name.rpartition(".")[0]
    ends = [side.figures.get(f"{stem}.{end}") for end in ("low", "high") for side in (before, after)]
    is_estimate = name.endswith(".difference" if ".vs_baseline." in name else ".value")
    if not is_estimate or None in ends:
        return difference, "plain difference"
    # Half-widths of independent intervals add up as the sides of a right-angled triangle do
    low, high = np.array(ends, float).reshape(2, 2)
    half_width = float(np.hypot(*(high - low))) / 2
    return difference - half_width * float(ndtri(options.confidence) / ndtri(0.975)), "unpaired, by the intervals"


def say_other_images(revision: str, before: Side, after: Side) -> str:
    """A first line if the two sides tested different images, with both counts; or an empty text."""
    ours, theirs = after.tested, before.tested
    if ours is None or theirs is None:
        missing = revision if theirs is None else "here"
        return f"It is not known whether both sides tested the same images: {missing} has no {OUTCOMES}."
    both = ours.correct.keys() & theirs.correct.keys()
    if ours.digest == theirs.digest and all(ours.correct[name].keys() == theirs.correct[name].keys() for name in both):
        return ""
    n = tested_images.count_shared(theirs, ours)
    if n == ours.n == theirs.n:
        return f"Both sides tested the same {n:,} images, but **in other splits, or with other seeds**."
    same = "" if n is None else f"; {n:,} of them are the same"
    return (
        f"**The two sides tested different images**: {theirs.n:,} in {revision}, {ours.n:,} here{same}. Figures of the "
        "two sides are about different images."
    )


def is_higher_better(name: str, metric: str) -> bool:
    """By the last key of the dotted name whose better direction is known; ValueError if there is none.

    `metric`: compare.metric, which the difference from the baseline is about.
    """
    for key in reversed(name.split(".")):
        if key in OF_METRIC:
            return metric != "nll"
        if key in HIGHER_IS_BETTER or key in LOWER_IS_BETTER:
            return key in HIGHER_IS_BETTER
    known = ", ".join(sorted(HIGHER_IS_BETTER | LOWER_IS_BETTER))
    raise ValueError(f"compare.guard: {name}: is higher or lower better? Expected a name with one of the keys {known}")


def as_markdown(revision: str, before: Side, after: Side, verdicts: list[Verdict]) -> str:
    """Whether the images differ, parameters and metrics that differ, the recommendation of here, the guard."""
    head = ("file", "name", revision, "here", "change")
    guarded = [
        (one.name, one.before, one.after, one.shown, one.method, one.tolerance, "holds" if one.holds else "**worse**")
        for one in verdicts
    ]
    columns = ("figure", revision, "here", "regression shown", "how", "tolerance", "")
    sections = [
        f"## Compared with `{revision}`",
        say_other_images(revision, before, after),
        "### Parameters",
        _table(head, _changes("params", revision)) or "No parameter differs.",
        "### Metrics",
        _table(head, _changes("metrics", revision)) or "No metric differs.",
        "### Recommendation",
        after.recommendation,
        "### Guard",
        _table(columns, guarded) or "Nothing is guarded.",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def draw(revision: str, directory: Path) -> str:
    """Write what `dvc plots diff` draws as PNG files; Markdown that shows them."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = ["### Pictures", ""]
    for name, plots in _dvc("plots", "diff", revision, "--targets", *PICTURES)["data"].items():
        for plot in plots:
            title = "_".join(Path(name).with_suffix("").parts[1:])
            path = directory / f"{title}.png"
            path.write_bytes(vl_convert.vegalite_to_png(plot["content"], vl_version=VEGA_LITE, scale=2))
            lines.append(f"![{title}]({path.as_posix()})")
    return "\n".join(lines) + "\n"


def _changes(kind: str, revision: str) -> list[tuple[Any, ...]]:
    """Rows of `dvc params diff` or `dvc metrics diff`, whose own Markdown does not escape `|`."""
    files = sorted(_dvc(kind, "diff", revision).items())
    return [
        (path, name, change.get("old"), change.get("new"), change.get("diff", ""))
        for path, changes in files
        for name, change in sorted(changes.items())
    ]


def _dvc(*arguments: str) -> dict[str, Any]:
    return json.loads(experiments.dvc(*arguments, "--json", is_quiet=True))


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:  # noqa: ANN401
    """Leaves by dotted name; the entries of a list are numbered from 0."""
    if not isinstance(value, dict | list):
        yield name, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _flat(inner, f"{name}.{key}" if name else f"{key}")


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Markdown; empty without rows."""
    lines = [head, ("---",) * len(head), *rows]
    escaped = ([" ".join(_cell(value).split()).replace("|", "\\|") for value in line] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped) if rows else ""


def _cell(value: Any) -> str:  # noqa: ANN401
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if type(value) is int else str(value)
