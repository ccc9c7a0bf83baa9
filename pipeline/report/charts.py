"""Records -> Vega-Lite specifications of the page's charts, and the two themes that they share.

A chart is as wide as its place and takes its colours from the theme, so that one specification serves dark and light,
phone and desk. What the colours stand for is said beside a chart, in HTML, where it can wrap.
"""

import re
from collections.abc import Sequence
from typing import Any

import altair as alt

Rows = Sequence[dict[str, Any]]
Spec = dict[str, Any]

# Colours that stay apart for the colour-blind: Okabe & Ito 2008, "Color universal design"; on dark ground lightened
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#59636e",
    "line": "#dfe3e8",
    "heat": ["#f1f5f9", "#9cc5de", "#0072b2", "#003b5c"],
    "category": ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b", "#56b4e9", "#882255", "#4d4d4d", "#999933"],
}
DARK = {
    "paper": "#14181d",
    "ink": "#e6e9ed",
    "muted": "#a0a9b3",
    "line": "#323a43",
    "heat": ["#1d242c", "#1f5273", "#3f9bd1", "#b9e2fb"],
    "category": ["#56b4e9", "#f28e4b", "#2fc79a", "#dd8fc4", "#e6c34a", "#9ad0f5", "#e07a9b", "#b5bac0", "#c9c96b"],
}
LABELLED_CELLS = 6  # classes up to which a cell of the confusion matrix has room for its numbers


def theme(colours: dict[str, Any]) -> Spec:
    """A Vega-Lite config."""
    axis = {
        "labelColor": colours["muted"],
        "titleColor": colours["muted"],
        "gridColor": colours["line"],
        "domainColor": colours["line"],
        "tickColor": colours["line"],
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 130,
    }
    return {
        "background": None,
        "font": "system-ui, sans-serif",
        "lineBreak": "\n",
        "padding": {"left": 0, "right": 8, "top": 4, "bottom": 5},
        "view": {"stroke": None},
        "axis": axis,
        # A title above the axis instead of beside it leaves a phone its width
        "axisY": {"titleAngle": 0, "titleAlign": "left", "titleAnchor": "end", "titleX": 0, "titleY": -10},
        "range": {"category": colours["category"], "heatmap": colours["heat"], "ramp": colours["heat"]},
        "text": {"color": colours["ink"], "fontSize": 12},
        "rule": {"color": colours["muted"]},
        "style": {
            "on-light": {"color": colours["ink"]},
            "on-strong": {"color": colours["paper"]},
            "quiet-rule": {"color": colours["muted"], "strokeDash": [4, 4], "strokeWidth": 1.2},
            "plain": {"color": colours["category"][0]},
        },
    }


def accuracy_against_cost(rows: Rows, names: Sequence[str]) -> Spec:
    """Rows of strategy, train_flops, accuracy, low, high (None where unknown)."""
    cost = alt.X("train_flops:Q", title="training FLOPs, from nothing (log)")
    cost = cost.scale(type="log", nice=False, padding=40).axis(format="~s", grid=False, tickCount=4)
    accuracy = alt.Y("accuracy:Q", title="test accuracy").scale(zero=False).axis(format=".0%", tickCount=6)
    base = _chart(rows).encode(cost, _colour("strategy", names))
    whiskers = base.mark_rule(strokeWidth=2).encode(alt.Y("low:Q"), alt.Y2("high:Q"))
    points = base.mark_point(filled=True, size=110, opacity=1).encode(
        accuracy,
        tooltip=[
            alt.Tooltip("strategy:N"),
            alt.Tooltip("accuracy:Q", format=".1%"),
            alt.Tooltip("low:Q", format=".1%"),
            alt.Tooltip("high:Q", format=".1%"),
            alt.Tooltip("train_flops:Q", format=".3s"),
        ],
    )
    has_intervals = any(row.get("low") is not None for row in rows)
    return _spec(whiskers + points if has_intervals else points, 280)


