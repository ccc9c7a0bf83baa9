"""The experiments of a sweep of the freeze depth, side by side.

Reads   reports/details.json of HEAD and of every `dvc exp run` that started from HEAD, as git has them
Writes  reports/sweep.svg     validation accuracy and training cost against the share of the network that is trained

The depth of the lowest validation NLL is chosen; what it reaches on the test images is shown after the choice.
"""

import io
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from pipeline.files import write_text
from pipeline.params import HEAD_ONLY

DETAILS = "reports/details.json"
PICTURE = Path("reports/sweep.svg")


@dataclass(frozen=True)
class Depth:
    """One experiment: fractions, FLOPs of training; `low` and `high` bound the 95 % interval of `val_accuracy`."""

    experiment: str
    boundary: str
    trained: float
    val_accuracy: float
    low: float
    high: float
    val_nll: float
    train_flops: float
    seeds: int
    test_accuracy: float
    test_low: float
    test_high: float


def show(strategy: str) -> None:
    """Print the table, write the picture, name the choice."""
    depths = read(strategy)
    print(as_table(depths))
    write_text(PICTURE, as_svg(depths))
    best = min(depths, key=lambda depth: depth.val_nll)
    print(
        f"\nlowest validation NLL: freeze until {best.boundary} ({best.experiment}); on the test images "
        f"{best.test_accuracy:.1%} ({best.test_low:.1%} to {best.test_high:.1%})\npicture: {PICTURE}"
    )


def read(strategy: str) -> list[Depth]:
    """The runs of `strategy`, and the head alone, from the least trained to the most; of equal boundaries the best.

    Raises ValueError if neither HEAD nor an experiment that started there has run it.
    """
    head = _git("rev-parse", "HEAD").strip()
    refs = _git("for-each-ref", "--format=%(refname)", f"refs/exps/{head[:2]}/{head[2:]}").split()
    found: dict[str, Depth] = {}
    for ref in [*refs, "HEAD"]:
        try:
            details = json.loads(_git("show", f"{ref}:{DETAILS}"))
        except ValueError:  # a commit from before the first repro
            continue
        strategies = details.get("strategies", {})
        if strategy not in strategies:  # another study, or reports of an earlier version
            continue
        for name in (strategy, HEAD_ONLY):
            depth = _depth(HEAD_ONLY if name == HEAD_ONLY else ref.rpartition("/")[2], strategies[name])
            if depth.boundary not in found or depth.val_nll < found[depth.boundary].val_nll:
                found[depth.boundary] = depth
    if not found:
        raise ValueError(f"no {DETAILS} of HEAD, or of an experiment that started there, has the strategy {strategy}")
    return sorted(found.values(), key=lambda depth: depth.trained)


def _depth(experiment: str, details: dict[str, Any]) -> Depth:
    runs, val, test = details["runs"], details["val"]["metrics"], details["test"]["metrics"]
    return Depth(
        experiment=experiment,
        boundary=runs[0]["network"]["boundary"],
        trained=runs[0]["cost"]["trainable_params"] / runs[0]["network"]["params"],
        val_accuracy=val["accuracy"]["value"],
        low=val["accuracy"]["low"],
        high=val["accuracy"]["high"],
        val_nll=val["nll"]["value"],
        train_flops=details["cost"]["train_flops"],
        seeds=details["distinct_runs"],
        test_accuracy=test["accuracy"]["value"],
        test_low=test["accuracy"]["low"],
        test_high=test["accuracy"]["high"],
    )


def as_table(depths: list[Depth]) -> str:
    """Markdown, validation figures only."""
    lines = [
        "| frozen until | trained share | validation accuracy (95 % interval) | validation NLL (nats) "
        "| training TFLOPs | n | experiment |",
        "|---|---|---|---|---|---|---|",
    ]
    for depth in depths:
        accuracy = f"{depth.val_accuracy:.1%} ({depth.low:.1%} to {depth.high:.1%})"
        cost = f"{depth.train_flops / 1e12:,.0f}"
        cells = [depth.boundary, f"{depth.trained:.1%}", accuracy, f"{depth.val_nll:.3f}", cost, f"{depth.seeds}"]
        lines.append(f"| {' | '.join([*cells, depth.experiment])} |")
    return "\n".join(lines)


def as_svg(depths: list[Depth]) -> str:
    """Two panels over the trained share, drawn by Vega-Lite without a network."""
    table = pd.DataFrame([vars(depth) for depth in depths])
    share = alt.X("trained:Q", title="share of the parameters that is trained").axis(format="%")
    accuracy = alt.Y("val_accuracy:Q", title="validation accuracy, 95 % interval").scale(zero=False).axis(format="%")
    points = alt.Chart(table).mark_line(point=True).encode(share, accuracy)
    bars = alt.Chart(table).mark_rule().encode(share, alt.Y("low:Q"), alt.Y2("high:Q"))
    above = alt.Chart(table).mark_text(angle=270, dx=5, align="left", baseline="middle")
    names = above.encode(share, alt.Y("high:Q"), alt.Text("boundary:N"))
    flops = alt.Y("train_flops:Q", title="training FLOPs").axis(format="~s")
    cost = alt.Chart(table).mark_line(point=True).encode(share, flops)
    chart = alt.vconcat(
        (bars + points + names).properties(width=640, height=300), cost.properties(width=640, height=140)
    )
    svg = io.StringIO()
    chart.save(svg, format="svg")
    return svg.getvalue()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout
