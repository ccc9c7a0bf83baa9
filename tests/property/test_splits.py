"""What must hold for every split, whatever the images."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.dataset.manifest import Labels, Split
from pipeline.dataset.units import make_units
from pipeline.files import digest
from pipeline.ingest import splits
from pipeline.ingest.splits import RANKED, check_classes, draw, find_leaks
from pipeline.params import Splitting
from tests import factories

Table = list[tuple[str, str, str, str, str]]  # per image: sha256, group, near-duplicate group, class, stratum

METHODS = ("stratified", "hash", "given")
SHARES = st.tuples(st.floats(0.05, 0.6), st.floats(0.05, 0.35))
SEEDS = st.integers(0, 2**32 - 1)


def tables(min_size: int = 1, ties: bool = True, max_size: int = 60) -> st.SearchStrategy[Table]:
    """Images of which some are equal or of one group; `ties`: False for none of them."""
    few = st.integers(0, 30).map(lambda number: str(number) if number < 8 else "")
    tie = few if ties else st.just("")
    row = st.tuples(few if ties else st.just(""), tie, tie, st.sampled_from("xyz"), st.sampled_from(["", "p", "q"]))
    rows = st.lists(row, min_size=min_size, max_size=max_size)
    return rows.map(lambda rows: [(row[0] or f"only {i}", *row[1:]) for i, row in enumerate(rows)])


GIVEN = st.lists(st.sampled_from(["", "", "train", "train", "val", "test", "unused"]), min_size=60, max_size=60)


def records(table: Table, order: list[int] | None = None, given: list[str] | None = None) -> Labels:
    order = order or list(range(len(table)))
    sha256, group, near, class_of, stratum = (list(column) for column in zip(*(table[i] for i in order), strict=True))
    image_id, names = [f"{i:03}.png" for i in order], sorted(set(class_of))
    columns = {"image_id": image_id, "sha256": sha256, "group": group, "near_duplicate_group": near, "stratum": stratum}
    label, given_split = np.array([names.index(name) for name in class_of]), [given[i] if given else "" for i in order]
    return factories.labels(len(order), label=label, given_split=given_split, class_names=names, **columns)


def sizes(method: str, shares: tuple[float, float], seed: int = 0) -> Splitting:
    return Splitting.model_validate(
        {
            "method": method,
            "seeds": (seed,),
            "partition_seed": 0,
            "test_fraction": shares[0],
            "val_fraction": shares[1],
            "allow_leakage": False,
        }
    )


def drawn(labels: Labels, shares: tuple[float, float], seed: int, method: str = "stratified") -> dict[str, str]:
    """The split of each image by its name."""
    split = draw(labels, make_units(labels), sizes(method, shares, seed), seed)
    assert split.seed == seed
    assert split.image_id == labels.image_id
    return dict(zip(split.image_id, split.split.tolist(), strict=True))


def drawn_without_filling(labels: Labels, shares: tuple[float, float], seed: int) -> dict[str, str]:
    """A stratified split before classes are given the splits that they miss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "_fill", lambda *_: None)
        return drawn(labels, shares, seed)


def tied_splits(table: Table, chosen: list[str]) -> list[set[str]]:
    """For each tie, the splits of the images that it ties, without unused."""
    return [
        {name for name, row in zip(chosen, table, strict=True) if row[column] == value} - {"unused"}
        for column in range(3)
        for value in {row[column] for row in table} - {""}
    ]


@settings(deadline=None)
@given(tables(), SHARES, SEEDS, st.sampled_from(METHODS), GIVEN)
def test_every_image_has_one_split(
    table: Table, shares: tuple[float, float], seed: int, method: str, chosen: list[str]
):
    assume(method != "given" or any(chosen[: len(table)]))
    labels = records(table, given=chosen)
    split = draw(labels, make_units(labels), sizes(method, shares), seed)
    rows = [row for name in (*RANKED, "unused") for row in split.rows(name)]
    assert sorted(rows) == list(range(len(table)))
    if method == "stratified":
        assert not len(split.rows("unused"))


@settings(deadline=None)
@given(tables(), SHARES, SEEDS, st.sampled_from(["stratified", "hash"]))
def test_equal_images_and_images_of_one_group_never_straddle(
    table: Table, shares: tuple[float, float], seed: int, method: str
):
    labels = records(table)
    chosen = list(drawn(labels, shares, seed, method).values())
    assert all(len(found) <= 1 for found in tied_splits(table, chosen))
    assert find_leaks(labels, Split(seed, labels.image_id, np.array(chosen))) == []


