"""Images, Labels and Splits: the tables that say what is trained on what, and how they are read.

`find_images` reads a user's directory; the rest reads and writes the pipeline's own CSV files, all in the order of
`image_id` (POSIX path below the dataset directory).
"""

import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from pipeline.files import write_text

IMAGES = Path("data/images.csv")
LABELS = Path("data/labels.csv")
SPLITS = Path("data/splits")
PARTS = ("train", "val", "test", "unused")
OPTIONAL = {"weight": "1", "group": "", "stratum": "", "subset": "", "split": ""}


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

    The others are text, empty where the dataset says nothing; `sha256` ties a row to its features.
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


@dataclass(frozen=True)
class Split:
    """Which part each image plays for one seed: train, val, test or unused."""

    seed: int
    image_id: list[str]
    split: np.ndarray

    def rows(self, part: str) -> np.ndarray:
        """Positions (int64) of the images of one part."""
        return np.flatnonzero(self.split == part)


def find_images(directory: Path) -> pd.DataFrame:
    """List a dataset: a row per image with path, label, weight, group, stratum, subset and split, as text.

    A `labels.csv` in the directory decides; else each sub-directory is a class. Raises ValueError for a missing
    column, a path that is absent or leads out of the directory, a weight that is no number above 0, an empty class.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"params.yaml: dataset.path: {directory} is not a directory")
    table = directory / "labels.csv"
    frame = _from_csv(table) if table.exists() else _from_classes(directory)
    if frame.empty:
        raise ValueError(f"{directory}: no image found; expected a sub-directory per class, or a labels.csv")
    missing = {column: value for column, value in OPTIONAL.items() if column not in frame}
    return frame.assign(**missing).sort_values("path", ignore_index=True)


def _from_csv(table: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(table, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{table}: not a CSV file in UTF-8: {error}") from None
    for column in ("path", "label"):
        if column not in frame:
            found = ", ".join(frame.columns)
            raise ValueError(f"{table}: column {column!r} is missing; found {found}; expected path and label")
    for line, row in enumerate(frame.to_dict("records"), start=2):
        problem = _problem(row, table.parent.resolve())
        if problem:
            raise ValueError(f"{table}: row {line}: {problem}")
    if frame["path"].duplicated().any():
        twice = frame["path"][frame["path"].duplicated()].iloc[0]
        raise ValueError(f"{table}: {twice!r} is listed twice; expected one row per image")
    return frame[["path", "label", *(column for column in OPTIONAL if column in frame)]]


def _problem(row: dict, root: Path) -> str | None:
    name = row["path"]
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name:
        return f"path {name!r}; expected a plain path below the directory, with / between its parts"
    if not (root / path).resolve().is_relative_to(root):
        return f"path {name!r} is a link that leads out of the directory"
    if not (root / path).is_file():
        return f"path {name!r} does not exist"
    if not row["label"]:
        return "label is empty"
    if row.get("split", "") not in ("", *PARTS):
        return f"split {row['split']!r}; expected {', '.join(PARTS)} or nothing"
    try:
        weight = float(row.get("weight", "1"))
    except ValueError:
        weight = math.nan
    return None if 0 < weight < math.inf else f"weight {row['weight']!r}; expected a number above 0"


def _from_classes(directory: Path) -> pd.DataFrame:
    rows = []
    for entry in sorted(directory.iterdir()):
        if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
            paths = [path.relative_to(directory).as_posix() for path in _regular_files(entry)]
            if not paths:
                raise ValueError(f"{entry}: class without an image; add some or remove the directory")
            rows += [(path, entry.name) for path in paths]
    return pd.DataFrame(rows, columns=["path", "label"])


def _regular_files(directory: Path) -> Iterator[Path]:
    """Files below, without hidden ones, links, pipes and devices."""
    for parent, folders, names in os.walk(directory):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if stat.S_ISREG(path.lstat().st_mode))


def write_images(images: Images, path: Path = IMAGES) -> None:
    """Write images.csv."""
    _write(path, pd.DataFrame(vars(images)))


def read_images(path: Path = IMAGES) -> Images:
    """Read images.csv."""
    frame = _read(path, Images).astype({"width": int, "height": int})
    return Images(**{str(column): list(frame[column]) for column in frame})


def write_labels(labels: Labels, path: Path = LABELS) -> None:
    """Write labels.csv: the label by name, the weight as the shortest decimal that reads back."""
    frame = pd.DataFrame({column: values for column, values in vars(labels).items() if column != "class_names"})
    _write(path, frame.assign(label=[labels.class_names[index] for index in labels.label]))


def read_labels(path: Path = LABELS) -> Labels:
    """Read labels.csv; class names are those that occur, sorted."""
    frame = _read(path, Labels)
    class_names = sorted(set(frame["label"]))
    text = {str(column): list(frame[column]) for column in frame if column not in ("label", "weight")}
    label = frame["label"].map(class_names.index).to_numpy(np.int64)
    return Labels(**text, label=label, weight=frame["weight"].astype(float).to_numpy(), class_names=class_names)


def write_split(split: Split, directory: Path = SPLITS) -> None:
    """Write seed_<s>.csv."""
    _write(directory / f"seed_{split.seed}.csv", pd.DataFrame({"image_id": split.image_id, "split": split.split}))


def read_split(seed: int, image_id: Sequence[str], directory: Path = SPLITS) -> Split:
    """Read seed_<s>.csv; ValueError unless it is about just the images `image_id`, in this order."""
    path = directory / f"seed_{seed}.csv"
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if list(frame["image_id"]) != list(image_id):
        raise ValueError(f"{path}: other images than in {LABELS}; run: dvc repro split")
    return Split(seed, list(image_id), frame["split"].to_numpy(str))


def read_splits(image_id: Sequence[str], directory: Path = SPLITS) -> list[Split]:
    """Read every split, by seed."""
    seeds = sorted(int(path.stem.removeprefix("seed_")) for path in directory.glob("seed_*.csv"))
    return [read_split(seed, image_id, directory) for seed in seeds]


def _write(path: Path, frame: pd.DataFrame) -> None:
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def _read(path: Path, record: type) -> pd.DataFrame:
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = set(record.__dataclass_fields__) - {"class_names"} - set(frame.columns)
    if missing:
        raise ValueError(f"{path}: column {min(missing)!r} is missing; run: dvc repro index")
    return frame
