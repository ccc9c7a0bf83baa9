"""Records -> Vega-Lite specifications of the page's charts, and the two themes that they share.

Charts that `dvc plots` draws too come from its templates in .dvc/plots/; the others are made here. A chart is as wide
as its container and takes its colours from the theme, so one specification serves dark and light, phone and desktop.
The legend of a chart is HTML beside it, where it can wrap.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt

Rows = Sequence[dict[str, Any]]
Spec = dict[str, Any]
TEMPLATES = Path(".dvc/plots")
HEIGHT = 280  # px

# Colours that colour-blind readers can tell apart: Okabe & Ito 2008, "Color universal design"; lighter on dark ground
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


def theme(colours: dict[str, Any]) -> Spec:
    """A Vega-Lite config."""
    muted, line = colours["muted"], colours["line"]
    axis = {"labelColor": muted, "titleColor": muted, "gridColor": line, "domainColor": line, "tickColor": line}
    axis |= {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 130}
    return {
        "background": None,
        "font": "system-ui, sans-serif",
        "padding": {"left": 0, "right": 8, "top": 4, "bottom": 5},
        "view": {"stroke": None},
        "legend": {"disable": True},
        "axis": axis,
        # A title above the axis instead of beside it leaves a phone its width
        "axisY": {"titleAngle": 0, "titleAlign": "left", "titleAnchor": "end", "titleX": 0, "titleY": -10},
        "range": {"category": colours["category"], "ramp": colours["heat"]},
        "text": {"color": colours["ink"], "fontSize": 12},
        "style": {
            "on-light": {"color": colours["ink"]},
            "on-strong": {"color": colours["paper"]},
            "diagonal": {"color": muted, "strokeDash": [4, 4], "strokeWidth": 1.2},
            "plain": {"color": colours["category"][0]},
        },
    }


def from_template(name: str, rows: Rows, strategies: Sequence[str], height: int = HEIGHT) -> Spec:
    """The chart that `dvc plots` draws of `rows` with .dvc/plots/<name>.json, without title, legends and revisions."""

    def filled(value: Any) -> Any:  # noqa: ANN401
        if value == "<DVC_METRIC_DATA>":
            return rows
        if isinstance(value, list):
            return [filled(inner) for inner in value if not _is_omitted(inner)]
        if not isinstance(value, dict):
            return value
        domain = {"scale": {"domain": strategies}} if value.get("field") == "strategy" and "sort" in value else {}
        return {
            key: filled(inner) for key, inner in value.items() if key != "legend" and not _is_omitted(inner)
        } | domain

    spec = filled(json.loads((TEMPLATES / f"{name}.json").read_text(encoding="utf-8")))
    if spec.pop("facet", None):  # by strategy and revision: one of each is left
        spec |= spec.pop("spec")
    return _sized(spec, height)


def _is_omitted(value: Any) -> bool:  # noqa: ANN401
    return value in ("rev", "<DVC_METRIC_TITLE>") or (isinstance(value, dict) and value.get("field") == "rev")


def penalty_path(rows: Rows) -> Spec:
    """Rows of seed, strength (text), val_nll, is_selected; from the weakest regularization to the strongest."""
    order = list(dict.fromkeys(row["strength"] for row in rows))
    base = _chart(rows).encode(
        alt.X("strength:N", title="regularization strength", sort=order).axis(labelAngle=0, grid=False),
        alt.Y("val_nll:Q", title="validation NLL (nats)").scale(zero=False).axis(tickCount=6),
        alt.Detail("seed:N"),
        tooltip=["seed:N", "strength:N", alt.Tooltip("val_nll:Q", format=".4f")],
    )
    line = base.mark_line(style="plain", opacity=0.5, strokeWidth=1.5)
    selected = base.transform_filter("datum.is_selected").mark_point(style="plain", filled=True, size=80, opacity=0.9)
    return _sized((line + selected).to_dict(), HEIGHT)


def per_class(rows: Rows, classes: Sequence[str], names: Sequence[str]) -> Spec:
    """Rows of strategy, class, f1, precision, recall, support: bars of F1."""
    shares = (alt.Tooltip(f"{name}:Q", format=".1%") for name in ("f1", "precision", "recall"))
    bars = _chart(rows).encode(
        alt.Y("class:N", sort=list(classes), title=None).axis(domain=False, ticks=False),
        alt.YOffset("strategy:N", sort=list(names)),
        alt.X("f1:Q", title="F1").scale(domain=[0, 1]).axis(format=".0%", tickCount=5),
        alt.Color("strategy:N").scale(domain=list(names)),
        tooltip=["strategy:N", "class:N", *shares, alt.Tooltip("support:Q", format=",")],
    )
    return _sized(bars.mark_bar(cornerRadiusEnd=2).to_dict(), len(classes) * max(22, 11 * len(names) + 10))


def accuracy_by_depth(rows: Rows, kinds: Sequence[str], majority: float) -> Spec:
    """Rows of block, place (1 for the first), kind, value, low, high; `majority` is a dashed line."""
    tooltip = ["block:N", "kind:N", *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("value", "low", "high"))]
    x = alt.X("place:Q", title="block, from input to output").scale(nice=False).axis(tickMinStep=1, format="d")
    base = _chart(rows).encode(x, alt.Color("kind:N").scale(domain=list(kinds)), tooltip=tooltip)
    value = alt.Y("value:Q", title="accuracy").scale(zero=False).axis(format=".0%", tickCount=6)
    line = base.encode(value).mark_line(point={"filled": True, "size": 50})
    band = base.encode(alt.Y("low:Q", title="accuracy"), alt.Y2("high:Q")).mark_rule(opacity=0.4)
    rule = _chart([{"value": majority}]).encode(value).mark_rule(style="diagonal")
    return _sized((band + line + rule).to_dict(), HEIGHT)


def accuracy_by_images(rows: Rows) -> Spec:
    """Rows of images, kind (measured or expected), value, low, high."""
    tooltip = ["kind:N", alt.Tooltip("images:Q", format=",")]
    tooltip += [alt.Tooltip(f"{name}:Q", format=".1%") for name in ("value", "low", "high")]
    x = alt.X("images:Q", title="training images").scale(type="log", nice=False, padding=12)
    x = x.axis(format=",d", tickCount=6)
    base = _chart(rows).encode(x, alt.Color("kind:N").scale(domain=["measured", "expected"]), tooltip=tooltip)
    value = alt.Y("value:Q", title="accuracy").scale(zero=False).axis(format=".0%", tickCount=6)
    band = base.encode(alt.Y("low:Q", title="accuracy"), alt.Y2("high:Q")).mark_rule(opacity=0.5)
    return _sized((band + base.encode(value).mark_line(point={"filled": True, "size": 50})).to_dict(), HEIGHT)


def class_counts(rows: Rows) -> Spec:
    """Rows of class, count: bars with their numbers, the largest first."""
    most = max(row["count"] for row in rows)
    base = _chart(rows).encode(
        alt.Y("class:N", sort=[row["class"] for row in rows], title=None).axis(domain=False, ticks=False),
        alt.X("count:Q", title="images").scale(domain=[0, 1.2 * most], nice=False).axis(format=",d", tickCount=4),
        tooltip=["class:N", alt.Tooltip("count:Q", format=",")],
    )
    bars = base.mark_bar(style="plain", cornerRadiusEnd=2)
    numbers = base.mark_text(align="left", dx=5).encode(alt.Text("count:Q", format=","))
    return _sized((bars + numbers).to_dict(), 26 * len(rows))


def feature_map(rows: Rows, field: str, domain: Sequence[str], shares: Sequence[float]) -> Spec:
    """Rows of x, y, image and `field`; `shares` of the variance along the two axes."""
    hidden: dict[str, Any] = {"labels": False, "ticks": False, "grid": False}
    first, second = (f"principal component {i} ({share:.0%} of the variance)" for i, share in enumerate(shares, 1))
    points = _chart(rows).encode(
        alt.X("x:Q", title=first).scale(zero=False, nice=False, padding=6).axis(**hidden),
        alt.Y("y:Q", title=second).scale(zero=False, nice=False, padding=6).axis(**hidden),
        alt.Color(f"{field}:N").scale(domain=list(domain)),
        # Vega's tooltip would load a field called `image` as an image
        tooltip=[alt.Tooltip("image:N", title="file"), "class:N", "outcome:N"],
    )
    # Thousands of points are drawn on a canvas; page.js reads this
    return _sized(points.mark_circle(size=18, opacity=0.6).to_dict(), 340) | {"usermeta": {"renderer": "canvas"}}


def _chart(rows: Rows) -> alt.Chart:
    return alt.Chart(alt.Data(values=list(rows)))


def _sized(spec: Spec, height: int) -> Spec:
    """As wide as its container, and without the colours, which the theme gives."""
    kept = {key: value for key, value in spec.items() if key not in ("config", "$schema")}
    text = json.dumps(kept | {"width": "container", "height": height}, ensure_ascii=False)
    # JSON allows these two line separators in a text, Vega's parser of expressions does not
    return json.loads(re.sub("[\u2028\u2029]", " ", text))
