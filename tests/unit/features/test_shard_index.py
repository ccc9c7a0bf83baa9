"""index: rows are found without reading values, whatever has become of the files that save time."""

import errno
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.features import hdf5
from pipeline.features import store as feature_store
from pipeline.features.hdf5 import Row
from pipeline.features.shard_index import FACTORS, SAVED, VERIFIED, Index, _hashes
from pipeline.features.store import Store
from pipeline.features.views import AUGMENTED
from tests.factories import STORE_ROWS as ROWS
from tests.factories import STORE_VALUES as VALUES
from tests.factories import fill_store, store_key

Opened = list[str]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the shards of the symmetries lie."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return feature_store.root() / store_key().name(0)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Grows by the name of each shard that is read for its rows."""
    return recorded("parse_shard", monkeypatch)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Grows by the name of each shard whose checksum is verified."""
    return recorded("read_shard", monkeypatch)


def recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> Opened:
    names: Opened = []
    read = getattr(hdf5, name)

    def record(path: Path) -> hdf5.Shard:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(hdf5, name, record)
    return names


def changed_quietly(path: Path, position: int = -1) -> None:
    """Change a byte, and nothing that tells of it."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[position] ^= 8
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_opening_a_second_time_reads_no_shard(parsed: Opened, compared: Opened) -> None:
    fill_store(store_key())
    compared.clear()  # of the writer, which reads what it has written
    parsed.clear()
    assert len(Store(store_key())) == 12
    assert len(parsed) == 3
    store = Store(store_key())
    assert len(store) == 12
    assert len(parsed) == 3
    assert compared == []
    assert np.array_equal(store.read(ROWS), VALUES)


def test_an_older_index_lacks_only_what_is_new(parsed: Opened, directory: Path) -> None:
    fill_store(store_key())
    Store(store_key())
    Store(store_key()).write([("f" * 64, 3)], VALUES[:1])
    (removed,) = (path for path in directory.glob("*.h5") if hdf5.parse_shard(path).rows == ROWS[4:8])
    removed.unlink()
    parsed.clear()
    for n_parsed in (1, 0):
        store = Store(store_key())
        assert len(parsed) == n_parsed
        assert store.missing([*ROWS, ("f" * 64, 3)]) == ROWS[4:8]
        assert np.array_equal(store.read([*ROWS[8:], ("f" * 64, 3)]), [*VALUES[8:], VALUES[0]])
        parsed.clear()


def test_the_writer_can_save_the_index(parsed: Opened) -> None:
    fill_store(store_key())
    store = Store(store_key())
    store.write([("f" * 64, 3), ("f" * 64, AUGMENTED)], VALUES[:2])
    store.save_index()
    parsed.clear()
    opened = Store(store_key())
    assert parsed == []
    assert opened.missing([*ROWS, ("f" * 64, 3), ("f" * 64, AUGMENTED)]) == []


def rewritten(path: Path, **changes: np.ndarray) -> None:
    """An index that holds other arrays, and their digest."""
    arrays = hdf5.read_index(path, path.parent.name)
    hdf5.write_index(path, path.parent.name, arrays | changes)


def with_soft_link(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.move("row", "elsewhere")
        file["row"] = h5py.SoftLink("/elsewhere")


def as_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def of_another_key(path: Path) -> None:
    hdf5.write_index(path, "0" * 32, hdf5.read_index(path, path.parent.name))


def flipped(path: Path) -> None:
    position = hdf5.read_index(path, path.parent.name)["position"]
    changed_quietly(path, path.read_bytes().index(position.tobytes()))


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no HDF5"),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        *(flipped, with_soft_link, as_link, as_pipe, of_another_key),
        lambda path: rewritten(path, position=np.full(12, 4, np.int32)),
        lambda path: rewritten(path, position=np.full(12, -1, np.int32)),
        lambda path: rewritten(path, shard=np.full(12, 3, np.int32)),
        lambda path: rewritten(path, shard=np.full(11, 0, np.int32)),
        lambda path: rewritten(path, offset=np.full(3, -1, np.int64)),
        lambda path: rewritten(path, rounding=np.zeros(12, np.float64)),
        lambda path: rewritten(path, name=np.zeros((3, 2), "S64")),
    ],
)
def test_index_that_is_not_what_was_written_is_made_again(
    damage: Callable[[Path], None], directory: Path, parsed: Opened
) -> None:
    fill_store(store_key())
    Store(store_key())
    damage(directory / SAVED)
    parsed.clear()
    store = Store(store_key())
    assert len(parsed) == 3
    assert np.array_equal(store.read(ROWS), VALUES)
    assert not (directory / SAVED).is_symlink()
    assert (directory / SAVED).is_file()
    assert np.array_equal(Store(store_key()).read(ROWS), VALUES)


