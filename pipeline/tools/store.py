"""store: list the keys of the feature store, check its shards, and remove what is not used; checkpoints, too."""

import json
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.features import hdf5, shard_index, store
from pipeline.features.store import read_shards
from pipeline.files import digest, shared
from pipeline.training.runs import CHECKPOINTS

HOUR, DAY = 3600, 86_400  # s; a temporary file that is older than an hour was left by a process that is gone
KEY = re.compile(r"[0-9a-f]{16}([0-9a-f]{16})?(\.[0-9a-f]{8})?")  # directories with other names are not the store's
OWN = re.compile(r"key\.json|index\.hdf5|verified|.+\.(h5|damaged)|\..+\.tmp")  # files that the store makes in them
UNKNOWN = "unknown: no key.json that fits"


@dataclass(frozen=True)
class _Directory:
    """The directory of a key; `is_current`: this version can read its shards.

    `last_use` and `now` are in seconds since the epoch, by the clock of the file system.
    """

    path: Path
    description: str
    is_current: bool
    n_bytes: int
    last_use: float
    now: float

    @property
    def days_unused(self) -> float:
        return max(0.0, self.now - self.last_use) / DAY

    @property
    def shards(self) -> list[Path]:
        return sorted(self.path.glob("*.h5"))

    @property
    def left_overs(self) -> list[Path]:
        """Damaged shards, and temporary files of processes that were killed."""
        abandoned = [path for path in self.path.glob(".*.tmp") if self.now - _size_and_time(path)[1] > HOUR]
        return sorted([*self.path.glob("*.damaged"), *abandoned])

    def line(self, contents: str = "") -> str:
        age = f"used {self.days_unused:.0f} days ago" if self.days_unused >= 1 else "used today"
        return f"{self.path.name}  {contents}{_size(self.n_bytes)}, {age}"


def _directories() -> list[_Directory]:
    """Every key, the one used last first. Where no key.json fits, a directory with other files is not the store's."""
    found, now = [], _now(store.root())
    for path in (path for path in store.root().glob("*/") if KEY.fullmatch(path.name) and not path.is_symlink()):
        inside = [*path.glob("*")]
        entries = [_size_and_time(entry) for entry in inside]
        last_use = max((time for _, time in entries), default=_size_and_time(path)[1])
        description, is_current = UNKNOWN, False
        # The errors that a file of another program can cause; RecursionError: brackets nested too deep
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            key = json.loads((path / "key.json").read_text(encoding="utf-8"))
            name, _, aside = path.name.partition(".")
            if isinstance(key, dict) and digest(key)[:32] == name:
                last_use = _size_and_time(path / "key.json")[1]
                is_current = key["schema"] == store.SCHEMA and not aside
                other = "set aside, its rows were computed again" if aside else "of another version of this pipeline"
                description = _describe(key) if is_current else other
        if description == UNKNOWN and not all(OWN.fullmatch(entry.name) for entry in inside):
            continue
        found.append(_Directory(path, description, is_current, sum(size for size, _ in entries), last_use, now))
    return sorted(found, key=lambda directory: -directory.last_use)


def _checkpoints() -> list[Path]:
    """What interrupted training left: checkpoints, and temporary files."""
    return sorted(path for path in shared(CHECKPOINTS).glob("*") if not path.is_dir())


def _days(path: Path) -> float:
    return max(0.0, _now(path.parent) - _size_and_time(path)[1]) / DAY


def _now(directory: Path) -> float:
    """Seconds since the epoch by the clock of the directory's file system, which may be that of another machine."""
    with suppress(OSError), tempfile.TemporaryFile(dir=directory) as file:
        return os.fstat(file.fileno()).st_mtime
    return time.time()  # nothing can be written there, and so nothing removed


