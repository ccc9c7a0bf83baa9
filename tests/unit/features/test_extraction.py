"""extraction: each row computed once and never again, whatever was interrupted, and assembled in order."""

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.features import extraction, hdf5
from pipeline.features.extraction import Computation, Share
from pipeline.features.hdf5 import Row
from pipeline.features.loading import Loader
from pipeline.features.store import Store
from pipeline.features.views import AUGMENTED
from pipeline.network import backbones, cuts
from pipeline.network.backbones import Backbone, state_sha256
from pipeline.network.cuts import Prefix
from pipeline.network.preprocessing import Normalize, Preprocessing
from pipeline.params import Augmentation, BackboneChoice
from tests.factories import FLIPS, PREPROCESSING, feature_options, loader, provenance

CPU = torch.device("cpu")
N_IMAGES = 12
VIEWS = [0, AUGMENTED + 1]
EVERYTHING = Share(0, 1)


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


def make_computation(
    augmentation: Augmentation = FLIPS,
    *,
    seed: int = 0,
    cut: str = "all",
    pool: str = "none",
    store_dtype: str = "fp32",
    engine: str = "torch",
    preprocessing: Preprocessing = PREPROCESSING,
    name: str = "torchvision/tiny",
    module: nn.Module | None = None,
) -> Computation:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = module or nn.Sequential(nn.Flatten(), nn.Linear(3 * preprocessing.crop**2, 5))
    backbone = Backbone(name, layers, preprocessing, state_sha256(layers), 5, None)
    prefix = Prefix(nn.Sequential(Normalize(preprocessing), layers), backbone, cut, pool, {})
    return extraction.prepare(prefix, augmentation, feature_options(store_dtype=store_dtype, engine=engine), CPU)


def fill(
    computation: Computation,
    paths: dict[str, Path],
    rows: Sequence[Row],
    max_gb: float = math.inf,
    share: Share = EVERYTHING,
) -> Store:
    return extraction.fill(computation, loader(computation, paths), rows, max_gb, share)


def all_rows(paths: dict[str, Path], views: int = 2) -> list[Row]:
    """View 0, and augmented views."""
    return [(name, AUGMENTED + k if k else 0) for name in paths for k in range(views)]


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


def test_rows_are_what_the_network_gives_for_the_view(paths: dict[str, Path]) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    store = fill(make_computation(module=network), paths, all_rows(paths))
    name, path = next(iter(paths.items()))
    with Image.open(path) as image:
        pixels = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))
    views = np.stack([pixels, pixels[:, ::-1]])  # with `flips: both` view 1 is the horizontal flip
    with torch.no_grad():
        expected = network(Normalize(PREPROCESSING)(torch.from_numpy(views))).numpy()
    np.testing.assert_allclose(store.read([(name, 0), (name, AUGMENTED + 1)]), expected, rtol=1e-4, atol=1e-5)


def test_rows_of_openvino_do_not_depend_on_the_threads_of_torch() -> None:
    backbone = backbones.load(BackboneChoice.of("torchvision/squeezenet1_1", "random", 0), 64)
    prefix, _ = cuts.prefix_and_suffix(backbone, "all", {"all": cuts.Pool("none", 0)})
    pixels = torch.randint(256, (8, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made = extraction.prepare(prefix, FLIPS, feature_options(engine="openvino"), CPU)
        found.append(next(made.runner.run([pixels])))
    assert np.array_equal(*found)


def test_key_of_one_cut_says_nothing_of_several_and_that_of_several_names_all_of_them() -> None:
    backbone = backbones.load(BackboneChoice.of("timm/test_resnet", "random", 0), 32)
    pools = {cuts.resolve(backbone, cut): cuts.Pool("avg", 0) for cut in ("layer1", "layer2", "layer3")}
    first, second, end = pools

    def described(boundary: str, *taps: str) -> dict[str, Any]:
        prefix, _ = cuts.prefix_and_suffix(backbone, boundary, {cut: pools[cut] for cut in taps})
        key = extraction.prepare(prefix, FLIPS, feature_options(), CPU).key
        return {name: key.description.get(name) for name in ("cut", "pool", "taps")}

    assert described(end, end) == {"cut": end, "pool": "avg", "taps": None}
    assert described(first, end) == {"cut": first, "pool": "none", "taps": None}
    assert described(first, second, end) == {"cut": first, "pool": "none", "taps": None}  # the same rows as with one
    assert described(second, first, end) == {"cut": second, "pool": "flatten", "taps": {first: "avg"}}
    assert described(second, first, second, end) == {
        "cut": second,
        "pool": "flatten",
        "taps": {first: "avg", second: "avg"},
    }
    assert described(end, first, end) == {"cut": end, "pool": "avg", "taps": {first: "avg"}}


def test_threads_are_in_the_key_where_they_change_the_rows() -> None:
    names = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        names |= {(engine, threads): make_computation(engine=engine).key.name(0) for engine in ("torch", "openvino")}
    assert names["torch", 1] != names["torch", 2]
    assert names["openvino", 1] == names["openvino", 2]


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
    other = FLIPS.model_copy(update={"brightness": 0.2})
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
        {"preprocessing": PREPROCESSING.model_copy(update={"geometry": "pad"})},
        {"preprocessing": PREPROCESSING.model_copy(update={"mean": (0.4, 0.5, 0.5)})},
    ],
    ids=["weights", "cut", "pool", "stored type", "network", "size", "interpolation", "geometry", "mean"],
)
def test_whatever_can_change_a_row_has_a_key_of_its_own(
    paths: dict[str, Path], computed: list[Row], change: dict[str, Any]
) -> None:
    rows = all_rows(paths)
    fill(make_computation(), paths, rows)
    computed.clear()
    fill(make_computation(**change), paths, rows)
    assert sorted(computed) == sorted(rows)


