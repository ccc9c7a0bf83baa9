"""The Markdown of a pull request: what changed against another revision, the recommendation, and the guard.

DVC compares parameters and metrics. The guard compares reports/details.json on the disk with that of the revision,
which `git show` reads.
"""

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vl_convert

from pipeline.comparison.plots import VEGA_LITE
from pipeline.logs import one_line
from pipeline.params import load_params
from pipeline.report.provenance import file_at, git

DETAILS = Path("reports/details.json")
PICTURES = ("reports/cost.json", "reports/curves.json", "reports/reliability.json", "reports/confusion")
HIGHER_IS_BETTER = {
    *("accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy", "auroc", "precision", "recall", "f1"),
    *("difference", "by_seed", "baseline_accuracy", "vs_baseline"),
}
LOWER_IS_BETTER = {
    *("nll", "brier", "ece", "ece_scaled", "temperature", "sd", "val_nll", "largest_rounding"),
    *("p_value", "p_value_uncorrected", "corrected_t_p_value"),
    *("cost", "trainable_params", "train_flops", "base_passes", "cached_bytes"),
}
Figures = dict[str, Any]  # by dotted name: the keys of details.json below `strategies`


@dataclass(frozen=True)
class Verdict:
    """A guarded figure at the revision and here, None where there is none."""

    name: str
    tolerance: float
    before: float | None
    after: float | None

    @property
    def worse_by(self) -> float:
        """The regression: infinite if the figure is gone, 0 if it is new."""
        if self.before is None or self.after is None:
            return float("inf") if self.before is not None else 0.0
        return round((self.before - self.after) * (1 if is_higher_better(self.name) else -1), 9)

    def __str__(self) -> str:
        """In a line."""
        by = f"by {self.worse_by:g} (tolerance {self.tolerance:g})" if self.after is not None else "is gone"
        return f"{self.name} {by}"

    @property
    def holds(self) -> bool:
        """Whether it is within its tolerance."""
        return self.worse_by <= self.tolerance


def show(revision: str, pictures: Path | None) -> None:
    """Print the Markdown; ValueError if a guarded figure got worse by more than its tolerance."""
    guard = load_params().compare.guard
    if not DETAILS.is_file():
        raise FileNotFoundError(f"{DETAILS}: not found; run: dvc repro")
    after, recommendation = parse(DETAILS.read_text(encoding="utf-8"), f"{DETAILS}")
    before, _ = parse(text_at(revision), f"--against {revision}: {DETAILS}")
    verdicts = judge(before, after, guard)
    print(as_markdown(revision, recommendation, verdicts))
    if pictures is not None:
        print(draw(revision, pictures))
    if worse := [str(verdict) for verdict in verdicts if not verdict.holds]:
        raise ValueError(f"worse than in {revision}: {'; '.join(worse)}")


def text_at(revision: str) -> str:
    """details.json as git has it at `revision`; ValueError if there is no such commit, or no such file in it."""
    try:
        commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").strip()
        text = file_at(commit, DETAILS.as_posix())
    except ValueError as error:
        nothing = "no such commit here; expected a branch, tag or hash (git fetch brings those of a remote)"
        problem = str(error).removeprefix("git rev-parse: ").strip()  # empty where there is just no such commit
        raise ValueError(f"--against {revision}: {problem or nothing}") from None
    if text is None:
        raise ValueError(f"--against {revision}: that commit has no {DETAILS}; run `dvc repro` there and commit")
    return text


def parse(text: str, source: str) -> tuple[Figures, str]:
    """Figures of details.json and the text of its recommendation; ValueError, naming `source`, for any other shape."""
    try:
        details = json.loads(text)
        strategies, recommendation = dict(details["strategies"]), str(details["recommendation"]["text"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{source}: damaged, or of another version ({one_line(error)}); run: dvc repro") from None
    return dict(_flat(strategies)), recommendation


def judge(before: Figures, after: Figures, guard: Mapping[str, float]) -> list[Verdict]:
    """A verdict on every guarded figure; a strategy that ran on neither side holds.

    ValueError for a name that its strategy has on neither side, and for what is no number or has no better direction.
    """
    known = {**before, **after}
    for name in guard:
        is_higher_better(name)
        same_strategy = [other for other in known if other.partition(".")[0] == name.partition(".")[0]]
        if same_strategy and name not in known:
            near = ", ".join(difflib.get_close_matches(name, same_strategy, n=3)) or "none"
            raise ValueError(f"compare.guard: {name!r} is not in {DETAILS}; close matches: {near}")
        for value in (before.get(name), after.get(name)):
            if isinstance(value, bool | str):
                raise ValueError(f"compare.guard: {name} is {value!r} in {DETAILS}; expected a number")
    return [Verdict(name, tolerance, before.get(name), after.get(name)) for name, tolerance in guard.items()]


def is_higher_better(name: str) -> bool:
    """By the last key of the dotted name whose better direction is known; ValueError if there is none."""
    for key in reversed(name.split(".")):
        if key in HIGHER_IS_BETTER or key in LOWER_IS_BETTER:
            return key in HIGHER_IS_BETTER
    known = ", ".join(sorted(HIGHER_IS_BETTER | LOWER_IS_BETTER))
    raise ValueError(f"compare.guard: {name}: is higher or lower better? Expected a name with one of the keys {known}")


def as_markdown(revision: str, recommendation: str, verdicts: list[Verdict]) -> str:
    """Parameters and metrics that differ, the recommendation of here, the guard."""
    head = ("file", "name", revision, "here", "change")
    guarded = [
        (one.name, one.before, one.after, one.tolerance, "holds" if one.holds else "**worse**") for one in verdicts
    ]
    sections = [
        f"## Compared with `{revision}`",
        "### Parameters",
        _table(head, _changes("params", revision)) or "No parameter differs.",
        "### Metrics",
        _table(head, _changes("metrics", revision)) or "No metric differs.",
        "### Recommendation",
        recommendation,
        "### Guard",
        _table(("figure", revision, "here", "tolerance", ""), guarded) or "Nothing is guarded.",
    ]
    return "\n\n".join(sections) + "\n"


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
    command = [sys.executable, "-m", "dvc", *arguments, "--json"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}  # whatever this terminal can show
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    if done.returncode:
        raise ValueError(f"dvc {' '.join(arguments[:3])}: {' '.join(done.stderr.split())}")
    print(done.stderr, end="", file=sys.stderr)  # what it could not read at one of the revisions
    return json.loads(done.stdout)


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
