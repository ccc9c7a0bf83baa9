"""Draw splits into train, val and test, and find leaks between them.

Units (see dataset.units) are kept together, except by `method: given`, where the data set decides.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from pipeline.dataset.manifest import Labels, Split
from pipeline.dataset.units import count_units, make_units, ties_of
from pipeline.params import Splitting

UNTIED = "add images, raise split.test_fraction and split.val_fraction (of folds: have fewer)"
TIED = "a class needs three groups (by group, equal bytes or near-duplicates), one for each split: add other groups"
RANKED = ("test", "val", "train")  # where tied images disagree, the first of these counts


class Leak(NamedTuple):
    """Tied images in more than one of train, val and test: what ties them, and the split of each by its image_id."""

    tie: str
    name: str
    splits: dict[str, str]


def draw(labels: Labels, units: list[list[int]], options: Splitting, seed: int) -> Split:
    """Draw one split by `options.method`; ValueError if the data set should give it and does not."""
    if options.method == "hash":
        split = _by_hash(labels, units, options, seed)
    elif options.method == "folds":
        split = _fold(labels, units, options, seed)
    elif options.method == "stratified":
        split = _stratified(labels, units, [""] * len(labels.image_id), options, seed)
    elif any(labels.given_split):
        split = _stratified(labels, units, labels.given_split, options, seed)
    else:
        expected = "a `split` column in its labels.csv, or train/, val/ and test/ with the classes below"
        problem = "found given, but the data set gives no split to any image"
        raise ValueError(f"params.yaml: split.method: {problem}; expected {expected}; or choose stratified or hash")
    return Split(seed, labels.image_id, split)


def _stratified(labels: Labels, units: list[list[int]], given: list[str], options: Splitting, seed: int) -> np.ndarray:
    """The splits that are given; test or validation is drawn, stratified, where none is given.

    Images without a split are train, except those tied to an image with a split: they get the same one. What is drawn
    is taken from train, given or not.
    """
    names, pool = list(given), []
    for unit in units:
        used = [row for row in unit if given[row] != "unused"]  # this is of one image, not of what is tied to it
        found = {given[row] for row in used}
        if used and found <= {"train", ""}:
            pool.append(used)
        highest = next((name for name in RANKED if name in found), "train")
        for row in unit:
            names[row] = given[row] or highest
    split = np.array(names, dtype="<U6")
    shares = {"test": options.test_fraction, "val": options.val_fraction}
    if "test" in split:
        shares = {"val": options.val_fraction / (1 - options.test_fraction)}  # of the images that are not test
    if shares := {name: share for name, share in shares.items() if name not in split}:
        _draw_units(labels, pool, shares, seed, split)
    return split


def _fold(labels: Labels, units: list[list[int]], options: Splitting, number: int) -> np.ndarray:
    """One fold of a partition into as many folds as there are seeds is test; validation is drawn from the others.

    The folds are drawn one after the other, each from the units that no fold before it has.
    """
    n_folds, pool = len(options.seeds), units
    fold = np.full(len(labels.image_id), n_folds - 1)
    for k in range(n_folds - 1):
        drawn = np.full(len(fold), "train", dtype="<U6")
        _draw_units(labels, pool, {"test": 1 / (n_folds - k)}, options.partition_seed, drawn)
        fold[drawn == "test"] = k
        pool = [unit for unit in pool if drawn[unit[0]] == "train"]
    split = np.where(fold == number, "test", "train").astype("<U6")
    rest = [unit for unit in units if fold[unit[0]] != number]
    share = options.val_fraction * n_folds / (n_folds - 1)  # of the images that are not test
    _draw_units(labels, rest, {"val": share}, options.partition_seed + number, split)
    return split


def _draw_units(labels: Labels, units: list[list[int]], shares: dict[str, float], seed: int, split: np.ndarray) -> None:
    """Move units of each stratum from train to the splits of `shares`, in random order, until these have their share.

    A unit belongs to the stratum (class and `stratum` column) of most of its images. The fraction of an image by which
    a stratum misses its share is carried over to the next stratum, so that small strata add up to the shares. No more
    than half an image is carried over, or the large groups of one class would take the places of the next class.
    At the end, classes get what they miss (_fill).
    """
    strata = defaultdict(list)
    of_row = [*zip([labels.class_names[label] for label in labels.label.tolist()], labels.stratum, strict=True)]
    for unit in units:
        stratum = of_row[unit[0]]
        if len(unit) > 1:
            counts = Counter(of_row[row] for row in unit)
            stratum = max(sorted(counts), key=counts.__getitem__)
        strata[stratum].append((_random_key(labels, unit, seed), unit))
    missing = dict.fromkeys(shares, 0.0)  # images, by split
    for stratum in sorted(strata):
        pool = [unit for _, unit in sorted(strata[stratum])]
        n_images = sum(map(len, pool))
        for name, share in shares.items():
            missing[name] = min(max(missing[name], -0.5), 0.5) + share * n_images
            left, moved = [], []
            for unit in pool:  # a unit that is too large is skipped, smaller ones behind it may fit
                if len(unit) / 2 <= missing[name]:
                    missing[name] -= len(unit)
                    moved += unit
                else:
                    left.append(unit)
            split[moved] = name
            pool = left
    _fill(labels, units, ("train", *shares), seed, split)


def _random_key(labels: Labels, unit: list[int], seed: int) -> str:
    """Sorts units in an order that depends on the seed and on the unit, but not on the order of the rows."""
    return _digest(seed, min([labels.image_id[row] for row in unit]))


def _digest(seed: int, *texts: str) -> str:
    """What files.digest gives of [seed, *texts], several times as fast: there are millions."""
    return hashlib.sha256(f"[{', '.join([str(seed), *map(json.dumps, texts)])}]".encode()).hexdigest()


def _fill(labels: Labels, units: list[list[int]], names: Sequence[str], seed: int, split: np.ndarray) -> None:
    """Move units so that no class misses one of the splits `names`, as far as no other class then misses one.

    A split that a class misses gets the smallest unit with images of the class. The unit must not hold all images that
    any class has in the present split of the unit. Of equally large units, the one is moved whose present split holds
    most images of the class. A complete split stays as it is.
    """
    n_classes = len(labels.class_names)
    held = {name: np.bincount(labels.label[split == name], minlength=n_classes) for name in names}
    units_of = defaultdict(list)
    for unit in units if any((counts == 0).any() for counts in held.values()) else ():
        for label in set(labels.label[unit].tolist()):
            units_of[label].append(unit)

    def count(unit: list[int]) -> np.ndarray:
        return np.bincount(labels.label[unit], minlength=n_classes)

    def is_spare(unit: list[int]) -> bool:
        return bool(np.all((held[str(split[unit[0]])] > count(unit)) | (count(unit) == 0)))

    def rank(unit: list[int], label: int) -> tuple[int, int, str]:
        return len(unit), -held[str(split[unit[0]])][label], _random_key(labels, unit, seed)

    is_moving = True
    while is_moving:  # a class that has got a unit may be able to spare another one
        is_moving = False
        for name, label in product(names, range(n_classes)):
            spare = [] if held[name][label] else [unit for unit in units_of[label] if is_spare(unit)]
            if spare:
                unit = min(spare, key=lambda unit: rank(unit, label))
                held[str(split[unit[0]])] -= count(unit)
                held[name] += count(unit)
                split[unit] = name
                is_moving = True


def _by_hash(labels: Labels, units: list[list[int]], options: Splitting, seed: int) -> np.ndarray:
    """The seed and the key of a unit decide on its split, whatever other units there are.

    The key is the name of the unit's group, or else the smallest digest of its images. So an added image moves no image
    of another unit; it may move its own unit, where it joins one.
    """
    split = np.empty(len(labels.image_id), "<U6")
    for unit in units:
        groups = {labels.group[row] for row in unit} - {""}
        key = ["group", min(groups)] if groups else ["image", min(labels.sha256[row] for row in unit)]
        split[unit] = _place(key, options, seed)
    return split


def count_followers(labels: Labels, split: Split, options: Splitting) -> int:
    """With `hash`: images that their own group or digest would put into another split than their unit's."""
    own = [
        ["group", group] if group else ["image", sha] for group, sha in zip(labels.group, labels.sha256, strict=True)
    ]
    return sum(_place(key, options, split.seed) != name for key, name in zip(own, split.split.tolist(), strict=True))