def test_key_says_how_rows_were_made() -> None:
    key = make_computation().key
    made = {"precision", "engine", "device", "machine", "batch", "code", "versions", "schema", "weights_sha256"}
    assert made <= key.describe(0).keys()
    assert key.describe(0)["augmentation"] is None
    assert key.describe(AUGMENTED - 1) == key.describe(0)
    assert key.describe(AUGMENTED) == key.describe(AUGMENTED + 1)
    assert key.describe(AUGMENTED)["augmentation"]["flips"] == "both"


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
    again = Store(make_computation(store_dtype="fp16").key)
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
    rows = all_rows(paths)
    store = fill(make_computation(module=nn.Conv2d(3, 4, 3, stride=2), store_dtype="fp16"), paths, rows)
    assert store.read(rows[:3]).shape == (3, 4, 3, 3)
    extraction.assemble(store, list(paths), VIEWS, [0], provenance(), Path("features.h5"))
    values = hdf5.read_features(Path("features.h5")).values
    assert (values.shape, values.dtype) == ((N_IMAGES, 2, 4, 3, 3), np.float16)
    assert np.array_equal(values.reshape(-1, 4, 3, 3), store.read(rows))


def test_shard_that_shrinks_while_it_is_read_is_an_error(paths: dict[str, Path]) -> None:
    store = fill(make_computation(), paths, all_rows(paths))
    for path in shards():
        path.write_bytes(path.read_bytes()[:100])
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


def test_interrupted_fill_keeps_what_it_has_computed_and_says_how_much(
    paths: dict[str, Path], computed: list[Row], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extraction, "SHARD_ROWS", 5)
    rows = all_rows(paths)
    stopping = make_computation(module=Stops(1 + 2))  # the first finds the shape of a row
    with caplog.at_level(logging.WARNING, "pipeline"), pytest.raises(KeyboardInterrupt):
        fill(stopping, paths, rows)
    assert not list(Path().glob("data/.feature_store/*/.*")), "temporary files are left"
    kept = Store(stopping.key)
    assert kept.missing(rows) == rows[16:], "two batches were computed: three shards of 5 and a row"
    assert "16 of 24 rows are kept; the next run computes the rest" in caplog.text

    computed.clear()
    whole = make_computation(module=Stops(float("inf")))
    store = fill(whole, paths, rows)
    assert sorted(computed) == sorted(rows[16:])
    assert store.missing(rows) == []


def test_rows_of_damaged_shards_are_computed_again_in_the_same_run(
    paths: dict[str, Path], computed: list[Row], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extraction, "SHARD_ROWS", 5)
    rows = all_rows(paths)
    whole = fill(make_computation(), paths, rows).read(rows)
    damaged = [row for path in shards()[:2] for row in hdf5.read_shard(path).rows]
    for path in shards()[:2]:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    computed.clear()
    assert Store(make_computation().key).locate([row for row in rows if row not in damaged])
    assert "is damaged" not in caplog.text, "what is not used is not read"
    store = fill(make_computation(), paths, rows)
    assert caplog.text.count("is damaged") == 2
    assert sorted(computed[-len(damaged) :]) == sorted(damaged)
    assert store.largest_rounding(rows) == 0
    assert np.array_equal(store.read(rows), whole)


