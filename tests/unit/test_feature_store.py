"""feature_store: each row computed once, shards whole or absent, and a file of plain arrays."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline import backbones, feature_store
from pipeline.backbones import Backbone
from pipeline.feature_store import Computation, Row
from pipeline.images import Preprocessing, Sample
from pipeline.params import Augmentation, FeatureOptions

CPU = torch.device("cpu")
N_IMAGES = 12
PREPROCESSING = Preprocessing(resize=(8,), crop=8, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
OPTIONS = FeatureOptions(
    views=2, image_size=None, cut="all", pool="none", engine="torch", precision="fp32", store_dtype="fp32"
)
AUGMENTATION = Augmentation(
    seed=0,
    flips="both",
    right_angles=False,
    rotation_degrees=0.0,
    shift_fraction=0.0,
    scale=(1.0, 1.0),
    crop_area=(1.0, 1.0),
    crop_aspect=(1.0, 1.0),
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    noise_std=0.0,
)


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The images by SHA-256, in a repository that is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    random, found = np.random.default_rng(0), {}
    for number in range(N_IMAGES):
        path = tmp_path / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (10, 10, 3), np.uint8)).save(path)
        found[hashlib.sha256(path.read_bytes()).hexdigest()] = path
    return found


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Grows by every row that is computed."""
    rows: list[Row] = []
    load_batches = feature_store.load_batches

    def counted(batches: Sequence[Sequence[Sample]], *how: Any) -> Iterator[torch.Tensor]:
        rows.extend((sample.sha256, sample.view) for batch in batches for sample in batch)
        return load_batches(batches, *how)

    monkeypatch.setattr(feature_store, "load_batches", counted)
    return rows


def make_computation(
    augmentation: Augmentation = AUGMENTATION,
    *,
    seed: int = 0,
    cut: str = "all",
    pool: str = "none",
    store_dtype: str = "fp32",
    preprocessing: Preprocessing = PREPROCESSING,
    name: str = "torchvision/tiny",
    module: nn.Module | None = None,
) -> Computation:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = module or nn.Sequential(nn.Flatten(), nn.Linear(3 * preprocessing.crop**2, 5))
    backbone = Backbone(name, layers, preprocessing, backbones.state_sha256(layers), 5)
    network = nn.Sequential(backbones.Normalize(preprocessing), layers)
    options = OPTIONS.model_copy(update={"store_dtype": store_dtype})
    return feature_store.computation(network, backbone, cut, pool, augmentation, options, CPU)


def fill(
    computation: Computation, paths: dict[str, Path], rows: Sequence[Row], max_gb: float = math.inf
) -> feature_store.Store:
    return feature_store.fill(computation, paths, rows, workers=0, max_gb=max_gb)


def all_rows(paths: dict[str, Path], views: int = 2) -> list[Row]:
    return [(name, view) for name in paths for view in range(views)]


def shards(root: Path = Path()) -> list[Path]:
    return sorted(root.glob("data/.feature_store/*/*.h5"))


def test_every_row_is_computed_once_and_never_again(paths: dict[str, Path], computed: list[Row]) -> None:
    rows = all_rows(paths)
    fill(make_computation(), paths, [*rows, *rows[:5]])
    assert sorted(computed) == sorted(rows)
    computed.clear()
    store = fill(make_computation(), paths, rows)
    assert computed == []
    assert store.missing(rows) == []


def test_only_what_is_missing_is_computed(paths: dict[str, Path], computed: list[Row]) -> None:
    rows = all_rows(paths)
    fill(make_computation(), paths, rows[:7])
    computed.clear()
    fill(make_computation(), paths, rows)
    assert sorted(computed) == sorted(rows[7:])


def test_rows_are_what_the_network_says_of_the_view(paths: dict[str, Path]) -> None:
    computation = make_computation()
    store = fill(computation, paths, all_rows(paths))
    name, path = next(iter(paths.items()))
    with Image.open(path) as image:
        pixels = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))
    views = np.stack([pixels, pixels[:, ::-1]])  # with `flips: both` view 1 is the horizontal flip
    with torch.no_grad():
        expected = computation.module(torch.from_numpy(views)).numpy()
    np.testing.assert_allclose(store.read([(name, 0), (name, 1)]), expected, rtol=1e-4, atol=1e-5)


