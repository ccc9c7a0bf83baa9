"""The experiments of a sweep of the freeze boundary, side by side.

Reads   reports/details.json of HEAD and of every `dvc exp run` that started from HEAD, as git has them
Writes  reports/sweep.svg     validation accuracy and training cost against the share of the network that is trained

The boundary with the lowest validation NLL is selected; its test accuracy is shown after the selection.
"""

import io
import json
import logging
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from pipeline.files import write_text
from pipeline.params import HEAD_ONLY
from pipeline.report.provenance import file_at, git

DETAILS = "reports/details.json"
PICTURE = Path("reports/sweep.svg")
log = logging.getLogger("pipeline")


def show(strategy: str) -> None:
    """Print the table, write the picture, name the selected boundary."""
    boundaries = read(strategy)
    print(as_table(boundaries))
    write_text(PICTURE, as_svg(boundaries))
    best = boundaries.sort_values("val_nll", kind="stable").iloc[0]
    print(
        f"\nlowest validation NLL: freeze until {best.boundary} ({best.experiment}); on the test images "
        f"{best.test_value:.1%} ({best.test_low:.1%} to {best.test_high:.1%})\npicture: {PICTURE}"
    )


def read(strategy: str) -> pd.DataFrame:
    """The experiments with `strategy`, and the head alone, one row per freeze boundary, from the least trained on.

    Of experiments with the same boundary the one with the lowest validation NLL. Raises ValueError if neither HEAD nor
    an experiment that started there has run the strategy.
    """
    head = git("rev-parse", "HEAD").strip()
    refs = git("for-each-ref", "--format=%(refname)", f"refs/exps/{head[:2]}/{head[2:]}").split()
    rows = []
    for ref in [*refs, "HEAD"]:
        text = file_at(ref, DETAILS)
        try:
            strategies = json.loads(text).get("strategies", {}) if text else {}  # none before the first repro
        except ValueError as error:
            log.warning("%s: %s is damaged (%s), and left out", ref, DETAILS, error)
            continue
        if strategy in strategies:  # else another study, or reports of an earlier version
            rows.append(_row(HEAD_ONLY, strategies[HEAD_ONLY]))
            rows.append(_row(ref.rpartition("/")[2], strategies[strategy]))
    if not rows:
        raise ValueError(f"no {DETAILS} of HEAD, or of an experiment that started there, has the strategy {strategy}")
    best = pd.DataFrame(rows).sort_values("val_nll", kind="stable").drop_duplicates("boundary")
    return best.sort_values("trained", ignore_index=True)


def _row(experiment: str, details: dict[str, Any]) -> dict[str, Any]:
    """Fractions, nats and training FLOPs; `low` and `high` are the bounds of the 95 % interval of the accuracy."""
    run = details["runs"][0]
    accuracy = {split: details[split]["metrics"]["accuracy"] for split in ("val", "test")}
    return {
        "experiment": experiment,
        "boundary": run["network"]["boundary"],
        "trained": run["cost"]["trainable_params"] / run["network"]["params"],
        "val_nll": details["val"]["metrics"]["nll"]["value"],
        "train_flops": details["cost"]["train_flops"],
        "seeds": details["distinct_runs"],
        **{f"{split}_{key}": found[key] for split, found in accuracy.items() for key in ("value", "low", "high")},
    }


def as_table(boundaries: pd.DataFrame) -> str:
    """Markdown, validation figures only."""
    lines = [
        "| frozen until | trained share | validation accuracy (95 % interval) | validation NLL (nats) "
        "| training TFLOPs | n | experiment |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row.boundary} | {row.trained:.1%} | {row.val_value:.1%} ({row.val_low:.1%} to {row.val_high:.1%}) "
            f"| {row.val_nll:.3f} | {row.train_flops / 1e12:,.0f} | {row.seeds} | {row.experiment} |"
            for _, row in boundaries.iterrows()
        ),
    ]
    return "\n".join(lines)


def as_svg(boundaries: pd.DataFrame) -> str:
    """Two panels over the trained share, drawn by Vega-Lite without a network."""
    share = alt.X("trained:Q", title="share of the parameters that is trained").axis(format="%")
    accuracy = alt.Y("val_value:Q", title="validation accuracy, 95 % interval").scale(zero=False).axis(format="%")
    chart = alt.Chart(boundaries, width=640).encode(share)
    points = chart.mark_line(point=True).encode(accuracy)
    bars = chart.mark_rule().encode(alt.Y("val_low:Q"), alt.Y2("val_high:Q"))
    above = chart.mark_text(angle=270, dx=5, align="left", baseline="middle")
    names = above.encode(alt.Y("val_high:Q"), alt.Text("boundary:N"))
    cost = chart.mark_line(point=True).encode(alt.Y("train_flops:Q", title="training FLOPs").axis(format="~s"))
    svg = io.StringIO()
    ((points + bars + names).properties(height=300) & cost.properties(height=140)).save(svg, format="svg")
    return svg.getvalue()
