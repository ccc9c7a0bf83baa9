"""split: split the images into train, validation and test, once per seed.

Reads   data/labels.csv, data/near_duplicates.csv
Writes  data/splits/seed_<s>.csv
        reports/splits.json     sizes, leaks, near-duplicates in different splits, and notes

Byte-identical images and images of one group stay together. The order of the files does not matter.
"""

from collections import Counter
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline import logs
from pipeline.dataset import manifest
from pipeline.dataset.manifest import SPLIT_NAMES, Labels, Split
from pipeline.dataset.near_duplicates import find_twins
from pipeline.dataset.units import FEW_UNITS, make_units
from pipeline.files import write_json
from pipeline.ingest import splits
from pipeline.ingest.splits import Leak
from pipeline.params import Splitting, load_params

REPORT = Path("reports/splits.json")
MIN_TRAINING_IMAGES = 10  # a class with fewer of them is named
# By which a split may miss its share without a note: of what was asked, and images
MISSED_SHARE, MISSED_IMAGES = 0.2, 2
SHOWN_LEAKS, SHOWN_IMAGES = 1000, 20  # at most, in the report; its counts are of all


def main() -> None:
    """Write one split per seed; fail if a class has no image in train, val or test, or if images leak."""
    options = load_params().split
    labels, pairs = manifest.read_labels(), manifest.read_near_duplicates()
    units = make_units(labels)
    drawn, by_tie = [], {}
    for seed in options.seeds:
        split = splits.draw(labels, units, options, seed)
        drawn.append(split)
        # A fold may test no image of a rare class: the folds are judged together
        splits.check_classes(split, labels, ("train", "val", "test")[: 2 if options.method == "folds" else 3])
        manifest.write_split(split)
        sizes = Counter(split.split.tolist())
        logs.log.info("split %d: %s", seed, ", ".join(f"{n} {name}" for name, n in sizes.items()))
        for leak in splits.find_leaks(labels, split):
            by_tie.setdefault((leak.tie, leak.name), leak)
    leaks = [*by_tie.values()]
    straddling = [find_twins(labels, split, pairs).straddling for split in drawn]
    followers = [splits.count_followers(labels, one, options) for one in drawn] if options.method == "hash" else []
    notes = make_notes(labels, drawn, options) + missed_shares(labels, drawn, units, options)
    notes += few_units(drawn, units, options) + twin_notes(straddling, len(pairs))
    if any(followers):
        notes.append(f"up to {max(followers):,} images follow their unit to another split than their own digest gives")
    report = {
        "method": options.method,
        "sizes": {str(split.seed): {name: len(split.rows(name)) for name in SPLIT_NAMES} for split in drawn},
        "notes": notes,
        "n_leaks": len(leaks),
        "leaks": [
            {"tie": tie, "name": name, "n": len(split_of), "parts": dict(islice(split_of.items(), SHOWN_IMAGES))}
            for tie, name, split_of in leaks[:SHOWN_LEAKS]
        ],
        "n_near_duplicates": len(pairs),
        "n_straddling": [len(these) for these in straddling],  # of these, in different splits, by seed
        "straddling": max(straddling, key=len)[:SHOWN_LEAKS].to_dict("records"),  # with the seed that has most
        "n_followers": followers,  # by seed
    }
    write_json(REPORT, report)
    for note in notes:
        logs.log.warning("%s", note)
    if leaks:
        warn_or_fail(leaks, options)


def make_notes(labels: Labels, drawn: list[Split], options: Splitting) -> list[str]:
    """What a reader of the results should know about the splits."""
    given, notes = set(labels.given_split), []
    if options.method != "given" and given != {""}:
        ignored = f"the data set gives splits, which `split.method: {options.method}` ignores"
        notes.append(f"{ignored}; to use them, set it to given")
    for name in ("test", "val"):
        if options.method == "given" and name not in given:
            source = "train and images without a split" if "" in given else "train"
            hint = "; to test on the given val, rename it to test" if name == "test" and "val" in given else ""
            notes.append(f"the data set has no image in {name}: drawn by seed from {source}{hint}")
    if few := splits.small_classes(drawn, labels, MIN_TRAINING_IMAGES):
        listed = ", ".join(f"{name} ({n})" for name, n in few.items())
        advice = "`class_weights: balanced` gives all classes the same influence on training"
        found = f"classes with fewer than {MIN_TRAINING_IMAGES} images to train on: {listed}"
        notes.append(f"{found}; add images, or merge classes; {advice}")
    return notes