def test_rows_are_read_in_the_order_asked_for(paths: dict[str, Path]) -> None:
    rows = all_rows(paths)
    store = fill(make_computation(), paths, rows)
    values = store.read(rows)
    assert values.shape == (len(rows), 5)
    assert values.dtype == np.float32
    order = np.random.default_rng(0).permutation(len(rows))
    assert np.array_equal(store.read([rows[i] for i in order]), values[order])
    with pytest.raises(KeyError):
        store.read([("0" * 64, 0)])


def test_other_augmentation_leaves_view_0_in_place(paths: dict[str, Path], computed: list[Row]) -> None:
    rows = all_rows(paths, views=3)
    fill(make_computation(), paths, rows)
    computed.clear()
    other = AUGMENTATION.model_copy(update={"brightness": 0.2})
    fill(make_computation(other), paths, rows)
    assert sorted(computed) == sorted(row for row in rows if row[1])
    computed.clear()
    fill(make_computation(), paths, rows)
    assert computed == []


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"cut": "layer3"},
        {"pool": "avg"},
        {"store_dtype": "fp16"},
        {"name": "timm/tiny"},
        {"preprocessing": PREPROCESSING.model_copy(update={"crop": 6})},
        {"preprocessing": PREPROCESSING.model_copy(update={"interpolation": "bicubic"})},
        {"preprocessing": PREPROCESSING.model_copy(update={"mean": (0.4, 0.5, 0.5)})},
    ],
    ids=["weights", "cut", "pool", "stored type", "network", "size", "interpolation", "mean"],
)
def test_whatever_can_change_a_row_has_a_key_of_its_own(
    paths: dict[str, Path], computed: list[Row], change: dict[str, Any]
) -> None:
    rows = all_rows(paths)
    fill(make_computation(), paths, rows)
    computed.clear()
    fill(make_computation(**change), paths, rows)
    assert sorted(computed) == sorted(rows)


@pytest.mark.parametrize("key", ["precision", "engine", "device", "versions", "schema", "weights_sha256"])
def test_description_says_how_rows_were_made(key: str) -> None:
    computation = make_computation()
    assert key in computation.description
    assert computation.describe(0)["augmentation"] is None
    assert computation.describe(1) == computation.describe(2)
    assert computation.describe(1)["augmentation"]["flips"] == "both"


