"""What must hold for every split, whatever the images."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.manifest import Labels, Split
from pipeline.params import Splitting
from pipeline.stages.split import check_classes, draw
from pipeline.units import make_units

Table = list[tuple[str, str, str, str, str]]  # per image: sha256, group, near-duplicate group, class, stratum

SHARES = st.tuples(st.floats(0.05, 0.6), st.floats(0.05, 0.35))
SEEDS = st.integers(0, 2**32 - 1)


def tables(min_size: int = 1, ties: bool = True) -> st.SearchStrategy[Table]:
    """Images of which some are equal or of one group; `ties`: False for none of them."""
    few = st.integers(0, 30).map(lambda number: str(number) if number < 8 else "")
    tie = few if ties else st.just("")
    row = st.tuples(few if ties else st.just(""), tie, tie, st.sampled_from("xyz"), st.sampled_from(["", "p", "q"]))
    rows = st.lists(row, min_size=min_size, max_size=60)
    return rows.map(lambda rows: [(row[0] or f"only {i}", *row[1:]) for i, row in enumerate(rows)])


def records(table: Table, order: list[int] | None = None) -> Labels:
    order = order or list(range(len(table)))
    sha256, group, near, class_of, stratum = (list(column) for column in zip(*(table[i] for i in order), strict=True))
    image_id, names = [f"{i:03}.png" for i in order], sorted(set(class_of))
    n, label = len(order), np.array([names.index(name) for name in class_of])
    return Labels(image_id, sha256, label, np.ones(n), group, near, stratum, [""] * n, [""] * n, class_names=names)


def drawn(table: Table, shares: tuple[float, float], seed: int, order: list[int] | None = None) -> dict[str, str]:
    """Part of each image by its name."""
    labels = records(table, order)
    sizes = Splitting(seeds=(seed,), test_fraction=shares[0], val_fraction=shares[1])
    split = draw(labels, make_units(labels), sizes, seed)
    assert split.seed == seed
    assert split.image_id == labels.image_id
    return dict(zip(split.image_id, split.split.tolist(), strict=True))


@settings(deadline=None)
@given(tables(), SHARES, SEEDS)
def test_every_image_has_one_part(table: Table, shares: tuple[float, float], seed: int):
    labels = records(table)
    sizes = Splitting(seeds=(seed,), test_fraction=shares[0], val_fraction=shares[1])
    split = draw(labels, make_units(labels), sizes, seed)
    rows = [row for part in ("train", "val", "test") for row in split.rows(part)]
    assert sorted(rows) == list(range(len(table)))


@settings(deadline=None)
@given(tables(), SHARES, SEEDS)
def test_equal_images_and_images_of_one_group_never_straddle(table: Table, shares: tuple[float, float], seed: int):
    parts = list(drawn(table, shares, seed).values())
    for column in range(3):
        for value in {row[column] for row in table} - {""}:
            assert len({part for part, row in zip(parts, table, strict=True) if row[column] == value}) == 1


@settings(deadline=None)
@given(tables(), SHARES, SEEDS)
def test_units_are_the_smallest_sets_that_may_not_be_parted(table: Table, shares: tuple[float, float], seed: int):
    labels = records(table)
    units = make_units(labels)
    assert sorted(row for unit in units for row in unit) == list(range(len(table)))
    ties = [{(c, row[c]) for c in range(3) if row[c]} for row in table]
    for unit in units:
        reached = {unit[0]}
        for _ in unit:
            reached |= {row for row in range(len(table)) if any(ties[row] & ties[other] for other in reached)}
        assert reached == set(unit)


@settings(deadline=None)
@given(tables(), SHARES, SEEDS)
def test_parts_have_their_size_to_within_one_unit(table: Table, shares: tuple[float, float], seed: int):
    largest = max(map(len, make_units(records(table))))
    counts = Counter(drawn(table, shares, seed).values())
    for part, share in zip(("test", "val"), shares, strict=True):
        assert abs(counts[part] - share * len(table)) <= largest


@settings(deadline=None)
@given(tables(ties=False), SHARES, SEEDS)
def test_every_stratum_has_its_share_of_every_part(table: Table, shares: tuple[float, float], seed: int):
    parts = list(drawn(table, shares, seed).values())
    for stratum in {row[3:] for row in table}:
        counts = Counter(part for part, row in zip(parts, table, strict=True) if row[3:] == stratum)
        assert abs(counts["test"] - shares[0] * counts.total()) <= 1
        assert abs(counts["val"] - shares[1] * counts.total()) <= 2  # it takes what test has left


@settings(deadline=None)
@given(tables(min_size=2), SHARES, SEEDS, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_nothing(table: Table, shares: tuple[float, float], seed: int, random):
    order = list(range(len(table)))
    random.shuffle(order)
    assert drawn(table, shares, seed, order) == drawn(table, shares, seed)


@settings(deadline=None)
@given(tables(min_size=40, ties=False), st.tuples(SEEDS, SEEDS).filter(lambda pair: pair[0] != pair[1]))
def test_another_seed_is_another_split(table: Table, seeds: tuple[int, int]):
    first, second = (drawn(table, (0.3, 0.3), seed) for seed in seeds)
    assert first != second


@pytest.mark.parametrize("absent", ["train", "val", "test"])
def test_a_class_that_misses_a_part_is_named(absent: str):
    parts = ["train", "val", "test"]
    table = [(str(i), "", "", "rare" if i < 3 else "common", "") for i in range(6)]
    labels = records(table)
    complete = Split(3, labels.image_id, np.array(parts * 2, "<U6"))
    check_classes(complete, labels)
    complete.split[parts.index(absent)] = "unused"
    with pytest.raises(ValueError, match=f"seed 3: class 'rare' has 3 images, none of them in {absent}; add images"):
        check_classes(complete, labels)


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_one_large_group_does_not_keep_the_rest_of_its_class_out_of_test_and_validation(seed: int):
    table = [(str(i), "video" if i < 30 else "", "", "x" if i < 50 else "y", "") for i in range(100)]
    labels = records(table)
    sizes = Splitting(seeds=(seed,), test_fraction=0.25, val_fraction=0.1125)
    check_classes(draw(labels, make_units(labels), sizes, seed), labels)