def learning_curves(rows: Rows, names: Sequence[str]) -> Spec:
    """Rows of strategy, run, epoch, loss, kind (validation | training), is_chosen."""
    base = _chart(rows).encode(
        alt.X("epoch:Q", title="epoch (0: the start)").axis(tickMinStep=1, grid=False, format="d"),
        alt.Y("loss:Q", title="loss (nats)").scale(zero=False).axis(tickCount=6),
        _colour("strategy", names),
        alt.Detail("run:N"),
        tooltip=["run:N", "kind:N", "epoch:Q", alt.Tooltip("loss:Q", format=".4f")],
    )
    dash = alt.StrokeDash("kind:N", legend=None).scale(domain=["validation", "training"], range=[[1, 0], [3, 3]])
    chosen = base.transform_filter("datum.is_chosen").mark_point(filled=True, size=90, opacity=1)
    return _spec(base.mark_line(strokeWidth=1.8).encode(dash) + chosen, 280)


def penalty_path(rows: Rows) -> Spec:
    """Rows of seed, strength (text), val_nll, is_chosen; from the weakest penalty to the strongest."""
    order = list(dict.fromkeys(row["strength"] for row in rows))
    base = _chart(rows).encode(
        alt.X("strength:N", title="strength of the penalty", sort=order).axis(labelAngle=0, grid=False),
        alt.Y("val_nll:Q", title="validation NLL (nats)").scale(zero=False).axis(tickCount=6),
        alt.Detail("seed:N"),
        tooltip=["seed:N", "strength:N", alt.Tooltip("val_nll:Q", format=".4f")],
    )
    line = base.mark_line(style="plain", opacity=0.5, strokeWidth=1.5)
    chosen = base.transform_filter("datum.is_chosen").mark_point(style="plain", filled=True, size=80, opacity=0.9)
    return _spec(line + chosen, 280)


def confusion(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> Spec:
    """Counts by actual (rows) and predicted class, coloured by their share of the actual class."""
    has_room = len(class_names) <= LABELLED_CELLS
    rows = []
    for actual, line in zip(class_names, counts, strict=True):
        for predicted, count in zip(class_names, line, strict=True):
            share = count / sum(line) if sum(line) else 0.0
            label = f"{100 * share:.0f} %\n{count:,}" if has_room else f"{100 * share:.0f}" if count else ""
            rows.append({"actual": actual, "predicted": predicted, "count": count, "share": share, "label": label})
    base = _chart(rows).encode(
        alt.X("predicted:N", title=None, sort=list(class_names)).axis(
            orient="top", labelAngle=0 if len(class_names) <= 3 else -45, labelLimit=90, domain=False, ticks=False
        ),
        alt.Y("actual:N", title=None, sort=list(class_names)).axis(domain=False, ticks=False, labelLimit=90),
        tooltip=["actual:N", "predicted:N", "count:Q", alt.Tooltip("share:Q", format=".1%")],
    )
    cells = base.mark_rect(cornerRadius=2).encode(
        alt.Color("share:Q", legend=None).scale(domain=[0, 1], range="heatmap", interpolate="rgb")
    )
    layers: list[alt.Chart] = [cells]
    if len(class_names) <= 2 * LABELLED_CELLS:
        for style, where in (("on-light", "datum.share < 0.45"), ("on-strong", "datum.share >= 0.45")):
            layers.append(base.transform_filter(where).mark_text(style=style, lineHeight=15).encode(text="label:N"))
    return _spec(alt.layer(*layers), min(420, max(150, 48 * len(class_names))))


def reliability(rows: Rows, names: Sequence[str]) -> Spec:
    """Rows of strategy, confidence, accuracy, weight (share of the images)."""
    least = min((row["confidence"] for row in rows), default=0.0) - 0.02
    base = _chart(rows).encode(
        alt.X("confidence:Q", title="mean confidence")
        .scale(domain=[least, 1], nice=False)
        .axis(format=".0%", tickCount=5),
        alt.Y("accuracy:Q", title="accuracy").scale(domain=[0, 1]).axis(format=".0%", tickCount=5),
        _colour("strategy", names),
        tooltip=[
            "strategy:N",
            alt.Tooltip("confidence:Q", format=".1%"),
            alt.Tooltip("accuracy:Q", format=".1%"),
            alt.Tooltip("weight:Q", format=".1%", title="share of the images"),
        ],
    )
    ends = [{"x": 0, "y": 0}, {"x": 1, "y": 1}]
    even = (
        _chart(ends)
        .mark_line(style="quiet-rule", clip=True)
        .encode(alt.X("x:Q").scale(domain=[least, 1]), alt.Y("y:Q"))
    )
    line = base.mark_line(strokeWidth=1.5, opacity=0.6)
    points = base.mark_point(filled=True, opacity=0.95).encode(
        alt.Size("weight:Q", legend=None).scale(range=[25, 320], domain=[0, 0.5], clamp=True)
    )
    return _spec(even + line + points, 280)


def per_class(rows: Rows, classes: Sequence[str], names: Sequence[str]) -> Spec:
    """Rows of strategy, class, f1, precision, recall, support: bars of F1."""
    bars = _chart(rows).encode(
        alt.Y("class:N", sort=list(classes), title=None).axis(domain=False, ticks=False),
        alt.YOffset("strategy:N", sort=list(names)),
        alt.X("f1:Q", title="F1").scale(domain=[0, 1]).axis(format=".0%", tickCount=5),
        _colour("strategy", names),
        tooltip=[
            "strategy:N",
            "class:N",
            *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("f1", "precision", "recall")),
            alt.Tooltip("support:Q", format=","),
        ],
    )
    height = len(classes) * max(22, 11 * len(names) + 10)
    return _spec(bars.mark_bar(cornerRadiusEnd=2), height)