@settings(deadline=None)
@given(tables(), SHARES, SEEDS, st.sampled_from(METHODS), GIVEN, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_nothing(
    table: Table, shares: tuple[float, float], seed: int, method: str, chosen: list[str], random
):
    assume(method != "given" or any(chosen[: len(table)]))
    order = list(range(len(table)))
    random.shuffle(order)
    one, other = (drawn(records(table, rows, chosen), shares, seed, method) for rows in (None, order))
    assert one == other


@settings(deadline=None)
@given(tables(), SHARES, SEEDS)
def test_units_are_the_smallest_sets_that_may_not_be_separated(table: Table, shares: tuple[float, float], seed: int):
    units = make_units(records(table))
    assert sorted(row for unit in units for row in unit) == list(range(len(table)))
    ties = [{(c, row[c]) for c in range(3) if row[c]} for row in table]
    for unit in units:
        reached = {unit[0]}
        for _ in unit:
            reached |= {row for row in range(len(table)) if any(ties[row] & ties[other] for other in reached)}
        assert reached == set(unit)


# stratified


@settings(deadline=None)
@given(tables(), SHARES, SEEDS)
def test_splits_have_their_size_to_within_one_unit_of_a_stratum(table: Table, shares: tuple[float, float], seed: int):
    largest = max(map(len, make_units(records(table)))) * len({row[3:] for row in table})
    counts = Counter(drawn_without_filling(records(table), shares, seed).values())
    for name, share in zip(("test", "val"), shares, strict=True):
        assert abs(counts[name] - share * len(table)) <= largest


@settings(deadline=None)
@given(tables(ties=False), SHARES, SEEDS)
def test_every_stratum_has_its_share_of_every_split(table: Table, shares: tuple[float, float], seed: int):
    chosen = list(drawn_without_filling(records(table), shares, seed).values())
    for stratum in {row[3:] for row in table}:
        counts = Counter(name for name, row in zip(chosen, table, strict=True) if row[3:] == stratum)
        assert abs(counts["test"] - shares[0] * counts.total()) <= 1
        assert abs(counts["val"] - shares[1] * counts.total()) <= 2  # it takes what test has left


@pytest.mark.slow
@settings(deadline=None)
@given(tables(min_size=40, ties=False), st.tuples(SEEDS, SEEDS).filter(lambda pair: pair[0] != pair[1]))
def test_another_seed_is_another_split(table: Table, seeds: tuple[int, int]):
    for method in ("stratified", "hash"):
        first, second = (drawn(records(table), (0.3, 0.3), seed, method) for seed in seeds)
        assert first != second


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_one_large_group_does_not_keep_the_rest_of_its_class_out_of_test_and_validation(seed: int):
    table = [(str(i), "video" if i < 30 else "", "", "x" if i < 50 else "y", "") for i in range(100)]
    labels = records(table)
    check_classes(draw(labels, make_units(labels), sizes("stratified", (0.25, 0.1125)), seed), labels)


@pytest.mark.parametrize("seed", range(5))
def test_large_groups_of_one_class_take_no_places_of_the_next(seed: int):
    table = [(str(i), str(i // 100) if i < 1000 else "", "", "x" if i < 1000 else "y", "") for i in range(1150)]
    found = drawn(records(table), (0.25, 0.1125), seed)
    counts = Counter(split for name, split in found.items() if int(name.removesuffix(".png")) >= 1000)
    assert counts["test"] == pytest.approx(37.5, abs=1)
    assert counts["val"] == pytest.approx(16.9, abs=1)


def classes_of(*group_sizes: list[int]) -> Labels:
    """For each class images in groups of these sizes; an image alone is tied to none."""
    return records(
        [
            (f"{label} {group} {i}", f"{label} {group}" if n > 1 else "", "", f"class {label:02}", "")
            for label, counts in enumerate(group_sizes)
            for group, n in enumerate(counts)
            for i in range(n)
        ]
    )


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 40), min_size=3, max_size=9), min_size=1, max_size=8), SHARES, SEEDS)
def test_a_class_of_three_groups_or_more_has_one_in_every_split(
    group_sizes: list[list[int]], shares: tuple[float, float], seed: int
):
    labels = classes_of(*group_sizes)
    check_classes(draw(labels, make_units(labels), sizes("stratified", shares), seed), labels)


