"""Predict new images with a saved run: files, directories, patterns or a table of paths -> a table, JSON or CSV."""

import codecs
import csv
import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from pipeline import logs
from pipeline.files import replacing
from pipeline.ingest.directory import IMAGE_EXTENSIONS, is_system, printable
from pipeline.tools import inference
from pipeline.tools.inference import Answer
from pipeline.training import calibration
from pipeline.training.saved_networks import Card

FORMATS = ("table", "json", "jsonl", "csv")
SHOWN = 20  # files that cannot be read, in the last line
UNDECIDED = "undecided"  # in a table; null in JSON, empty in CSV
Json = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How predictions are shown: in one of FORMATS, with the `top` most probable classes, or None: all.

    `is_raw`: without the temperature of the card. Below the probability `least`, no class is predicted.
    """

    form: str
    top: int | None
    is_raw: bool
    least: float


def show(
    run: str, images: Sequence[str], table: Path | None, options: Options, output: Path | None, workers: int | None
) -> None:
    """Print the prediction for every image that can be read, or write it to `output`; ValueError if one cannot.

    `run`: the path of a saved run, e.g. models/full_retrain/seed_0. `table`: a CSV file whose column `path` names more
    images.
    """
    paths = [*find(images), *(read_paths(table) if table else ())]
    if not paths:
        where = ", ".join([*images, *([str(table)] if table else [])])
        raise ValueError(f"no image in {printable(where)}; expected files with the extensions of images")
    if not any(map(os.path.exists, paths)):  # one that is missing among others is a failure of its own
        others = f", nor another of {len(paths):,} images" if len(paths) > 1 else ""
        raise FileNotFoundError(
            f"{printable(str(paths[0]))}: not there{others}; expected files, directories or patterns"
        )
    network = inference.open_network(inference.path_of(run), len(paths))
    answers = logs.progress(inference.run(network, paths, workers), len(paths), "images", "predict")
    failures: list[str] = []
    rows = _noted(predict(answers, network.card, options), failures)
    with ExitStack() as stack:
        file = sys.stdout
        if output is not None:
            place = stack.enter_context(replacing(output))
            file = stack.enter_context(place.open("w", encoding="utf-8", errors="backslashreplace", newline=""))
        _WRITERS[options.form](rows, network.card, options, file)
    if failures:
        more = f"; and {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
        found = f"{len(failures)} of {len(paths)} images cannot be read"
        raise ValueError(f"{found}: {'; '.join(failures[:SHOWN])}{more}")


def form_of(output: Path | None) -> str:
    """The format of FORMATS that the ending of a file names, or a table."""
    ending = "" if output is None else output.suffix.lower().removeprefix(".")
    return ending if ending in FORMATS else "table"


def find(images: Sequence[str]) -> list[Path]:
    """The files that arguments name: files as they are, the images in directories and below, what patterns fit.

    A name of a file that has the signs of a pattern in it is a file. Raises FileNotFoundError for a pattern that fits
    nothing; files that are not there are errors of their own later. What is named twice is there once.
    """
    found: list[Path] = []
    for name in images:
        fitting = [name]
        if not os.path.lexists(name) and glob.has_magic(name):
            fitting = sorted(glob.glob(name, recursive=True))
            if not fitting:
                raise FileNotFoundError(f"{printable(name)}: no file fits this pattern")
        for path in fitting:
            found += _images_below(Path(path)) if os.path.isdir(path) else [Path(path)]
    return [*dict.fromkeys(found)]


def _images_below(directory: Path) -> list[Path]:
    """The files below with an extension of images, in order; hidden ones, and directories behind links, are left out.

    Raises OSError for a directory that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found, others = [], []
    for folder, folders, names in os.walk(directory, onerror=fail):
        folders[:] = sorted(name for name in folders if not is_system(name))
        for name in sorted(name for name in names if not is_system(name)):
            is_image = os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS
            (found if is_image else others).append(Path(folder, name))
    if others:
        is_one = len(others) == 1
        what = "1 file" if is_one else f"{len(others):,} files"
        was = "was left out:" if is_one else "were left out, first"
        logs.log.info("%s", printable(f"{directory}: {what} without an extension of images {was} {others[0]}"))
    return found


