"""Thumbnails, and the map of the features."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset import decoding
from pipeline.dataset.manifest import Images
from pipeline.features.hdf5 import Features
from pipeline.report import pictures
from tests import factories


def test_map_of_many_images_is_a_sample_and_always_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "MAX_POINTS", 30)
    values = np.random.default_rng(0).normal(size=(100, 2, 8)).astype(np.float32)
    first, second = (pictures.map_features(Features(values, values, [], factories.provenance())) for _ in range(2))
    assert len(first[0]) == 30
    assert all(map(np.array_equal, first, second))


def test_thumbnail_of_a_file_that_changed_or_lies_elsewhere_is_not_shown(tmp_path: Path):
    directory = tmp_path / "images"
    directory.mkdir()
    Image.new("RGB", (40, 30), "red").save(directory / "a.png")
    Image.new("RGB", (40, 30), "blue").save(directory / "b.png")
    files = Images(["a.png"], [decoding.sha256((directory / "a.png").read_bytes())], [40], [30])
    assert str(pictures.Album(directory, files).thumbnail("a.png")).startswith("data:image/webp;base64,")
    assert pictures.Album(directory, files).thumbnail("b.png")  # rejected files are not in the index
    shutil.copy(directory / "b.png", directory / "a.png")
    shutil.copy(directory / "b.png", tmp_path / "secret.png")
    changed = pictures.Album(directory, files)
    assert changed.thumbnail("a.png") is None
    assert changed.thumbnail("../secret.png") is None