@pytest.mark.parametrize(
    "group_sizes", [[[15] * 4] * 2, [[10] * 3, [1] * 90], [[1] * 8] * 10, [[1] * 5] * 10, [[1] * 3, [1] * 900]]
)
def test_few_groups_and_tiny_classes_give_a_split_with_the_default_fractions(group_sizes: list[list[int]]):
    labels = classes_of(*group_sizes)
    for seed in range(10):
        check_classes(draw(labels, make_units(labels), sizes("stratified", (0.25, 0.1125)), seed), labels)


@settings(deadline=None)
@given(tables(), SHARES, SEEDS)
def test_classes_get_what_they_miss_by_a_unit_each_and_no_class_loses_its_last(
    table: Table, shares: tuple[float, float], seed: int
):
    labels = records(table)
    before, after = drawn_without_filling(labels, shares, seed), drawn(labels, shares, seed)
    held, now = ({(labels.label[row], split) for row, split in enumerate(found.values())} for found in (before, after))
    assert held <= now
    moved = [unit for unit in make_units(labels) if before[labels.image_id[unit[0]]] != after[labels.image_id[unit[0]]]]
    assert len(moved) <= len(now - held)


# hash


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(tables(min_size=2), SHARES, SEEDS, st.data())
def test_an_added_image_moves_no_image_of_another_unit(
    table: Table, shares: tuple[float, float], seed: int, data: st.DataObject
):
    is_old = data.draw(st.lists(st.booleans(), min_size=len(table), max_size=len(table)).filter(any))
    old = [row for row, is_there in enumerate(is_old) if is_there]
    before, after = (drawn(records(table, rows), shares, seed, "hash") for rows in (old, None))
    for unit in make_units(records(table)):
        if all(is_old[row] for row in unit):
            assert all(after[f"{row:03}.png"] == before[f"{row:03}.png"] for row in unit)


@settings(deadline=None)
@given(tables(), SHARES, SEEDS)
def test_a_unit_goes_where_its_group_or_its_smallest_digest_does_and_no_image_is_unused(
    table: Table, shares: tuple[float, float], seed: int
):
    labels, options = records(table), sizes("hash", shares, seed)
    found = drawn(labels, shares, seed, "hash")
    assert "unused" not in found.values()
    n_followers = 0
    for unit in make_units(labels):
        first = min(unit, key=lambda row: (table[row][1] == "", table[row][1] or table[row][0]))
        alone = [drawn(records(table, [row]), shares, seed, "hash")[f"{row:03}.png"] for row in (first, *unit)]
        assert {found[labels.image_id[row]] for row in unit} == {alone[0]}
        n_followers += sum(own != alone[0] for own in alone[1:])
    split = draw(labels, make_units(labels), options, seed)
    assert splits.count_followers(labels, split, options) == n_followers


@settings(deadline=None)
@given(tables(min_size=2), SHARES, SEEDS)
def test_names_and_labels_of_images_have_no_influence_on_hash(table: Table, shares: tuple[float, float], seed: int):
    labels = records(table)
    renamed = replace(labels, image_id=[f"new/{name}" for name in labels.image_id], label=1 - labels.label.clip(0, 1))
    found = [list(drawn(one, shares, seed, "hash").values()) for one in (labels, renamed)]
    assert found[0] == found[1]


def test_hash_meets_the_fractions_in_expectation():
    table = [(f"image {i}", f"group {i % 4000}" if i < 8000 else "", "", "x", "") for i in range(16000)]
    counts = Counter(drawn(records(table), (0.2, 0.1), 3, "hash").values())
    assert abs(counts["test"] / 16000 - 0.2) < 0.015  # four deviations of 12,000 units
    assert abs(counts["val"] / 16000 - 0.1) < 0.011


# folds


@settings(deadline=None, max_examples=60)
@given(tables(min_size=8), st.floats(0.05, 0.3), st.integers(2, 6), SEEDS)
def test_every_unit_is_tested_once_and_never_split(table: Table, val_share: float, n_folds: int, seed: int):
    labels = records(table)
    units = make_units(labels)
    options = sizes("folds", (0.5, val_share)).model_copy(
        update={"seeds": tuple(range(n_folds)), "partition_seed": seed}
    )
    drawn_folds = [draw(labels, units, options, number) for number in range(n_folds)]
    tested = np.concatenate([fold.rows("test") for fold in drawn_folds])
    assert sorted(tested) == list(range(len(table)))
    for fold in drawn_folds:
        assert all(len(set(fold.split[unit])) == 1 for unit in units)
        assert set(fold.split) <= {"train", "val", "test"}
        assert find_leaks(labels, fold) == []


