"""The Markdown of a pull request: what changed against another revision, what is recommended, and what is guarded.

Reads committed kinds of files only, params.yaml, reports/comparison.json and reports/details.json: those of REV by
`git show`, those of here from the disk.
"""

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vl_convert
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.comparison.plots import VEGA_LITE
from pipeline.params import HIGHER_IS_BETTER, PARAMS

COMPARISON, DETAILS = Path("reports/comparison.json"), Path("reports/details.json")
PICTURES = ("reports/cost.json", "reports/curves.json", "reports/reliability.json", "reports/confusion")
Number = float | None


@dataclass(frozen=True)
class State:
    """Parameters and metrics of a revision, by dotted name."""

    params: dict[str, Any]
    metrics: dict[str, Number]


@dataclass(frozen=True)
class Verdict:
    """On a guarded metric: its value before and after, None where there is none, and by how much it is worse."""

    name: str
    tolerance: float
    before: Number
    after: Number

    @property
    def worse_by(self) -> float:
        """In the direction in which the metric gets worse; infinite if it is gone, 0 if it is new."""
        if self.before is None or self.after is None:
            return float("inf") if self.before is not None else 0.0
        is_higher_better = self.name.partition(".")[2] in HIGHER_IS_BETTER
        return round(self.before - self.after if is_higher_better else self.after - self.before, 9)

    def __str__(self) -> str:
        """In a line."""
        by = f"by {self.worse_by:g} (tolerance {self.tolerance:g})" if self.after is not None else "is gone"
        return f"{self.name} {by}"

    @property
    def holds(self) -> bool:
        """Whether it is within its tolerance."""
        return self.worse_by <= self.tolerance


def here() -> tuple[State, str]:
    """The state on the disk and its recommendation; FileNotFoundError where nothing was compared yet."""
    for path in (COMPARISON, DETAILS):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; run: dvc repro")
    try:
        recommendation = json.loads(DETAILS.read_text(encoding="utf-8"))["recommendation"]["text"]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{DETAILS}: damaged, or of another version; run: dvc repro") from None
    return _state(PARAMS.read_text(encoding="utf-8"), COMPARISON.read_text(encoding="utf-8")), recommendation


def at(revision: str) -> State:
    """The state that git has of `revision`; ValueError if there is no such commit, or no reports in it."""
    commit = f"{revision}^{{commit}}"
    if _git("rev-parse", "--verify", "--quiet", "--end-of-options", commit) is None:
        raise ValueError(
            f"--against {revision}: no such commit here; expected a branch, tag or hash (git fetch brings those of a "
            "remote)"
        )
    shown = {path: _git("show", f"{revision}:./{path.as_posix()}") for path in (PARAMS, COMPARISON)}
    for path, text in shown.items():
        if text is None:
            raise ValueError(f"--against {revision}: that commit has no {path}; run `dvc repro` there and commit")
    try:
        return _state(str(shown[PARAMS]), str(shown[COMPARISON]))
    except (ValueError, YAMLError) as error:
        raise ValueError(f"--against {revision}: {' '.join(str(error).split())}") from None


def judge(before: State, after: State, guard: Mapping[str, float]) -> list[Verdict]:
    """A verdict on every guarded metric."""
    return [Verdict(name, guard[name], before.metrics.get(name), after.metrics.get(name)) for name in guard]


def as_markdown(revision: str, before: State, after: State, recommendation: str, verdicts: list[Verdict]) -> str:
    """Parameters and metrics that differ, the recommendation of here, the guard."""
    guarded = [
        (
            verdict.name,
            _value(verdict.before),
            _value(verdict.after),
            f"{verdict.tolerance:,g}",
            "holds" if verdict.holds else "**worse**",
        )
        for verdict in verdicts
    ]
    parts = [
        f"## Compared with {_code(revision)}",
        "### Parameters",
        _table(("parameter", revision, "here"), _changed(before.params, after.params)) or "No parameter differs.",
        "### Metrics",
        _table(("metric", revision, "here", "change"), _changed_metrics(before.metrics, after.metrics))
        or "No metric differs.",
        "### Recommendation",
        recommendation,
        "### Guard",
        _table(("metric", revision, "here", "tolerance", ""), guarded) or "Nothing is guarded.",
    ]
    return "\n\n".join(parts) + "\n"


def draw(revision: str, directory: Path) -> str:
    """Write what `dvc plots diff` draws as PNG files; Markdown that shows them."""
    command = [sys.executable, "-m", "dvc", "plots", "diff", revision, "--json", "--targets", *PICTURES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"dvc plots diff {revision}: {' '.join(done.stderr.split())}")
    directory.mkdir(parents=True, exist_ok=True)
    lines = ["### Pictures", ""]
    for name, plots in json.loads(done.stdout)["data"].items():
        for plot in plots:
            title = "_".join(Path(name).with_suffix("").parts[1:])
            path = directory / f"{title}.png"
            path.write_bytes(vl_convert.vegalite_to_png(plot["content"], vl_version=VEGA_LITE, scale=2))
            lines.append(f"![{title}]({path.as_posix()})")
    return "\n".join(lines) + "\n"


def _state(params: str, comparison: str) -> State:
    metrics = _flat(json.loads(comparison))
    if strange := [name for name, value in metrics.items() if not isinstance(value, float | int | None)]:
        raise ValueError(f"{COMPARISON}: {strange[0] or 'all of it'} is no number; expected what dvc repro writes")
    return State(_flat(YAML(typ="safe", pure=True).load(io.StringIO(params))), metrics)


def _flat(value: Any, name: str = "") -> dict[str, Any]:  # noqa: ANN401
    """Leaves by dotted name; lists are leaves."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    parts = (_flat(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items())
    return {key: inner for part in parts for key, inner in part.items()}


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    names = [*before, *(name for name in after if name not in before)]
    shown = [(name, _json(before, name), _json(after, name)) for name in names]
    return [row for row in shown if row[1] != row[2]]


def _changed_metrics(before: dict[str, Number], after: dict[str, Number]) -> list[tuple[str, str, str, str]]:
    rows = []
    for name in [*after, *(name for name in before if name not in after)]:
        old, new = before.get(name), after.get(name)
        if _value(old) != _value(new):
            change = "" if old is None or new is None else _value(new - old, sign="+")
            rows.append((name, _value(old), _value(new), change))
    return rows


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    """Markdown; empty without rows."""
    lines = [head, ("---",) * len(head), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped) if rows else ""


def _value(value: Number, sign: str = "") -> str:
    if value is None:
        return "none"
    return f"{value:{sign},}" if isinstance(value, int) else f"{value:{sign}.4f}"


def _json(values: dict[str, Any], name: str) -> str:
    return _code(json.dumps(values[name], ensure_ascii=False)) if name in values else "none"


def _code(text: str) -> str:
    return f"`{text.replace('`', ' ')}`"


def _git(*arguments: str) -> str | None:
    """What git says; None if it fails."""
    done = subprocess.run(["git", *arguments], capture_output=True, encoding="utf-8")
    return None if done.returncode else done.stdout
