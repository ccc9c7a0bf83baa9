"""data/features.h5 has the same bytes however the store came to be filled."""

import hashlib
import io
import math
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from pipeline import backbones, feature_store
from pipeline.backbones import Backbone
from pipeline.feature_store import Computation, Row
from pipeline.images import Preprocessing
from pipeline.params import Augmentation, FeatureOptions

N_IMAGES, VIEWS = 9, 3
CPU = torch.device("cpu")
AUGMENTATION = Augmentation(
    seed=0,
    flips="both",
    right_angles=True,
    rotation_degrees=10.0,
    shift_fraction=0.1,
    scale=(1.0, 1.0),
    crop_area=(1.0, 1.0),
    crop_aspect=(1.0, 1.0),
    brightness=0.2,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    noise_std=2.0,
)


class Network(nn.Module):
    """A convolution and a linear layer that raise KeyboardInterrupt after `left` batches."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
        self.left = float("inf")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.layers(x)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Images by SHA-256."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    found = {}
    for number in range(N_IMAGES):
        content = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (10, 12, 3), np.uint8)).save(content, "PNG")
        (folder / f"{number}.png").write_bytes(content.getvalue())
        found[hashlib.sha256(content.getvalue()).hexdigest()] = folder / f"{number}.png"
    return found


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_store, "SHARD_ROWS", 4)


@cache
def computation() -> tuple[Network, Computation]:
    preprocessing = Preprocessing(resize=(8,), crop=8, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
    network = Network()
    backbone = Backbone("torchvision/tiny", network, preprocessing, backbones.state_sha256(network), 5)
    options = FeatureOptions(
        views=VIEWS, image_size=None, cut="all", pool="none", engine="torch", precision="fp32", store_dtype="fp16"
    )
    whole = nn.Sequential(backbones.Normalize(preprocessing), network)
    return network, feature_store.computation(whole, backbone, "all", "none", AUGMENTATION, options, CPU)


def fill(images: dict[str, Path], rows: list[Row], after: float = float("inf")) -> feature_store.Store:
    """Fill the store, or be killed after so many batches."""
    network, how = computation()
    network.left = after
    return feature_store.fill(how, images, rows, workers=0, max_gb=math.inf)


def assembled(images: dict[str, Path], store: feature_store.Store, folder: str) -> bytes:
    path = Path(folder, "features.h5")
    feature_store.assemble(store, list(images), VIEWS, {"made": "by a test"}, path)
    return path.read_bytes()


def all_rows(images: dict[str, Path]) -> list[Row]:
    return [(name, view) for name in images for view in range(VIEWS)]


@pytest.fixture(scope="module")
def expected(images: dict[str, Path]) -> bytes:
    """The bytes of a fresh run."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", folder)
        return assembled(images, fill(images, all_rows(images)), folder)


orders = st.permutations(range(N_IMAGES * VIEWS))
borders = st.lists(st.integers(0, N_IMAGES * VIEWS), max_size=3).map(sorted)


@settings(max_examples=20, deadline=None)
@given(order=orders, borders=borders)
def test_bytes_do_not_depend_on_order_and_instalments(
    images: dict[str, Path], expected: bytes, order: list[int], borders: list[int]
) -> None:
    rows = all_rows(images)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", folder)
        for start, end in zip([0, *borders], [*borders, len(rows)], strict=True):
            fill(images, [rows[i] for i in order[start:end]])
        assert assembled(images, fill(images, rows), folder) == expected


@settings(max_examples=20, deadline=None)
@given(kills=st.lists(st.integers(0, 4), max_size=3), order=orders)
def test_store_that_was_killed_anywhere_resumes_to_the_same_bytes(
    images: dict[str, Path], expected: bytes, kills: list[int], order: list[int]
) -> None:
    rows = [all_rows(images)[i] for i in order]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", folder)
        for after in kills:
            try:
                fill(images, rows, after)
            except KeyboardInterrupt:
                continue
        assert assembled(images, fill(images, rows), folder) == expected