def test_store_lies_below_dvc_root_where_that_is_set(
    paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    fill(make_computation(), paths, all_rows(paths))
    assert shards(tmp_path / "main")
    assert not shards()


def test_cache_over_the_limit_is_refused_before_anything_is_computed(
    paths: dict[str, Path], computed: list[Row]
) -> None:
    rows = all_rows(paths)
    needed = len(rows) * 5 * 4 / 1e9
    with pytest.raises(ValueError, match=r"runtime\.store_max_gb: .* needs 4\.8e-07 GB.*boundary_cache: off") as caught:
        fill(make_computation(), paths, rows, max_gb=0.99 * needed)
    assert all(way in str(caught.value) for way in ("fewer views", "a later cut", "features.store_dtype: fp16"))
    assert computed == []
    assert shards() == []
    fill(make_computation(), paths, [*rows, *rows], max_gb=needed)
    fill(make_computation(store_dtype="fp16"), paths, rows, max_gb=needed / 2)


def test_values_are_stored_as_asked_with_the_error_that_this_makes(paths: dict[str, Path]) -> None:
    rows = all_rows(paths)
    full, half = (fill(make_computation(store_dtype=kind), paths, rows) for kind in ("fp32", "fp16"))
    exact, rounded = full.read(rows), half.read(rows)
    assert (exact.dtype, rounded.dtype) == (np.float32, np.float16)
    assert 2 * rounded.nbytes == exact.nbytes
    assert np.array_equal(rounded, exact.astype(np.float16))
    assert len({path.parent for path in shards()}) == 4, "view 0 and the others, of either type"
    expected = (np.abs(rounded.astype(np.float64) - exact).max(axis=1) / np.abs(exact).max(axis=1)).tolist()
    assert full.largest_rounding(rows) == 0
    assert half.largest_rounding(rows) == pytest.approx(max(expected), rel=1e-5)
    assert 0 < max(expected) < 2**-11
    smallest = int(np.argmin(expected))
    assert half.largest_rounding([rows[smallest]]) == pytest.approx(expected[smallest], rel=1e-5)
    again = feature_store.Store(make_computation(store_dtype="fp16"))
    assert again.largest_rounding(rows) == half.largest_rounding(rows)


def test_rows_of_zeros_have_no_error(paths: dict[str, Path]) -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    nn.init.zeros_(layers[1].weight)  # pyright: ignore[reportArgumentType]
    nn.init.zeros_(layers[1].bias)  # pyright: ignore[reportArgumentType]
    store = fill(make_computation(module=layers, store_dtype="fp16"), paths, all_rows(paths))
    assert store.largest_rounding(all_rows(paths)) == 0


@pytest.mark.parametrize("value", [65_600.0, -1e6])
def test_value_that_fp16_cannot_hold_is_an_error_and_not_stored(
    paths: dict[str, Path], computed: list[Row], value: float
) -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    nn.init.zeros_(layers[1].weight)  # pyright: ignore[reportArgumentType]
    nn.init.constant_(layers[1].bias, value)  # pyright: ignore[reportArgumentType]
    how = make_computation(module=layers, cut="layer3", store_dtype="fp16")
    with pytest.raises(
        ValueError, match=r"features\.store_dtype: fp16 cannot hold .* at layer3; expected fp32"
    ) as caught:
        fill(how, paths, all_rows(paths))
    assert str(caught.value).startswith("params.yaml: features.store_dtype: ")
    assert "\n" not in str(caught.value)
    assert computed
    assert shards() == []
    assert fill(make_computation(module=layers), paths, all_rows(paths)).largest_rounding(all_rows(paths)) == 0


def test_rows_of_any_shape_are_read_as_they_were_written(paths: dict[str, Path]) -> None:
    computation = make_computation(module=nn.Conv2d(3, 4, 3, stride=2))
    rows = all_rows(paths)
    store = fill(computation, paths, rows)
    assert store.read(rows[:3]).shape == (3, 4, 3, 3)
    feature_store.assemble(store, list(paths), 2, {}, Path("features.h5"))
    values = feature_store.read(Path("features.h5")).values
    assert values.shape == (N_IMAGES, 2, 4, 3, 3)
    assert np.array_equal(values.reshape(-1, 4, 3, 3), store.read(rows))


def test_features_are_assembled_as_they_are_stored(paths: dict[str, Path]) -> None:
    store = fill(make_computation(store_dtype="fp16"), paths, all_rows(paths))
    feature_store.assemble(store, list(paths), 2, {}, Path("features.h5"))
    assert feature_store.read(Path("features.h5")).values.dtype == np.float16


def test_shard_that_shrinks_while_it_is_read_is_an_error(paths: dict[str, Path]) -> None:
    store = fill(make_computation(), paths, all_rows(paths))
    for path in shards():
        cut_in_half(path)
    with pytest.raises(OSError, match="was cut short while it was read"):
        store.read(all_rows(paths))


class Stops(nn.Module):
    """Raises KeyboardInterrupt after so many batches."""

    def __init__(self, after: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(3 * 64, 5)
        self.left = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.linear(x.flatten(1))


def test_interrupted_fill_keeps_its_finished_shards(
    paths: dict[str, Path], computed: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "SHARD_ROWS", 5)
    rows = all_rows(paths)
    stopping = make_computation(module=Stops(1 + 2))  # the first finds the shape of a row
    with pytest.raises(KeyboardInterrupt):
        fill(stopping, paths, rows)
    assert not list(Path().glob("data/.feature_store/*/.*")), "temporary files are left"
    kept = feature_store.Store(stopping)
    assert kept.missing(rows) == rows[15:]  # 16 rows were computed: three shards of 5

    computed.clear()
    whole = make_computation(module=Stops(float("inf")))
    store = fill(whole, paths, rows)
    assert sorted(computed) == sorted(rows[15:])
    assert store.missing(rows) == []


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_link(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.move("features", "elsewhere")
        file["features"] = h5py.SoftLink("/elsewhere")


def drop_rows(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        values = file["view"][:-1]  # pyright: ignore[reportIndexIssue]
        del file["view"]
        file["view"] = values


@pytest.mark.parametrize("damage", [cut_in_half, empty, replace_by_link, drop_rows])
def test_damaged_shard_is_set_aside_with_a_warning_and_computed_again(
    paths: dict[str, Path],
    computed: list[Row],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:
    monkeypatch.setattr(feature_store, "SHARD_ROWS", 4)
    rows = all_rows(paths, views=1)
    before = fill(make_computation(), paths, rows).read(rows).copy()
    assert len(shards()) == 3
    damage(shards()[1])
    damaged = shards()[1]
    computed.clear()
    with caplog.at_level(logging.WARNING, "pipeline"):
        store = fill(make_computation(), paths, rows)
    assert f"{damaged} is damaged" in caplog.text
    assert damaged.with_suffix(".damaged").exists()
    assert len(computed) == 4
    assert np.array_equal(store.read(rows), before)


def test_image_with_other_bytes_than_were_indexed_is_refused(paths: dict[str, Path]) -> None:
    path = next(iter(paths.values()))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=rf"{path}: other bytes than were indexed"):
        fill(make_computation(), paths, all_rows(paths))


def test_features_that_are_not_finite_are_refused_and_not_stored(paths: dict[str, Path]) -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    nn.init.constant_(layers[1].bias, float("nan"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="gives features that are not finite"):
        fill(make_computation(module=layers), paths, all_rows(paths))
    assert shards() == []


def assemble(paths: dict[str, Path], path: Path = Path("features.h5")) -> Path:
    store = fill(make_computation(), paths, all_rows(paths))
    feature_store.assemble(store, list(paths), 2, {"b": 1, "a": [2]}, path)
    return path


def test_features_are_read_as_they_were_assembled(paths: dict[str, Path]) -> None:
    features = feature_store.read(assemble(paths))
    assert features.values.shape == (N_IMAGES, 2, 5)
    assert features.values.dtype == np.float32
    assert isinstance(features.values, np.memmap)
    assert features.sha256 == list(paths)
    assert features.provenance == {"a": [2], "b": 1}
    store = feature_store.Store(make_computation())
    assert np.array_equal(features.values.reshape(-1, 5), store.read(all_rows(paths)))


def test_image_that_is_listed_twice_has_its_row_twice(paths: dict[str, Path]) -> None:
    store = fill(make_computation(), paths, all_rows(paths))
    names = [*paths, next(iter(paths))]
    feature_store.assemble(store, names, 2, {}, Path("features.h5"))
    features = feature_store.read(Path("features.h5"))
    assert features.sha256 == names
    assert np.array_equal(features.values[0], features.values[-1])


def external_link(file: h5py.File) -> None:
    file["features"] = h5py.ExternalLink("other.h5", "features")


def soft_link(file: h5py.File) -> None:
    file["real"] = np.zeros((2, 1, 3), np.float32)
    file["features"] = h5py.SoftLink("/real")


def objects(file: h5py.File) -> None:
    file.create_dataset("features", (2,), h5py.string_dtype())


def group(file: h5py.File) -> None:
    file.create_group("features")


def external_storage(file: h5py.File) -> None:
    file.create_dataset("features", (2, 1, 3), np.float32, external=[("params.yaml", 0, 24)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((2, 1, 3), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "features", (2, 1, 3))
    file.create_virtual_dataset("features", layout)


def chunked(file: h5py.File) -> None:
    file.create_dataset("features", data=np.zeros((2, 1, 3), np.float32), chunks=(1, 1, 3))


def absent(file: h5py.File) -> None:
    del file


@pytest.mark.parametrize(
    "write", [external_link, soft_link, objects, group, external_storage, virtual, chunked, absent]
)
def test_file_whose_features_are_no_plain_array_of_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[h5py.File], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_bytes(b"x" * 24)
    with h5py.File("other.h5", "w") as other:
        other["features"] = np.zeros((2, 1, 3), np.float32)
    with h5py.File("features.h5", "w") as file:
        file["sha256"] = np.array([b"a" * 64, b"b" * 64])
        file.attrs["provenance"] = json.dumps({})
        write(file)
    with pytest.raises(ValueError, match=r"features\.h5: not written by this pipeline .* dvc repro extract"):
        feature_store.read(Path("features.h5"))


@pytest.mark.parametrize("content", [b"", b"no HDF5"])
def test_file_that_is_no_hdf5_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "features.h5").write_bytes(content)
    with pytest.raises(ValueError, match="not written by this pipeline"):
        feature_store.read(tmp_path / "features.h5")


def test_truncated_features_are_refused(paths: dict[str, Path]) -> None:
    path = assemble(paths)
    cut_in_half(path)
    with pytest.raises(ValueError, match="not written by this pipeline"):
        feature_store.read(path)