def test_folds_have_equal_shares_of_each_class_and_draw_validation_from_the_rest():
    table = [(f"image {i}", "", "", "xyyyy"[i % 5], "") for i in range(500)]
    labels = records(table)
    options = sizes("folds", (0.5, 0.1)).model_copy(update={"seeds": (0, 1, 2, 3, 4)})
    for number in range(5):
        fold = draw(labels, make_units(labels), options, number)
        assert Counter(fold.split) == {"train": 350, "val": 50, "test": 100}
        assert Counter(labels.label[fold.rows("test")]) == {0: 20, 1: 80}
        assert Counter(labels.label[fold.rows("val")]) == {0: 10, 1: 40}
    other = draw(labels, make_units(labels), options.model_copy(update={"partition_seed": 1}), 0)
    assert (other.split != draw(labels, make_units(labels), options, 0).split).any()


def test_folds_of_40_patients_are_of_similar_size():
    random = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), random.integers(20, 60, 40))
    table = [(f"image {i}", f"patient {p}", "", "xy"[p % 2], "") for i, p in enumerate(patients)]
    labels = records(table)
    options = sizes("folds", (0.5, 0.1)).model_copy(update={"seeds": (0, 1, 2, 3, 4)})
    folds = [draw(labels, make_units(labels), options, number) for number in range(5)]
    shares = [len(fold.rows("test")) / len(table) for fold in folds]
    assert min(shares) > 0.13
    assert max(shares) < 0.27
    assert all(len(fold.rows("val")) for fold in folds)


# given


@settings(deadline=None)
@given(tables(), SHARES, SEEDS, GIVEN)
def test_given_splits_are_kept_and_a_missing_one_is_drawn_from_train_and_from_what_has_none(
    table: Table, shares: tuple[float, float], seed: int, chosen: list[str]
):
    chosen = chosen[: len(table)]
    assume(any(chosen))
    found = list(drawn(records(table, given=chosen), shares, seed, "given").values())
    drawn_splits = {"test", "val"} - set(chosen)
    for name, now in zip(chosen, found, strict=True):
        if name not in ("", "train"):
            assert now == name
        assert now in {"train", *drawn_splits} or name != "train"
    if not drawn_splits:
        assert [now for name, now in zip(chosen, found, strict=True) if name] == [name for name in chosen if name]
    assert set(found) - set(chosen) <= {"train", *drawn_splits}


@settings(deadline=None)
@given(tables(), SHARES, SEEDS, GIVEN)
def test_no_leak_is_made_that_was_not_given(table: Table, shares: tuple[float, float], seed: int, chosen: list[str]):
    chosen = chosen[: len(table)]
    assume(any(chosen))
    labels = records(table, given=chosen)
    found = np.array(list(drawn(labels, shares, seed, "given").values()))
    for unit in make_units(labels):
        before = {chosen[row] for row in unit} - {"", "unused"}
        after = set(found[unit]) - {"unused"}
        assert len(after) <= max(1, len(before))


@settings(deadline=None)
@given(tables(), st.lists(st.sampled_from((*RANKED, "unused")), min_size=60, max_size=60))
def test_every_leak_is_found(table: Table, chosen: list[str]):
    chosen = chosen[: len(table)]
    leaks = find_leaks(records(table), Split(0, [f"{i:03}.png" for i in range(len(table))], np.array(chosen)))
    assert len(leaks) == sum(len(found) > 1 for found in tied_splits(table, chosen))
    for leak in leaks:
        column = ("identical bytes", "group", "near-duplicates").index(leak.tie)
        tied = [row for row in range(len(table)) if table[row][column] == leak.name and chosen[row] != "unused"]
        assert leak.splits == {f"{row:03}.png": chosen[row] for row in tied}


