"""Signatures of pictures, and pairs of signatures that correlate, against every pair compared."""

import io
from itertools import combinations

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from pipeline.ingest.duplicates import N_PARTNERS, SCALE, near, reduced, signatures

DEFAULT = 0.997  # of params.yaml


def photograph(seed: int = 0, side: int = 300) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(io.BytesIO(stream.getvalue()))


def correlation(a: Image.Image, b: Image.Image) -> float:
    one, other = (np.asarray(signature, float) for signature in signatures([reduced(a), reduced(b)]))
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((100, 75)),
        lambda image: image.resize((60, 54)),  # squashed
        lambda image: image.resize((1600, 1200)),
        lambda image: image.convert("L"),
        lambda image: image.filter(ImageFilter.GaussianBlur(2)),
        lambda image: ImageEnhance.Brightness(image).enhance(0.8),
        lambda image: ImageEnhance.Contrast(image).enhance(0.8),
        lambda image: recompressed(image, 30),
        lambda image: recompressed(image.resize((80, 60)), 50),
    ],
)
def test_copies_are_near_duplicates(change):
    for seed in range(10):
        assert correlation(photograph(seed), change(photograph(seed))) >= DEFAULT


def test_other_pictures_are_far_apart():
    assert max(correlation(photograph(a), photograph(b)) for a, b in combinations(range(12), 2)) < 0.9


@pytest.mark.parametrize("image", [Image.new("L", (50, 40), 128), Image.new("RGB", (1, 1), (9, 200, 3))])
def test_a_flat_picture_has_no_signature(image: Image.Image):
    assert signatures([reduced(image)]) == [None]
    assert signatures([]) == []


def directions(entries: list[tuple[int, int]], seed: int) -> np.ndarray:
    """Signatures around six centres; those with the same entry are the same."""
    random = np.random.default_rng(seed)
    centres, moves = random.normal(size=(6, 63)), random.normal(size=(4, 63))
    rows = np.array([centres[i] + 0.05 * moves[j] for i, j in entries]).reshape(-1, 63)
    return np.round(SCALE * rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.int16)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=30),
    st.sampled_from([0.9, 0.99, 0.997, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_pairs_and_chains_are_those_of_comparing_every_pair(entries, least: float, seed: int):
    signature = directions(entries, seed)
    n, unit = len(signature), signature / np.maximum(np.linalg.norm(signature.astype(float), axis=1), 1)[:, None]
    close = {(a, b) for a, b in combinations(range(n), 2) if unit[a] @ unit[b] >= least - 1e-12}
    pairs, value, component = near(signature, least)
    listed = set(map(tuple, pairs.tolist()))
    assert len(listed) == len(pairs)
    assert listed <= close
    first = {tuple(row): a for a, row in reversed([*enumerate(signature.tolist())])}
    represented = [first[tuple(row)] for row in signature.tolist()]
    assert {(represented[a], represented[b]) for a, b in close if represented[a] != represented[b]} <= {
        (represented[a], represented[b]) for a, b in listed | {(b, a) for a, b in listed}
    }
    assert value == pytest.approx([float(unit[a] @ unit[b]) for a, b in pairs], abs=1e-9)
    assert (np.diff(value.round(9)) <= 0).all()
    ties = networkx.Graph([*close])
    ties.add_nodes_from(range(n))
    expected = {frozenset(group) for group in networkx.connected_components(ties)}
    assert {frozenset(np.flatnonzero(component == number).tolist()) for number in component} == expected


def test_each_of_many_copies_has_its_most_similar_partners_and_all_are_one_group():
    random = np.random.default_rng(0)
    rows = random.normal(size=63) + 0.002 * random.normal(size=(2000, 63))
    signature = np.round(SCALE * rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.int16)
    pairs, _, component = near(signature, 0.997)
    assert set(component) == {0}
    assert len(pairs) <= N_PARTNERS * 2000
    assert set(pairs.ravel()) == set(range(2000))


def test_no_signatures_are_no_pairs():
    pairs, value, component = near(np.zeros((0, 63), np.int16), 0.997)
    assert (len(pairs), len(value), len(component)) == (0, 0, 0)