def _size_and_time(path: Path) -> tuple[int, float]:
    """Bytes, and seconds since the epoch of the last change; 0 bytes and now for a file that was removed meanwhile."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0, time.time()
    return found.st_size, found.st_mtime


def _describe(key: dict[str, Any]) -> str:
    if "pixels" in key:
        shape = " x ".join(map(str, key["shape"]))
        return f"pixels ({key['pixels']}), {shape}, {key['interpolation']}, JPEGs {key['jpeg_decoding']}"
    views = "augmented views" if key["augmentation"] else "symmetries"
    engine = f"{key['engine']} {key['precision']} on {key['device']}, stored as {key['store_dtype']}"
    geometry = "" if (kind := key["preprocessing"].get("geometry", "crop")) == "crop" else f" ({kind})"
    network = f"{key['backbone']} (weights {key['weights_sha256'][:8]}) at {key['cut']}, pool {key['pool']}"
    if taps := key.get("taps"):
        network += f", and before it {', '.join(f'{cut} ({pool})' for cut, pool in taps.items())}"
    return f"{network}, {key['preprocessing']['crop']} px{geometry}, {views}, {engine}"


def status() -> None:
    """Print for every key what it is, its rows, bytes and last use, and how many files are damaged."""
    directories = _directories()
    for directory in directories:
        n_rows, n_damaged = 0, len(directory.left_overs)
        for path in directory.shards if directory.is_current else ():
            with suppress(FileNotFoundError):  # set aside by a run, or removed by gc
                try:
                    n_rows += len(hdf5.parse_shard(path).sortable)
                except ValueError:
                    n_damaged += 1
        contents = f"{n_rows:,} rows, " if directory.is_current else f"{len(directory.shards):,} shards, "
        damaged = f", {n_damaged} damaged or left over" if n_damaged else ""
        print(f"{directory.line(contents)}{damaged}: {directory.description}")
    print(f"{store.root()}: {len(directories)} keys, {_size(sum(directory.n_bytes for directory in directories))}")
    if checkpoints := _checkpoints():
        size = _size(sum(_size_and_time(path)[0] for path in checkpoints))
        print(f"{shared(CHECKPOINTS)}: {len(checkpoints)} files of interrupted training, {size}")


def verify() -> None:
    """Compare every shard with its digest and its key; print the damaged ones; ValueError if there are any."""
    n_shards, damaged = 0, []
    for directory in _directories():
        n_before = len(damaged)
        for path, found in read_shards(directory.shards if directory.is_current else []):
            n_shards += 1
            if isinstance(found, ValueError):
                damaged.append(f"{path}: {found}")
            elif found.key != directory.path.name:
                damaged.append(f"{path}: it belongs to the key {found.key}")
        if len(damaged) > n_before:  # or a run would trust what it remembers
            (directory.path / shard_index.VERIFIED).unlink(missing_ok=True)
    print("\n".join([*damaged, f"{store.root()}: {n_shards} shards, {len(damaged)} damaged"]))
    if damaged:
        raise ValueError(f"{len(damaged)} damaged shards; the next run that uses them computes their rows again")


def collect_garbage(days: float, *, is_asked: bool) -> None:
    """Remove keys that no run used for `days` days, left-overs of the others, and checkpoints as old.

    Asks first if `is_asked`.
    """
    if not days >= 0:
        raise ValueError(f"--days: found {days:g}, expected 0 or more")
    directories = _directories()
    unused = [directory for directory in directories if directory.days_unused >= days]
    left_overs = [path for directory in directories if directory not in unused for path in directory.left_overs]
    left_overs += [path for path in _checkpoints() if _days(path) >= days]
    if not unused and not left_overs:
        print(f"{store.root()}: nothing to remove")
        return
    for directory in unused:
        print(f"{directory.line()}: {directory.description}")
    n_bytes = sum(directory.n_bytes for directory in unused) + sum(_size_and_time(path)[0] for path in left_overs)
    print(
        f"{len(unused)} keys and {len(left_overs)} left-overs of others and of training, {_size(n_bytes)}", flush=True
    )
    try:
        if is_asked and input("remove them? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return
    except (EOFError, RuntimeError):  # RuntimeError: there is no standard input at all
        raise ValueError("gc asks before it removes anything, and nobody answered; expected --yes") from None
    still_unused = {directory.path for directory in _directories() if directory.days_unused >= days}
    for directory in unused:
        if directory.path in still_unused:  # no run has used it since
            _remove(directory.path)
    for path in left_overs:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)  # another process may remove files at the same time
    if path.exists():
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise OSError(f"{path} could not be removed ({error}): a run may have just begun to use it") from None


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