def test_validation_is_drawn_as_its_share_of_what_is_not_test():
    table = [(str(i), "", "", "xy"[i % 2], "") for i in range(300)]
    chosen = ["test" if i < 200 else "train" for i in range(300)]
    found = list(drawn(records(table, given=chosen), (0.25, 0.15), 0, "given").values())
    assert Counter(found) == {"test": 200, "train": 80, "val": 20}
    assert found[:200] == ["test"] * 200


def test_where_only_train_and_validation_are_given_test_is_drawn_from_train():
    table = [(str(i), "", "", "xy"[i % 2], "") for i in range(120)]
    chosen = ["val" if i < 20 else "train" for i in range(120)]
    found = list(drawn(records(table, given=chosen), (0.25, 0.15), 0, "given").values())
    assert Counter(found) == {"val": 20, "train": 75, "test": 25}


@pytest.mark.parametrize("n_blank", [0, 1, 20, 119])
def test_images_without_a_split_are_drawn_from_like_those_of_train(n_blank: int):
    labels = records([(str(i), "", "", "xy"[i % 2], "") for i in range(120)], given=["train"] * 120)
    split = drawn(labels, (0.25, 0.15), 0, "given")
    assert Counter(split.values()) == {"train": 72, "test": 30, "val": 18}
    blank = replace(labels, given_split=[""] * n_blank + ["train"] * (120 - n_blank))
    assert drawn(blank, (0.25, 0.15), 0, "given") == split


def test_a_class_gets_what_it_misses_of_a_split_that_is_drawn_but_not_of_one_that_is_given():
    chosen = ["test"] * 20 + ["train"] * 80
    table = [(str(i), "", "", "rare" if i in (0, 50, 51) else "common", "") for i in range(100)]
    found = drawn(records(table, given=chosen), (0.25, 0.1125), 0, "given")
    assert {found["050.png"], found["051.png"]} == {"train", "val"}
    assert [found[f"{i:03}.png"] for i in range(20)] == ["test"] * 20


def test_an_image_without_a_split_goes_with_those_it_is_tied_to():
    table = [("a", "patient", "", "x", ""), ("b", "patient", "", "x", ""), ("c", "", "", "x", "")]
    found = drawn(records(table, given=["", "test", "train"]), (0.25, 0.15), 0, "given")
    assert found["000.png"] == "test"


def test_given_without_any_split_is_an_error_that_says_what_would_do():
    labels = records([("a", "", "", "x", "")])
    with pytest.raises(ValueError, match=r"split\.method: found given, but .* expected a `split` column"):
        drawn(labels, (0.25, 0.15), 0, "given")


# classes


@pytest.mark.parametrize("absent", ["train", "val", "test"])
def test_a_class_that_misses_a_split_is_named(absent: str):
    chosen = ["train", "val", "test"]
    labels = records([(str(i), "", "", "rare" if i < 3 else "common", "") for i in range(6)])
    complete = Split(3, labels.image_id, np.array(chosen * 2, "<U6"))
    check_classes(complete, labels)
    complete.split[chosen.index(absent)] = "unused"
    with pytest.raises(ValueError, match=f"seed 3: class 'rare' has 3 images, none of them in {absent}; add images"):
        check_classes(complete, labels)


def test_a_class_in_fewer_than_three_groups_is_named_as_such_without_advice_to_add_images():
    labels = classes_of([10, 20], [1] * 30)
    for seed in range(5):
        with pytest.raises(
            ValueError, match="class 'class 00' has 30 images in 2 groups that stay together, "
        ) as error:
            check_classes(draw(labels, make_units(labels), sizes("stratified", (0.25, 0.1125)), seed), labels)
        assert "a class needs three groups" in str(error.value)
        assert "add images, " not in str(error.value)


def test_every_class_that_misses_a_split_is_named_in_one_message():
    labels = records([("1", "", "", "x", ""), ("2", "", "", "y", ""), ("3", "", "", "y", "")])
    with pytest.raises(ValueError, match="class 'x' has 1 images, none of them in val and test; class 'y' has 2") as e:
        check_classes(Split(0, labels.image_id, np.array(["train", "train", "val"], "<U6")), labels)
    assert "none of them in test; add images" in str(e.value)


@pytest.mark.slow
@given(seed=st.integers(0, 2**31), texts=st.lists(st.text(), max_size=2))
def test_units_are_ordered_by_the_digest_of_seed_and_name(seed: int, texts: list[str]) -> None:
    assert splits._digest(seed, *texts) == digest([seed, *texts])
