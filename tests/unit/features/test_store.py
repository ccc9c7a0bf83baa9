"""store: rows are read as they were written, whoever else uses the store."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.features import hdf5
from pipeline.features import store as feature_store
from pipeline.features.store import Store
from pipeline.features.views import AUGMENTED
from tests.factories import STORE_ROWS as ROWS
from tests.factories import STORE_VALUES as VALUES
from tests.factories import fill_store, store_key


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the store lies."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "repository"))
    return tmp_path / "repository" / "data" / ".feature_store"


def test_rows_are_read_as_they_were_written() -> None:
    fill_store(store_key())
    store = Store(store_key())
    assert len(store) == 12
    order = np.random.default_rng(1).permutation(12)
    assert np.array_equal(store.read([ROWS[i] for i in order]), VALUES[order])
    assert store.missing([*ROWS, ("f" * 64, 0), (ROWS[0][0], AUGMENTED)]) == [("f" * 64, 0), (ROWS[0][0], AUGMENTED)]


def test_pixels_are_read_and_located_as_they_were_written() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), np.uint8)
    key = replace(store_key(store_dtype="uint8"), row_shape=(4, 4, 3))
    Store(key).write(ROWS, pixels)
    store = Store(key)
    assert store.read(ROWS).dtype == np.uint8
    assert np.array_equal(store.read(ROWS), pixels)
    assert store.agrees(dict(zip(ROWS, pixels, strict=True)))
    assert not store.agrees({ROWS[0]: pixels[1]})
    assert store.largest_rounding(ROWS) == 0


@pytest.mark.parametrize("store_dtype", ["fp32", "fp16", "uint8"])
def test_rows_lie_where_they_are_located(store_dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (12, 5), np.uint8)
    key = store_key(store_dtype=store_dtype)
    Store(key).write(ROWS, values if store_dtype == "uint8" else values.astype(np.float32))
    store = Store(key)
    for (path, offset), value in zip(store.locate(ROWS[::-1]).values(), values[::-1], strict=True):
        assert np.array_equal(np.memmap(path, key.dtype, "r", offset, (5,)), value)
    assert store.locate([("f" * 64, 0)]) == {}
    assert ROWS[0] in store
    assert ("f" * 64, 0) not in store
    assert (ROWS[0][0], AUGMENTED) not in store


def test_writing_the_same_rows_again_adds_nothing() -> None:
    shards = fill_store(store_key())
    assert fill_store(store_key()) == []
    assert sorted(feature_store.root().glob("*/*.h5")) == shards


def test_opening_the_store_marks_its_keys_as_used(root: Path) -> None:
    fill_store(store_key())
    then = time.time() - 40 * 86_400
    os.utime(root / store_key().name(0) / "key.json", (then, then))
    Store(store_key())
    assert time.time() - (root / store_key().name(0) / "key.json").stat().st_mtime < 86_400


def test_shard_that_another_process_takes_away_meanwhile_is_no_error(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_store(store_key())
    read = hdf5.read_shard

    def taken(path: Path) -> hdf5.Shard:
        found = read(path)
        if found.rows == ROWS[:4]:
            raise FileNotFoundError(path)
        return found

    monkeypatch.setattr(hdf5, "read_shard", taken)
    assert Store(store_key()).missing(ROWS) == ROWS[:4]
    assert not caplog.records


def test_a_shard_whose_directory_is_set_aside_while_it_is_written_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_store(store_key())
    store = Store(store_key())

    def write_shard(directory: Path, *_: object) -> Path:
        Store(store_key()).set_aside()
        raise FileNotFoundError(directory)

    monkeypatch.setattr(hdf5, "write_shard", write_shard)
    with pytest.raises(ValueError, match=r"another process has set aside the rows of this key.*; start again$"):
        store.write([("f" * 64, 0)], VALUES[:1])
