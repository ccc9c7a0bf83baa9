"""Classes by the names of directories: which files lie in which, and whether these directories can be classes."""

import os
import re
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path

from pipeline.ingest.directory import (
    EXCLUDED,
    FOLDER,
    HIDDEN,
    OPTIONAL,
    TABLE,
    Entry,
    Found,
    Row,
    describe,
    left_out,
    shorten,
)
from pipeline.ingest.table import SYNONYMS

# Names of directories that hold something else than one class
NO_CLASS = {
    *("image", "images", "img", "imgs", "jpegimages", "picture", "pictures", "photo", "photos", "mask", "masks"),
    *("label", "labels", "annotation", "annotations", "segmentation", "segmentations", "gt", "groundtruth"),
    *("ground_truth", "thumb", "thumbs", "thumbnail", "thumbnails", "preview", "previews", "backup", "backups"),
    *("original", "originals", "raw", "crops", "results", "output", "outputs", "tmp", "temp", "unlabeled"),
    *("unlabelled", "new folder", "untitled folder"),
}
SPLIT_LIKE = re.compile(r"(^|[\W_\d])(train(ing)?|test(ing)?|val(id(ation)?)?|dev|eval)([\W_\d]|$)", re.IGNORECASE)


def from_folders(directory: Path, entries: Sequence[Entry], exclude: Sequence[str]) -> Found:
    """Take each directory as a class, below train/, val/ and test/ if there are such.

    ValueError if there is no image, or a directory that cannot be a class.
    """
    folders = [path for path, problem in entries if problem == FOLDER]
    tree = describe(entries)
    split_of = _find_splits(directory, folders, tree)
    depth = 2 if split_of else 1
    rows: list[Row] = []
    rejected: list[tuple[str, str]] = []
    closed, loose = [], []
    for path, problem in entries:
        parents = path.split("/")[:-1]
        if problem is None and len(parents) >= depth:
            rows.append(OPTIONAL | {"path": path, "label": parents[depth - 1], "split": split_of.get(parents[0], "")})
        elif problem is None:
            loose.append(path)
        elif problem not in (HIDDEN, EXCLUDED, FOLDER):
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
            advice = "expected one per class; keep images without a class elsewhere, or set dataset.exclude"
            raise ValueError(f"{directory / folder}: no class directory in it; {advice}; found {tree}")
        if folder in empty:
            advice = f"add some, remove the directory, or set dataset.exclude: [{folder}]"
            raise ValueError(f"{directory / folder}: class without an image; {advice}; found {tree}")
    if not rows:
        expected = "expected a sub-directory per class, or a labels.csv"
        raise ValueError(f"{directory}: no image found; {expected}; found {tree or 'nothing'}{_tables(loose)}")
    skipped, warnings = left_out(directory, entries, exclude)
    if loose:
        skipped["in no class directory"] = len(loose)
        found = f"{len(loose)} files lie in no class directory and were left out"
        warnings.insert(0, f"{found}: {shorten([repr(path) for path in loose], 3)}{_tables(loose)}")
    if closed:
        found = f"{len(closed)} directories and all images in them were left out: {shorten(sorted(closed), 20)}"
        warnings.append(f"{found}; put a copy in place of a link (cp -rL), rename, or make readable")
    layout, doubts = _doubts(directory, rows, depth, tree)
    return Found(rows, rejected, warnings + doubts, skipped, layout)


def _tables(loose: Sequence[str]) -> str:
    """A hint for files that may have been meant as labels.csv."""
    tables = [path for path in loose if re.search(r"\.(csv|tsv|xlsx?|ods)", path, re.IGNORECASE)]
    return f"; a table is read only if it is called {TABLE}: {shorten(tables, 3)}" if tables else ""


def _find_splits(directory: Path, folders: list[str], tree: str) -> dict[str, str]:
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
        expected = "expected train/, val/ and test/ only (see dataset.exclude), or classes, or a labels.csv"
        raise ValueError(f"{directory}: {problem}; {expected}; found {tree}")
    return splits


def _names_in(parents: Container[str], folders: list[str]) -> set[str]:
    """Names of the directories that lie in `parents`."""
    return {os.path.basename(path) for path in folders if os.path.dirname(path) in parents}


def _doubts(directory: Path, rows: Sequence[Row], depth: int, tree: str) -> tuple[str, list[str]]:
    """What was found, with what can be meant by it, for errors; and warnings about directories that may be no classes.

    ValueError for directories whose names say that they are splits, and which hold the same directories.
    """
    paths = [(row["label"], row["path"].split("/")[depth:]) for row in rows]
    nested = [(label, below[0]) for label, below in paths if len(below) > 1]
    is_nested = len(nested) > 0.9 * len(rows)
    labels = sorted({row["label"] for row in rows})
    n_classes = Counter(name for _, name in set(nested))  # in which there is a directory of this name
    names = sorted(n_classes)
    shared = [name for name in names if n_classes[name] > 1]
    listed, below = (shorten([f"{name}/" for name in found], 4) for found in (labels, names))
    meant = "each directory a class, or train/, val/ and test/ with the classes below, or a labels.csv"
    layout = f"found {tree}; expected {meant}"
    if len(labels) == 1 and len(names) > 1 and is_nested:
        layout = f"found {tree}; if {below} are the classes, set dataset.path: {directory / labels[0]}"
    if depth == 1 and len(labels) > 1 and shared and all(map(SPLIT_LIKE.search, labels)):
        problem = f"{listed} hold the same directories ({below}) and are called like splits"
        advice = "rename them to train/, val/ and test/, or write a labels.csv"
        raise ValueError(f"{directory}: {problem}; {advice}; {layout}")
    doubts = []
    if len(labels) > 1 and is_nested:
        what = f"taken as the classes: {listed}; they hold directories ({below})"
        if set(map(str.casefold, names)) <= set(SYNONYMS):
            other = "if those are splits, put them above the classes: train/<class>/"
        elif shared:
            other = f"if {below} are the classes, move them to the top, or write a labels.csv with path, label, group"
        else:
            other = f"if {below} are the classes, move them to the top, or write a labels.csv"
        doubts.append(f"{what}; {other}; found {tree}")
    odd = [name for name in labels if name.casefold() in NO_CLASS or (depth == 1 and name.casefold() in SYNONYMS)]
    odd += [name for name in names if name.casefold() in NO_CLASS]
    if odd:
        what = f"{shorten([f'{name}/' for name in odd], 4)}: what lies there counts as images of a class"
        doubts.append(f"{what}; if it is something else, set dataset.exclude: [{', '.join(odd[:4])}]; found {tree}")
    return layout, doubts