def missed_shares(labels: Labels, drawn: list[Split], units: list[list[int]], options: Splitting) -> list[str]:
    """A note on each of validation and test whose share of the images is far from the one asked for, with some seed."""
    given = set(labels.given_split) if options.method == "given" else set()
    shares = {"test": options.test_fraction, "val": options.val_fraction}
    if options.method == "folds":
        shares["test"] = 1 / len(options.seeds)
    if "test" in given:
        shares["val"] /= 1 - options.test_fraction  # as in splits: of the images that are not test
    shares = {name: share for name, share in shares.items() if name not in given}
    notes = []
    for name, share in shares.items():
        missed = []
        for split in drawn:
            n_all = sum(len(split.rows(other)) for other in ("train", *shares))
            missed.append((abs(len(split.rows(name)) - share * n_all), split.seed, len(split.rows(name)), n_all))
        most, seed, n, n_all = max(missed)
        if most > max(MISSED_SHARE * share * n_all, MISSED_IMAGES):
            largest = max(map(len, units))
            tied = f"images that stay together are not split (up to {largest})"
            why = tied if largest > 1 else "few images in a class"
            why = "hash meets shares on average only" if options.method == "hash" else why
            found = f"{name} has {n} of {n_all} images ({n / n_all:.1%}) with seed {seed}"
            notes.append(f"{found}, where {share:.1%} were asked for: {why}")
    return notes


def few_units(drawn: list[Split], units: list[list[int]], options: Splitting) -> list[str]:
    """A note on each of validation and test that has fewer than 10 units with some seed, or in all folds together."""
    found, unit_of = [], np.empty(len(drawn[0].split), np.int64)
    unit_of[[*chain.from_iterable(units)]] = np.repeat(np.arange(len(units)), [*map(len, units)])
    for name in ("val", "test"):
        counts = [np.unique(unit_of[split.rows(name)]) for split in drawn]
        is_folds = options.method == "folds"
        fewest = len(np.unique(np.concatenate(counts))) if is_folds else min(map(len, counts))
        if fewest < FEW_UNITS:
            way_out = "add data" if is_folds else "add data, or raise split.val_fraction or split.test_fraction"
            found.append(
                f"{name} has {fewest} units (groups, or images that belong to none): with fewer than {FEW_UNITS}, "
                f"confidence intervals are rough; {way_out}"
            )
    return found


def twin_notes(straddling: list[pd.DataFrame], n_pairs: int) -> list[str]:
    """A note on near-duplicates in different splits, by the seed with most of them."""
    most = max(map(len, straddling))
    if not most:
        return []
    found = f"{most:,} of {n_pairs:,} pairs of near-duplicates lie in different splits"
    seeds = " with some seed" if len(straddling) > 1 else ""
    return [
        f"{found}{seeds}: test figures may be too good. `dataset.near_duplicates: group` keeps them together; "
        "reports/comparison.md also gives the figures without them"
    ]


def warn_or_fail(leaks: list[Leak], options: Splitting) -> None:
    """ValueError that lists the first leaks, or the same as a warning if params.yaml allows leakage."""
    listed = []
    for tie, name, split_of in leaks[:5]:
        one_of_each = {split: image for image, split in reversed(split_of.items())}
        files = ", ".join(f"{image} ({split})" for split, image in sorted(one_of_each.items()))
        listed.append(f"{tie} {name!r}: {files}" if tie == "group" else f"{tie}: {files}")
    found = f"{len(leaks)} sets of images that belong together are in several splits: {'; '.join(listed)}"
    advice = "put each set into one split (`unused` leaves an image out), or set split.allow_leakage: true"
    if not options.allow_leakage:
        raise ValueError(f"split: {found}; all are in {REPORT}; {advice}")
    logs.log.warning("split: %s; all are in %s", found, REPORT)


if __name__ == "__main__":
    logs.run(main)
