"""Images, Labels and Splits: the tables that say what is trained on what, and how they are read.

`find_images` reads a user's directory; the rest reads and writes the pipeline's own CSV files, all
in the order of `image_id` (POSIX path below the dataset directory).
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
SPLIT_NAMES = ("train", "val", "test", "unused")
OPTIONAL_COLUMNS = ("weight", "group", "stratum", "subset", "split")


@dataclass(frozen=True)
class Images:
    """One entry per image: SHA-256 (hex) of the file's bytes, and its size in px."""

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
    class_names: list[str]
    label: np.ndarray
    weight: np.ndarray
    group: list[str]
    near_duplicate_group: list[str]
    stratum: list[str]
    subset: list[str]
    given_split: list[str]


@dataclass(frozen=True)
class Split:
    """Which part each image plays for one seed: train, val, test or unused."""

    seed: int
    image_id: list[str]
    split: np.ndarray

    def rows(self, name: str) -> np.ndarray:
        """Positions (int64) of the images of one part."""
        return np.flatnonzero(self.split == name)


def find_images(directory: Path) -> pd.DataFrame:
    """List a dataset: a row per image with path, label, weight and the optional columns (text).

    A `labels.csv` in the directory decides; else each sub-directory is a class. Raises ValueError
    for a missing column, a path that is absent or leads out of the directory, a weight that is no
    number above 0, an empty class.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"params.yaml: dataset.path: {directory} is not a directory")
    table = directory / "labels.csv"
    frame = _from_csv(table, directory) if table.exists() else _from_classes(directory)
    if frame.empty:
        raise ValueError(f"{directory}: no image found; expected a directory per class")
    for column in OPTIONAL_COLUMNS:
        if column not in frame:
            frame[column] = "1" if column == "weight" else ""
    return frame.sort_values("path", ignore_index=True)


def _from_csv(table: Path, directory: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(table, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{table}: not a CSV file in UTF-8: {error}") from None
    missing = {"path", "label"} - set(frame.columns)
    if missing:
        raise ValueError(
            f"{table}: column {sorted(missing)[0]!r} is missing; found {', '.join(frame.columns)}; "
            f"expected path, label and, optionally, {', '.join(OPTIONAL_COLUMNS)}"
        )
    if frame["path"].duplicated().any():
        twice = frame["path"][frame["path"].duplicated()].iloc[0]
        raise ValueError(f"{table}: {twice!r} is listed twice; expected one row per image")
    root = directory.resolve()
    for line, row in enumerate(frame.to_dict("records"), start=2):
        _check_row(f"{table}: row {line}", row, root)
    return frame[["path", "label", *(c for c in OPTIONAL_COLUMNS if c in frame)]].copy()


def _check_row(where: str, row: dict[str, str], root: Path) -> None:
    path = PurePosixPath(row["path"])
    if path.is_absolute() or ".." in path.parts or "\\" in row["path"] or "\0" in row["path"]:
        raise ValueError(f"{where}: {row['path']!r} leads out of the dataset; expected a path below")
    if str(path) != row["path"]:
        raise ValueError(f"{where}: {row['path']!r}: expected it written as {str(path)!r}")
    if not (root / path).resolve().is_relative_to(root):
        raise ValueError(f"{where}: {row['path']!r} is a link that leads out of the dataset")
    if not (root / path).is_file():
        raise ValueError(f"{where}: {row['path']!r} does not exist (or is no file) below {root.name}")
    if not row["label"]:
        raise ValueError(f"{where}: label is empty")
    if row.get("split", "") not in ("", *SPLIT_NAMES):
        raise ValueError(f"{where}: split {row['split']!r}; expected {', '.join(SPLIT_NAMES)} or none")
    try:
        weight = float(row.get("weight", "1"))
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"{where}: weight {row['weight']!r}; expected a number above 0")


def _from_classes(directory: Path) -> pd.DataFrame:
    rows = []
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
            continue
        paths = [str(p) for p in _regular_files(Path(entry.path))]
        if not paths:
            raise ValueError(f"{entry.path}: class without an image; add some or remove the directory")
        rows += [(Path(p).relative_to(directory).as_posix(), entry.name) for p in paths]
    return pd.DataFrame(rows, columns=["path", "label"])


def _regular_files(directory: Path) -> Iterator[Path]:
    """Files below, without hidden ones, links, pipes and devices."""
    for parent, folders, names in os.walk(directory):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and stat.S_ISREG(path.lstat().st_mode):
                yield path


def write_images(path: Path, images: Images) -> None:
    """Write images.csv."""
    _write(path, pd.DataFrame(vars(images)))


def read_images(path: Path = IMAGES) -> Images:
    """Read images.csv."""
    frame = _read(path, ("image_id", "sha256", "width", "height"))
    size = frame[["width", "height"]].astype(int)
    return Images(list(frame["image_id"]), list(frame["sha256"]), list(size["width"]), list(size["height"]))


def write_labels(path: Path, labels: Labels) -> None:
    """Write labels.csv: the label by name, the weight as the shortest decimal that reads back."""
    frame = pd.DataFrame({key: value for key, value in vars(labels).items() if key != "class_names"})
    frame["label"] = [labels.class_names[label] for label in labels.label]
    _write(path, frame)


def read_labels(path: Path = LABELS) -> Labels:
    """Read labels.csv; class names are those that occur, sorted."""
    columns = ("image_id", "sha256", "label", "weight", "group")
    columns += ("near_duplicate_group", "stratum", "subset", "given_split")
    frame = _read(path, columns)
    class_names = sorted(set(frame["label"]))
    index = {name: i for i, name in enumerate(class_names)}
    text = {column: list(frame[column]) for column in columns if column not in ("label", "weight")}
    return Labels(
        label=np.array([index[name] for name in frame["label"]], dtype=np.int64),
        weight=frame["weight"].astype(float).to_numpy(),
        class_names=class_names,
        **text,
    )


def write_split(directory: Path, split: Split) -> None:
    """Write seed_<s>.csv."""
    frame = pd.DataFrame({"image_id": split.image_id, "split": split.split})
    _write(directory / f"seed_{split.seed}.csv", frame)


def read_split(path: Path, image_id: Sequence[str]) -> Split:
    """Read seed_<s>.csv; ValueError unless it is about just the images `image_id`, in order."""
    frame = _read(path, ("image_id", "split"))
    if list(frame["image_id"]) != list(image_id):
        raise ValueError(f"{path}: other images than in {LABELS}; run: dvc repro split")
    return Split(int(path.stem.removeprefix("seed_")), list(image_id), frame["split"].to_numpy(str))


def read_splits(directory: Path, image_id: Sequence[str]) -> list[Split]:
    """Read every split, by seed."""
    splits = [read_split(path, image_id) for path in directory.glob("seed_*.csv")]
    return sorted(splits, key=lambda split: split.seed)


def _write(path: Path, frame: pd.DataFrame) -> None:
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def _read(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if missing := set(columns) - set(frame.columns):
        raise ValueError(f"{path}: column {sorted(missing)[0]!r} is missing; run: dvc repro")
    return frame
