"""Sections of the page that show images: errors, a map of the features, label suspects, duplicates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.comparison import outcomes
from pipeline.comparison.outcomes import Outcomes
from pipeline.dataset.manifest import Labels
from pipeline.features.hdf5 import Features
from pipeline.report import charts, pictures
from pipeline.report.evidence import Figure, numbered
from pipeline.report.pictures import Album
from pipeline.training.runs import Predictions

Json = dict[str, Any]
N_ERRORS, N_CORRECT, N_SUSPECTS, N_PAIRS = 16, 8, 24, 12  # images, or pairs of them, that are shown
N_BARS = 20  # of the chart of class sizes
MAX_COLOURS = 9  # classes that have a colour of their own; the others share one
OTHERS = "other classes"


@dataclass(frozen=True)
class Example:
    """An image and its caption: lines of a word, a class, a probability."""

    image_id: str
    uri: str | None
    lines: tuple[tuple[str, str, str], ...]


def average(runs: Sequence[Predictions], labels: Labels) -> Outcomes:
    """Every image that some run tested, once, by the mean of its probabilities over those runs."""
    tested = outcomes.pooled([outcomes.of_predictions(run, labels.label) for run in runs])
    return outcomes.by_unit(tested, labels.label, np.arange(len(labels.label)))


def examples(tested: Outcomes, labels: Labels, album: Album) -> tuple[list[Example], list[Example]]:
    """The most confident errors, and the least confident correct predictions."""
    confidence = tested.probability.max(1)

    def example(i: int) -> Example:
        row = tested.rows[i]
        label = ("label", labels.class_names[labels.label[row]], "")
        predicted = ("predicted", labels.class_names[tested.predicted[i]], percent(confidence[i]))
        return make_example(album, labels.image_id[row], label, predicted)

    is_wrong = tested.predicted != labels.label[tested.rows]
    order = np.argsort(confidence, kind="stable")
    errors, correct = [i for i in order[::-1] if is_wrong[i]], [i for i in order if not is_wrong[i]]
    return [example(i) for i in errors[:N_ERRORS]], [example(i) for i in correct[:N_CORRECT]]


def percent(probability: float) -> str:
    """A probability as text, never rounded to 0 or 1."""
    return f"{100 * min(max(probability, 0.001), 0.999):.1f}\u2009%"


def maps(features: Features, labels: Labels, tested: Outcomes) -> list[Figure]:
    """The cached features in two dimensions, coloured by class and by error."""
    images, xy, shares = pictures.map_features(features)
    outcome = np.full(len(labels.label), "not tested", dtype=object)
    outcome[tested.rows] = np.where(tested.predicted == labels.label[tested.rows], "correct", "wrong")
    counts = np.bincount(labels.label, minlength=len(labels.class_names))
    n_colours = len(counts) if len(counts) <= MAX_COLOURS else MAX_COLOURS - 1
    largest = set(np.argsort(-counts, kind="stable")[:n_colours])
    rows = []
    for row, (x, y) in zip(images.tolist(), xy.tolist(), strict=True):
        name = labels.class_names[labels.label[row]]
        colour = name if labels.label[row] in largest else OTHERS
        place = {"x": float(f"{x:.4g}"), "y": float(f"{y:.4g}"), "image": labels.image_id[row]}
        rows.append(place | {"class": name, "colour": colour, "outcome": outcome[row]})
    sampled = f", a sample of {len(labels.label):,}" if len(rows) < len(labels.label) else ""
    pooled = " Feature maps are averaged over their pixels." if features.values.ndim > 3 else ""
    by_class = (
        f"{len(rows):,} images{sampled}, by the first two principal components of their features.{pooled} Where the "
        "classes form separate clouds, a head on frozen features is enough."
    )
    colours = [name for i, name in enumerate(labels.class_names) if i in largest]
    colours += [OTHERS] if len(largest) < len(counts) else []
    kinds = ["correct", "wrong"]
    shown = sorted((row for row in rows if row["outcome"] in kinds), key=lambda row: row["outcome"])
    n_wrong = sum(row["outcome"] == "wrong" for row in shown)
    by_error = f"The {len(shown):,} of these images that some seed tests; {n_wrong:,} are predicted wrong."
    return [
        Figure("By class", by_class, charts.feature_map(rows, "colour", colours, shares), numbered(colours)),
        Figure("By error", by_error, charts.feature_map(shown, "outcome", kinds, shares), numbered(kinds)),
    ]


def suspects(rows: Sequence[dict[str, str]], album: Album) -> list[Example]:
    """The first rows of reports/label_suspects.csv: the labels that are most probably wrong."""
    found = []
    for row in rows[:N_SUSPECTS]:
        given = ("label", row["label"], percent(float(row["self_confidence"])))
        found.append(make_example(album, row["image_id"], given, ("suggested", row["suggested"], "")))
    return found


def class_counts(classes: dict[str, int]) -> Figure:
    """Bars of the images of each class, the largest first."""
    counts = sorted(classes.items(), key=lambda item: -item[1])
    ratio = counts[0][1] / max(counts[-1][1], 1)
    caption = f"{sum(classes.values()):,} images. The largest class has {ratio:.1f} times the images of the smallest."
    if len(counts) > N_BARS:
        half = N_BARS // 2
        caption += f" Of {len(counts)} classes, the {half} largest and the {half} smallest are shown."
        counts = counts[:half] + counts[-half:]
    return Figure("Images per class", caption, charts.class_counts([{"class": name, "count": n} for name, n in counts]))


def groups(found: Sequence[Sequence[str]], album: Album) -> list[list[Example]]:
    """The first groups of images that are alike, at most four images of each."""
    return [[make_example(album, image_id) for image_id in group[:4]] for group in found[:N_PAIRS]]


def make_example(album: Album, image_id: str, *lines: tuple[str, str, str]) -> Example:
    """An image of the album, with its caption."""
    return Example(image_id, album.thumbnail(image_id), lines)
