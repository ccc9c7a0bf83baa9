"""Views that worker processes load, and pixels that are kept in the store: the same with and without either."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.dataset.decoding import sha256
from pipeline.features import extraction, loading, pixel_store, pixels
from pipeline.features.engine import Runner
from pipeline.features.extraction import Computation, Share
from pipeline.features.hdf5 import Row
from pipeline.features.loading import Loader
from pipeline.features.pixel_store import PixelStore, open_pixels
from pipeline.features.store import Key
from pipeline.features.views import AUGMENTED, make_views
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import Augmentation, Runtime
from tests.factories import PLAIN, PREPROCESSING, encoded, noise

CPU = torch.device("cpu")
SMALL = PREPROCESSING.model_copy(
    update={"resize": (20,), "crop": 16, "interpolation": "bicubic", "mean": (0.5, 0.4, 0.3)}
)
EVERYTHING = PLAIN.model_copy(
    update={"flips": "both", "crop_area": (0.3, 0.9), "rotation_degrees": 20.0, "brightness": 0.3, "noise_std": 4.0}
)
MOVED = EVERYTHING.model_copy(update={"crop_area": (1.0, 1.0)})
CODES = [0, 2, AUGMENTED + 1, AUGMENTED + 2]


def files(directory: Path, n: int, kind: str = "PNG") -> dict[str, Path]:
    paths = {}
    for i in range(n):
        content = encoded(Image.fromarray(noise(20 + i, 24, 3)), kind)
        path = directory / f"{i}.{kind.lower()}"
        path.write_bytes(content)
        paths[sha256(content)] = path
    return paths


def runtime(pixel_cache: str = "auto", store_max_gb: float = 1.0) -> Runtime:
    fields: dict[str, Any] = {"device": "cpu", "workers": 0, "pixel_cache": pixel_cache, "store_max_gb": store_max_gb}
    return Runtime.model_construct(**fields)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a store of its own."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    return tmp_path / "root" / "data" / ".feature_store"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by every image file that this process reads."""
    read, paths = loading._read, []

    def noted(sample: loading.Sample) -> bytes:
        paths.append(sample.path)
        return read(sample)

    monkeypatch.setattr(loading, "_read", noted)
    return paths


def open_loader(
    paths: dict[str, Path],
    augmentation: Augmentation = EVERYTHING,
    store: PixelStore | None = None,
    workers: int = 0,
    preprocessing: Preprocessing = SMALL,
) -> Loader:
    return Loader(paths, preprocessing, augmentation, store, workers, CPU)


def opened(augmentation: Augmentation = EVERYTHING, preprocessing: Preprocessing = SMALL) -> PixelStore:
    store = open_pixels(preprocessing, augmentation, CODES, 3, runtime())
    assert store is not None
    return store


def load(loader: Loader, batches: Sequence[Sequence[Row]]) -> list[np.ndarray]:
    with closing(loader):
        return [batch.numpy().copy() for batch in loader.load(batches)]


def batches_of(paths: dict[str, Path]) -> list[list[Row]]:
    rows = [(name, code) for name in paths for code in CODES]
    return [rows[:5], rows[5:], rows[3:2:-1]]


@pytest.mark.parametrize("augmentation", [PLAIN, EVERYTHING, MOVED])
@pytest.mark.parametrize("geometry", ["crop", "squash", "pad"])
def test_views_are_the_same_with_and_without_workers_and_pixels(
    geometry: str, augmentation: Augmentation, tmp_path: Path, kept: Path, decoded: list[Path]
):
    paths, preprocessing = files(tmp_path, 3), SMALL.model_copy(update={"geometry": geometry})
    batches = batches_of(paths)
    plain = load(open_loader(paths, augmentation, preprocessing=preprocessing), batches)
    assert [batch.shape for batch in plain] == [(5, 16, 16, 3), (7, 16, 16, 3), (1, 16, 16, 3)]
    name, code = batches[2][0]
    expected = make_views(paths[name].read_bytes(), name, [code], preprocessing, augmentation)
    assert np.array_equal(plain[2], expected)
    assert not kept.exists()
    store = opened(augmentation, preprocessing)
    others = [load(open_loader(paths, augmentation, None, 2, preprocessing), batches)]
    decoded.clear()
    others.append(load(open_loader(paths, augmentation, store, 0, preprocessing), batches))
    assert len(set(decoded)) == 3
    for path in paths.values():
        path.unlink()
    for workers in (0, 2):
        again = opened(augmentation, preprocessing)
        others.append(load(open_loader(paths, augmentation, again, workers, preprocessing), batches))
    for other in others:
        assert all(map(np.array_equal, other, plain))


def test_a_loader_serves_epoch_after_epoch_and_reads_each_file_once(tmp_path: Path, kept: Path):
    paths = files(tmp_path, 3)
    batches = batches_of(paths)
    with closing(open_loader(paths, store=opened(), workers=2)) as loader:
        first = [batch.clone() for batch in loader.load(batches)]
        processes = {worker.pid for worker in loader._loader._iterator._workers}  # pyright: ignore
        next(loader.load(batches))  # and the rest is not asked for
        for path in paths.values():
            path.unlink()
        for _ in range(2):
            assert all(map(torch.equal, loader.load(batches), first))
        assert {worker.pid for worker in loader._loader._iterator._workers} == processes  # pyright: ignore