def _place(key: list[str], options: Splitting, seed: int) -> str:
    borders = {"test": options.test_fraction, "val": options.test_fraction + options.val_fraction, "train": 1.0}
    place = int(_digest(seed, *key)[:12], 16) / 16**12
    return next(name for name, border in borders.items() if place < border)


def find_leaks(labels: Labels, split: Split) -> list[Leak]:
    """Every set of tied images that is in more than one of train, val and test; by tie and name."""
    leaks, is_used = [], (split.split != "unused").tolist()
    for tie, values in ties_of(labels).items():
        n_images, rows_of = Counter(values), defaultdict(list)
        for row, value in enumerate(values):
            if n_images[value] > 1 and value and is_used[row]:
                rows_of[value].append(row)
        for value, rows in sorted(rows_of.items()):
            if len(set(split.split[rows])) > 1:
                leaks.append(Leak(tie, value, {labels.image_id[row]: str(split.split[row]) for row in rows}))
    return leaks


def check_classes(split: Split, labels: Labels, needed: Sequence[str] = ("train", "val", "test")) -> None:
    """ValueError that names every class without an image in one of the splits `needed`."""
    n_classes = len(labels.class_names)
    held = np.array([np.bincount(labels.label[split.rows(name)], minlength=n_classes) for name in needed])
    if held.all():
        return
    n_units, problems, advice = count_units(labels, make_units(labels)), [], set()
    for index in np.flatnonzero((held == 0).any(axis=0)).tolist():
        missed = " and ".join(name for name, counts in zip(needed, held, strict=True) if not counts[index])
        n_images = np.count_nonzero(labels.label == index)
        is_tied = n_units[index] < 3 <= n_images
        tied = f" in {n_units[index]} groups that stay together" if is_tied else ""
        problems.append(f"class {labels.class_names[index]!r} has {n_images} images{tied}, none of them in {missed}")
        advice.add(TIED if is_tied else UNTIED)
    listed = "; ".join([*problems, *sorted(advice)])
    raise ValueError(
        f"split, seed {split.seed}: {listed}; or merge the class with another, or leave it out "
        "(dataset.min_class_size, with small_classes: drop)"
    )


def small_classes(splits: Sequence[Split], labels: Labels, least: int) -> dict[str, int]:
    """Classes that have fewer than `least` images in train with some seed, and their smallest number."""
    counts = [np.bincount(labels.label[split.rows("train")], minlength=len(labels.class_names)) for split in splits]
    fewest = np.min(counts, axis=0)
    return {name: int(n) for name, n in zip(labels.class_names, fewest, strict=True) if n < least}
