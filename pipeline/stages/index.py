"""index: read every image once; list what is there, what cannot be read, and what occurs twice.

Reads   the directory dataset.path
Writes  data/images.csv, data/labels.csv
        data/near_duplicates.csv     pairs of images, which no stage that computes features or trains reads
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
from pipeline.ingest.inventory import Inventory
from pipeline.params import Dataset, load_params

REPORTS = Path("reports/data")
SHOWN_PAIRS = 1000


def main() -> None:
    """Write the reports, then check what was found, then write the tables."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.stages.index", description="Index the images.")
    parser.add_argument("--verify", action="store_true", help="also read the files that look unchanged")
    is_verifying = parser.parse_args().verify
    params = load_params()
    directory = Path(params.dataset.path)
    listed = listing.find_images(directory)
    names = list(listed.images["path"])
    inspected = indexing.inspect(directory, names, params.runtime.workers, is_verifying=is_verifying)
    found = inventory.take(listed, inspected, params.dataset.near_duplicate_correlation)
    rejected = pd.DataFrame(sorted(found.unreadable + found.conflicts), columns=["path", "reason"])
    manifest.write_csv(REPORTS / "rejected.csv", rejected)
    manifest.write_csv(REPORTS / "near_duplicates.csv", found.near_duplicates[:SHOWN_PAIRS])
    write_json(REPORTS / "summary.json", found.summary)
    for warning in found.summary["warnings"]:
        logs.log.warning("%s: %s", directory, warning)
    check(found, params.dataset, set(listed.images["label"]))
    manifest.write_csv(manifest.NEAR_DUPLICATES, found.near_duplicates)
    write_tables(found.kept, is_grouped=params.dataset.near_duplicates == "group")
    logs.log.info("indexed %d images, rejected %d", len(found.kept), len(rejected))


def check(found: Inventory, options: Dataset, classes: set[str]) -> None:
    """ValueError if too many images cannot be read, labels conflict, or a class has no image left."""
    where = REPORTS / "rejected.csv"
    unreadable, n_all = found.unreadable, found.summary["n_images"] + found.summary["n_rejected"]
    if len(unreadable) > options.max_rejected_fraction * n_all:
        path, reason = unreadable[0]
        first = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in f"{options.path}/{path}")
        problem = f"{len(unreadable)} of {n_all} images cannot be read, first {first} ({reason}); all are in {where}"
        raise ValueError(f"{problem}; repair or remove them, or raise dataset.max_rejected_fraction")
    if found.conflicts and options.on_conflict == "error":
        path, reason = found.conflicts[0]
        problem = f"{len(found.conflicts)} images have other labels than images with the same bytes"
        advice = "correct the labels, or leave all of them out: dataset.on_conflict: drop"
        raise ValueError(f"{problem}, first {options.path}/{path} ({reason}); all are in {where}; {advice}")
    if lost := classes - set(found.kept["label"]):
        raise ValueError(f"{options.path}: no image of class {min(lost)!r} can be used; see {where}")
    if len(classes) < 2:
        raise ValueError(f"{options.path}: one class only ({min(classes)}); expected two or more")


def write_tables(kept: pd.DataFrame, *, is_grouped: bool) -> None:
    """Write images.csv and labels.csv."""
    table = kept.rename(columns={"path": "image_id", "split": "given_split"})
    if not is_grouped:
        table["near_duplicate_group"] = ""
    manifest.write_images(manifest.make_images(table))
    manifest.write_labels(manifest.make_labels(table))


if __name__ == "__main__":
    logs.run(main, memory=(logs.WORKERS,))
