"""split: stratified train, validation and test parts, one split per seed.

Reads   data/labels.csv
Writes  data/splits/seed_<s>.csv

Byte-identical images and images of one group stay together; the order of the files does not matter.
"""

from collections import Counter, defaultdict

import numpy as np

from pipeline import logs, manifest
from pipeline.files import digest
from pipeline.manifest import Labels, Split
from pipeline.params import Splitting, load_params
from pipeline.units import make_units


def main() -> None:
    """Write one split per seed; fail if a class misses one of the parts."""
    params = load_params()
    labels = manifest.read_labels()
    if any(labels.given_split):
        logs.log.warning("the `split` column of the data set is not used yet: splits are drawn by split.seeds")
    units = make_units(labels)
    for seed in params.split.seeds:
        split = draw(labels, units, params.split, seed)
        check_classes(split, labels)
        manifest.write_split(split)
        logs.log.info("split %d: %s", seed, ", ".join(f"{n} {part}" for part, n in Counter(split.split).items()))


def draw(labels: Labels, units: list[list[int]], sizes: Splitting, seed: int) -> Split:
    """Deal the units of each stratum out to test, val and train, in random order.

    A unit belongs to the stratum (class and `stratum` column) of most of its images. What a stratum's share lacks of
    a whole image is carried on to the next stratum, so that each part has its size to within one unit.
    """
    strata = defaultdict(list)
    for unit in units:
        kinds = Counter((labels.class_names[labels.label[row]], labels.stratum[row]) for row in unit)
        name = min(labels.image_id[row] for row in unit)
        strata[max(sorted(kinds), key=lambda kind: kinds[kind])].append((digest([seed, name]), unit))
    split = np.full(len(labels.image_id), "train", dtype="<U6")
    seen, taken = 0, {"test": 0, "val": 0}
    for stratum in sorted(strata):
        pool = [unit for _, unit in sorted(strata[stratum])]
        seen += sum(map(len, pool))
        for part, share in (("test", sizes.test_fraction), ("val", sizes.val_fraction)):
            left = []
            for unit in pool:  # one that is too large for a part leaves it to the smaller ones behind
                if taken[part] + len(unit) / 2 <= share * seen:
                    taken[part] += len(unit)
                    split[unit] = part
                else:
                    left.append(unit)
            pool = left
    return Split(seed, labels.image_id, split)


def check_classes(split: Split, labels: Labels) -> None:
    """ValueError if a class has no image in train, val or test."""
    for index, name in enumerate(labels.class_names):
        counts = Counter(split.split[labels.label == index])
        for part in ("train", "val", "test"):
            if not counts[part]:
                raise ValueError(
                    f"split, seed {split.seed}: class {name!r} has {counts.total()} images, none of them in {part}; "
                    "add images, merge the class with another, or raise split.test_fraction and split.val_fraction"
                )


if __name__ == "__main__":
    logs.run(main)
