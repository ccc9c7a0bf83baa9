"""Distances from the training images: those of Mahalanobis, whatever the shape of the data."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.training import novelty


def draw(n: int, width: int, label: np.ndarray, seed: int = 0) -> np.ndarray:
    """Two classes that are 6 apart, with one direction that varies 5 times as much as the others."""
    found = np.random.default_rng(seed).normal(size=(n, width))
    found[:, 0] *= 5
    found[:, 1] += 6 * label
    return found.astype(np.float32)


def test_distances_are_those_of_mahalanobis_to_the_nearest_class_mean():
    label = np.arange(4000) % 2
    known = novelty.fit(draw(4000, 3, label), label, draw(400, 3, label[:400], 1), label[:400])
    assert len(known.components) == 1
    points = np.array([[5, 0, 0], [0, 6, 2], [0, 3, 0], [15, 6, 4]], np.float32)
    np.testing.assert_allclose(known.distances(points), [1, 2, 3, 5], rtol=0.07, atol=0.1)
    np.testing.assert_allclose(known.validation, np.sort(known.distances(draw(400, 3, label[:400], 1))))


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 30), st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
def test_distances_are_finite_and_far_images_are_far_whatever_the_sizes(n: int, width: int, k: int, seed: int):
    random = np.random.default_rng(seed)
    label = random.integers(0, k, n)
    train, val = random.normal(size=(2, n, width)).astype(np.float32)
    known = novelty.fit(train, label, val, random.integers(0, k, n))
    assert len(known.components) < max(width, 1)
    far = known.distances(val + 1e3)
    assert np.isfinite(far).all()
    assert far.min() > known.validation.max()


def test_images_that_are_all_the_same_and_a_class_without_training_images_are_no_errors():
    train, val = np.ones((6, 4), np.float32), np.ones((3, 4), np.float32)
    known = novelty.fit(train, np.array([0, 0, 0, 2, 2, 2]), val, np.array([0, 1, 2]))
    assert known.means.shape == (2, 4)
    assert known.validation.tolist() == [0, 0, 0]
    assert known.distances(val + 1).tolist() == pytest.approx([2, 2, 2])


def test_the_same_features_give_the_same_bytes_and_leave_random_numbers_alone():
    label = np.arange(60) % 2
    train, val = draw(60, 90, label), draw(20, 90, label[:20], 1)
    state = torch.get_rng_state()
    ours, theirs = (novelty.fit(train, label, val, label[:20]) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(vars(ours).values(), vars(theirs).values(), strict=True))


def test_a_sample_has_all_images_or_as_many_of_each_class():
    label = np.repeat([0, 1, 2], [20_000, 300, 4])
    assert novelty.sample(label[:9000], 10).tolist() == [*range(9000)]
    chosen = novelty.sample(label, 10)
    assert np.bincount(label[chosen]).tolist() == [novelty.MAX_IMAGES - 304, 300, 4]
    assert len(np.unique(chosen)) == novelty.MAX_IMAGES
    wide = novelty.sample(label, novelty.MAX_BYTES // 40)
    assert np.bincount(label[wide]).tolist() == [4, 3, 3]


def test_the_penultimate_layer_is_the_input_of_the_last_one():
    head = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    layers, width = novelty.penultimate(head)
    x = torch.randn(5, 4)
    assert width == 3
    assert torch.equal(head[-1](layers(x)), head(x))