@pytest.mark.parametrize("change", ["shard", "position", "offset", "n_rows"])
def test_what_an_index_says_of_a_shard_gives_way_to_the_shard(directory: Path, change: str) -> None:
    """Such an index has a digest that fits."""
    fill_store(store_key())
    Store(store_key())
    saved = hdf5.read_index(directory / SAVED, directory.name)
    if change == "position":
        rewritten(directory / SAVED, position=3 - saved["position"])
    elif change == "shard":
        rewritten(directory / SAVED, shard=2 - saved["shard"])
    else:
        rewritten(directory / SAVED, **{change: saved[change] + 4})
    store = Store(store_key())
    assert store.missing(ROWS) == []
    assert np.array_equal(store.read(ROWS), VALUES)


def test_index_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    fill_store(store_key())
    monkeypatch.setattr(hdf5, "write_index", refuse)
    assert np.array_equal(Store(store_key()).read(ROWS), VALUES)
    assert not (directory / SAVED).exists()


def test_index_that_is_read_while_others_write_it_is_whole(directory: Path) -> None:
    fill_store(store_key())
    Store(store_key())
    arrays = hdf5.read_index(directory / SAVED, directory.name)
    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(hdf5.write_index, directory / SAVED, directory.name, arrays) for _ in range(20)]
        while not all(one.done() for one in writing):
            assert len(hdf5.read_index(directory / SAVED, directory.name)["row"]) == 12
    assert not [*directory.glob(".*")]


# Checksums


def test_a_shard_is_compared_once_by_all_processes_unless_it_changes(compared: Opened, directory: Path) -> None:
    shards = fill_store(store_key())
    compared.clear()
    store = Store(store_key())
    store.read(ROWS[:4])
    assert len(compared) == 1, "only the shard that is read"
    store.read(ROWS)
    Store(store_key()).read(ROWS)
    assert sorted(compared) == sorted(path.name for path in shards)
    compared.clear()
    os.utime(shards[0], (0, 0))
    copy = shards[1].with_suffix(".copy")
    copy.write_bytes(shards[1].read_bytes())
    os.utime(copy, ns=(shards[1].stat().st_atime_ns, shards[1].stat().st_mtime_ns))
    copy.replace(shards[1])  # the same size and time, another inode
    for _ in range(2):
        assert np.array_equal(Store(store_key()).read(ROWS), VALUES)
    assert sorted(compared) == sorted(path.name for path in shards[:2])


@pytest.mark.parametrize("use", [Store.missing, Store.read, Store.locate, Store.largest_rounding])
def test_no_row_of_a_damaged_shard_is_used(
    use: Callable[[Store, list[Row]], object], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill_store(store_key())
    Store(store_key())  # the index knows all rows
    (victim,) = (path for path in directory.glob("*.h5") if hdf5.read_shard(path).rows == ROWS[:4])
    changed_quietly(victim)
    store = Store(store_key())
    assert not caplog.records
    if use is Store.missing:
        assert store.missing(ROWS) == ROWS[:4]
    elif use is Store.locate:
        assert [*store.locate(ROWS)] == ROWS[4:]
    else:
        with pytest.raises(ValueError, match=r"were damaged, and are set aside; run again$") as caught:
            use(store, ROWS)
        assert "\n" not in str(caught.value)
        with pytest.raises(KeyError):
            use(store, ROWS)
    assert f"{victim} is damaged" in caplog.text
    assert victim.with_suffix(".damaged").exists()
    assert store.missing(ROWS) == ROWS[:4]
    assert [row in store for row in (ROWS[0], ROWS[4])] == [False, True]
    store.write(ROWS[:4], VALUES[:4])
    for whole in (store, Store(store_key())):
        assert np.array_equal(whole.read(ROWS), VALUES)


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b"\xff\x00 nothing"),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(path.read_bytes() * 3),
        as_pipe,
        as_link,
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_whatever_becomes_of_what_is_remembered_rows_are_right(damage: Callable[[Path], None], directory: Path) -> None:
    fill_store(store_key())
    Store(store_key()).read(ROWS)
    damage(directory / VERIFIED)
    for _ in range(2):
        assert np.array_equal(Store(store_key()).read(ROWS), VALUES)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