def test_images_are_decoded_ahead(tmp_path: Path, kept: Path):
    paths = files(tmp_path, 2)  # one batch, which is received however soon it is ended
    expected = load(open_loader(paths, MOVED), batches_of(paths))
    with closing(open_loader(paths, MOVED, opened(MOVED), workers=2)) as loader:
        with loader.decoding_ahead([*paths]):
            pass
        for path in paths.values():
            path.unlink()
        assert all(map(np.array_equal, (batch.numpy() for batch in loader.load(batches_of(paths))), expected))
        loader.load([])
        with loader.decoding_ahead([*paths]):  # nothing is left to do
            assert len(list(kept.glob("*/*.h5"))) >= 1


@pytest.mark.parametrize(("geometry", "needed"), [("crop", 20), ("squash", 16), ("pad", 16)])
def test_jpegs_are_decoded_to_twice_the_px_that_are_needed_unless_exactly(
    geometry: str, needed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked, decode = [], pixels.decode
    monkeypatch.setattr(pixels, "decode", lambda content, least: asked.append(least) or decode(content, least))
    ((_, path),) = files(tmp_path, 1, "JPEG").items()
    for jpeg_decoding in ("fast", "exact"):
        preprocessing = SMALL.model_copy(update={"geometry": geometry, "jpeg_decoding": jpeg_decoding})
        for kind in ("crop", "whole"):
            pixels.make(path.read_bytes(), kind, preprocessing, EVERYTHING)
    whole = 30  # px of a square whose smallest random crop, 0.3 of its area, has 16 x 16
    assert asked == [2 * needed, 2 * whole, None, None]


def test_pixels_that_the_decoder_gives_no_more_are_set_aside_with_the_rows_that_were_made_of_them(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As another version of the decoder would, with the same keys."""
    paths = files(tmp_path, 6)
    key = Key(
        {"cut": "all", "store_dtype": "fp32", "engine": "torch", "precision": "fp32", "device": "cpu"}, PLAIN, (3,)
    )

    def run(batches: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
        yield from (batch.float().mean((1, 2)).numpy() for batch in batches)

    def fill(names: list[str], store: PixelStore | None) -> np.ndarray:
        computation, rows = Computation(key, Runner("torch", 4, 4, run)), [(name, 0) for name in names]
        with closing(open_loader(paths, PLAIN, store)) as loader:
            return extraction.fill(computation, loader, rows, 1.0, Share(0, 1)).read(rows)

    fill([*paths][:3], opened(PLAIN))
    crop = pixels.crop
    monkeypatch.setattr(pixels, "crop", lambda *given: 255 - crop(*given))
    found = fill([*paths], opened(PLAIN))
    assert "stored pixels differ" in caplog.text
    assert "stored rows differ" in caplog.text
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "empty"))
    assert np.array_equal(found, fill([*paths], None))
    caplog.clear()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    assert np.array_equal(found, fill([*paths], opened(PLAIN)))
    assert not caplog.messages or "differ" not in caplog.text


def test_an_image_that_cannot_be_decoded_ahead_is_an_error_once_it_is_needed(tmp_path: Path, kept: Path):
    paths = files(tmp_path, 3)
    bad = [*paths][1]
    paths[bad].write_bytes(b"no image")
    with closing(open_loader(paths, store=opened(), workers=1)) as loader:
        with loader.decoding_ahead([*paths]):
            pass
        with pytest.raises(ValueError, match=str(paths[bad])):
            list(loader.load([[(bad, 0)]]))


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["auto", "on"])
def test_a_disk_without_room_is_a_warning_unless_pixels_must_be_kept(
    cache: str, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def write(*_: object) -> None:
        raise OSError(28, "No space left on device")

    paths = files(tmp_path, 3)
    expected = load(open_loader(paths), batches_of(paths))
    monkeypatch.setattr(pixel_store.Store, "write", write)
    monkeypatch.setattr(pixel_store, "SHARD_BYTES", 1)  # each image is a shard
    store = open_pixels(SMALL, EVERYTHING, CODES, 3, runtime(cache))
    if cache == "on":
        with pytest.raises(OSError, match="No space left on device"):
            load(open_loader(paths, store=store), batches_of(paths))
        return
    assert all(map(np.array_equal, load(open_loader(paths, store=store), batches_of(paths)), expected))
    assert [line for line in caplog.messages if "No space left" in line] == [
        "pixels are not kept any more ([Errno 28] No space left on device): image files are decoded each time"
    ]


def test_networks_of_the_same_geometry_share_pixels_and_others_do_not(tmp_path: Path, kept: Path):
    def keys(**changes: Any) -> set[str]:
        preprocessing = SMALL.model_copy(update=changes)
        return {pixel_store._key(kind, preprocessing, EVERYTHING).name(0) for kind in ("crop", "whole")}

    assert keys(mean=(0.1,) * 3, std=(0.9,) * 3) == keys()
    assert keys(geometry="squash", resize=(9,)) == keys(geometry="squash", mean=(0.1,) * 3)
    for other in ({"crop": 17}, {"interpolation": "bilinear"}, {"jpeg_decoding": "fast"}):
        assert not keys(**other) & keys(), other
    assert keys(geometry="pad", mean=(0.1,) * 3) != keys(geometry="pad")
    assert keys(resize=(21,)) != keys()


@pytest.mark.parametrize(
    ("cache", "max_gb", "is_kept"), [("auto", 1, True), ("on", 1, True), ("auto", 1e-9, False), ("off", 1, False)]
)
def test_pixels_are_kept_where_they_fit(
    cache: str, max_gb: float, is_kept: bool, kept: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO):
        opened = open_pixels(SMALL, PLAIN, CODES, 3, runtime(cache, max_gb))
    assert (opened is not None) == is_kept
    assert bool(caplog.messages) == (cache != "off")


def test_pixels_that_must_be_kept_and_do_not_fit_are_an_error(kept: Path):
    with pytest.raises(ValueError, match=r"^params\.yaml: runtime\.pixel_cache: on, but the pixels of 3 images take"):
        open_pixels(SMALL, PLAIN, CODES, 3, runtime("on", 1e-9))


@pytest.mark.parametrize(("free", "is_shared"), [(10**6, True), (10**4, False), (0, False)])
def test_small_shared_memory_is_not_used(free: int, is_shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three batches of 2 views of 16 px, of which at most 10 wait: 15 kB, and as much again for other programs."""
    paths = files(tmp_path, 3)
    rows = [(name, code) for name in paths for code in (0, AUGMENTED + 2)]
    batches = [rows[:2], rows[2:4], rows[4:]]
    expected = load(open_loader(paths), batches)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with closing(open_loader(paths, workers=1)) as loader:
        found = list(loader.load(batches))
    assert all(np.array_equal(one.numpy(), other) for one, other in zip(found, expected, strict=True))
    assert {batch.is_shared() for batch in found} == {is_shared}


@pytest.mark.parametrize("workers", [0, 2])
def test_image_that_needs_more_memory_than_there_is_is_not_called_damaged(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def decode(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pixels, "decode", decode)
    ((name, path),) = files(tmp_path, 1).items()
    with pytest.raises(MemoryError, match=rf"^{path}: cannot be decoded in the memory there is$"):
        load(open_loader({name: path}, workers=workers), [[(name, 0)]])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_shared_memory_comes_without_the_traceback_of_a_worker_and_a_bug_with_it(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ((name, path),) = files(tmp_path, 1).items()
    for text, begin in (
        ("unable to write to file </torch_1_2>: No space left on device (28)", "unable"),
        ("a bug", "Caught" if workers else "a bug"),
    ):

        def collate(_: object, text: str = text) -> None:
            raise RuntimeError(text)

        monkeypatch.setattr(loading, "default_collate", collate)
        with pytest.raises(RuntimeError, match=f"^{begin}"):
            load(open_loader({name: path}, workers=workers), [[(name, 0)]])


@pytest.mark.parametrize("workers", [0, 2])
def test_no_batches_are_no_batches(workers: int):
    assert load(open_loader({}, workers=workers), []) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["changed", "unreadable", "absent"])
def test_a_file_that_is_not_as_it_was_indexed_is_one_line_with_its_path(damage: str, workers: int, tmp_path: Path):
    paths = files(tmp_path, 2)
    good, other = paths
    bad = paths[other]
    if damage == "changed":
        bad.write_bytes(paths[good].read_bytes())
    elif damage == "unreadable":
        bad.write_bytes(b"no image")
        other = sha256(b"no image")
        paths[other] = bad
    else:
        bad.unlink()
    with closing(open_loader(paths, workers=workers)) as loader:
        batches: Iterator[torch.Tensor] = loader.load([[(good, 0)], [(other, 0)]])
        assert next(batches).shape == (1, 16, 16, 3)
        with pytest.raises(ValueError, match=str(bad)) as error:
            next(batches)
        assert next(loader.load([[(good, 0)]])).shape == (1, 16, 16, 3), "it goes on"
    assert len(str(error.value).splitlines()) == 1
    if damage == "changed":
        assert str(error.value) == f"{bad}: the file changed since it was indexed; run: dvc repro"


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_that_were_removed_meanwhile_are_decoded_again(
    workers: int, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
):
    paths = files(tmp_path, 3)
    rows = [[(name, code) for name in paths for code in CODES]]
    expected = load(open_loader(paths, store=opened()), rows)
    with closing(open_loader(paths, store=opened(), workers=workers)) as loader:
        store = loader._store
        assert store is not None
        located = {kind: store.locate(paths, kind) for kind in ("crop", "whole")}
        monkeypatch.setattr(store, "locate", lambda _, kind: located[kind])
        for shard in kept.glob("*/*.h5"):
            shard.unlink()
        assert all(map(np.array_equal, (batch.numpy() for batch in loader.load(rows)), expected))
