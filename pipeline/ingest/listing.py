"""Read a user's directory: which files are images of which class, what cannot be one, and what was left out.

Nothing outside the directory is read, and nothing in it is opened but its labels.csv.
"""

import csv
import errno
import math
import os
import stat
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import pandas as pd

from pipeline.dataset.manifest import PARTS

OPTIONAL = {"weight": "1", "group": "", "stratum": "", "subset": "", "split": ""}
PART_NAMES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"} | {p: p for p in PARTS}
LEFT_BEHIND = {"Thumbs.db", "ehthumbs.db", "desktop.ini", "Desktop.ini", "__MACOSX"}  # by file managers
LARGEST_TABLE = 512 * 1024**2  # bytes of a labels.csv
SHOWN_CLOSED = 20  # directories that were left out, in the warning
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}
Real = Callable[[str], str]  # os.path.realpath, remembering directories


@dataclass(frozen=True)
class Listing:
    """What lies in a directory.

    `images`: a row per image by path, as text: path, label, weight, group, stratum, subset, split.
    `rejected`: (path, reason) of what would be an image but cannot be read as one. `warnings`: what was left out.
    """

    images: pd.DataFrame
    rejected: list[tuple[str, str]]
    warnings: list[str]


def find_images(directory: Path) -> Listing:
    """List a dataset: a `labels.csv` in the directory decides, else each sub-directory is a class.

    If the sub-directories are train/ and val/ or test/ (also training/, valid/, validation/, testing/, in any case),
    theirs are the classes, and `split` is train, val or test. In labels.csv these names will do, too.

    Raises ValueError for a mistake in labels.csv (a missing column, a path twice, a weight that is no number above 0),
    and for a class without a file. A path in it that is absent, no file or leads out of the directory is rejected.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"params.yaml: dataset.path: {directory} is not a directory")
    table = directory / "labels.csv"
    listing = _from_csv(table) if os.path.lexists(table) else _from_classes(directory)
    if listing.images.empty:
        raise ValueError(f"{directory}: no image found; expected a sub-directory per class, or a labels.csv")
    missing = {column: value for column, value in OPTIONAL.items() if column not in listing.images}
    images = listing.images.assign(**missing).sort_values("path", ignore_index=True)
    images["split"] = [PART_NAMES.get(name.casefold(), "") for name in images["split"]]
    return Listing(images, sorted(listing.rejected), listing.warnings + _alike(images["label"]))


def _alike(labels: pd.Series) -> list[str]:
    """A warning for classes that a typing error may have made two."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(name.strip().casefold(), name), name) for name in sorted(set(labels))]
    return [f"classes {a!r} and {b!r} differ by case or spaces only" for a, b in pairs if a != b]


# labels.csv


