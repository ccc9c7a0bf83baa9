"""List a user's directory: which files are images of which class, which cannot be used, and what is left out.

Nothing outside the directory is read, and of the files in it only labels.csv is opened.
"""

import csv
import errno
import math
import os
import stat
import unicodedata
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import pandas as pd

from pipeline.dataset.manifest import SPLIT_NAMES

OPTIONAL = {"weight": "1", "group": "", "stratum": "", "subset": "", "split": ""}
SYNONYMS = {name: name for name in SPLIT_NAMES}
SYNONYMS |= {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
SYSTEM_FILES = {"Thumbs.db", "ehthumbs.db", "desktop.ini", "Desktop.ini", "__MACOSX"}
LARGEST_TABLE = 512 * 1024**2  # bytes of a labels.csv
HIDDEN, FOLDER = "is hidden or of the system", "is a directory"  # of what is no file, but no mistake either
# Kinds of files by the first letter of their mode, as `ls -l` shows it
KINDS = {"d": "a directory", "p": "a pipe", "s": "a socket", "b": "a device", "c": "a device"}
Row = dict[str, str]  # path, label and the columns of OPTIONAL
Found = tuple[list[Row], list[tuple[str, str]], list[str]]  # rows, and `rejected` and `warnings` as in Listing
Check = Callable[[str], str | None]  # why a path is no file within the directory, None if it is one


@dataclass(frozen=True)
class Listing:
    """The content of a directory.

    `images`: a row per image by path, as text: path, label, weight, group, stratum, subset, split.
    `rejected`: (path, reason) of what should be an image but cannot be read. `warnings`: about what is left out.
    """

    images: pd.DataFrame
    rejected: list[tuple[str, str]]
    warnings: list[str]


def find_images(directory: Path) -> Listing:
    """List a data set: its `labels.csv` decides; without one, each sub-directory is a class.

    If the sub-directories are train/ and val/ or test/ (also training/, valid/, validation/, testing/, in any case),
    the classes are below them, and `split` is train, val or test. A labels.csv may use the same names.

    Raises ValueError for a mistake in labels.csv (a missing column, a path twice, a weight that is no number above 0),
    and for a class without a file. Paths that do not exist, are no files or lead out of the directory are rejected.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"params.yaml: dataset.path: {directory} is not a directory")
    table = directory / "labels.csv"
    rows, rejected, warnings = _from_table(table) if os.path.lexists(table) else _from_folders(directory)
    if not rows:
        raise ValueError(f"{directory}: no image found; expected a sub-directory per class, or a labels.csv")
    images = pd.DataFrame(rows, columns=["path", "label", *OPTIONAL], dtype=str).sort_values("path", ignore_index=True)
    images["split"] = [SYNONYMS.get(name.casefold(), "") for name in images["split"]]
    return Listing(images, sorted(rejected), warnings + _similar_classes(images["label"]))


def shorten(items: Sequence[str], n: int) -> str:
    """The first `n` items, and … if there are more."""
    return ", ".join([*items[:n], "…"] if len(items) > n else items)


def _similar_classes(labels: pd.Series) -> list[str]:
    """A warning for each pair of classes whose names a typing error may have made different."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(name.strip().casefold(), name), name) for name in sorted(set(labels))]
    return [f"classes {a!r} and {b!r} differ by case or spaces only" for a, b in pairs if a != b]


# labels.csv


def _from_table(table: Path) -> Found:
    check = _make_check(table.parent)
    if problem := check(str(table)):
        raise ValueError(f"{table} {problem}")
    if table.stat().st_size > LARGEST_TABLE:
        raise ValueError(f"{table}: {table.stat().st_size:,} bytes; expected at most {LARGEST_TABLE:,}")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            numbered = list(_read_rows(table, csv.reader(file, strict=True)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: not a CSV file in UTF-8: {error}") from None
    rows: list[Row] = []
    rejected: list[tuple[int, Row, str]] = []
    first: dict[str, int] = {}
    for number, row in numbered:
        path = row["path"]
        if problem := _row_problem(row):
            raise ValueError(f"{table}: row {number}: {problem}")
        if first.setdefault(path, number) != number:
            raise ValueError(f"{table}: row {number}: {path!r} is in row {first[path]} already; expected it once")
        if problem := _path_problem(path, table.parent, check):
            rejected.append((number, row, problem))
        else:
            rows.append(row)
    labels = {row["label"] for row in rows}
    lost = [(number, row, problem) for number, row, problem in rejected if row["label"] not in labels]
    if lost:
        number, row, problem = lost[0]
        of_class = f"of class {row['label']!r} " if rows else ""
        n_rows = sum(other["label"] == row["label"] or not rows for _, other, _ in lost)
        where = f"first row {number}: {row['path']!r} {problem}"
        raise ValueError(f"{table}: no row {of_class}can be used (of {n_rows}), {where}")
    listed = {*first, table.name}
    n_unlisted = sum(problem not in (HIDDEN, FOLDER) and path not in listed for path, problem in _walk(table.parent))
    warnings = [f"{n_unlisted} files are not listed in labels.csv and were left out"] if n_unlisted else []
    return rows, [(row["path"], problem) for _, row, problem in rejected], warnings


def _read_rows(table: Path, reader: Iterator[list[str]]) -> Iterator[tuple[int, Row]]:
    """Number (as a spreadsheet counts) and fields of each row that is not empty."""
    header = next(reader, [])
    for column in ("path", "label"):
        if header.count(column) != 1:
            found = f"is missing; found {', '.join(header)}" if column not in header else "is there twice"
            raise ValueError(f"{table}: column {column!r} {found}; expected path and label, separated by commas")
    for column in header:
        plain = column.strip().casefold()
        if plain in OPTIONAL and (column != plain or header.count(column) > 1):
            raise ValueError(f"{table}: column {column!r}; expected {plain!r}, once")
    for number, fields in enumerate(reader, start=2):
        if len(fields) != len(header) and fields:
            raise ValueError(f"{table}: row {number}: {len(fields)} fields; expected {len(header)}, as in row 1")
        if fields:
            yield number, OPTIONAL | dict(zip(header, fields, strict=True))


def _row_problem(row: Row) -> str | None:
    if not row["label"].strip():
        return "label is empty"
    if row["split"].casefold() not in ("", *SYNONYMS):
        return f"split {row['split']!r}; expected {', '.join(SPLIT_NAMES)} or nothing"
    try:
        is_weight = 0 < float(row["weight"]) < math.inf and "_" not in row["weight"]  # Python allows _ between digits
    except ValueError:
        is_weight = False
    return None if is_weight else f"weight {row['weight']!r}; expected a number above 0"


def _path_problem(name: str, directory: Path, check: Check) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "leads out of the directory; expected a path below it"
    if "\\" in name or "\0" in name or str(path) != name or name == ".":
        return "is no plain path below the directory; expected folder/file, with / only"
    if not (problem := check(f"{directory}/{name}")):
        return None
    for form in ("NFC", "NFD"):  # of é, for example: one sign, or a letter and an accent
        if (other := unicodedata.normalize(form, name)) != name and os.path.lexists(f"{directory}/{other}"):
            return f"{problem}; the file's name is spelled in Unicode's {form}"
    return problem


# directories


def _from_folders(directory: Path) -> Found:
    entries = list(_walk(directory))
    folders = sorted(path for path, problem in entries if problem == FOLDER)
    split_of = _find_splits(directory, folders)
    depth = 2 if split_of else 1
    rows: list[Row] = []
    rejected: list[tuple[str, str]] = []
    closed, loose, hidden = [], [], []
    for path, problem in entries:
        parents = path.split("/")[:-1]
        if problem is None and len(parents) >= depth:
            rows.append(OPTIONAL | {"path": path, "label": parents[depth - 1], "split": split_of.get(parents[0], "")})
        elif problem is None:
            loose.append(repr(path))
        elif problem == HIDDEN:
            hidden.append(repr(path))
        elif problem != FOLDER:
            name = os.fsencode(path).decode(errors="backslashreplace")
            rejected.append((name, problem))
            if os.path.isdir(directory / path):
                closed.append(f"{name!r} ({problem})")
    filled = {"/".join(row["path"].split("/")[:depth]) for row in rows}
    empty = [path for path in folders if path.count("/") == depth - 1 and path not in filled]
    unreadable = dict(rejected)
    for folder in ("", *split_of, *empty):
        if folder in unreadable:
            raise ValueError(f"{directory / folder} {unreadable[folder]}")
        if folder in split_of and not _names_in([folder], folders):
            advice = "expected one per class; keep images without a class elsewhere"
            raise ValueError(f"{directory / folder}: no class directory in it; {advice}")
        if folder in empty:
            raise ValueError(f"{directory / folder}: class without an image; add some or remove the directory")
    warnings = []
    if loose:
        warnings.append(f"{len(loose)} files lie in no class directory and were left out: {shorten(sorted(loose), 3)}")
    if closed:
        found = f"{len(closed)} directories and all images in them were left out: {shorten(sorted(closed), 20)}"
        warnings.append(f"{found}; put a copy in place of a link (cp -rL), rename, or make readable")
    if hidden:
        warnings.append(f"{len(hidden)} hidden or system files were left out: {shorten(sorted(hidden), 3)}")
    return rows, rejected, warnings


def _find_splits(directory: Path, folders: list[str]) -> dict[str, str]:
    """The split of each sub-directory, by its name; empty if the sub-directories are classes."""
    names = sorted(_names_in([""], folders))
    splits = {name: SYNONYMS[name.casefold()] for name in names if name.casefold() in SYNONYMS}
    others = [name for name in names if name not in splits]
    # Sub-directories with the same sub-directories are splits; one that is called train may be a class of trains
    is_similar = _names_in(splits, folders) & _names_in(dict.fromkeys(others), folders)
    if "train" not in splits.values() or (len(splits) == 1 and others and not is_similar):
        return {}
    listed = ", ".join(f"{name}/" for name in splits)
    problem = f"{others[0]}/ lies beside {listed}" if others else f"{listed} are not one of each split"
    if others or len(set(splits.values())) < len(splits):
        raise ValueError(f"{directory}: {problem}; expected train/, val/ and test/ only, or classes, or a labels.csv")
    return splits


def _names_in(parents: Container[str], folders: list[str]) -> set[str]:
    """Names of the directories that lie in `parents`."""
    return {os.path.basename(path) for path in folders if os.path.dirname(path) in parents}


def _walk(directory: Path) -> Iterator[tuple[str, str | None]]:
    """Each file below, by its path from there, and why it cannot be used, None if it can; FOLDER for a directory.

    Links to files are followed within the directory. Links to directories never are: they could run in circles.
    """
    check, folders = _make_check(directory), [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(directory / folder))
        except OSError as error:
            yield folder, f"cannot be read: {error.strerror}"
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(".") or entry.name in SYSTEM_FILES:
                yield path, HIDDEN
            elif entry.name.encode(errors="ignore").decode() != entry.name:
                yield path, "has a name that is not UTF-8"
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
                yield path, FOLDER
            else:
                yield path, None if entry.is_file(follow_symlinks=False) else check(entry.path)


def _make_check(directory: Path) -> Check:
    """Make the function that says why a path is no file within `directory`. It remembers resolved directories."""
    inside = os.path.join(os.path.realpath(directory), "")
    resolve = cache(lambda folder: os.path.realpath(folder))

    def check(path: str) -> str | None:
        folder, name = os.path.split(path)
        target, is_link = os.path.join(resolve(folder), name), False
        try:
            if target.startswith(inside) and (is_link := stat.S_ISLNK(os.lstat(target).st_mode)):
                target = os.path.realpath(target)
            if not target.startswith(inside):
                return "is a link that leads out of the directory"
            kind = stat.filemode(os.stat(target).st_mode)[0]
        except (FileNotFoundError, NotADirectoryError):
            return "is a broken link" if is_link else "does not exist"
        except OSError as error:
            is_circle = error.errno == errno.ELOOP
            return "is a link that runs in a circle" if is_circle else f"cannot be read: {error.strerror}"
        if is_link and kind == "d":
            return "is a link to a directory, which is not followed"
        return None if kind == "-" else f"is {KINDS.get(kind, 'something else')}; expected a file"

    return check
