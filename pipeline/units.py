"""Units: images that must stay together, in splits as in folds."""

import networkx

from pipeline.manifest import Labels


def make_units(labels: Labels) -> list[list[int]]:
    """Rows that must stay together: connected by equal bytes, by group or by near-duplicate group."""
    ties = networkx.Graph()
    ties.add_nodes_from(range(len(labels.image_id)))
    for kind in (labels.sha256, labels.group, labels.near_duplicate_group):
        first: dict[str, int] = {}
        ties.add_edges_from((row, first.setdefault(value, row)) for row, value in enumerate(kind) if value)
    return [sorted(unit) for unit in networkx.connected_components(ties)]
