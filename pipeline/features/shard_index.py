"""The index of one directory of shards: which rows they hold, in arrays, 56 bytes a row; no values are read for it.

The index is saved beside the shards. What it lacks is read from the shards themselves, so it may be missing, old or
damaged, and several processes may replace it at once. It only says where to look: a shard is compared with its
checksum before its rows are used, once per (size, time of change, inode). Those that were found whole are remembered in
a file to which every process appends lines. A lost line costs time. No clocks are compared, and nothing relies on the
order in which other machines see files appear.

Later damage that changes neither size nor time nor inode is not noticed by runs. `python -m pipeline store verify`
reads every byte; where it finds damage, it has the shards of that directory forgotten, so that the next run checks them
again.
"""

import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import NamedTuple

import numpy as np

from pipeline.features import hdf5
from pipeline.features.hdf5 import Shard

SAVED, VERIFIED = "index.hdf5", "verified"
UNREAD, WHOLE, GONE = range(3)  # what is known of a shard
FACTORS = {  # of the words of a row, by where they begin: the digest in four, and the view
    **{0: 1, 8: 0xBF58476D1CE4E5B9, 16: 0x94D049BB133111EB, 24: 0xD6E8FEB86659FD93, 32: 0x9E3779B97F4A7C15}
}
log = logging.getLogger("pipeline")


class Rows(NamedTuple):
    """Rows, sorted by hash: the hash, the row (hdf5.sortable), its shard by number, position there, and rounding."""

    hash: np.ndarray
    row: np.ndarray
    shard: np.ndarray
    position: np.ndarray
    rounding: np.ndarray


