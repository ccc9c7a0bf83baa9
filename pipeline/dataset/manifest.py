"""Images, Labels and Splits: the tables of the images, their labels and the splits, as CSV files.

All are in the order of `image_id` (POSIX path below the directory of the data set).
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.files import write_text

IMAGES = Path("data/images.csv")
LABELS = Path("data/labels.csv")
NEAR_DUPLICATES = Path("data/near_duplicates.csv")
SPLITS = Path("data/splits")
SPLIT_NAMES = ("train", "val", "test", "unused")


@dataclass(frozen=True)
class Images:
    """One entry per image: SHA-256 (hex) of the file's bytes, and its size in px, upright."""

    image_id: list[str]
    sha256: list[str]
    width: list[int]
    height: list[int]


@dataclass(frozen=True)
class Labels:
    """One entry per image: `label` (n,) int64 indexes `class_names`; `weight` (n,) float64.

    The other columns are text, empty where the data set gives nothing. `sha256` connects a row to its features.
    """

    image_id: list[str]
    sha256: list[str]
    label: np.ndarray
    weight: np.ndarray
    group: list[str]
    near_duplicate_group: list[str]
    stratum: list[str]
    subset: list[str]
    given_split: list[str]
    class_names: list[str]


IMAGE_COLUMNS = [field.name for field in fields(Images)]
LABEL_COLUMNS = [field.name for field in fields(Labels) if field.name != "class_names"]


@dataclass(frozen=True)
class Split:
    """For one seed, the split that each image belongs to, (n,) of str: train, val, test or unused."""

    seed: int
    image_id: list[str]
    split: np.ndarray

    def rows(self, name: str) -> np.ndarray:
        """Positions (int64) of the images of train, val, test or unused."""
        return np.flatnonzero(self.split == name)


def write_images(images: Images, path: Path = IMAGES) -> None:
    """Write images.csv."""
    write_csv(path, pd.DataFrame(vars(images)))


def read_images(path: Path = IMAGES) -> Images:
    """Read images.csv."""
    return make_images(_read(path, IMAGE_COLUMNS, "index"))


def make_images(table: pd.DataFrame) -> Images:
    """Images of a table of text that has their columns."""
    return Images(*(list(table[name].astype(int if name in ("width", "height") else str)) for name in IMAGE_COLUMNS))


def write_labels(labels: Labels, path: Path = LABELS) -> None:
    """Write labels.csv: the label by name, the weight as the shortest decimal that reads back exactly."""
    frame = pd.DataFrame({name: getattr(labels, name) for name in LABEL_COLUMNS})
    write_csv(path, frame.assign(label=[labels.class_names[index] for index in labels.label]))


def read_labels(path: Path = LABELS) -> Labels:
    """Read labels.csv."""
    return make_labels(_read(path, LABEL_COLUMNS, "index"))


def make_labels(table: pd.DataFrame) -> Labels:
    """Labels of a table of text that has their columns; the class names are those that occur, sorted."""
    class_names = sorted(set(table["label"]))
    columns: dict[str, Any] = {name: list(table[name]) for name in LABEL_COLUMNS}
    index_of = {name: index for index, name in enumerate(class_names)}
    columns["label"] = table["label"].map(index_of).to_numpy(np.int64)
    columns["weight"] = table["weight"].astype(float).to_numpy()
    return Labels(**columns, class_names=class_names)


def read_near_duplicates(path: Path = NEAR_DUPLICATES) -> pd.DataFrame:
    """Read near_duplicates.csv: pairs of image_id `a` and `b`, as text."""
    return _read(path, ["a", "b"], "index")


def write_split(split: Split, directory: Path = SPLITS) -> None:
    """Write seed_<s>.csv."""
    write_csv(directory / f"seed_{split.seed}.csv", pd.DataFrame({"image_id": split.image_id, "split": split.split}))


def read_split(seed: int, image_id: Sequence[str], directory: Path = SPLITS) -> Split:
    """Read seed_<s>.csv; ValueError unless its images are exactly `image_id`, in this order."""
    path = directory / f"seed_{seed}.csv"
    frame = _read(path, ["image_id", "split"], "split")
    if list(frame["image_id"]) != list(image_id):
        raise ValueError(f"{path}: other images than in {LABELS}; run: dvc repro split")
    return Split(seed, list(image_id), frame["split"].to_numpy(str))


def read_splits(image_id: Sequence[str], directory: Path = SPLITS) -> list[Split]:
    """Read every split, by seed."""
    seeds = sorted(int(path.stem.removeprefix("seed_")) for path in directory.glob("seed_*.csv"))
    return [read_split(seed, image_id, directory) for seed in seeds]


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a table with a header, without the index."""
    text = frame.to_csv(index=False, lineterminator="\n")
    if "\r" in text:  # pandas does not quote a name for it, though it would end the row
        text = frame.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_ALL)
    write_text(path, text)


def _read(path: Path, columns: list[str], stage: str) -> pd.DataFrame:
    """Read a table of `stage` as text; ValueError that names the stage to run if the file is missing or damaged."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: not there; run: dvc repro {stage}") from None
    except ValueError as error:  # not CSV, or not UTF-8
        raise ValueError(f"{path}: {' '.join(str(error).split())}; run: dvc repro {stage}") from None
    if missing := set(columns) - set(frame.columns):
        raise ValueError(f"{path}: column {min(missing)!r} is missing; run: dvc repro {stage}")
    return frame[columns]