def class_counts(rows: Rows) -> Spec:
    """Rows of class, count: bars with their numbers, the largest first."""
    most = max(row["count"] for row in rows)
    order = [row["class"] for row in rows]
    base = _chart(rows).encode(
        alt.Y("class:N", sort=order, title=None).axis(domain=False, ticks=False),
        alt.X("count:Q", title="images").scale(domain=[0, 1.2 * most], nice=False).axis(format=",d", tickCount=4),
        tooltip=["class:N", alt.Tooltip("count:Q", format=",")],
    )
    bars = base.mark_bar(style="plain", cornerRadiusEnd=2)
    numbers = base.mark_text(align="left", dx=5).encode(alt.Text("count:Q", format=","))
    return _spec(bars + numbers, 26 * len(rows))


def feature_map(rows: Rows, field: str, domain: Sequence[str], shares: Sequence[float]) -> Spec:
    """Rows of x, y, image and `field`; `shares` of the variance that the two axes hold."""
    hidden: dict[str, Any] = {"labels": False, "ticks": False, "grid": False}
    first, second = (f"principal component {i} ({share:.0%} of the variance)" for i, share in enumerate(shares, 1))
    points = _chart(rows).encode(
        alt.X("x:Q", title=first).scale(zero=False, nice=False, padding=6).axis(**hidden),
        alt.Y("y:Q", title=second).scale(zero=False, nice=False, padding=6).axis(**hidden),
        _colour(field, domain),
        tooltip=[alt.Tooltip("image:N", title="file"), "class:N", "verdict:N"],  # of what is called image, one is made
    )
    # Thousands of points: on a canvas, which the page chooses by this name
    return _spec(points.mark_circle(size=18, opacity=0.6), 340) | {"usermeta": {"renderer": "canvas"}}


def _chart(rows: Rows) -> alt.Chart:
    return alt.Chart(alt.Data(values=list(rows)))


def _colour(field: str, domain: Sequence[str]) -> alt.Color:
    return alt.Color(f"{field}:N", legend=None).scale(domain=list(domain))


def _spec(chart: alt.Chart | alt.LayerChart | alt.FacetChart, height: int) -> Spec:
    described = chart.properties(width="container", height=height).to_dict()
    return {key: _speakable(value) for key, value in described.items() if key not in ("config", "$schema")}


def _speakable(value: Any) -> Any:  # noqa: ANN401
    """Without the two line separators that JSON allows in a text and Vega's parser of expressions does not."""
    if isinstance(value, dict):
        return {key: _speakable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_speakable(inner) for inner in value]
    return re.sub("[\u2028\u2029]", " ", value) if isinstance(value, str) else value
