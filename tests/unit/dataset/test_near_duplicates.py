"""Near-duplicates in different splits, and the test images that they make doubtful."""

import numpy as np
import pandas as pd
import pytest

from pipeline.dataset.manifest import Split
from pipeline.dataset.near_duplicates import find_twins
from tests.factories import labels

NAMES = labels(8).image_id
SPLIT = Split(0, NAMES, np.array(["train", "test", "test", "val", "test", "unused", "test", "train"]))


def pairs(*rows: tuple[int, int]) -> pd.DataFrame:
    return pd.DataFrame([(NAMES[a], NAMES[b]) for a, b in rows], columns=["a", "b"])


def test_pairs_in_different_splits_straddle_and_their_test_images_are_named():
    found = find_twins(labels(8), SPLIT, pairs((0, 1), (2, 4), (3, 6), (0, 7), (0, 3), (4, 5)))
    assert found.straddling.to_numpy().tolist() == [[NAMES[0], NAMES[1]], [NAMES[3], NAMES[6]], [NAMES[0], NAMES[3]]]
    assert np.flatnonzero(found.tested).tolist() == [1, 6]


def test_the_first_image_of_equal_bytes_stands_for_all():
    sha256 = [*"ABCBEFGH"]  # image 3, in val, has the bytes of image 1, in test
    found = find_twins(labels(8, sha256=sha256), SPLIT, pairs((1, 4)))
    assert np.flatnonzero(found.tested).tolist() == [1, 4]


def test_without_pairs_there_are_none():
    found = find_twins(labels(8), SPLIT, pairs())
    assert (len(found.straddling), found.tested.any()) == (0, False)


def test_pairs_of_other_images_are_refused():
    with pytest.raises(ValueError, match=r"x\.png is not in data/labels\.csv; run: dvc repro"):
        find_twins(labels(8), SPLIT, pd.DataFrame({"a": ["x.png"], "b": [NAMES[0]]}))
