"""How images are dealt out to train, val and test, and what leaks from one of them into another.

Units (units.make_units) are parted by nobody but the data set itself, with `method: given`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.files import digest
from pipeline.manifest import Labels, Split
from pipeline.params import Splitting
from pipeline.units import ties_of

RANKED = ("test", "val", "train")  # where tied images disagree, the first of these counts


@dataclass(frozen=True)
class Leak:
    """Tied images in more than one of train, val and test: what ties them, and the part of each by its image_id."""

    tie: str
    name: str
    parts: dict[str, str]


def draw(labels: Labels, units: list[list[int]], options: Splitting, seed: int) -> Split:
    """One split by `options.method`; ValueError if there is nothing to draw from."""
    method: Callable[[Labels, list[list[int]], Splitting, int], np.ndarray]
    method = {"stratified": _stratified, "hash": _by_hash, "given": _as_given}[options.method]
    return Split(seed, labels.image_id, method(labels, units, options, seed))


def _stratified(labels: Labels, units: list[list[int]], options: Splitting, seed: int) -> np.ndarray:
    return _deal(labels, units, {"test": options.test_fraction, "val": options.val_fraction}, seed)


def _deal(labels: Labels, units: list[list[int]], shares: dict[str, float], seed: int) -> np.ndarray:
    """Deal the units of each stratum out to the parts of `shares`, and to train, in random order.

    A unit belongs to the stratum (class and `stratum` column) of most of its images. What a stratum's share lacks of
    a whole image is carried on to the next stratum, so that small strata add up to the shares; no more than that is, or
    the large groups of one class would take the next one's places.
    """
    strata = defaultdict(list)
    for unit in units:
        kinds = Counter((labels.class_names[labels.label[row]], labels.stratum[row]) for row in unit)
        name = min(labels.image_id[row] for row in unit)
        strata[max(sorted(kinds), key=lambda kind: kinds[kind])].append((digest([seed, name]), unit))
    split = np.full(len(labels.image_id), "train", dtype="<U6")
    owed = dict.fromkeys(shares, 0.0)  # images, by part
    for stratum in sorted(strata):
        pool = [unit for _, unit in sorted(strata[stratum])]
        n_images = sum(map(len, pool))
        for part, share in shares.items():
            owed[part] = min(max(owed[part], -0.5), 0.5) + share * n_images
            left = []
            for unit in pool:  # one that is too large for a part leaves it to the smaller ones behind
                if len(unit) / 2 <= owed[part]:
                    owed[part] -= len(unit)
                    split[unit] = part
                else:
                    left.append(unit)
            pool = left
    return split


def _by_hash(labels: Labels, units: list[list[int]], options: Splitting, seed: int) -> np.ndarray:
    """Each image goes where the digest of its group, or else of its bytes, and the seed sends it, whatever others do.

    So an image that is added moves no other from one part to another. Where it ties images of several parts, those of
    the highest (test, val, train) stay, and the others become unused.
    """
    borders = {"test": options.test_fraction, "val": options.test_fraction + options.val_fraction, "train": 1.0}

    def part_of(row: int) -> str:
        key = ["group", labels.group[row]] if labels.group[row] else ["image", labels.sha256[row]]
        place = int(digest([seed, *key])[:12], 16) / 16**12
        return next(part for part, border in borders.items() if place < border)

    split = np.array([part_of(row) for row in range(len(labels.image_id))], dtype="<U6")
    for unit in units:
        highest = _highest(split[unit])
        split[[row for row in unit if split[row] != highest]] = "unused"
    return split


def _as_given(labels: Labels, units: list[list[int]], options: Splitting, seed: int) -> np.ndarray:
    """The parts that the data set gives; test or validation is drawn, stratified, where it gives none.

    What is drawn comes from the images without a part, or, if there are none, from train; the rest of them is train.
    An image without a part that is tied to one with a part goes with it.
    """
    if not any(labels.given_split):
        raise ValueError(
            "params.yaml: split.method: found given, but the data set gives no part to any image; expected a `split` "
            "column in its labels.csv, or train/, val/ and test/ with the classes below; or choose stratified or hash"
        )
    split = np.array(labels.given_split, dtype="<U6")
    free = []
    for unit in units:
        blank = [row for row in unit if not split[row]]
        highest = _highest(split[unit])
        split[blank] = highest or "train"
        if blank and not highest:
            free.append(blank)
    pool = free or [unit for unit in units if set(split[unit]) == {"train"}]
    shares = _shares_to_draw(split, options)
    dealt = _deal(labels, pool, shares, seed)
    for unit in pool if shares else ():
        split[unit] = dealt[unit]
    return split


def _shares_to_draw(split: np.ndarray, options: Splitting) -> dict[str, float]:
    """Of the images that are drawn from: the usual shares; of what is not test, where test is given."""
    if "test" not in split:
        shares = {"test": options.test_fraction}
        return shares if "val" in split else shares | {"val": options.val_fraction}
    return {} if "val" in split else {"val": options.val_fraction / (1 - options.test_fraction)}


def _highest(parts: np.ndarray) -> str:
    return next((part for part in RANKED if part in parts), "")


def missing_parts(labels: Labels) -> list[str]:
    """Of test and val, those that the data set gives to no image."""
    return [part for part in ("test", "val") if part not in labels.given_split]


def find_leaks(labels: Labels, split: Split) -> list[Leak]:
    """Every set of tied images that lies in more than one of train, val and test; by tie and name."""
    leaks = []
    for tie, names in ties_of(labels).items():
        rows_of = defaultdict(list)
        for row, name in enumerate(names):
            if name and split.split[row] != "unused":
                rows_of[name].append(row)
        for name, rows in sorted(rows_of.items()):
            if len(set(split.split[rows])) > 1:
                leaks.append(Leak(tie, name, {labels.image_id[row]: str(split.split[row]) for row in rows}))
    return leaks


def check_classes(split: Split, labels: Labels) -> None:
    """ValueError that names every class without an image in train, val or test."""
    problems = []
    for index, name in enumerate(labels.class_names):
        counts = Counter(split.split[labels.label == index])
        absent = [part for part in ("train", "val", "test") if not counts[part]]
        if absent:
            problems.append(f"class {name!r} has {counts.total()} images, none of them in {' and '.join(absent)}")
    if problems:
        raise ValueError(
            f"split, seed {split.seed}: {'; '.join(problems)}; add images, merge the class with another, raise "
            "split.test_fraction and split.val_fraction, or leave the class out"
        )


def small_classes(splits: Sequence[Split], labels: Labels, least: int) -> dict[str, int]:
    """Classes with fewer than `least` images in train with some seed, and how many they have there at least."""
    counts = [np.bincount(labels.label[split.rows("train")], minlength=len(labels.class_names)) for split in splits]
    fewest = np.min(counts, axis=0)
    return {name: int(n) for name, n in zip(labels.class_names, fewest, strict=True) if n < least}
