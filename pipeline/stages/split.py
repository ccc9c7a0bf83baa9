"""split: stratified train, validation and test parts, one split per seed.

Reads   data/images.csv, data/labels.csv
Writes  data/splits/seed_<s>.csv

Byte-identical images and images of one group stay together, and the result does not depend on the
order of the files.
"""

from collections import Counter, defaultdict

import numpy as np

from pipeline import logs, manifest
from pipeline.files import digest
from pipeline.manifest import Images, Labels, Split
from pipeline.params import Splitting, load_params


def main() -> None:
    """Write one split per seed; fail if a class misses one of the parts."""
    params = load_params()
    images, labels = manifest.read_images(), manifest.read_labels()
    units = make_units(images, labels)
    for seed in params.split.seeds:
        split = draw(labels, units, params.split, seed)
        check_classes(split, labels)
        manifest.write_split(manifest.SPLITS, split)
        logs.log.info("split %d: %s", seed, dict(Counter(split.split.tolist())))


def make_units(images: Images, labels: Labels) -> list[list[int]]:
    """Rows that must stay together: connected by equal bytes, by group or by near-duplicate group."""
    parent = list(range(len(images.image_id)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for column in (images.sha256, labels.group, labels.near_duplicate_group):
        first: dict[str, int] = {}
        for row, value in enumerate(column):
            if value:
                parent[root(row)] = root(first.setdefault(value, row))
    units = defaultdict(list)
    for row in range(len(parent)):
        units[root(row)].append(row)
    return list(units.values())


def draw(labels: Labels, units: list[list[int]], sizes: Splitting, seed: int) -> Split:
    """Deal the units of each stratum out to test, val and train, in a random order.

    A unit belongs to the stratum (class and `stratum` column) of most of its images. What a
    stratum's share lacks of a whole image is carried to the next stratum, so that each part has its
    size to within one unit.
    """
    strata = defaultdict(list)
    for unit in units:
        kinds = Counter((labels.class_names[labels.label[row]], labels.stratum[row]) for row in unit)
        strata[max(sorted(kinds), key=lambda kind: kinds[kind])].append(unit)
    split = np.full(len(labels.image_id), "train", dtype="<U6")
    seen, taken = 0, {"test": 0, "val": 0}
    shares = {"test": sizes.test_fraction, "val": sizes.val_fraction}
    for stratum in sorted(strata):
        names = {id(unit): min(labels.image_id[row] for row in unit) for unit in strata[stratum]}
        pool = sorted(strata[stratum], key=lambda unit: digest([seed, names[id(unit)]]))
        seen += sum(len(unit) for unit in pool)
        for name, share in shares.items():
            while pool and taken[name] + len(pool[0]) / 2 <= share * seen:
                unit = pool.pop(0)
                split[unit] = name
                taken[name] += len(unit)
    return Split(seed, labels.image_id, split)


def check_classes(split: Split, labels: Labels) -> None:
    """ValueError if a class has no image in train, val or test."""
    for index, name in enumerate(labels.class_names):
        counts = Counter(split.split[labels.label == index].tolist())
        for part in ("train", "val", "test"):
            if not counts[part]:
                raise ValueError(
                    f"split, seed {split.seed}: class {name!r} has {sum(counts.values())} images, "
                    f"none of them in {part}; add images, merge the class with another, raise "
                    "split.test_fraction and split.val_fraction, or take other split.seeds"
                )


if __name__ == "__main__":
    logs.run(main)
