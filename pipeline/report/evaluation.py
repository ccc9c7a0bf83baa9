"""What `evaluate` found, in words, as Markdown, and as a page that loads nothing from a network."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.dataset.units import FEW_UNITS
from pipeline.ingest.directory import printable
from pipeline.report import templates
from pipeline.report.evidence import METRICS, NONE, PERCENT
from pipeline.report.gallery import Example, make_example, percent
from pipeline.report.pictures import Album

Json = dict[str, Any]
NAMES = METRICS | {"nll_scaled": "NLL (nats), scaled", "brier_scaled": "Brier score, scaled"}
MAX_MATRIX = 20  # classes of a confusion matrix; of more, the most frequent confusions are listed
N_NAMED, N_LISTED, N_PICTURES = 3, 20, 24
ENDS = ("value", "low", "high")


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names its rows."""

    title: str
    caption: str
    columns: list[str]
    rows: list[list[str]]


def summary(found: Json) -> list[str]:
    """The answer in sentences: how good, better or worse than on the model's own test, and how far the images lie."""
    data, sentences = found["data"], []
    units = "" if data["n_units"] == data["n_images"] else f" ({data['n_units']:,} units that belong together)"
    for one in found["models"]:
        shown = _estimate("accuracy", one["metrics"]["accuracy"])
        sentences.append(f"{one['model']}: accuracy {shown} on {data['n_images']:,} new images{units}.")
        sentences += [text for text in (_leakage(one), _against_own_test(one, data), _away(one["distance"])) if text]
    if found["paired"]:
        sentences += _paired(found)
    if data["n_units"] < FEW_UNITS:
        sentences.append(f"There are only {data['n_units']} units: the intervals are rough.")
    if absent := [name for name, n in data["classes"].items() if not n]:
        listed = ", ".join(absent[:N_LISTED]) + (
            f" and {len(absent) - N_LISTED} more" if len(absent) > N_LISTED else ""
        )
        sentences.append(f"No new image is of {listed}: metrics that need all classes are left out.")
    if data["n_unreadable"]:
        path, reason = data["unreadable"][0]
        sentences.append(f"{data['n_unreadable']:,} images cannot be read and are left out, first {path} ({reason}).")
    if data["n_conflicts"]:
        sentences.append(
            f"{data['n_conflicts']:,} images with the same bytes as others but another label are left out."
        )
    return [printable(sentence) for sentence in sentences]


def _leakage(one: Json) -> str:
    """Images that the model has seen."""
    if not one["is_known"]:
        return "Whether the model was trained on some of these images is not known: its labels and split are not there."
    other, rest, sentences = one["relabelled"], one["without_seen"], []
    splits = Counter(row["split"] for row in other)
    seen = {name: n - splits[name] for name, n in one["seen"].items() if name in ("train", "val") and n > splits[name]}
    if seen:
        sentences.append(f"{_images_of_model(seen)} (the same bytes), so that the figures are too good.")
    if other:
        named = "; ".join(
            f"{row['image_id']} ({row['label']}; there {row['image_of_model']}: {row['label_of_model']})"
            for row in other[:N_NAMED]
        )
        more = f"; and {len(other) - N_NAMED:,} more" if len(other) > N_NAMED else ""
        sentences.append(f"{_images_of_model(splits, ' with another label')}: {named}{more}.")
        sentences.append("At least one of the two labels is wrong.")
    if rest:
        without = "Without training and validation images of the model, accuracy is"
        sentences.append(f"{without} {_estimate('accuracy', rest['metrics']['accuracy'])}.")
    return " ".join(sentences)


def _images_of_model(splits: Mapping[str, int], more: str = "") -> str:
    """How many new images lie in each split of the model."""
    names = {"train": "training", "val": "validation", "unused": "left-out"}
    parts = []
    for split, n in sorted(splits.items()):
        name = names.get(split, split)
        own = f"new image is a {name} image" if n == 1 else f"new images are {name} images"
        parts.append(f"{n:,} {own} of the model{more}")
    return " and ".join(parts)