def test_image_with_other_bytes_than_were_indexed_is_refused(paths: dict[str, Path]) -> None:
    path = next(iter(paths.values()))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=rf"{path}: the file changed since it was indexed"):
        fill(make_computation(), paths, all_rows(paths))


def test_features_that_are_not_finite_are_refused_and_not_stored(paths: dict[str, Path]) -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    nn.init.constant_(layers[1].bias, float("nan"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="gives features that are not finite"):
        fill(make_computation(module=layers), paths, all_rows(paths))
    assert shards() == []


# stored rows that are computed again


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[list[Row]]:
    """Grows by the rows of every call that loads images: those that are checked, then those that are missing."""
    calls: list[list[Row]] = []
    load = Loader.load

    def recorded(self: Loader, batches: Sequence[Sequence[Row]], **options: Any) -> Iterator[torch.Tensor]:
        calls.append([row for batch in batches for row in batch])
        return load(self, batches, **options)

    monkeypatch.setattr(Loader, "load", recorded)
    return calls


def other_machine(*, seed: int = 1) -> Computation:
    """A computation with the key of make_computation that gives other values."""
    return replace(make_computation(seed=seed), key=make_computation().key)


def set_aside(root: Path = Path()) -> list[Path]:
    return sorted(root.glob("data/.feature_store/*.*"))


def test_rows_that_come_out_otherwise_are_set_aside_with_one_warning_and_all_are_computed_again(
    paths: dict[str, Path], loaded: list[list[Row]], caplog: pytest.LogCaptureFixture
) -> None:
    rows = all_rows(paths)
    before = fill(other_machine(), paths, rows[:10]).read(rows[:10])
    loaded.clear()
    with caplog.at_level(logging.INFO, "pipeline"):
        store = fill(make_computation(), paths, rows)
    checked, computed = loaded
    assert len(checked) == extraction.N_CHECKED
    assert {*checked} <= {*rows[:10]}
    assert computed == rows
    (warning,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert "stored rows differ from the same rows computed now; set aside: " in warning
    assert all(str(path) in warning for path in set_aside())
    assert len(set_aside()) == 2
    assert "0 rows reused, 24 computed, 0 dropped" in caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", "elsewhere")
        assert np.array_equal(store.read(rows), fill(make_computation(), paths, rows).read(rows))
    assert not np.array_equal(store.read(rows[:10]), before)
    caplog.clear()
    loaded.clear()
    fill(make_computation(), paths, rows)
    assert loaded == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_rows_that_come_out_as_they_are_stored_stay(paths: dict[str, Path], loaded: list[list[Row]]) -> None:
    rows = all_rows(paths)
    fill(make_computation(store_dtype="fp16"), paths, rows[:10])
    loaded.clear()
    fill(make_computation(store_dtype="fp16"), paths, rows)
    checked, computed = loaded
    assert len(checked) == extraction.N_CHECKED
    assert computed == rows[10:]
    assert set_aside() == []


def test_where_nothing_is_missing_nothing_is_computed_again(paths: dict[str, Path], loaded: list[list[Row]]) -> None:
    rows = all_rows(paths)
    fill(other_machine(), paths, rows)
    loaded.clear()
    fill(make_computation(), paths, rows)
    assert loaded == []


def test_symmetries_and_augmented_views_of_every_format_are_checked(
    paths: dict[str, Path], loaded: list[list[Row]], tmp_path: Path
) -> None:
    for number, ending in enumerate(("jpg", "webp", "PNG")):
        path = tmp_path / f"another.{ending}"
        Image.fromarray(np.full((10, 10, 3), number, np.uint8)).save(path)
        paths[hashlib.sha256(path.read_bytes()).hexdigest()] = path
    rows = [(name, view) for name in paths for view in (0, 1, 2, *VIEWS[1:])]
    fill(make_computation(), paths, rows[:-1])
    loaded.clear()
    fill(make_computation(), paths, rows)
    checked, _ = loaded
    kinds = [(view < AUGMENTED, paths[name].suffix.lower()) for name, view in checked]
    assert len(checked) == len({*checked}) == extraction.N_CHECKED
    assert {*kinds} == {(is_plain, ending) for is_plain in (True, False) for ending in (".png", ".jpg", ".webp")}


@pytest.mark.parametrize("stale", VIEWS)
def test_one_kind_of_view_that_is_stale_is_found(paths: dict[str, Path], stale: int) -> None:
    rows = all_rows(paths)
    plain = [row for row in rows if row[1] != stale]
    fill(make_computation(), paths, plain)
    Store(make_computation().key).write(rows[stale != 0 :: 2][:3], np.ones((3, 5), np.float32))
    fill(make_computation(), paths, rows)
    assert len(set_aside()) == 2


def test_rows_that_never_come_out_the_same_are_an_error_and_are_not_kept(paths: dict[str, Path]) -> None:
    class Restless(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rand(len(x), 5)

    rows, restless = all_rows(paths), replace(make_computation(module=Restless()), key=make_computation().key)
    fill(restless, paths, rows[:10])
    with pytest.raises(
        ValueError, match=r"the same rows, computed twice in this run, differ; .*features\.engine"
    ) as caught:
        fill(restless, paths, rows)
    assert "\n" not in str(caught.value)
    assert Store(make_computation().key).missing(rows) == rows


def test_a_rank_whose_rows_another_sets_aside_stops_with_one_line(
    paths: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "SHARD_ROWS", 4)
    rows, plain = all_rows(paths), make_computation()
    fill(plain, paths, rows[:4])

    def run(batches: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
        for number, output in enumerate(plain.runner.run(batches)):
            if number == 1:
                Store(plain.key).set_aside()
            yield output

    with (
        caplog.at_level(logging.WARNING, "pipeline"),
        pytest.raises(
            ValueError, match=r"another process has set aside the rows of this key.*; start again$"
        ) as caught,
    ):
        fill(replace(plain, runner=replace(plain.runner, run=run)), paths, rows)
    assert "\n" not in str(caught.value)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    store = fill(plain, paths, rows)
    assert store.missing(rows) == []


def test_two_ranks_that_find_the_same_set_the_rows_aside_once(paths: dict[str, Path]) -> None:
    fill(make_computation(), paths, all_rows(paths))
    first, second = Store(make_computation().key), Store(make_computation().key)
    first.set_aside()
    with pytest.raises(ValueError, match="start again"):
        second.set_aside()
    first = Store(make_computation().key)
    first.write([("0" * 64, 0)], np.ones((1, 5), np.float32))
    with pytest.raises(ValueError, match="start again"):
        second.write([("0" * 64, 0)], np.ones((1, 5), np.float32))
    first.write([("1" * 64, 0)], np.ones((1, 5), np.float32))
    assert len(set_aside()) == 2


def test_a_rank_checks_what_others_stored(paths: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    rows = all_rows(paths)
    fill(other_machine(), paths, rows, share=Share(0, 2))
    store = fill(make_computation(), paths, rows, share=Share(1, 2))
    assert "set aside" in caplog.text
    assert {*store.missing(rows)} == {row for row in rows if Share(0, 2).holds(row)}


def assemble(paths: dict[str, Path], path: Path = Path("features.h5")) -> Path:
    store = fill(make_computation(), paths, all_rows(paths))
    extraction.assemble(store, list(paths), VIEWS, [0], provenance(), path)
    return path


def test_features_are_read_as_they_were_assembled(paths: dict[str, Path]) -> None:
    features = hdf5.read_features(assemble(paths))
    assert features.values.shape == (N_IMAGES, 2, 5)
    assert features.values.dtype == np.float32
    assert isinstance(features.values, np.memmap)
    assert features.sha256 == list(paths)
    assert features.provenance == provenance()
    store = Store(make_computation().key)
    assert np.array_equal(features.values.reshape(-1, 5), store.read(all_rows(paths)))


def test_image_that_is_listed_twice_has_its_row_twice(paths: dict[str, Path]) -> None:
    store = fill(make_computation(), paths, all_rows(paths))
    names = [*paths, next(iter(paths))]
    extraction.assemble(store, names, VIEWS, [0], provenance(), Path("features.h5"))
    features = hdf5.read_features(Path("features.h5"))
    assert features.sha256 == names
    assert np.array_equal(features.values[0], features.values[-1])


def test_each_run_says_what_it_reused_computed_and_dropped(
    paths: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    rows = all_rows(paths)
    with caplog.at_level(logging.INFO, "pipeline"):
        for chosen in (rows[:20], rows[4:], rows[4:]):
            fill(make_computation(), paths, chosen)
    logged = [message for message in caplog.messages if "reused" in message]
    assert [message.partition(": ")[2].partition(" (")[0] for message in logged] == [
        "0 rows reused, 20 computed, 0 dropped",
        "16 rows reused, 4 computed, 4 dropped",
        "20 rows reused, 0 computed, 4 dropped",
    ]


def test_file_whose_bytes_change_costs_its_own_rows_and_one_that_moves_costs_none(
    paths: dict[str, Path], computed: list[Row], tmp_path: Path
) -> None:
    fill(make_computation(), paths, all_rows(paths))
    computed.clear()
    first, second, *others = paths
    moved = {first: paths[first].rename(tmp_path / "another name.png"), **{name: paths[name] for name in others}}
    Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(paths[second])
    changed = hashlib.sha256(paths[second].read_bytes()).hexdigest()
    now = moved | {changed: paths[second]}
    store = fill(make_computation(), now, all_rows(now))
    assert computed == [(changed, 0), (changed, AUGMENTED + 1)]
    extraction.assemble(store, list(now), VIEWS, [0], provenance(), Path("incremental.h5"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(tmp_path / "empty"))
        store = fill(make_computation(), now, all_rows(now))
        extraction.assemble(store, list(now), VIEWS, [0], provenance(), Path("fresh.h5"))
    assert Path("incremental.h5").read_bytes() == Path("fresh.h5").read_bytes()


def test_ranks_share_the_rows_and_each_counts_the_size_of_all(paths: dict[str, Path], computed: list[Row]) -> None:
    rows = all_rows(paths)
    done = []
    for rank in range(2):
        fill(make_computation(), paths, rows, share=Share(rank, 2))
        done.append(set(computed) - set().union(*done))
        assert len({name for name, _ in done[-1]}) * 2 == len(done[-1]), "an image's views stay together"
    assert sorted(computed) == sorted(rows), "each once"
    assert all(len(part) > 0 for part in done)
    needed = len(rows) * 5 * 4 / 1e9
    with pytest.raises(ValueError, match=r"runtime\.store_max_gb"):
        fill(make_computation(), paths, rows, max_gb=0.99 * needed, share=Share(0, 2))


def set_environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DVC_STAGE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("found", "share"),
    [
        ({}, Share(0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, Share(1, 4)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Share(3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Share(0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3"}, Share(0, 1)),
        ({"LOCAL_RANK": "x"}, Share(0, 1)),
    ],
)
def test_the_share_is_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, str], share: Share
) -> None:
    set_environment(monkeypatch, **found)
    assert extraction.share_of_environment() == share


@pytest.mark.parametrize("found", ["0 2 0", "1 2 1", "x 2 0", "0 auto x", "7 1 7"])
def test_in_a_stage_that_dvc_runs_ranks_are_those_of_another_program(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, found: str
) -> None:
    rank, world_size, local_rank = found.split()
    set_environment(monkeypatch, DVC_STAGE="extract", RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=local_rank)
    assert extraction.share_of_environment() == Share(0, 1)
    (line,) = caplog.messages
    assert line.startswith("environment: ")
    assert f"'WORLD_SIZE': '{world_size}'" in line
    assert "to run ranks: torchrun --nproc-per-node N -m pipeline.stages.extract && dvc repro" in line
    caplog.clear()
    set_environment(monkeypatch, DVC_STAGE="extract", LOCAL_RANK="3")
    assert (extraction.share_of_environment(), caplog.messages) == (Share(0, 1), [])


def test_tasks_of_slurm_that_share_nothing_are_warned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_environment(monkeypatch, SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2")
    assert extraction.share_of_environment() == Share(0, 1)
    (line,) = caplog.messages
    assert "srun runs 2 of these, and each computes all rows" in line
    caplog.clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert (extraction.share_of_environment(), caplog.messages) == (Share(1, 2), [])


def test_a_rank_that_was_forgotten_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, WORLD_SIZE="2")
    with pytest.raises(ValueError, match=r"environment: found .*expected 0 <= RANK < WORLD_SIZE"):
        extraction.share_of_environment()


@pytest.mark.parametrize("found", ["2 2 0", "x 2 0", "-1 2 0", "0 0 0", "0 x 0", "1 1 0", "0 2 x"])
def test_ranks_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    rank, world_size, local_rank = found.split()
    set_environment(monkeypatch, RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=local_rank)
    with pytest.raises(ValueError, match=r"environment: found .*expected 0 <= RANK < WORLD_SIZE"):
        extraction.share_of_environment()