def read_paths(table: Path) -> list[Path]:
    """The column `path` of a CSV file, relative to its directory; ValueError in one line if it is no such file."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if "path" not in (reader.fieldnames or ()):
                found = ", ".join(reader.fieldnames or ()) or "nothing"
                raise ValueError(
                    f"{table}: column 'path' is missing; found {printable(found)}, expected columns separated by commas"
                )
            named = [(reader.line_num, row["path"]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: not a CSV file in UTF-8: {error}") from None
    if empty := [number for number, name in named if not name]:
        raise ValueError(f"{table}: line {empty[0]}: path is empty; expected the path of an image")
    return [table.parent / name for _, name in named]


def predict(answers: Iterable[Answer], card: Card, options: Options) -> Iterator[Json]:
    """A row per answer: path, class, probability, probabilities (by class), error.

    `class` is None where it is undecided, and `error` says why there is no prediction; it is empty otherwise. With
    `top`, the most probable classes come first.
    """
    temperature = 1.0 if options.is_raw else card.temperature
    for answer in answers:
        row = {"path": str(answer.path), "class": None, "probability": None, "probabilities": {}, "error": answer.error}
        if not answer.error:
            probability = calibration.scaled(answer.log_probability[None], temperature)[0]
            order = np.argsort(-probability, kind="stable")
            best, shown = order[0], range(len(order)) if options.top is None else order[: options.top]
            row["class"] = card.class_names[best] if probability[best] >= options.least else None
            row["probability"] = round(float(probability[best]), 6)
            row["probabilities"] = {card.class_names[i]: round(float(probability[i]), 6) for i in shown}
        yield row


def _noted(rows: Iterable[Json], failures: list[str]) -> Iterator[Json]:
    for row in rows:
        if row["error"]:
            failures.append(printable(f"{row['path']}: {row['error']}"))
        yield row


def _table(rows: Iterable[Json], card: Card, options: Options, file: TextIO) -> None:
    """Class, probability and path; with `top`, the next most probable classes between them, of an undecided one all."""
    width = max(len(name) for name in (*card.class_names, UNDECIDED))
    for row in rows:
        if row["error"]:
            continue
        ranked = [f"{name} {p:.4f}" for name, p in row["probabilities"].items()] if options.top else []
        ranked = ranked if row["class"] is None else ranked[1:]
        name = UNDECIDED if row["class"] is None else row["class"]
        shown = [f"{printable(name):<{width}}", f"{row['probability']:.4f}", *map(printable, ranked)]
        print(*shown, printable(row["path"]), sep="  ", file=file)


def _json(rows: Iterable[Json], _card: Card, _options: Options, file: TextIO) -> None:
    """A list with a line for each image that can be read."""
    separator = "[\n"
    for row in rows:
        if not row.pop("error"):
            file.write(separator + _dumped(row, file))
            separator = ",\n"
    file.write("\n]\n" if separator != "[\n" else "[]\n")


def _jsonl(rows: Iterable[Json], _card: Card, _options: Options, file: TextIO) -> None:
    """A line for each image; one that cannot be read has an `error`."""
    for row in rows:
        error = row.pop("error")
        print(_dumped(row | ({"error": error} if error else {}), file), file=file)


def _csv(rows: Iterable[Json], card: Card, options: Options, file: TextIO) -> None:
    """A row for each image; one that cannot be read has an `error`."""
    names, n = card.class_names, min(options.top or 0, len(card.class_names))
    ranked = [f"{word}_{k}" for k in range(1, n + 1) for word in ("class", "probability")]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", "class", "probability", *(ranked or [f"p({name})" for name in names]), "error"])
    for row in rows:
        given = row["probabilities"]
        shown = [value for pair in given.items() for value in pair] if n else [*given.values()]
        shown = shown or [None] * (2 * n or len(names))
        writer.writerow([row["path"], row["class"], row["probability"], *shown, row["error"]])


def _dumped(row: Json, file: TextIO) -> str:
    """JSON in one line, of which every sign can be written to the file."""
    is_ascii = codecs.lookup(getattr(file, "encoding", None) or "ascii").name != "utf-8"
    return json.dumps(row, ensure_ascii=is_ascii)


_WRITERS = {"table": _table, "json": _json, "jsonl": _jsonl, "csv": _csv}
