"""The feature store: what frozen networks said of views of images, a directory of shards per key.

A key digests everything that can change a value; a row is found by (SHA-256 of the image file, view). A shard is whole
or absent, and only ever added: several processes fill one store without talking to each other.

    python -m pipeline.feature_store status               the keys: what they are, rows, bytes, last use
    python -m pipeline.feature_store verify               read everything again; fail if anything is damaged
    python -m pipeline.feature_store gc --days N [--yes]  remove keys that no run used for N days, and left-overs
"""

import argparse
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import hdf5, logs
from pipeline.files import digest, write_json
from pipeline.hdf5 import Row, Shard
from pipeline.params import STORE_DTYPES, Augmentation

SCHEMA = 3
HOUR, DAY = 3600, 86_400  # s; after an hour a temporary file has no writer any more
log = logging.getLogger("pipeline")


def root() -> Path:
    """Where the store lies: in the main checkout also inside `dvc exp run --temp`, which sets DVC_ROOT."""
    return Path(os.environ.get("DVC_ROOT", "."), "data", ".feature_store")


@dataclass(frozen=True)
class Key:
    """Everything that can change a row; `row_shape` follows from it."""

    description: dict[str, Any]
    augmentation: Augmentation
    row_shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """In which rows are stored."""
        return np.dtype(STORE_DTYPES[self.description["store_dtype"]])

    def describe(self, view: int) -> dict[str, Any]:
        """What a row of this view depends on: on the augmentation only if it is not view 0."""
        augmentation = self.augmentation.model_dump(mode="json") if view else None
        return {"schema": SCHEMA, **self.description, "augmentation": augmentation}

    def name(self, view: int) -> str:
        """The directory of rows of this view."""
        return digest(self.describe(view))[:32]


class Store:
    """The rows under one key that are on disk: those that were there at the start, and those written since."""

    def __init__(self, key: Key) -> None:
        self._key = key
        self._rows: dict[Row, tuple[Shard, int]] = {}
        for view in (0, 1):
            directory = root() / key.name(view)
            with suppress(OSError):  # there is no such key yet, or we may only read
                os.utime(directory / "key.json")  # says when the key was last used
            for path, found in _read_all(directory.glob("*.h5")):
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
            with path.open("rb", buffering=0) as file:  # not mapped: what is read does not stay in memory
                for i in group:
                    shard, position = found[i]
                    file.seek(shard.offset + position * values[i].nbytes)
                    if file.readinto(values[i].reshape(-1).data.cast("B")) != values[i].nbytes:
                        raise OSError(f"{path} was cut short while it was read")
        return values

    def largest_rounding(self, rows: Sequence[Row]) -> float:
        """Largest error that `store_dtype` makes in these rows, relative to the row's largest value."""
        return max(float(shard.rounding[position]) for shard, position in map(self._rows.__getitem__, rows))

    def write(self, rows: Sequence[Row], values: np.ndarray) -> None:
        """Add (len(rows), *row_shape) float32: one shard for view 0 and one for the others, whichever have rows."""
        stored, rounding = self._rounded(values)
        for is_plain in (True, False):
            part = [i for i, (_, view) in enumerate(rows) if (view == 0) == is_plain]
            if part:
                view = rows[part[0]][1]
                name = self._key.name(view)
                if not (root() / name / "key.json").exists():
                    write_json(root() / name / "key.json", self._key.describe(view))
                chosen = [rows[i] for i in part]
                path = hdf5.write_shard(root() / name, name, chosen, stored[part], rounding[part])
                self._add(hdf5.read_shard(path))

    def _add(self, shard: Shard) -> None:
        self._rows.update({row: (shard, position) for position, row in enumerate(shard.rows)})

    def _misfit(self, shard: Shard, view: int) -> str:
        """Why the shard cannot be one of the directory for this view, plain or not; empty if it can."""
        if shard.key != self._key.name(view):
            return f"it belongs to the key {shard.key}"
        if any((view == 0) != (other == 0) for _, other in shard.rows):
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


def _read_all(paths: Iterable[Path]) -> Iterator[tuple[Path, Shard | ValueError]]:
    """Each shard, or why it is none; without those that another process took away meanwhile."""

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


def main() -> None:
    """House-keeping, by hand."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.feature_store", description="House-keeping of the store.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="the keys: what they are, rows, bytes, last use")
    commands.add_parser("verify", help="read everything again; fail if anything is damaged")
    collect = commands.add_parser("gc", help="remove keys that no run used for N days, and left-overs")
    collect.add_argument("--days", type=float, required=True, metavar="N")
    collect.add_argument("--yes", action="store_true", help="do not ask")
    arguments = parser.parse_args()
    if arguments.command == "gc":
        collect_garbage(arguments.days, is_asked=not arguments.yes)
    else:
        {"status": status, "verify": verify}[arguments.command]()


@dataclass(frozen=True)
class _Directory:
    """A key's directory, as house-keeping sees it; `last_use` in seconds since the epoch."""

    path: Path
    what: str
    is_current: bool
    n_bytes: int
    last_use: float

    def is_unused(self, days: float) -> bool:
        return time.time() - self.last_use >= days * DAY

    @property
    def shards(self) -> list[Path]:
        return sorted(self.path.glob("*.h5"))

    @property
    def left_overs(self) -> list[Path]:
        """Damaged shards, and what writers that were killed left behind."""
        abandoned = [path for path in self.path.glob(".*.tmp") if time.time() - _size_and_time(path)[1] > HOUR]
        return sorted([*self.path.glob("*.damaged"), *abandoned])

    @property
    def age(self) -> str:
        days = (time.time() - self.last_use) / DAY
        return f"used {days:.0f} days ago" if days >= 1 else "used today"


