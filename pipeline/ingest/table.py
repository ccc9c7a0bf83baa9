"""Read a labels.csv: which file each of its rows means, and which rows cannot be used."""

import csv
import math
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path, PurePosixPath

from pipeline.dataset.manifest import SPLIT_NAMES
from pipeline.ingest.directory import (
    EXCLUDED,
    FOLDER,
    HIDDEN,
    IMAGE_EXTENSIONS,
    OPTIONAL,
    TABLE,
    Check,
    Entry,
    Found,
    Row,
    fits,
    is_system,
    left_out,
    make_check,
    shorten,
)

SYNONYMS = {name: name for name in SPLIT_NAMES}
SYNONYMS |= {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
SEARCHED = ("does not exist", "leads out", "is no plain path")  # problems of paths that may mean another file
LARGEST = 512 * 1024**2  # bytes of a labels.csv


def from_table(table: Path, entries: Sequence[Entry], exclude: Sequence[str], columns: Mapping[str, str]) -> Found:
    """Read a labels.csv, and find the file that the path in each row means; `entries` are those of its directory.

    ValueError for a mistake in it, and for a class of which no row can be used.
    """
    directory = table.parent
    check = make_check(directory)
    if problem := check(str(table)):
        raise ValueError(f"{table} {problem}")
    if table.stat().st_size > LARGEST:
        raise ValueError(f"{table}: {table.stat().st_size:,} bytes; expected at most {LARGEST:,}")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            unread: list[str] = []
            numbered = list(_read_rows(table, csv.reader(file, strict=True), columns, unread))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: not a CSV file in UTF-8: {error}; save it as CSV in UTF-8") from None
    files = {path for path, problem in entries if problem is None}
    find = _make_finder(directory, files)
    rows: list[Row] = []
    rejected: list[tuple[int, Row, str]] = []
    first: dict[str, int] = {}
    meant: list[tuple[str, str]] = []
    n_excluded = 0
    for number, row in numbered:
        name = row["path"]
        if problem := _row_problem(row):
            raise ValueError(f"{table}: row {number}: {problem}")
        problem = None if name in files else _path_problem(name, directory, check)
        is_found = problem is None or not problem.startswith(SEARCHED)
        path, advice = (None if problem else name, "") if is_found else find(name)
        if first.setdefault(path or name, number) != number:
            same = f"{name!r}" if path in (name, None) else f"{name!r}, which is {path!r},"
            raise ValueError(f"{table}: row {number}: {same} is in row {first[path or name]} already; expected it once")
        parts = accumulate((path or name).split("/"), "{}/{}".format)  # the directories above it, and the path
        if any(fits(part, pattern) for part in parts for pattern in exclude):
            n_excluded += 1
        elif path is None:
            rejected.append((number, row, f"{problem}{advice}"))
        else:
            rows.append(row | {"path": path})
            if path != name:
                meant.append((name, path))
    if not rows and not rejected:
        raise ValueError(f"{table}: no image found; expected a row for each image")
    labels = {row["label"] for row in rows}
    lost = [(number, row, problem) for number, row, problem in rejected if row["label"] not in labels]
    if lost:
        number, row, problem = lost[0]
        of_class = f"of class {row['label']!r} " if rows else ""
        n_rows = sum(other["label"] == row["label"] or not rows for _, other, _ in lost)
        where, others = f"first row {number}: {row['path']!r} {problem}", files - {table.name}
        example = f"; expected paths below the directory, such as {min(others)!r}" if others else ""
        raise ValueError(f"{table}: no row {of_class}can be used (of {n_rows}), {where}{example}")
    listed = {row["path"] for row in rows}
    known = {TABLE, table.name, *listed, *(row["path"] for _, row, _ in rejected)}
    n_unlisted = sum(what not in (HIDDEN, EXCLUDED, FOLDER) and path not in known for path, what in entries)
    skipped, warnings = left_out(directory, entries, exclude, listed)
    if n_unlisted:
        skipped["not listed in labels.csv"] = n_unlisted
        warnings.insert(0, f"{n_unlisted} files are not listed in labels.csv and were left out")
    if n_excluded:
        warnings.append(f"{n_excluded} rows of labels.csv were left out by dataset.exclude")
    if meant:
        found = f"{len(meant)} paths of labels.csv were taken as the only file that they can mean"
        warnings.append(f"{found}, first {meant[0][0]!r} as {meant[0][1]!r}")
    if n_system := sum(any(map(is_system, path.split("/"))) for path in listed):
        warnings.append(f"{n_system} images that labels.csv lists are hidden or of the system (thumbnails?), and used")
    if unread:
        advice = f"to read one as group, set dataset.columns: {{group: {unread[0]!r}}}"
        warnings.append(f"columns of {table.name} that are not read: {', '.join(unread[:10])}; {advice}")
    reasons = [(row["path"], problem) for _, row, problem in rejected]
    return Found(rows, reasons, warnings, skipped)


def _read_rows(
    table: Path, reader: Iterator[list[str]], columns: Mapping[str, str], unread: list[str]
) -> Iterator[tuple[int, Row]]:
    """Number (as a spreadsheet counts) and fields of each row that is not empty.

    `columns` maps names of ours to those in the header; a column of ours that another one stands for is not read.
    Names of columns that are not read are added to `unread`.
    """
    header = next(reader, [])
    listed = ", ".join(header)
    for separator, word in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and separator in header[0]:
            raise ValueError(f"{table}: columns separated by {word} ({listed}); expected commas: save it so")
    for column, name in columns.items():
        if header.count(name) != 1:
            found = f"is missing; found {listed}" if name not in header else "is there twice"
            raise ValueError(f"{table}: column {name!r} (params.yaml: dataset.columns.{column}) {found}")
    for column in ("path", "label"):
        if column not in columns and header.count(column) != 1:
            found = f"is missing; found {listed}" if column not in header else "is there twice"
            near = next((name for name in header if name.strip().casefold() == column), "<its name there>")
            advice = f"expected path and label, separated by commas, or set dataset.columns: {{{column}: {near!r}}}"
            raise ValueError(f"{table}: column {column!r} {found}; {advice}")
    ours = {name: name for name in header if name in ("path", "label", *OPTIONAL) and name not in columns}
    for column in set(header) - set(columns.values()):
        plain = column.strip().casefold()
        if plain in OPTIONAL and plain not in columns and (column != plain or header.count(column) > 1):
            raise ValueError(f"{table}: column {column!r}; expected {plain!r}, once")
    place = {column: header.index(name) for column, name in (ours | dict(columns)).items()}
    unread += [name for name in header if name not in place and name not in columns.values()]
    for number, fields in enumerate(reader, start=2):
        if len(fields) != len(header) and fields:
            raise ValueError(f"{table}: row {number}: {len(fields)} fields; expected {len(header)}, as in row 1")
        if fields:
            yield number, OPTIONAL | {column: fields[index] for column, index in place.items()}


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
    return check(f"{directory}/{name}")


def _make_finder(directory: Path, files: set[str]) -> Callable[[str], tuple[str | None, str]]:
    """Make the function that finds the only one of `files` that a path can mean which is not the path of a file.

    Such paths are absolute or start above the directory, contain ./ or backslashes, differ in case or in the spelling
    in Unicode, or lack the directories or the extension. The function returns None where none or several files fit,
    and an advice.
    """

    def key(path: str) -> str:
        return unicodedata.normalize("NFC", path).casefold()

    def stem(path: str) -> str:
        head, extension = os.path.splitext(path)
        return head if extension.lower() in IMAGE_EXTENSIONS else path

    @cache
    def tables() -> list[defaultdict[str, set[str]]]:
        made: list[defaultdict[str, set[str]]] = [defaultdict(set) for _ in range(4)]
        for path in files:
            name = path.rsplit("/", 1)[-1]
            for table, text in zip(made, (path, stem(path), name, stem(name)), strict=True):
                table[key(text)].add(path)
        return made

    above = directory.resolve().parts[1:]
    starts = [f"/{'/'.join(above)}", os.path.abspath(directory), *("/".join(above[n:]) for n in range(len(above)))]

    def find(name: str) -> tuple[str | None, str]:
        plain = name.strip().replace("\\", "/")
        parts = [part for part in plain.split("/") if part not in ("", ".")]
        if ".." in parts or not parts or plain.endswith("/") or "\0" in name:
            return None, ""
        short = "/".join(parts)
        text = f"/{short}" if plain.startswith("/") else short
        rest = [text[len(start) + 1 :] for start in starts if text.startswith(f"{start}/")]
        candidates = rest if text != short else [short, *rest]
        whole, without_extension, by_name, by_stem = tables()
        for table in (whole, without_extension, *((by_name, by_stem) if text == parts[0] else ())):
            found = sorted(set().union(*(table.get(key(path), set()) for path in candidates)))
            if len(found) > 1:
                exact = [path for path in found if path in candidates]
                if len(exact) != 1:
                    return None, f"; it may mean {shorten([repr(path) for path in found], 3)}: write one of them"
                found = exact
            if found:
                return found[0], ""
        for n in range(len(parts)):  # written on another machine, or for another format
            tail = key("/".join(parts[n:]))
            if near := whole.get(tail) or without_extension.get(stem(tail)):
                return None, f"; if {min(near)!r} is meant, write that"
        return None, "; there is no such file in the directory" if rest else ""

    return find