def _from_csv(table: Path) -> Listing:
    root = os.path.realpath(table.parent)
    real = _real()
    if problem := _problem(str(table), root, real):
        raise ValueError(f"{table} {problem}")
    if table.stat().st_size > LARGEST_TABLE:
        raise ValueError(f"{table}: {table.stat().st_size:,} bytes; expected at most {LARGEST_TABLE:,}")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_rows(table, csv.reader(file, strict=True)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: not a CSV file in UTF-8: {error}") from None
    seen: dict[str, int] = {}
    for number, row in rows:
        if problem := _mistake(row):
            raise ValueError(f"{table}: row {number}: {problem}")
        if (first := seen.setdefault(row["path"], number)) != number:
            raise ValueError(f"{table}: row {number}: {row['path']!r} is in row {first} already; expected it once")
    found = [(number, row, _path_problem(row["path"], table.parent, root, real)) for number, row in rows]
    kept = [row for _, row, problem in found if not problem]
    rejected = [(row["path"], problem) for _, row, problem in found if problem]
    labels = {row["label"] for row in kept}
    for number, row, problem in found:
        if row["label"] not in labels:  # then all its rows are rejected, this one first
            whose = f"of class {row['label']!r} " if kept else ""
            n_lost = sum(other["label"] == row["label"] for _, other in rows) if kept else len(rows)
            raise ValueError(
                f"{table}: no row {whose}can be used (of {n_lost}), first row {number}: {row['path']!r} {problem}"
            )
    columns = [column for column in ("path", "label", *OPTIONAL) if rows and column in rows[0][1]]
    unlisted = sum(path not in seen for path, _ in _walk(table.parent, []) if path != table.name)
    warnings = [f"{unlisted} files are not listed in labels.csv and were left out"] if unlisted else []
    return Listing(pd.DataFrame(kept, columns=columns, dtype=str), rejected, warnings)


def _rows(table: Path, reader: Iterator[list[str]]) -> Iterator[tuple[int, dict[str, str]]]:
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
            yield number, dict(zip(header, fields, strict=True))


def _path_problem(name: str, directory: Path, root: str, real: Real) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "leads out of the directory; expected a path below it"
    if "\\" in name or "\0" in name or str(path) != name or name == ".":
        return "is no plain path below the directory, with / between its parts"
    problem = _problem(f"{directory}/{name}", root, real)
    return problem and problem + _other_spelling(directory, name)


def _mistake(row: dict[str, str]) -> str | None:
    if not row["label"].strip():
        return "label is empty"
    if row.get("split", "").casefold() not in ("", *PART_NAMES):
        return f"split {row['split']!r}; expected {', '.join(PARTS)} or nothing"
    try:
        weight = float(row.get("weight", "1"))
    except ValueError:
        weight = math.nan
    is_plain = "_" not in row.get("weight", "")  # which Python takes between digits
    return None if 0 < weight < math.inf and is_plain else f"weight {row['weight']!r}; expected a number above 0"


def _other_spelling(directory: Path, name: str) -> str:
    """A hint where the same letters, composed in another way (é as one sign or two), name a file."""
    for form in ("NFC", "NFD"):
        if (other := unicodedata.normalize(form, name)) != name and os.path.lexists(f"{directory}/{other}"):
            return f"; the file's name is spelled in Unicode's {form}"
    return ""


# directories


def _from_classes(directory: Path) -> Listing:
    parts = _find_parts(directory)
    depth = 2 if parts else 1
    rows: list[tuple[str, str, str]] = []
    rejected: list[tuple[str, str]] = []
    loose: list[str] = []
    ignored: list[str] = []
    closed: list[str] = []
    for path, problem in _walk(directory, ignored):
        *folders, _ = path.split("/")
        if problem:
            rejected.append((os.fsencode(path).decode(errors="backslashreplace"), problem))
            if os.path.isdir(directory / path):
                closed.append(f"{rejected[-1][0]!r} ({problem})")
        elif len(folders) >= depth:
            rows.append((path, folders[depth - 1], parts.get(folders[0], "")))
        else:
            loose.append(path)
    filled = {path.rsplit("/", path.count("/") - depth + 1)[0] for path, _, _ in rows}
    for name in _class_folders(directory, parts):
        if name not in filled:
            reason = dict(rejected).get(name)
            raise ValueError(
                f"{directory / name} {reason}"
                if reason
                else f"{directory / name}: class without an image; add some or remove the directory"
            )
    warnings = [f"{len(loose)} files lie in no class directory and were left out{_some(loose)}"] if loose else []
    if closed:
        shown = ", ".join(sorted(closed)[:SHOWN_CLOSED]) + (", …" if len(closed) > SHOWN_CLOSED else "")
        warnings.append(
            f"{len(closed)} directories and all images in them were left out: {shown}; put a copy in place of a link "
            "(cp -rL), rename, or make readable"
        )
    if ignored:
        warnings.append(f"{len(ignored)} hidden or system files were left out{_some(ignored)}")
    return Listing(pd.DataFrame(rows, columns=["path", "label", "split"], dtype=str), rejected, warnings)


def _find_parts(directory: Path) -> dict[str, str]:
    """The part that each sub-directory is, by its name; empty if they are classes."""
    folders = _folders(directory)
    parts = {name: PART_NAMES[name.casefold()] for name in folders if name.casefold() in PART_NAMES}
    others = [name for name in folders if name not in parts]
    is_like = any(_is_like(directory, part, other) for part in parts for other in others)
    is_alone = len(parts) == 1 and bool(others) and not is_like
    if "train" not in parts.values() or is_alone:
        return {}  # there may be a class of trains
    problem = None
    if others:
        problem = f"{others[0]}/ lies beside {', '.join(f'{name}/' for name in parts)}"
    elif len(set(parts.values())) < len(parts):
        problem = f"{', '.join(f'{name}/' for name in parts)} are not one of each part"
    if problem:
        raise ValueError(f"{directory}: {problem}; expected train/, val/ and test/ only, or classes, or a labels.csv")
    return parts


def _is_like(directory: Path, one: str, other: str) -> bool:
    """Whether two sub-directories hold some of the same sub-directories, as parts of a data set do."""
    return bool({*_folders(directory / one)} & {*_folders(directory / other)})


def _class_folders(directory: Path, parts: dict[str, str]) -> list[str]:
    """Paths of the class directories; ValueError for a part without any."""
    if not parts:
        return _folders(directory)
    found = []
    for part in parts:
        classes = _folders(directory / part)
        if not classes:
            raise ValueError(
                f"{directory / part}: no class directory in it; expected one per class; images without a class are "
                "to be kept elsewhere"
            )
        found += [f"{part}/{name}" for name in classes]
    return found


def _folders(directory: Path) -> list[str]:
    """Names of the directories in one, without links and what is ignored."""
    try:
        entries = [entry for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    except PermissionError:
        raise ValueError(f"{directory} cannot be read") from None
    return sorted(entry.name for entry in entries if not _is_ignored(entry.name) and _is_utf8(entry.name))


def _some(names: list[str]) -> str:
    first = ", ".join(repr(name) for name in sorted(names)[:3])
    return f": {first}{', …' if len(names) > 3 else ''}"


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name in LEFT_BEHIND


def _walk(directory: Path, ignored: list[str]) -> Iterator[tuple[str, str | None]]:
    """Each file below, by its path from there, with what is wrong with it; names left out go into `ignored`.

    Links to files are followed within the directory, links to directories never: they could run in circles.
    """
    root, real, folders = os.path.realpath(directory), _real(), [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(directory / folder))
        except OSError as error:
            yield folder.rstrip("/"), f"cannot be read: {error.strerror}"
            continue
        for entry in entries:
            path = folder + entry.name
            if _is_ignored(entry.name):
                ignored.append(path)
            elif not _is_utf8(entry.name):
                yield path, "has a name that is not UTF-8"
            elif entry.is_dir(follow_symlinks=False):
                folders.append(f"{path}/")
            elif entry.is_file(follow_symlinks=False):
                yield path, None
            else:
                yield path, _problem(entry.path, root, real)


def _real() -> Real:
    def real(path: str) -> str:
        return os.path.realpath(path)

    return cache(real)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _problem(path: str, root: str, real: Real) -> str | None:
    """Why `path` is no file within `root` (as realpath gives it), None if it is one."""
    folder, name = os.path.split(path)
    target, is_link = os.path.join(real(folder), name), False
    inside = f"{root.rstrip('/')}/"
    try:
        if target.startswith(inside) and (is_link := stat.S_ISLNK(os.lstat(target).st_mode)):
            target = os.path.realpath(target)
        if not target.startswith(inside):
            return "is a link that leads out of the directory"
        info = os.stat(target)
    except (FileNotFoundError, NotADirectoryError):
        return "is a broken link" if is_link else "does not exist"
    except OSError as error:
        is_circle = error.errno == errno.ELOOP
        return "is a link that runs in a circle" if is_circle else f"cannot be read: {error.strerror}"
    kind = stat.S_IFMT(info.st_mode)
    if is_link and kind == stat.S_IFDIR:
        return "is a link to a directory, which is not followed"
    return None if kind == stat.S_IFREG else f"is {KINDS.get(kind, 'something else')}; expected a file"