class Index:
    """The rows of `directory`; `misfit` says why a shard cannot belong there, and is empty if it can."""

    def __init__(self, directory: Path, misfit: Callable[[Shard], str]) -> None:
        self._directory, self._misfit = directory, misfit
        self.paths: list[Path] = []  # by the number of the shard
        self.offsets, self._n_rows = np.empty(0, np.int64), np.empty(0, np.int32)
        self._n_found = np.empty(0, np.int64)  # of these, rows that are found there, and not in another shard
        self._states = np.empty(0, np.uint8)
        self._runs: list[Rows] = []  # sorted each, no row twice; never changed, but replaced by another list
        self._remembered: set[str] | None = None
        self._is_saved, self._lock = True, RLock()  # one thread may write while another reads
        try:
            listed = {name for name in os.listdir(directory) if name.endswith(".h5")}
        except FileNotFoundError:
            return  # a new key
        self.add(self._read(sorted(listed - self._load(listed))), UNREAD)
        self.save()

    def __len__(self) -> int:
        """How many rows there are."""
        return sum(int(np.count_nonzero(self._states[rows.shard] != GONE)) for rows in self._runs)

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of `rows` (n,), the shard by number (-1 if there is none), the position there, the rounding."""
        shard, position = np.full(len(rows), -1, np.int32), np.zeros(len(rows), np.int32)
        rounding = np.zeros(len(rows), np.float32)
        hashes = _hashes(rows)
        for run in self._runs:
            last = len(run.row) - 1
            at = np.minimum(np.searchsorted(run.hash, hashes), last)
            is_hit = run.row[at] == rows
            while len(others := np.flatnonzero(~is_hit & (run.hash[at] == hashes) & (at < last))):  # of the same hash
                at[others] += 1
                is_hit[others] = run.row[at[others]] == rows[others]
            hit = np.flatnonzero(is_hit)
            hit = hit[self._states[run.shard[at[hit]]] != GONE]
            for found, column in zip((shard, position, rounding), run[2:], strict=True):
                found[hit] = column[at[hit]]
        return shard, position, rounding

    def add(self, shards: Iterable[Shard], state: int = WHOLE) -> None:
        """Add the rows of shards that are not there yet."""
        with self._lock:
            self._add(shards, state)

    def _add(self, shards: Iterable[Shard], state: int) -> None:
        columns: list[list[np.ndarray]] = [[], [], [], []]  # of Rows, but the hash
        offsets, n_rows = [], []
        for shard in shards:
            n = len(shard.sortable)
            numbers = np.full(n, len(self.paths), np.int32)
            for column, values in zip(
                columns, (shard.sortable, numbers, np.arange(n, dtype=np.int32), shard.rounding), strict=True
            ):
                column.append(values)
            self.paths.append(shard.path)
            offsets.append(shard.offset)
            n_rows.append(n)
        if not offsets:
            return
        self.offsets = np.append(self.offsets, np.array(offsets, np.int64))
        self._n_rows = np.append(self._n_rows, np.array(n_rows, np.int32))
        self._states = np.append(self._states, np.full(len(offsets), state, np.uint8))
        new = _sorted(columns)
        is_new = self.find(new.row)[0] < 0
        if not is_new.all():
            new = Rows(*(column[is_new] for column in new))
        n_found = np.bincount(new.shard, minlength=len(self.paths))
        self._n_found = np.append(self._n_found, n_found[len(self._n_found) :])
        runs = [*self._runs, new]
        while len(runs) > 1 and len(runs[-2].row) <= 2 * len(runs[-1].row):  # few runs, and a row is moved few times
            runs[-2:] = [self._merged(runs[-2:])]
        self._runs, self._is_saved = [run for run in runs if len(run.row)], False

    def check(self, numbers: np.ndarray) -> bool:
        """Compare the shards `numbers` with their checksums; those that are damaged are set aside, with a warning.

        Returns whether all are as the index says. A shard is compared once, and rows of those that are gone are missing
        from now on.
        """
        unread = np.unique(numbers[self._states[numbers] == UNREAD]).tolist()
        if not unread:
            return True
        if self._remembered is None:
            self._remembered = self._read_verified()
        with self._lock, ThreadPoolExecutor(min(4, len(unread))) as pool:  # digests are computed side by side
            others = []  # of which the index says something else
            for number, found in zip(unread, pool.map(self._examine, unread), strict=True):
                self._states[number] = WHOLE if found is None else GONE
                if isinstance(found, Shard):
                    others.append(found)
                elif found:
                    _set_aside(self.paths[number], found)
            self.add(others)
        return bool((self._states[unread] == WHOLE).all())

    def save(self) -> None:
        """Save the index if it has changed. It only saves time: where it cannot be written, nothing is."""
        with self._lock:
            if self._is_saved or not self._directory.is_dir():
                return
            runs = self._runs
            if len(runs) > 1 or any((self._states[run.shard] == GONE).any() for run in runs):
                self._runs = runs = [self._merged(runs)]
            names = np.array([path.stem.encode() for path in self.paths], "S64")
            if runs and len(runs[0].row):
                arrays = {**runs[0]._asdict(), "name": names, "offset": self.offsets, "n_rows": self._n_rows}
                with suppress(OSError):
                    hdf5.write_index(self._directory / SAVED, self._directory.name, arrays)
            self._is_saved = True

    def _load(self, listed: set[str]) -> set[str]:
        """Load the saved index, without the shards that are not `listed`; the names of those that it knows."""
        try:
            saved = hdf5.read_index(self._directory / SAVED, self._directory.name)
        except (OSError, ValueError):  # missing, or not what was written: all shards are read
            return set()
        hashes = _hashes(saved["row"])
        if (hashes[1:] < hashes[:-1]).any():
            return set()
        names = [f"{name.decode(errors='replace')}.h5" for name in saved["name"].tolist()]
        is_kept = np.array([name in listed for name in names], bool)
        rows = Rows(hashes, *(saved[name] for name in Rows._fields[1:]))
        if not is_kept.all():
            self._is_saved, chosen = False, is_kept[rows.shard]
            numbers = (np.cumsum(is_kept) - 1).astype(np.int32)
            rows = Rows(*(column[chosen] for column in rows))._replace(shard=numbers[rows.shard[chosen]])
        kept = np.flatnonzero(is_kept)
        self.paths = [self._directory / names[number] for number in kept.tolist()]
        self.offsets, self._n_rows = saved["offset"][kept], saved["n_rows"][kept]
        self._n_found = np.bincount(rows.shard, minlength=len(kept))
        self._states = np.full(len(kept), UNREAD, np.uint8)
        self._runs = [rows] if len(rows.row) else []
        return {path.name for path in self.paths}

    def _read(self, names: Iterable[str]) -> Iterator[Shard]:
        """What shards say that they hold; those that cannot belong here are set aside."""
        for name in names:
            path = self._directory / name
            try:
                shard = hdf5.parse_shard(path)
                if problem := self._misfit(shard):
                    raise ValueError(problem)
                yield shard
            except ValueError as error:
                _set_aside(path, str(error))
            except OSError as error:
                _raise_unless_gone(error)

    def _examine(self, number: int) -> Shard | str | None:
        """None for a shard that is whole, or why it is damaged, or what it holds if the index says something else.

        The reason is empty for a shard that another process has taken away.
        """
        path = self.paths[number]
        try:
            status = path.lstat()
            identity = f"{path.stem} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
            if f"{identity} {self.offsets[number]} {self._n_rows[number]}" in (self._remembered or ()):
                hdf5.check_plain(path)
                return None
            shard = hdf5.read_shard(path)
            if problem := self._misfit(shard):
                return problem
            self._remember(f"{identity} {shard.offset} {len(shard.sortable)}")
        except ValueError as error:
            return str(error)
        except OSError as error:
            _raise_unless_gone(error)
            return ""
        found, position, _ = self.find(shard.sortable)
        is_right = (found >= 0).all() and (position == np.arange(len(found)))[found == number].all()
        expected = self.offsets[number], self._n_rows[number], self._n_found[number]
        is_right &= expected == (shard.offset, len(found), np.count_nonzero(found == number))
        return None if is_right else shard

    def _read_verified(self) -> set[str]:
        """Shards that were found whole, as lines; what is no such line does no harm."""
        with suppress(OSError, ValueError):
            hdf5.check_plain(self._directory / VERIFIED)
            return {*(self._directory / VERIFIED).read_text("ascii", errors="replace").splitlines()}
        return set()

    def _remember(self, line: str) -> None:
        with suppress(OSError, ValueError):  # a store without write permission
            if (path := self._directory / VERIFIED).is_symlink() or path.exists():
                hdf5.check_plain(path)
            with path.open("ab", buffering=0) as file:
                file.write(f"\n{line}\n".encode())  # with a line break before it, if another's line was cut short

    def _merged(self, runs: list[Rows]) -> Rows:
        kept = [self._states[run.shard] != GONE for run in runs]
        runs = [run if k.all() else Rows(*(column[k] for column in run)) for run, k in zip(runs, kept, strict=True)]
        return _sorted([*map(list, zip(*(run[1:] for run in runs), strict=True))])


def _sorted(columns: Iterable[list[np.ndarray]]) -> Rows:
    """Rows whose columns but the hash come in pieces, which are used up; of a row that comes twice, the first."""
    pieces, *others = columns
    row = np.concatenate(pieces)
    pieces.clear()
    hashes = _hashes(row)
    order = np.argsort(hashes, kind="stable")
    hashes, row = hashes[order], row[order]
    if (hashes[1:] == hashes[:-1]).any():
        by_row = np.lexsort((np.arange(len(row)), row, hashes))
        hashes, row, order = hashes[by_row], row[by_row], order[by_row]
        is_first = np.append(True, row[1:] != row[:-1])
        hashes, row, order = hashes[is_first], row[is_first], order[is_first]
    return Rows(hashes, row, *(np.concatenate(column)[order] for column in others))


def _hashes(rows: np.ndarray) -> np.ndarray:
    """A number (n,) uint64 for each row, by which it is found several times as fast as by its bytes."""
    joined = rows.view(np.uint8).reshape(-1, hdf5.SORTABLE.itemsize)
    hashes = np.zeros(len(rows), np.uint64)
    for start, factor in FACTORS.items():
        word = joined[:, start : start + 8].copy()
        hashes += word.view(f">u{word.shape[1]}")[:, 0] * np.uint64(factor)
    return hashes


def _set_aside(path: Path, problem: str) -> None:
    log.warning("%s is damaged (%s); set aside, its rows are computed again", path, problem)
    with suppress(FileNotFoundError):  # another process was faster
        path.replace(path.with_suffix(".damaged"))


def _raise_unless_gone(error: OSError) -> None:
    """A shard that another process, or another machine (ESTALE), has taken away is no error."""
    if not isinstance(error, FileNotFoundError) and error.errno != errno.ESTALE:
        raise error
