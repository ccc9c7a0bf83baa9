"""The parts of the page that show images: mistakes, a map of the features, suspects, duplicates, what was rejected."""

import contextlib
import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from pipeline.dataset.manifest import Labels
from pipeline.features.hdf5 import Features
from pipeline.report.evidence import Figure, numbered
from pipeline.report.page import charts, pictures
from pipeline.report.pictures import Album
from pipeline.training.models import Run

Json = dict[str, Any]
N_SHOWN = {"errors": 16, "hits": 8}
N_SUSPECTS = 24
N_PAIRS = 12
N_ROWS = 20  # of a list of files
MAX_COLOURS = 9  # classes that have a colour of their own; the others share one
OTHERS = "other classes"
NOT_TESTED = "not tested"


@dataclass(frozen=True)
class Verdicts:
    """What a strategy says of the images that some run tested: probabilities (n, n_classes), means over the runs."""

    rows: np.ndarray
    probability: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """The class of each."""
        return self.probability.argmax(1)

    @property
    def confidence(self) -> np.ndarray:
        """The probability of that class."""
        return self.probability.max(1)


@dataclass(frozen=True)
class Example:
    """An image with what is said of it, in short lines: a word, a class, how sure."""

    image_id: str
    uri: str | None
    lines: list[tuple[str, str, str]]


def judge(runs: Sequence[Run]) -> Verdicts:
    """Test images of all runs, each once."""
    rows = np.concatenate([run.test_rows for run in runs])
    probability = softmax(np.concatenate([run.test_logits for run in runs]).astype(np.float64), axis=1)
    distinct, place = np.unique(rows, return_inverse=True)
    total = np.zeros((len(distinct), probability.shape[1]))
    np.add.at(total, place, probability)
    return Verdicts(distinct, total / np.bincount(place)[:, None])


def mistakes(verdicts: Verdicts, labels: Labels, album: Album) -> dict[str, list[Example]]:
    """The most confident errors, and the least confident hits."""
    is_wrong = verdicts.predicted != labels.label[verdicts.rows]
    order = np.argsort(verdicts.confidence, kind="stable")
    chosen = {"errors": [i for i in order[::-1] if is_wrong[i]], "hits": [i for i in order if not is_wrong[i]]}
    return {
        kind: [_example(i, verdicts, labels, album) for i in found[: N_SHOWN[kind]]] for kind, found in chosen.items()
    }


def _example(i: int, verdicts: Verdicts, labels: Labels, album: Album) -> Example:
    row = verdicts.rows[i]
    said = labels.class_names[verdicts.predicted[i]]
    sure = percent(verdicts.confidence[i])
    lines = [("is", labels.class_names[labels.label[row]], ""), ("said", said, sure)]
    return Example(labels.image_id[row], album.thumbnail(labels.image_id[row]), lines)


def percent(probability: float) -> str:
    """A probability as text, never rounded to all or nothing."""
    return f"{100 * min(max(probability, 0.001), 0.999):.1f}\u2009%"


def maps(features: Features, labels: Labels, verdicts: Verdicts | None) -> list[Figure]:
    """The cached features in two dimensions, coloured by class and by error."""
    found = pictures.map_features(features)
    told = {int(row): i for i, row in enumerate(verdicts.rows)} if verdicts else {}
    counts = np.bincount(labels.label, minlength=len(labels.class_names))
    largest = set(np.argsort(-counts, kind="stable")[: MAX_COLOURS if len(counts) <= MAX_COLOURS else MAX_COLOURS - 1])
    rows = []
    for row, (x, y) in zip(found.rows.tolist(), found.xy.tolist(), strict=True):
        label, verdict = int(labels.label[row]), NOT_TESTED
        if verdicts and row in told:
            verdict = "right" if verdicts.predicted[told[row]] == label else "wrong"
        name = labels.class_names[label]
        place = {"x": float(f"{x:.4g}"), "y": float(f"{y:.4g}"), "image": labels.image_id[row]}
        rows.append(place | {"class": name, "colour": name if label in largest else OTHERS, "verdict": verdict})
    n = f"{len(rows):,} images" + (f", a sample of {len(labels.label):,}" if len(rows) < len(labels.label) else "")
    pooled = " Maps are averaged over their pixels." if found.is_pooled else ""
    colours = [name for i, name in enumerate(labels.class_names) if i in largest]
    colours += [OTHERS] if len(largest) < len(counts) else []
    caption = (
        f"{n}, by the first two principal components of their features.{pooled} Classes that lie apart need no more "
        "than a head."
    )
    figures = [
        Figure("By class", caption, charts.feature_map(rows, "colour", colours, found.shares), numbered(colours))
    ]
    if verdicts:
        kinds = ["right", "wrong"]
        tested = sorted((row for row in rows if row["verdict"] in kinds), key=lambda row: row["verdict"])
        n_wrong = sum(row["verdict"] == "wrong" for row in tested)
        caption = f"The same map: the {len(tested):,} images that some seed tests, {n_wrong:,} of them told wrong."
        figures.append(
            Figure("By error", caption, charts.feature_map(tested, "verdict", kinds, found.shares), numbered(kinds))
        )
    return figures


def suspects(path: Path, album: Album) -> list[Example]:
    """The images whose labels are most probably wrong; empty without such a list."""
    rows = _read_csv(path, ("image_id", "label", "suggested", "self_confidence"))
    examples = []
    for row in rows[:N_SUSPECTS]:
        sure = ""
        with contextlib.suppress(ValueError):
            sure = percent(float(row["self_confidence"]))
        lines = [("labelled", row["label"], sure), ("rather", row["suggested"], "")]
        examples.append(Example(row["image_id"], album.thumbnail(row["image_id"]), lines))
    return examples


def rejected(path: Path) -> list[Json]:
    """Path and reason of files that could not be read."""
    return _read_csv(path, ("path", "reason"))


def read_object(path: Path) -> Json:
    """A JSON object; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def class_counts(summary: Json) -> Figure | None:
    """Bars of the images of each class, the largest first."""
    counts = sorted((summary.get("classes") or {}).items(), key=lambda item: -item[1])
    if not counts:
        return None
    ratio = counts[0][1] / max(counts[-1][1], 1)
    caption = f"{sum(n for _, n in counts):,} images, the largest class {ratio:.1f} times the smallest."
    if len(counts) > N_ROWS:
        half = N_ROWS // 2
        caption += f" Of {len(counts)} classes the {half} largest and the {half} smallest."
        counts = counts[:half] + counts[-half:]
    rows = [{"class": name, "count": n} for name, n in counts]
    return Figure("Images per class", caption, charts.class_counts(rows))


def groups(found: Sequence[Sequence[str]], album: Album) -> list[list[Example]]:
    """Groups of images (at most four of each are shown) that are alike."""
    return [[Example(str(name), album.thumbnail(str(name)), []) for name in group[:4]] for group in found[:N_PAIRS]]


def near_duplicates(found: Sequence[Json], album: Album) -> list[Json]:
    """Pairs that look alike, with the bits in which their hashes differ."""
    return [
        {"bits": pair.get("bits"), "images": [Example(pair[k], album.thumbnail(pair[k]), []) for k in ("a", "b")]}
        for pair in found[:N_PAIRS]
        if "a" in pair and "b" in pair
    ]


def _read_csv(path: Path, columns: Sequence[str]) -> list[Json]:
    """Rows of a CSV file; empty if it is not there or lacks a column."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return []
    return [row for row in rows if all(row.get(column) is not None for column in columns)]
