"""Units: images that must stay together, in splits and in folds."""

from collections import Counter

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.dataset.manifest import Labels

FEW_UNITS = 10  # of a split, below which its confidence intervals are rough


def make_units(labels: Labels) -> list[list[int]]:
    """Rows of each unit: images connected by equal bytes, by group or by near-duplicate group."""
    n, ties = len(labels.image_id), []
    for values in ties_of(labels).values():
        first: dict[str, int] = {}
        ties += [(row, first.setdefault(value, row)) for row, value in enumerate(values) if value]
    edges = coo_array((np.ones(len(ties), bool), tuple(np.array(ties, np.int64).reshape(-1, 2).T)), shape=(n, n))
    units: dict[int, list[int]] = {}
    for row, number in enumerate(connected_components(edges, directed=False)[1].tolist()):
        units.setdefault(number, []).append(row)
    return [*units.values()]


def count_units(labels: Labels, units: list[list[int]]) -> Counter[int]:
    """The number of units that hold images of each class, by the index of the class."""
    return Counter(label for unit in units for label in set(labels.label[unit].tolist()))


def unit_of(labels: Labels) -> np.ndarray:
    """The number (n,) int64 of each image's unit: what was sampled, in statistics as in splits."""
    unit = np.empty(len(labels.image_id), np.int64)
    for number, rows in enumerate(make_units(labels)):
        unit[rows] = number
    return unit


def ties_of(labels: Labels) -> dict[str, list[str]]:
    """For each reason why images belong together, a value per image; equal values tie images, "" ties none."""
    return {"identical bytes": labels.sha256, "group": labels.group, "near-duplicates": labels.near_duplicate_group}
