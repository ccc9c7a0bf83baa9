"""Perceptual hashes, and pairs of hashes that are close, against every pair compared."""

from itertools import combinations

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from pipeline.ingest.duplicates import near, perceptual_hashes, reduced


def photograph(seed: int = 0, side: int = 300) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)


def perceptual_hash(image: Image.Image) -> int | None:
    return perceptual_hashes([reduced(image)])[0]


def distance(a: Image.Image, b: Image.Image) -> int:
    one, other = perceptual_hash(a), perceptual_hash(b)
    assert one is not None
    assert other is not None
    return (one ^ other).bit_count()


def test_a_hash_has_64_bits_half_of_which_are_set():
    value = perceptual_hash(photograph())
    assert value is not None
    assert 0 <= value < 2**64
    assert value.bit_count() == 32


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((100, 75)),
        lambda image: image.resize((1600, 1200)),
        lambda image: image.convert("L"),
        lambda image: image.filter(ImageFilter.GaussianBlur(2)),
        lambda image: ImageEnhance.Brightness(image).enhance(0.9),
        lambda image: image.crop((2, 2, image.width - 2, image.height - 2)),
    ],
)
def test_small_changes_leave_nearly_the_same_hash(change):
    assert distance(photograph(), change(photograph())) <= 6


def test_other_pictures_are_far_apart():
    assert min(distance(photograph(a), photograph(b)) for a, b in combinations(range(12), 2)) > 12


@pytest.mark.parametrize("image", [Image.new("L", (50, 40), 128), Image.new("RGB", (1, 1), (9, 200, 3))])
def test_a_flat_picture_has_no_hash(image: Image.Image):
    assert perceptual_hash(image) is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 63), max_size=5)), max_size=60),
    st.integers(0, 10),
    st.integers(0, 2**32 - 1),
)
def test_pairs_and_chains_are_those_of_comparing_every_pair(entries, bits: int, seed: int):
    centres = np.random.default_rng(seed).integers(0, 2**64, 6, dtype=np.uint64)
    hashes = np.array([int(centres[i]) ^ sum(1 << bit for bit in flipped) for i, flipped in entries], np.uint64)
    n = len(hashes)
    pairs = {
        (a, b): apart
        for a, b in combinations(range(n), 2)
        if (apart := (int(hashes[a]) ^ int(hashes[b])).bit_count()) <= bits
    }
    component, closest, n_pairs = near(hashes, bits, n * n)
    assert n_pairs == len(pairs)
    ties = networkx.Graph(list(pairs))
    ties.add_nodes_from(range(n))
    expected = {frozenset(component) for component in networkx.connected_components(ties)}
    assert {frozenset(np.flatnonzero(component == number).tolist()) for number in component} == expected
    listed = {(a, b): apart for a, b, apart in closest.tolist()}
    assert len(listed) == len(closest)
    assert listed.items() <= pairs.items()
    assert {apart for apart in listed.values()} == {apart for apart in pairs.values()}


def test_the_closest_pairs_come_first_and_no_more_than_asked_for():
    hashes = np.array([0, 0b111, 0b1, 2**63, 2**63 + 2**40, 2**63 + 2**40], np.uint64)
    assert near(hashes, 3, 3)[1].tolist() == [[4, 5, 0], [0, 2, 1], [0, 3, 1]]
    assert [pair for pair in near(hashes, 3, 99)[1].tolist() if 5 in pair] == [[4, 5, 0]], "4 stands for both"


def test_thousands_of_frames_of_one_video_are_one_group():
    random = np.random.default_rng(0)
    hashes = np.uint64(random.integers(2**63)) ^ (np.uint64(1) << random.integers(0, 64, 5000, dtype=np.uint64))
    component, closest, n_pairs = near(hashes, 6, 50)
    assert n_pairs == 5000 * 4999 // 2
    assert len(closest) == 50
    assert set(component) == {0}


def test_no_hashes_are_no_pairs():
    component, closest, n_pairs = near(np.array([], np.uint64), 6, 50)
    assert (n_pairs, len(closest), len(component)) == (0, 0, 0)
