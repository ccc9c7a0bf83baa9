"""Units: images that must stay together, in splits as in folds."""

import networkx
import numpy as np

from pipeline.dataset.manifest import Labels


def make_units(labels: Labels) -> list[list[int]]:
    """Rows that must stay together: connected by equal bytes, by group or by near-duplicate group."""
    ties = networkx.Graph()
    ties.add_nodes_from(range(len(labels.image_id)))
    for values in ties_of(labels).values():
        first: dict[str, int] = {}
        ties.add_edges_from((row, first.setdefault(value, row)) for row, value in enumerate(values) if value)
    return [sorted(unit) for unit in networkx.connected_components(ties)]


def unit_of(labels: Labels) -> np.ndarray:
    """The number (n,) int64 of each image's unit: what was sampled, in statistics as in splits."""
    unit = np.empty(len(labels.image_id), np.int64)
    for number, rows in enumerate(make_units(labels)):
        unit[rows] = number
    return unit


def ties_of(labels: Labels) -> dict[str, list[str]]:
    """What ties images, by what it is called: a value per image, which those of the same value share; "" ties none."""
    return {"identical bytes": labels.sha256, "group": labels.group, "near-duplicates": labels.near_duplicate_group}