@pytest.mark.parametrize("name", ["parse_shard", "read_shard"])
def test_shard_that_another_machine_has_removed_is_missing(
    number: int, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill_store(store_key())
    read = getattr(hdf5, name)

    def removed(path: Path) -> hdf5.Shard:
        if (found := read(path)).rows == ROWS[:4]:
            raise OSError(number, "gone", str(path))
        return found

    monkeypatch.setattr(hdf5, name, removed)
    assert Store(store_key()).missing(ROWS) == ROWS[:4]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_shard_that_cannot_be_read_for_another_reason_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> hdf5.Shard:
        raise PermissionError(13, "Permission denied", str(path))

    fill_store(store_key())
    monkeypatch.setattr(hdf5, "read_shard", refuse)
    with pytest.raises(PermissionError):
        Store(store_key()).missing(ROWS)


# Arrays


def test_rows_written_in_many_instalments_are_found() -> None:
    random, key = np.random.default_rng(0), store_key()
    rows = [(f"{number:064x}", view) for number in range(60) for view in (0, 3, AUGMENTED + 1)]
    values = random.normal(size=(len(rows), 5)).astype(np.float32)
    order, store = random.permutation(len(rows)), Store(key)
    for start in range(0, len(rows), 7):
        part = order[start : start + 7]
        store.write([rows[i] for i in part], values[part])
        known = order[: start + 7]
        assert np.array_equal(store.read([rows[i] for i in known]), values[known])
        assert store.missing(rows) == [rows[i] for i in sorted(order[start + 7 :])]
        assert len(store) == len(known)
    store.write(rows[:9], -values[:9])
    for opened in (store, Store(key), Store(key)):
        assert len(opened) == len(rows)
        assert np.array_equal(np.abs(opened.read(rows)), np.abs(values))


def test_rows_of_one_hash_are_told_apart() -> None:
    """Their digests differ by what their views add to the hash."""
    rows: list[Row] = []
    for view, last in [(5, 1), (0, 1), (2, 1), (7, 1), (5, 2), (0, 2), (2, 2), (7, 2)]:
        first = (10**19 - view * FACTORS[32] - last * FACTORS[24]) % 2**64  # whose factor is 1
        rows.append((f"{first:016x}{0:032x}{last:016x}", view))
    assert len({*_hashes(hdf5.sortable(rows)).tolist()}) == 1
    store = Store(store_key())
    for start in (0, 3, 6):
        store.write(rows[start : start + 3], VALUES[:8][start : start + 3])
    store.save_index()
    for opened in (store, Store(store_key())):
        order = np.random.default_rng(0).permutation(8)
        assert np.array_equal(opened.read([rows[i] for i in order]), VALUES[order])
        assert opened.missing([*rows, (rows[0][0], 0)]) == [(rows[0][0], 0)]


def test_an_index_takes_at_most_64_bytes_a_row(directory: Path) -> None:
    rows = [(f"{number:064x}", 0) for number in range(2560)]
    store = Store(store_key())
    for start in range(0, len(rows), 256):
        store.write(rows[start : start + 256], np.zeros((256, 5), np.float32))
    store.save_index()
    index = Index(directory, lambda _: "")
    arrays = [column for run in index._runs for column in run] + [index.offsets, index._n_rows, index._states]
    assert sum(array.nbytes for array in arrays) <= 64 * len(index) == 64 * len(rows)
    assert (directory / SAVED).stat().st_size <= 64 * len(rows)


def test_opening_marks_the_key_as_used_though_only_the_index_is_read(directory: Path) -> None:
    fill_store(store_key())
    Store(store_key())
    then = time.time() - 40 * 86_400
    os.utime(directory / "key.json", (then, then))
    Store(store_key())
    assert time.time() - (directory / "key.json").stat().st_mtime < 86_400