def _directories() -> list[_Directory]:
    """Every key, the one used last first."""
    found = []
    for path in (path for path in root().glob("*/") if not path.is_symlink()):
        sizes = [_size_and_time(entry) for entry in path.glob("*")]
        last_use = max((time for _, time in sizes), default=_size_and_time(path)[1])
        what, is_current = "unknown: no key.json that fits", False
        # What a file of someone else may hold, down to brackets within brackets without end
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            description = json.loads((path / "key.json").read_text(encoding="utf-8"))
            if isinstance(description, dict) and digest(description)[:32] == path.name:
                last_use = _size_and_time(path / "key.json")[1]
                is_other = description["schema"] != SCHEMA
                what = "of another version of this pipeline" if is_other else _told(description)
                is_current = not is_other
        found.append(_Directory(path, what, is_current, sum(size for size, _ in sizes), last_use))
    return sorted(found, key=lambda directory: -directory.last_use)


def _size_and_time(path: Path) -> tuple[int, float]:
    """Bytes, and seconds since the epoch of the last change; of a file that is gone, 0 bytes now."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0, time.time()
    return found.st_size, found.st_mtime


def _told(key: dict[str, Any]) -> str:
    views = "augmented views" if key["augmentation"] else "view 0"
    geometry = f"{key['preprocessing']['crop']} px"
    made = f"{key['engine']} {key['precision']} on {key['device']}, stored as {key['store_dtype']}"
    weights = key["weights_sha256"][:8]
    return f"{key['backbone']} (weights {weights}) at {key['cut']}, pool {key['pool']}, {geometry}, {views}, {made}"


def status() -> None:
    """Print every key: what it is, rows, bytes, last use, and what is damaged."""
    directories = _directories()
    for directory in directories:
        n_rows, n_broken = 0, 0
        for path in directory.shards:
            try:
                n_rows += len(hdf5.parse_shard(path).rows)
            except FileNotFoundError:  # a run set it aside, or gc removed it
                continue
            except ValueError:
                n_broken += 1
        rows = f"{n_rows:,} rows" if directory.is_current else f"{len(directory.shards):,} shards"
        n_broken = (n_broken if directory.is_current else 0) + len(directory.left_overs)
        broken = f", {n_broken} damaged or left over" if n_broken else ""
        print(f"{directory.path.name}  {rows}, {_size(directory.n_bytes)}, {directory.age}{broken}: {directory.what}")
    print(f"{root()}: {len(directories)} keys, {_size(sum(directory.n_bytes for directory in directories))}")


def verify() -> None:
    """Compare every shard with its digest and its key; ValueError that counts the damaged ones, which are printed."""
    n_shards, damaged = 0, []
    for directory in _directories():
        for path, found in _read_all(directory.shards if directory.is_current else []):
            n_shards += 1
            if isinstance(found, ValueError):
                damaged.append(f"{path}: {found}")
            elif found.key != directory.path.name:
                damaged.append(f"{path}: it belongs to the key {found.key}")
    print("\n".join([*damaged, f"{root()}: {n_shards} shards, {len(damaged)} damaged"]))
    if damaged:
        raise ValueError(f"{len(damaged)} damaged shards; the next run that uses them computes their rows again")


def collect_garbage(days: float, *, is_asked: bool) -> None:
    """Remove keys that no run used for so many days, and left-overs of the others; asks first if `is_asked`."""
    if not days >= 0:
        raise ValueError(f"--days: found {days:g}, expected 0 or more")
    directories = _directories()
    unused = [directory for directory in directories if directory.is_unused(days)]
    left_overs = [path for directory in directories if directory not in unused for path in directory.left_overs]
    if not unused and not left_overs:
        print(f"{root()}: nothing to remove")
        return
    for directory in unused:
        print(f"{directory.path.name}  {_size(directory.n_bytes)}, {directory.age}: {directory.what}")
    n_bytes = sum(directory.n_bytes for directory in unused) + sum(_size_and_time(path)[0] for path in left_overs)
    print(f"{len(unused)} keys and {len(left_overs)} left-overs of others, {_size(n_bytes)}", flush=True)
    try:
        if is_asked and input("remove them? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return
    except (EOFError, RuntimeError):  # RuntimeError: there is no standard input at all
        raise ValueError("gc asks before it removes anything, and nobody answered; expected --yes") from None
    still_unused = {directory.path for directory in _directories() if directory.is_unused(days)}
    for directory in unused:
        if directory.path in still_unused:  # no run began to use it since
            _remove(directory.path)
    for path in left_overs:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)  # another process may take files away meanwhile
    if path.exists():
        raise OSError(f"{path} could not be removed: it is not ours to write, or a run just began to use it")


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


if __name__ == "__main__":
    logs.run(main)
