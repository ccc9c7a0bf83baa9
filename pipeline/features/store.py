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
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from pipeline.features import hdf5
from pipeline.features.hdf5 import Row, Shard
from pipeline.features.views import AUGMENTED
from pipeline.files import digest, shared_directory, write_json
from pipeline.params import STORE_DTYPES, Augmentation

SCHEMA = 4  # of the shards and of the codes of views; what computes a row is in the key itself
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
        """The type in which rows are stored."""
        return np.dtype(STORE_DTYPES[self.description["store_dtype"]])

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
    """The rows under one key that are on disk: those that were there at the start, and those written since."""

    def __init__(self, key: Key) -> None:
        self._key = key
        self._rows: dict[Row, tuple[Shard, int]] = {}
        self._inodes: dict[Path, int] = {}  # of the directories
        for view in (0, AUGMENTED):
            directory = root() / key.name(view)
            with suppress(OSError):  # a new key, or a store without write permission
                self._inodes[directory] = directory.stat().st_ino
                os.utime(directory / "key.json")  # the time of the last use
            for path, found in read_shards(directory.glob("*.h5")):
                problem = str(found) if isinstance(found, ValueError) else self._misfit(found, view)
                if isinstance(found, ValueError) or problem:
                    log.warning("%s is damaged (%s); set aside, its rows are computed again", path, problem)
                    with suppress(FileNotFoundError):  # another process was faster
                        path.replace(path.with_suffix(".damaged"))
                else:
                    self._add(found)

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Those of `rows` that are not on disk, each once, in order."""
        return [row for row in dict.fromkeys(rows) if row not in self._rows]

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def read(self, rows: Sequence[Row]) -> np.ndarray:
        """Values (len(rows), *row_shape) as stored, in any order; KeyError for a missing row."""
        values = np.empty((len(rows), *self._key.row_shape), self._key.dtype)
        found = [self._rows[row] for row in rows]
        order = sorted(range(len(rows)), key=lambda i: (found[i][0].path, found[i][1]))
        for path, group in groupby(order, lambda i: found[i][0].path):
            with path.open("rb", buffering=0) as file:  # not a memory map, whose pages would stay in memory
                for i in group:
                    shard, position = found[i]
                    file.seek(shard.offset + position * values[i].nbytes)
                    if file.readinto(values[i].reshape(-1).data.cast("B")) != values[i].nbytes:
                        raise OSError(f"{path} was cut short while it was read")
        return values

    def largest_rounding(self, rows: Sequence[Row]) -> float:
        """Largest error that `store_dtype` makes in these rows, relative to the row's largest value."""
        return max(float(shard.rounding[position]) for shard, position in map(self._rows.__getitem__, rows))

    def agrees(self, values: Mapping[Row, np.ndarray]) -> bool:
        """Whether rows that were computed again, *row_shape float32 each, would be stored as they are."""
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
        """Add (len(rows), *row_shape) float32, as one shard of symmetries and one of augmented views."""
        stored, rounding = self._rounded(values)
        for view in (0, AUGMENTED):
            part = [i for i, (_, other) in enumerate(rows) if (other < AUGMENTED) == (view < AUGMENTED)]
            try:
                if part:
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
        self._add(hdf5.read_shard(hdf5.write_shard(directory, directory.name, rows, stored, rounding)))

    def _check_place(self) -> None:
        if not self.is_in_place():
            raise ValueError(
                f"{root()}: another process has set aside the rows of this key, or removed them; start again"
            )

    def _add(self, shard: Shard) -> None:
        self._rows.update({row: (shard, position) for position, row in enumerate(shard.rows)})

    def _misfit(self, shard: Shard, view: int) -> str:
        """Why the shard cannot be in the directory of `view`; empty if it can."""
        if shard.key != self._key.name(view):
            return f"it belongs to the key {shard.key}"
        if any((view < AUGMENTED) != (other < AUGMENTED) for _, other in shard.rows):
            return "it holds views that belong to another key"
        if (shard.shape, shard.dtype) != (self._key.row_shape, self._key.dtype):
            return f"it holds rows of {shard.dtype} {shard.shape}, not {self._key.dtype} {self._key.row_shape}"
        return ""

    def _rounded(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values in the stored type, and of each row the largest error relative to its largest value."""
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
