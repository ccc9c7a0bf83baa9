"""Twins: near-duplicates, and images of the same bytes, that lie in different splits."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.dataset.manifest import Labels, Split


class Twins(NamedTuple):
    """Pairs of images, both of which are used, that lie in different splits, and the test images they make doubtful.

    `straddling`: rows of the table of pairs; `tested`: bool (n_images,), test images with a twin in train or val.
    """

    straddling: pd.DataFrame
    tested: np.ndarray


def find_twins(labels: Labels, split: Split, pairs: pd.DataFrame) -> Twins:
    """Compare pairs of near-duplicates (columns a and b: image_id) with a split.

    The first image of equal bytes stands for all. ValueError if a pair names an image that is not in the labels.
    """
    row_of = {image_id: row for row, image_id in enumerate(labels.image_id)}
    if unknown := {*pairs["a"], *pairs["b"]} - row_of.keys():
        raise ValueError(f"data/near_duplicates.csv: {min(unknown)} is not in data/labels.csv; run: dvc repro")
    rows = [pairs[side].map(row_of).to_numpy(np.int64) for side in ("a", "b")]
    a, b = (split.split[row] for row in rows)
    is_straddling = (a != b) & (a != "unused") & (b != "unused")
    content, _ = pd.factorize(np.array(labels.sha256, object))
    seen = np.zeros(content.max() + 1, bool)  # in train or val, by content
    seen[content[np.isin(split.split, ("train", "val"))]] = True
    has_twin = seen.copy()
    for one, other in (rows, rows[::-1]):
        np.logical_or.at(has_twin, content[one], seen[content[other]])
    return Twins(pairs[is_straddling], (split.split == "test") & has_twin[content])
