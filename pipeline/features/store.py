"""The feature store: outputs of frozen networks by image and view, a directory of shards for each key.

A key digests everything that can change a value; a row is found by (SHA-256 of the image file, code of the view). Rows
of symmetries do not depend on the augmentation, so each key has two directories. A shard is whole or absent, and never
changed: several processes fill one store without communicating.
"""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from pipeline.features import hdf5
from pipeline.features.hdf5 import Row, Shard
from pipeline.features.shard_index import Index
from pipeline.features.views import AUGMENTED
from pipeline.files import digest, shared_directory, write_json
from pipeline.params import STORE_DTYPES, Augmentation

Place = tuple[Path, int]  # a file, and where in it a row begins, in bytes
SHARD_BYTES = 32 * 2**20
SCHEMA = 4  # of the shards and of the codes of views; what computes a row is in the key itself
CHUNK = 65_536  # rows that are looked up at once
log = logging.getLogger("pipeline")


def put_at(directory: str | None) -> None:
    """Set the directory of the store, `runtime.store`, for this process and those that it starts."""
    os.environ["FEATURE_STORE"] = directory or ""
    if root().exists() and not root().is_dir():
        raise ValueError(f"params.yaml: runtime.store: {root()} is a file, expected a directory")


def root() -> Path:
    """The directory of the store, which all experiments share: data/.feature_store, or where `put_at` has put it."""
    return shared_directory(os.environ.get("FEATURE_STORE") or "data/.feature_store")