def _against_own_test(one: Json, data: Json) -> str:
    own, found = one["own_test"], one["differences"].get("accuracy")
    if own is None:
        return "The model's own test figures are not there to compare with."
    weighted = "the test" if own["has_weights"] else "the new"
    caution = f" Note: only {weighted} images have weights." if own["has_weights"] != data["has_weights"] else ""
    n_tested = one["seen"].get("test", 0)
    if n_tested == data["n_images"]:
        return f"All of these images are test images of the model.{caution}"
    if n_tested:
        caution += f" {n_tested:,} of the new images are test images of the model, and are left out of this comparison."
    if found is None:
        return "No image is new to the model, so nothing is compared with its own test."
    value, low, high = (100 * found[end] for end in ENDS)
    size = f"{abs(value):.1f} points {'lower' if value < 0 else 'higher'}" if abs(value) >= 0.05 else "as high"
    verdict = "a difference is not shown" if low <= 0 <= high else "worse" if value < 0 else "better"
    than = "than" if abs(value) >= 0.05 else "as"
    return (
        f"Accuracy is {size} {than} on the model's own {own['n_images']:,} test images "
        f"({_estimate('accuracy', own['metrics']['accuracy'])}): {verdict} (95 % interval of the difference {low:+.1f} "
        f"to {high:+.1f} points, {_p(found['p_value'])}).{caution}"
    )


def _away(found: Json | None) -> str:
    if found is None:
        return "How far these images lie from the training images is not known: the model was saved without it."
    n_far, m, high = found["n_far"], found["n_images"], found["expected_high"]
    border = f"{found['n_nearer']:,} of the {found['n_validation']:,} validation images"
    verdict = "more than chance explains: these images differ from those of training"
    verdict = verdict if n_far > high else "no more than chance explains"
    return (
        f"{n_far:,} of the {m:,} new images lie further from the training images than {border}; by chance "
        f"{found['expected']:.1f} are expected ({found['expected_low']:.0f} to {high:.0f}): {verdict}. "
        f"Their median distance is {found['median']:.3g}, that of validation {found['validation_median']:.3g}; in "
        f"{100 * found['further_than_validation']:.0f} % of pairs the new image is the farther one (50 % if alike)."
    )


def _paired(found: Json) -> list[str]:
    (first, second), accuracy = found["models"], found["paired"]["accuracy"]
    value, low, high = (round(100 * accuracy[key], 1) + 0.0 for key in ("difference", "low", "high"))  # no -0.0
    verdict = "a difference is not shown" if low <= 0 <= high else "better" if value > 0 else "worse"
    return [
        f"On the same images, the accuracy of {second['model']} minus that of {first['model']} is {value:+.1f} points "
        f"({low:+.1f} to {high:+.1f}; {accuracy['method']}, {_p(accuracy['p_value'])}): {verdict}."
    ]


def _p(value: float) -> str:
    return "p below 0.001" if value < 0.001 else f"p = {value:.3f}"


def _estimate(metric: str, found: Json | None) -> str:
    """A metric with its interval, in one piece."""
    if found is None:
        return NONE
    if metric in PERCENT:
        return "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * found[end] for end in ENDS))
    return "{:.3f} ({:.3f} to {:.3f})".format(*(found[end] for end in ENDS))


def _percent(found: Any) -> str:  # noqa: ANN401
    return f"{100 * found:.1f} %" if isinstance(found, float) else _estimate("accuracy", found)


def tables(one: Json) -> list[Table]:
    """Everything about one model but its mistakes."""
    rest, own, columns, rows = one["without_seen"], one["own_test"], ["metric", "new images"], []
    columns += ["without images seen in training"] if rest else []
    columns += ["its own test images", "difference"] if own else []
    for name in NAMES:
        if one["metrics"].get(name):
            shown = [_estimate(name, part["metrics"].get(name)) for part in (one, rest, own) if part]
            difference = [_difference(name, one["differences"].get(name))] if own else []
            rows.append([NAMES[name], *shown, *difference])
    scaled = f"Scaled: at the temperature {one['temperature']:.3g}, which training fitted on validation."
    found = [Table("Metrics", f"With 95 % intervals over units of images. {scaled}", columns, rows)]
    by_class = [
        [row["class"], f"{row['support']:,}", *(_percent(row[key]) for key in ("recall", "precision", "f1"))]
        for row in one["classes"]
        if row["support"] or row["precision"]
    ]
    found.append(Table("Classes", "", ["class", "images", "recall", "precision", "F1"], by_class))
    found.append(_confusion([row["class"] for row in one["classes"]], one["confusion"]))
    for name, title in (("raw", "Calibration"), ("scaled", "Calibration, scaled")):
        bins = [row for row in one["reliability"][name] if row["confidence"] is not None]
        shown = [[_percent(row[key]) for key in ("confidence", "accuracy", "weight")] for row in bins]
        caption = "Where confidence is above accuracy, the model is too sure."
        found.append(Table(title, caption, ["mean confidence", "accuracy", "share of the images"], shown))
    return found


