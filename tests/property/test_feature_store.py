"""data/features.h5 has the same bytes however the store came to be filled."""

import hashlib
import io
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from pipeline.features import extraction
from pipeline.features.extraction import Computation, Share
from pipeline.features.hdf5 import Row
from pipeline.features.loading import Loader
from pipeline.features.store import Store
from pipeline.features.views import AUGMENTED
from pipeline.network.backbones import Backbone, state_sha256
from pipeline.network.cuts import Prefix
from pipeline.network.preprocessing import Normalize, Preprocessing
from tests.factories import FLIPS, PREPROCESSING, feature_options, loader, provenance

N_IMAGES = 6
VIEWS = [0, 2, AUGMENTED + 1, AUGMENTED + 2]
EVALUATION_VIEWS = [2, 0]
CPU = torch.device("cpu")
AUGMENTATION = FLIPS.model_copy(
    update={"right_angles": True, "rotation_degrees": 10.0, "shift_fraction": 0.1, "brightness": 0.2, "noise_std": 2.0}
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
    monkeypatch.setattr(extraction, "SHARD_ROWS", 4)


@cache
def prepared() -> tuple[Network, Computation]:
    network = Network()
    backbone = Backbone("torchvision/tiny", network, PREPROCESSING, state_sha256(network), 5, None)
    prefix = Prefix(nn.Sequential(Normalize(PREPROCESSING), network), backbone, "all", "none", {})
    return network, extraction.prepare(prefix, AUGMENTATION, feature_options(store_dtype="fp16"), CPU)


def fill(images: dict[str, Path], rows: list[Row], after: float = float("inf")) -> Store:
    """Fill the store, or be killed after so many batches."""
    network, computation = prepared()
    network.left = after
    return extraction.fill(computation, loader(computation, images), rows, math.inf, Share(0, 1))


def assembled(images: dict[str, Path], store: Store, folder: str) -> bytes:
    path = Path(folder, "features.h5")
    extraction.assemble(store, list(images), VIEWS, EVALUATION_VIEWS, provenance(), path)
    return path.read_bytes()


def all_rows(images: dict[str, Path]) -> list[Row]:
    return [(name, view) for name in images for view in VIEWS]


@pytest.fixture(scope="module")
def expected(images: dict[str, Path]) -> bytes:
    """The bytes of a fresh run."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", folder)
        return assembled(images, fill(images, all_rows(images)), folder)


orders = st.permutations(range(N_IMAGES * len(VIEWS)))
borders = st.lists(st.integers(0, N_IMAGES * len(VIEWS)), max_size=3).map(sorted)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
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


@pytest.mark.slow
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


KEYED = {  # what can change a row: a change of each, and back, is one step of a walk
    "network": ("timm/one", "timm/other"),
    "seed": (0, 1),
    "cut": ("all", "layer3"),
    "pool": ("none", "avg"),
    "store_dtype": ("fp32", "fp16"),
    "precision": ("fp32", "bf16"),
    "engine": ("torch", "openvino"),
    "threads": (1, 2),
    "crop": (8, 6),
    "interpolation": ("bilinear", "bicubic"),
    "mean": (0.5, 0.4),
    "geometry": ("crop", "pad"),
}
OF_VIEWS = {
    "seed": (0, 1),
    "brightness": (0.2, 0.0),
    "flips": ("both", "none"),
}  # what can change a row of an augmented view alone
State = dict[str, int]


@cache
def network_of(seed: int, crop: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * crop**2, 5))


@cache
def computation_of(state: tuple[tuple[str, int], ...]) -> Computation:
    """The computation of a state: which of the two values each thing has."""
    at = dict(state)
    v = {name: values[at[name]] for name, values in KEYED.items()}
    augmentation = AUGMENTATION.model_copy(update={n: values[at[f"view {n}"]] for n, values in OF_VIEWS.items()})
    crop, mean = int(v["crop"]), float(v["mean"])
    geometry = Preprocessing(
        jpeg_decoding="exact",
        geometry=v["geometry"],  # pyright: ignore[reportArgumentType]
        resize=(crop,),
        crop=crop,
        interpolation=str(v["interpolation"]),
        mean=(mean,) * 3,
        std=(0.5,) * 3,
    )
    layers = network_of(int(v["seed"]), crop)
    backbone = Backbone(str(v["network"]), layers, geometry, state_sha256(layers), 5, None)
    options = feature_options(**{name: v[name] for name in ("engine", "precision", "store_dtype")})
    prefix = Prefix(nn.Sequential(Normalize(geometry), layers), backbone, str(v["cut"]), str(v["pool"]), {})
    torch.set_num_threads(int(v["threads"]))
    return extraction.prepare(prefix, augmentation, options, CPU)


CHANGES = [*KEYED, *(f"view {name}" for name in OF_VIEWS)]
NOTHING = ["nothing", "rename", "another order", "fewer images", "all images", "fewer views", "all views", "a new file"]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(walk=st.lists(st.sampled_from([*CHANGES, *NOTHING]), min_size=1, max_size=8), random=st.randoms())
def test_a_walk_over_changes_computes_what_is_new_and_never_returns_what_is_old(
    images: dict[str, Path], walk: list[str], random: Random
) -> None:
    state: State = dict.fromkeys(CHANGES, 0)
    seen: set[tuple[str, Row]] = set()
    asked: list[Row] = []
    load = Loader.load

    def counted(self: Loader, batches: Sequence[Sequence[Row]], **options: Any) -> Iterator[torch.Tensor]:
        asked.extend(row for batch in batches for row in batch)
        return load(self, batches, **options)

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "load", counted)
        patch.setattr(extraction, "N_CHECKED", 0)
        paths = {name: Path(shutil.copy(path, folder)) for name, path in images.items()}
        chosen, views = list(paths), VIEWS
        for step in ["nothing", *walk]:
            if step in state:
                state[step] = 1 - state[step]
            elif step == "rename":
                name = random.choice(chosen)
                paths[name] = paths[name].rename(Path(folder, f"{uuid4()}.png"))
            elif step == "another order":
                random.shuffle(chosen)
            elif step == "fewer images":
                chosen = random.sample(chosen, len(chosen) // 2 + 1)
            elif step == "all images":
                chosen = list(paths)
            elif step in ("fewer views", "all views"):
                views = VIEWS[:1] if step == "fewer views" else VIEWS
            elif step == "a new file":
                content = io.BytesIO()
                Image.new("RGB", (9, 9), tuple(random.randbytes(3))).save(content, "PNG")
                path = Path(folder, f"{uuid4()}.png")
                path.write_bytes(content.getvalue())
                chosen.append(hashlib.sha256(content.getvalue()).hexdigest())
                paths[chosen[-1]] = path
            computation = computation_of(tuple(sorted(state.items())))
            rows = [(name, view) for name in chosen for view in views]
            asked.clear()
            patch.setenv("DVC_ROOT", f"{folder}/store")
            values = extraction.fill(computation, loader(computation, paths), rows, math.inf, Share(0, 1)).read(rows)
            keyed = {(computation.key.name(row[1]), row) for row in rows}
            assert {(computation.key.name(row[1]), row) for row in asked} == keyed - seen
            assert len(set(asked)) == len(asked)
            seen |= keyed
            with tempfile.TemporaryDirectory() as empty:
                patch.setenv("DVC_ROOT", empty)
                fresh = extraction.fill(computation, loader(computation, paths), rows, math.inf, Share(0, 1)).read(rows)
            assert values.tobytes() == fresh.tobytes()


def test_every_change_of_the_walk_has_a_key_of_its_own() -> None:
    plain = dict.fromkeys(CHANGES, 0)
    states = [plain, *({**plain, name: 1} for name in CHANGES)]
    keys = [computation_of(tuple(sorted(state.items()))).key for state in states]
    assert len({key.name(0) for key in keys}) == 1 + len(KEYED)
    assert len({key.name(AUGMENTED) for key in keys}) == 1 + len(CHANGES)
