"""List a user's directory: which files are images of which class, which cannot be used, and what is left out.

Nothing outside the directory is read, and of the files in it only labels.csv is opened.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pandas as pd

from pipeline.ingest.class_folders import from_folders
from pipeline.ingest.class_names import unify
from pipeline.ingest.directory import OPTIONAL, TABLE, fits, printable, walk
from pipeline.ingest.table import SYNONYMS, from_table


@dataclass(frozen=True)
class Listing:
    """The content of a directory.

    `images`: a row per file that may be an image, by path, as text: path, label, weight, group, stratum, subset, split.
    `rejected`: (path, reason) of what should be an image but cannot be read. `warnings`: about what is left out or
    doubtful. `skipped`: the number of files that are left out, by the reason. `is_table`: labels.csv lists the images.
    `layout`: the directories that were found, and what they can mean, for errors; empty if `is_table`.
    """

    images: pd.DataFrame
    rejected: list[tuple[str, str]]
    warnings: list[str]
    skipped: dict[str, int] = field(default_factory=dict)
    is_table: bool = False
    layout: str = ""


def find_images(
    directory: Path,
    exclude: Sequence[str] = (),
    columns: Mapping[str, str] = MappingProxyType({}),
    similar: str = "error",
    table: str = TABLE,
) -> Listing:
    """List a data set: its `table`, a CSV file, decides; without one, each sub-directory is a class.

    If the sub-directories are train/ and val/ or test/ (also training/, valid/, validation/, testing/, in any case),
    the classes are below them, and `split` is train, val or test. A labels.csv may use the same names.

    `exclude`: patterns (with * and ?) of files and directories that are left out: of their name, or of the path below
    the directory if they contain a slash. `columns`: what the columns of labels.csv are called there. `similar`: what
    to do about classes whose names differ by case or blanks only: error | merge | keep.

    Raises ValueError for a mistake in labels.csv (a missing column, a path twice, a weight that is no number above 0),
    and for a class without a file. Paths that do not exist, are no files or lead out of the directory are rejected.
    """
    if not directory.is_dir():
        advice = f"; run: dvc pull {directory}" if os.path.exists(f"{directory}.dvc") else ""
        advice = "; write the whole path, ~ is not replaced" if directory.parts[:1] == ("~",) else advice
        raise FileNotFoundError(f"params.yaml: dataset.path: {directory} is not a directory{advice}")
    try:
        return _find_images(directory, exclude, columns, similar, directory / table)
    except ValueError as error:  # names of files can contain line breaks
        raise ValueError(printable(str(error))) from None


def _find_images(
    directory: Path, exclude: Sequence[str], columns: Mapping[str, str], similar: str, table: Path
) -> Listing:
    is_table = os.path.lexists(table)
    if columns and not is_table:
        found = f"found {dict(columns)}, but {table} does not exist"
        raise ValueError(f"params.yaml: dataset.columns: {found}; expected {{}}, or a labels.csv")
    entries = sorted(walk(directory, exclude), key=lambda entry: entry[0])
    found = from_table(table, entries, exclude, columns) if is_table else from_folders(directory, entries, exclude)
    unused = [pattern for pattern in exclude if not any(fits(path, pattern) for path, _ in entries)]
    warnings = found.warnings + [f"dataset.exclude: {pattern!r} fits no file and no directory" for pattern in unused]
    images = pd.DataFrame(found.rows, columns=["path", "label", *OPTIONAL], dtype=str)
    images = images.sort_values("path", ignore_index=True)
    images["split"] = [SYNONYMS.get(name.casefold(), "") for name in images["split"]]
    warnings += unify(directory, images, similar, is_table=is_table)
    texts, layout = list(map(printable, warnings)), printable(found.layout)
    return Listing(images, sorted(found.rejected), texts, found.skipped, is_table, layout)