@dataclass(frozen=True)
class Key:
    """Everything that can change a row, as JSON; `row_shape` is the shape that results."""

    description: dict[str, Any]
    augmentation: Augmentation
    row_shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The type in which rows are stored: `features.store_dtype`, or uint8 for pixels."""
        name = self.description["store_dtype"]
        return np.dtype(name if name == "uint8" else STORE_DTYPES[name])

    @property
    def row_bytes(self) -> int:
        """The size of one row."""
        return self.dtype.itemsize * math.prod(self.row_shape)

    def describe(self, view: int) -> dict[str, Any]:
        """Everything that a row of this view depends on; symmetries do not depend on the augmentation."""
        augmentation = self.augmentation.model_dump(mode="json") if view >= AUGMENTED else None
        return {"schema": SCHEMA, **self.description, "augmentation": augmentation}

    def name(self, view: int) -> str:
        """The directory of rows of this view."""
        return digest(self.describe(view))[:32]


class Store:
    """The rows under one key that are on disk: those that were there at the start, and those written since.

    Opening reads the index, not the values (index.py). A shard is checked before its rows are used: one that is damaged
    is set aside with a warning, and its rows are missing.
    """

    def __init__(self, key: Key) -> None:
        self._key = key
        self._inodes: dict[Path, int] = {}  # of the directories
        self._indices: list[Index] = []  # of symmetries, and of augmented views
        for view in (0, AUGMENTED):
            directory = root() / key.name(view)
            with suppress(OSError):  # a new key, or a store without write permission
                self._inodes[directory] = directory.stat().st_ino
                os.utime(directory / "key.json")  # the time of the last use
            self._indices.append(Index(directory, partial(self._misfit, view)))

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Those of `rows` that are not on disk, or in a damaged shard, each once, in order."""
        shards = self._find(rows, is_checked=True)[1]
        return list(dict.fromkeys(rows[i] for i in np.flatnonzero(shards < 0).tolist()))

    def __len__(self) -> int:
        """How many rows there are."""
        return sum(map(len, self._indices))

    def __contains__(self, row: Row) -> bool:
        """Whether the row is on disk, in a shard that is whole."""
        return not self.missing([row])

    def locate(self, rows: Sequence[Row]) -> dict[Row, Place]:
        """Where the values of each row are; those that `missing` names are left out."""
        parts, shards, positions, _ = self._find(rows, is_checked=True)
        located: dict[Row, Place] = {}
        for row, part, shard, position in zip(rows, parts.tolist(), shards.tolist(), positions.tolist(), strict=True):
            if shard >= 0:
                index = self._indices[part]
                located[row] = index.paths[shard], int(index.offsets[shard]) + position * self._key.row_bytes
        return located

    def read(self, rows: Sequence[Row]) -> np.ndarray:
        """Values (len(rows), *row_shape) as stored, in any order.

        KeyError for a row that `missing` names, ValueError if a shard was damaged since, which is then set aside.
        """
        values, size = np.empty((len(rows), *self._key.row_shape), self._key.dtype), self._key.row_bytes
        content = values.reshape(-1).view(np.uint8).data
        parts, shards, positions, _ = self._found(rows)
        order = np.lexsort((positions, shards, parts))
        steps = [np.diff(column[order]) for column in (parts, shards, positions)]
        is_next = (steps[0] == 0) & (steps[1] == 0) & (steps[2] == 1) & (np.diff(order) == 1)  # read at once
        starts = np.append(np.flatnonzero(np.append(len(rows) > 0, ~is_next)), len(rows))
        first = order[starts[:-1]]
        file, path, offset = None, None, 0
        try:
            for part, shard, position, i, n in zip(
                *(column[first].tolist() for column in (parts, shards, positions)),
                *(first.tolist(), np.diff(starts).tolist()),
                strict=True,
            ):
                index = self._indices[part]
                if file is None or path is not index.paths[shard]:
                    if file:
                        file.close()
                    path = index.paths[shard]
                    file, offset = FileIO(path), int(index.offsets[shard])  # not a memory map: its pages stay in memory
                file.seek(offset + position * size)
                if file.readinto(content[i * size : (i + n) * size]) != n * size:
                    raise OSError(f"{path} was cut short while it was read")
        finally:
            if file:
                file.close()
        return values

    def save_index(self) -> None:
        """Save what was written since the start in the index, so that the next run need not look for it."""
        if self.is_in_place():
            for index in self._indices:
                index.save()

    def largest_rounding(self, rows: Sequence[Row]) -> float:
        """Largest error that `store_dtype` makes in these rows, relative to the row's largest value."""
        return float(self._found(rows)[3].max())

    def agrees(self, values: Mapping[Row, np.ndarray]) -> bool:
        """Whether rows that were computed again, *row_shape each, would be stored as they are."""
        again = [self._rounded(value[None])[0][0] for value in values.values()]
        return all(map(np.array_equal, self.read([*values]), again))

    def is_in_place(self) -> bool:
        """Whether no other process has set aside or removed the directories meanwhile."""
        with suppress(FileNotFoundError):
            return all(path.stat().st_ino == inode for path, inode in self._inodes.items())
        return False

    def set_aside(self) -> list[Path]:
        """Rename the directories, so that the key has no rows; their new paths."""
        self._check_place()
        return [path.replace(path.with_name(f"{path.name}.{uuid4().hex[:8]}")) for path in self._inodes]

    def write(self, rows: Sequence[Row], values: np.ndarray) -> None:
        """Add (len(rows), *row_shape) float32, uint8 for pixels: one shard of symmetries, one of augmented views."""
        stored, rounding = self._rounded(values)
        for view in (0, AUGMENTED):
            part = [i for i, (_, other) in enumerate(rows) if (other < AUGMENTED) == (view < AUGMENTED)]
            try:
                if len(part) == len(rows):
                    self._write(rows, stored, rounding)
                elif part:
                    self._write([rows[i] for i in part], stored[part], rounding[part])
            except FileNotFoundError:  # the directory was set aside meanwhile
                self._check_place()
                raise

    def _write(self, rows: Sequence[Row], stored: np.ndarray, rounding: np.ndarray) -> None:
        view = rows[0][1]
        directory = root() / self._key.name(view)
        directory.mkdir(parents=True, exist_ok=True)
        self._inodes.setdefault(directory, directory.stat().st_ino)
        self._check_place()
        if not (directory / "key.json").exists():
            write_json(directory / "key.json", self._key.describe(view))
        shard = hdf5.parse_shard(hdf5.write_shard(directory, directory.name, rows, stored, rounding))
        self._indices[int(view >= AUGMENTED)].add([shard])

    def _check_place(self) -> None:
        if not self.is_in_place():
            raise ValueError(
                f"{root()}: another process has set aside the rows of this key, or removed them; start again"
            )

    def _find(self, rows: Sequence[Row], *, is_checked: bool) -> tuple[np.ndarray, ...]:
        """Of each row, its directory (0 or 1), shard (-1 if there is none), position, rounding; (len(rows),) each."""
        found = [np.zeros(len(rows), dtype) for dtype in (np.int8, np.int32, np.int32, np.float32)]
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            wanted, is_augmented = hdf5.sortable(part), np.array([view >= AUGMENTED for _, view in part])
            for number, index in enumerate(self._indices):
                at = np.flatnonzero(is_augmented == number)
                places = index.find(wanted[at])
                if is_checked and not index.check(places[0][places[0] >= 0]):
                    places = index.find(wanted[at])
                for column, values in zip(found, (number, *places), strict=True):
                    column[start + at] = values
        return tuple(found)

    def _found(self, rows: Sequence[Row]) -> tuple[np.ndarray, ...]:
        """As _find, of rows that must be there; KeyError if one is not, ValueError if its shard was damaged."""
        found = self._find(rows, is_checked=False)
        if (found[1] < 0).any():
            raise KeyError(rows[int(found[1].argmin())])
        for number, index in enumerate(self._indices):
            if not index.check(found[1][found[0] == number]):
                found = self._find(rows, is_checked=True)
        if (found[1] < 0).any():
            raise ValueError(f"{root()}: rows that were there were damaged, and are set aside; run again")
        return found

    def _misfit(self, view: int, shard: Shard) -> str:
        """Why the shard cannot be in the directory of `view`; empty if it can."""
        if shard.key != self._key.name(view):
            return f"it belongs to the key {shard.key}"
        if ((shard.views < AUGMENTED) != (view < AUGMENTED)).any():
            return "it holds views that belong to another key"
        if (shard.shape, shard.dtype) != (self._key.row_shape, self._key.dtype):
            return f"it holds rows of {shard.dtype} {shard.shape}, not {self._key.dtype} {self._key.row_shape}"
        return ""

    def _rounded(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values in the stored type, and of each row the largest error relative to its largest value."""
        if self._key.dtype == np.uint8:
            return values.astype(np.uint8, casting="safe", copy=False), np.zeros(len(values), np.float32)
        with np.errstate(over="ignore"):
            stored = values.astype(self._key.dtype)
        largest = np.abs(values).reshape(len(values), -1).max(axis=1)
        if not np.isfinite(stored).all():
            raise ValueError(
                f"params.yaml: features.store_dtype: {self._key.description['store_dtype']} cannot hold "
                f"{largest.max():.4g}, found at {self._key.description['cut']}; expected fp32"
            )
        error = np.abs(stored.astype(np.float32) - values).reshape(len(values), -1).max(axis=1)
        return stored, error / np.maximum(largest, np.finfo(np.float32).tiny)


def read_shards(paths: Iterable[Path]) -> Iterator[tuple[Path, Shard | ValueError]]:
    """Each shard, or the reason why it cannot be used; shards that another process removes meanwhile are left out."""

    def read(path: Path) -> Shard | ValueError | None:
        try:
            return hdf5.read_shard(path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            return error

    ordered = sorted(paths)
    with ThreadPoolExecutor(4) as pool:  # digests are computed side by side
        for path, found in zip(ordered, pool.map(read, ordered), strict=True):
            if found is not None:
                yield path, found