def _difference(metric: str, found: Json | None) -> str:
    if found is None:
        return NONE
    scale, digits = (100, 1) if metric in PERCENT else (1, 3)
    value, low, high = (f"{round(scale * found[end], digits) + 0.0:+.{digits}f}" for end in ENDS)
    return f"{value} ({low} to {high})"


def _confusion(names: list[str], counts: list[list[int]]) -> Table:
    if len(names) <= MAX_MATRIX:
        rows = [[name, *(f"{n:,}" for n in row)] for name, row in zip(names, counts, strict=True) if sum(row)]
        return Table("Confusion", "Rows: actual class; columns: predicted.", ["", *names], rows)
    pairs = [(n, names[i], names[j]) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j]
    rows = [[own, other, f"{n:,}"] for n, own, other in sorted(pairs, key=lambda pair: (-pair[0], *pair[1:]))]
    return Table("Confusion", "The most frequent confusions.", ["actual", "predicted", "images"], rows[:N_LISTED])


def paired_table(found: Json) -> Table:
    """The second model minus the first."""
    rows = [
        [NAMES[name], _difference(name, one | {"value": one["difference"]}), _p(one["p_value"]), one["method"]]
        for name, one in found["paired"].items()
    ]
    first, second = (one["model"] for one in found["models"])
    caption = f"{second} minus {first}, on the same images."
    return Table("Paired comparison", caption, ["metric", "difference", "p", "test"], rows)


def as_markdown(found: Json) -> str:
    """evaluation.md."""
    directory = printable(found["data"]["directory"]).replace("`", "")
    lines = ["# Evaluation on new images", "", f"`{directory}`", ""]
    lines += [line for sentence in found["summary"] for line in (_escaped(sentence), "")]
    if found["paired"]:
        lines += _markdown(paired_table(found), "##")
    for one in found["models"]:
        lines += [f"## {_escaped(one['model'])}", ""]
        for table in tables(one):
            lines += _markdown(table, "###")
        wrong = [
            [row["image_id"], row["label"], row["predicted"], percent(row["probability"]).replace("\u2009", " ")]
            for row in one["mistakes"][:N_LISTED]
        ]
        columns = ["image", "label", "predicted", "probability"]
        lines += _markdown(Table("Worst mistakes", "The most probable wrong predictions.", columns, wrong), "###")
    return "\n".join(lines)


def _markdown(table: Table, level: str) -> list[str]:
    columns = table.columns if table.rows else ["none"]
    written = [f"| {' | '.join(map(_escaped, row))} |" for row in (columns, *table.rows)]
    written.insert(1, f"| {' | '.join(['---'] * len(columns))} |")
    return [f"{level} {table.title}", "", *([_escaped(table.caption), ""] if table.caption else []), *written, ""]


def _escaped(text: str) -> str:
    """Text that is no markup, in one line."""
    return re.sub(r"[\\`*_\[\]<>|#]", r"\\\g<0>", printable(text))


def as_page(found: Json, album: Album) -> str:
    """evaluation.html, with thumbnails of the worst mistakes."""
    models = [
        {
            "name": one["model"],
            "tables": tables(one),
            "mistakes": [_mistake(row, album) for row in one["mistakes"][:N_PICTURES]],
        }
        for one in found["models"]
    ]
    return templates.load("evaluation.html.jinja").render(
        data=found["data"],
        summary=found["summary"],
        paired=paired_table(found) if found["paired"] else None,
        models=models,
    )


def _mistake(row: Json, album: Album) -> Example:
    predicted = "predicted", row["predicted"], percent(row["probability"])
    return make_example(album, row["image_id"], ("label", row["label"], ""), predicted)
