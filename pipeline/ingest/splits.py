"""How images are dealt out to train, val and test, and what leaks from one of them into another.

Units (units.make_units) are parted by nobody but the data set itself, with `method: given`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from pipeline.dataset.manifest import Labels, Split
from pipeline.dataset.units import make_units, ties_of
from pipeline.files import digest
from pipeline.params import Splitting

UNTIED = "add images, or raise split.test_fraction and split.val_fraction"
TIED = "a class needs three groups (by group, equal bytes or near-duplicates), one for each part: add images of others"
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
    split = np.full(len(labels.image_id), "train", dtype="<U6")
    _deal(labels, units, {"test": options.test_fraction, "val": options.val_fraction}, seed, split)
    return split


def _deal(labels: Labels, units: list[list[int]], shares: dict[str, float], seed: int, split: np.ndarray) -> None:
    """Deal the units of each stratum, which are train in `split`, out to the parts of `shares`, in random order.

    A unit belongs to the stratum (class and `stratum` column) of most of its images. What a stratum's share lacks of
    a whole image is carried on to the next stratum, so that small strata add up to the shares; no more than that is, or
    the large groups of one class would take the next one's places. Then classes get what they miss (_fill).
    """
    strata = defaultdict(list)
    for unit in units:
        kinds = Counter((labels.class_names[labels.label[row]], labels.stratum[row]) for row in unit)
        strata[max(sorted(kinds), key=lambda kind: kinds[kind])].append((_lot(labels, unit, seed), unit))
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
    _fill(labels, units, ("train", *shares), seed, split)


def _lot(labels: Labels, unit: list[int], seed: int) -> str:
    return digest([seed, min(labels.image_id[row] for row in unit)])


def _fill(labels: Labels, units: list[list[int]], parts: Sequence[str], seed: int, split: np.ndarray) -> None:
    """Move units so that no class misses one of `parts`, as far as that can be done without another missing one.

    To each part that a class misses goes the smallest unit with images of it that is not, of any class, all that its
    present part has: of equal ones, one from where the class has most images. A complete split stays as it is.
    """
    n_classes = len(labels.class_names)
    held = {part: np.bincount(labels.label[split == part], minlength=n_classes) for part in parts}
    units_of = defaultdict(list)
    for unit in units if any((counts == 0).any() for counts in held.values()) else ():
        for label in set(labels.label[unit].tolist()):
            units_of[label].append(unit)

    def taken(unit: list[int]) -> np.ndarray:
        return np.bincount(labels.label[unit], minlength=n_classes)

    def is_spare(unit: list[int]) -> bool:
        return bool(np.all((held[str(split[unit[0]])] > taken(unit)) | (taken(unit) == 0)))

    def rank(unit: list[int], label: int) -> tuple[int, int, str]:
        return len(unit), -held[str(split[unit[0]])][label], _lot(labels, unit, seed)

    is_moving = True
    while is_moving:  # what one class has got, another may spare
        is_moving = False
        for part, label in product(parts, range(n_classes)):
            spare = [] if held[part][label] else [unit for unit in units_of[label] if is_spare(unit)]
            if spare:
                unit = min(spare, key=lambda unit: rank(unit, label))
                held[str(split[unit[0]])] -= taken(unit)
                held[part] += taken(unit)
                split[unit] = part
                is_moving = True


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

    Images without a part are train, but for one that is tied to one with a part, which goes with it. What is drawn
    comes from train, be it given or not.
    """
    if not any(labels.given_split):
        raise ValueError(
            "params.yaml: split.method: found given, but the data set gives no part to any image; expected a `split` "
            "column in its labels.csv, or train/, val/ and test/ with the classes below; or choose stratified or hash"
        )
    split = np.array(labels.given_split, dtype="<U6")
    for unit in units:
        blank = [row for row in unit if not split[row]]
        split[blank] = _highest(split[unit]) or "train"
    pool = [unit for unit in units if set(split[unit]) == {"train"}]
    if shares := _shares_to_draw(split, options):
        _deal(labels, pool, shares, seed, split)
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
    counts = [Counter(split.split[labels.label == index]) for index in range(len(labels.class_names))]
    short = [index for index, found in enumerate(counts) if not all(found[part] for part in RANKED)]
    if not short:
        return
    n_groups = Counter(label for unit in make_units(labels) for label in set(labels.label[unit].tolist()))
    problems, advice = [], []
    for index in short:
        n, absent = counts[index].total(), [part for part in ("train", "val", "test") if not counts[index][part]]
        is_tied = n_groups[index] < 3 <= n
        tied = f" in {n_groups[index]} groups that stay together" if is_tied else ""
        problems.append(
            f"class {labels.class_names[index]!r} has {n} images{tied}, none of them in {' and '.join(absent)}"
        )
        advice.append(TIED if is_tied else UNTIED)
    raise ValueError(
        f"split, seed {split.seed}: {'; '.join(problems)}; {'; '.join(sorted(set(advice)))}; or merge the class with "
        "another, or leave it out"
    )


def small_classes(splits: Sequence[Split], labels: Labels, least: int) -> dict[str, int]:
    """Classes with fewer than `least` images in train with some seed, and how many they have there at least."""
    counts = [np.bincount(labels.label[split.rows("train")], minlength=len(labels.class_names)) for split in splits]
    fewest = np.min(counts, axis=0)
    return {name: int(n) for name, n in zip(labels.class_names, fewest, strict=True) if n < least}
