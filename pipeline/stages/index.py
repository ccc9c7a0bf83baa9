"""index: read every image once; list what is there, what cannot be read, and what occurs twice.

Reads   the directory dataset.path
Writes  data/images.csv, data/labels.csv
        data/near_duplicates.csv     pairs of images, read by split and compare
        reports/data/summary.json, rejected.csv, near_duplicates.csv (the 1,000 most similar pairs)

Unchanged files are not read again (data/.index/), except by `python -m pipeline.stages.index --verify`.
"""

import argparse
from pathlib import Path

import pandas as pd

from pipeline import logs
from pipeline.dataset import manifest
from pipeline.files import write_json
from pipeline.ingest import indexing, inventory, listing
from pipeline.ingest.directory import counted, printable
from pipeline.ingest.inventory import Inventory
from pipeline.ingest.listing import Listing
from pipeline.params import Dataset, load_params

REPORTS = Path("reports/data")
SHOWN_PAIRS = 1000


def main() -> None:
    """Write the reports, then check what was found, then write the tables."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.stages.index", description="Index the images.")
    parser.add_argument("--verify", action="store_true", help="also read the files that look unchanged")
    is_verifying = parser.parse_args().verify
    params = load_params()
    options = params.dataset
    directory = Path(options.path)
    listed = listing.find_images(directory, options.exclude, options.columns, options.similar_classes)
    names = list(listed.images["path"])
    inspected = indexing.inspect(directory, names, params.runtime.workers, is_verifying=is_verifying)
    found = inventory.take(listed, inspected, options.near_duplicate_correlation, options.min_class_size)
    rejected = pd.DataFrame(sorted(found.unreadable + found.conflicts + found.few), columns=["path", "reason"])
    manifest.write_csv(REPORTS / "rejected.csv", rejected)
    manifest.write_csv(REPORTS / "near_duplicates.csv", found.near_duplicates[:SHOWN_PAIRS])
    write_json(REPORTS / "summary.json", found.summary)
    for warning in found.summary["warnings"]:
        logs.log.warning("%s: %s", directory, warning)
    check(found, options, listed)
    manifest.write_csv(manifest.NEAR_DUPLICATES, found.near_duplicates)
    table = found.kept.rename(columns={"path": "image_id", "split": "given_split"})
    if options.near_duplicates != "group":
        table["near_duplicate_group"] = ""
    manifest.write_images(manifest.make_images(table))
    manifest.write_labels(manifest.make_labels(table))
    n_skipped = found.summary["n_skipped"]
    logs.log.info("indexed %d images, rejected %d, left out %d other files", len(found.kept), len(rejected), n_skipped)


def check(found: Inventory, options: Dataset, listed: Listing) -> None:
    """ValueError if too many images cannot be read, labels conflict, or a class has no image or too few."""
    where = REPORTS / "rejected.csv"
    unreadable, n_all = found.unreadable, found.summary["n_images"] + found.summary["n_rejected"]
    if len(unreadable) > options.max_rejected_fraction * n_all:
        path, reason = unreadable[0]
        first = printable(f"{options.path}/{path}")
        problem = f"{len(unreadable)} of {n_all} images cannot be read, first {first} ({reason}); all are in {where}"
        advice = "repair, convert or remove them, leave them out (dataset.exclude)"
        raise ValueError(f"{problem}; {advice}, or raise dataset.max_rejected_fraction")
    if found.conflicts and options.on_conflict == "error":
        path, reason = found.conflicts[0]
        problem = f"{len(found.conflicts)} images have other labels than images with the same bytes"
        advice = "correct the labels, or leave all of them out: dataset.on_conflict: drop"
        first = printable(f"{options.path}/{path} ({reason})")
        raise ValueError(f"{problem}, first {first}; all are in {where}; {advice}")
    classes, layout = set(listed.images["label"]), f"; {listed.layout}" if listed.layout else ""
    if found.small and options.small_classes == "error":
        problem = f"{len(found.small)} classes have fewer images than dataset.min_class_size ({options.min_class_size})"
        advice = "add images, merge classes, lower it, or leave these classes out: dataset.small_classes: drop"
        raise ValueError(f"{options.path}: {problem}: {printable(counted(found.small, 20))}; {advice}")
    if lost := sorted(classes - set(found.kept["label"]) - set(found.small)):
        others = found.other_files.get(lost[0])
        why = f"its files are no images: {printable(counted(others))}{layout}" if others else f"see {where}"
        raise ValueError(f"{options.path}: no image of class {lost[0]!r} can be used; {why}")
    if len(left := set(found.kept["label"])) < 2:
        problem = f"one class only ({printable(min(left))})" if left else "no class with enough images"
        raise ValueError(f"{options.path}: {problem}; expected two or more{layout}")


if __name__ == "__main__":
    logs.run(main, memory=(logs.WORKERS,))
