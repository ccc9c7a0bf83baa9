"""The HDF5 files: shards of the feature store, the index of a directory of them, and data/features.h5.

No other module opens them. All hold plain arrays. A file that holds anything else (links, virtual datasets, further
objects) is refused. A shard is named by the SHA-256 of its bytes; an index holds the SHA-256 of its arrays.
"""

import errno
import hashlib
import math
import stat
from binascii import unhexlify
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import h5py
import numpy as np
from h5py import h5a, h5d, h5l, h5o, h5s  # pyright: ignore[reportAttributeAccessIssue]

from pipeline.files import replacing
from pipeline.network.plans import BackbonePlan
from pipeline.params import Augmentation, Record

FEATURES = Path("data/features.h5")
Blocks = Iterable[np.ndarray]  # features (…, n_views, *shape) of the next images, until all have come
Row = tuple[str, int]  # SHA-256 of the image file, code of the view (views.py)
SORTABLE = np.dtype("S36")
INDEX = {  # of rows: the row, its shard by number, its position there, its rounding; of shards, by number
    **{"row": SORTABLE, "shard": np.dtype(np.int32), "position": np.dtype(np.int32), "rounding": np.dtype(np.float32)},
    **{"name": np.dtype("S64"), "offset": np.dtype(np.int64), "n_rows": np.dtype(np.int32)},
}


class Provenance(Record):
    """How the values of data/features.h5 were computed; `engine` is openvino or torch.

    `training_views` are codes (views.py): the same code stands for the same pixels. `evaluation_views` are names.
    `largest_rounding`: the largest error of storing a row, relative to the largest value of the row.
    """

    backbone: BackbonePlan
    augmentation: Augmentation
    training_views: tuple[int, ...]
    evaluation_views: tuple[str, ...]
    engine: str
    precision: str
    store_dtype: str
    largest_rounding: float


@dataclass(frozen=True)
class Features:
    """data/features.h5, mapped into memory, as `features.store_dtype` says.

    `values` (n_images, n_views, *shape) of the training views, `evaluation` (n_images, n_evaluation_views, *shape).
    `sha256` (n_images) names the images; `provenance` says how the values were computed.
    """

    values: np.ndarray
    evaluation: np.ndarray
    sha256: list[str]
    provenance: Provenance


@dataclass(frozen=True)
class Shard:
    """What a shard holds: its rows, `sortable`, and the offset in the file of their values (n_rows, *shape), in bytes.

    `rounding` (n_rows,) float32: the largest error of storing a row, relative to the row's largest value.
    """

    path: Path
    key: str
    sortable: np.ndarray
    rounding: np.ndarray
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def views(self) -> np.ndarray:
        """The codes (n_rows,) of the views."""
        return self.sortable.view(np.uint8).reshape(-1, SORTABLE.itemsize)[:, 32:].copy().view(">u4")[:, 0]

    @property
    def rows(self) -> list[Row]:
        """The rows, in the order of their values."""
        names = [name[:32].hex() for name in self.sortable.view(f"V{SORTABLE.itemsize}").tolist()]
        return list(zip(names, self.views.tolist(), strict=True))


def sortable(rows: Sequence[Row]) -> np.ndarray:
    """Rows (n,) as bytes of a fixed width: the digest of the image file, then the code of the view."""
    return _sortable("".join(name for name, _ in rows).encode(), [view for _, view in rows])


def _sortable(names: bytes, views: Sequence[int] | np.ndarray) -> np.ndarray:
    """ValueError unless `names` are as many digests of 64 hexadecimal digits as there are views."""
    digests = unhexlify(names)
    if len(digests) != 32 * len(views):
        raise ValueError("its images are not named by SHA-256")
    joined = np.empty((len(views), SORTABLE.itemsize), np.uint8)
    joined[:, :32] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
    joined[:, 32:] = np.asarray(views, ">u4").reshape(-1, 1).view(np.uint8)
    return joined.view(SORTABLE)[:, 0]


@dataclass(frozen=True)
class _Array:
    """A plain dataset; of h5py the low level, which is three times as fast where there are thousands of shards."""

    stored: Any
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def offset(self) -> int:
        return self.stored.get_offset()

    def read(self) -> np.ndarray:
        values = np.empty(self.shape, self.dtype)
        self.stored.read(h5s.ALL, h5s.ALL, values)
        return values


def write_shard(directory: Path, key: str, rows: Sequence[Row], values: np.ndarray, rounding: np.ndarray) -> Path:
    """Write a shard for the key `key`; its path. The same rows always give the same name and bytes."""
    # A name of its own: pixels and features are written by two threads, and HDF5 opens no name twice, even in memory
    with h5py.File(uuid4().hex, "w", driver="core", backing_store=False) as file:
        file["features"] = values
        file["rounding"] = rounding
        file["sha256"] = np.array([name.encode() for name, _ in rows], "S64")
        file["view"] = np.array([view for _, view in rows], np.int32)
        file.attrs["key"] = key
        file.flush()
        content = file.id.get_file_image()
    path = directory / f"{hashlib.sha256(content).hexdigest()}.h5"
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


def read_shard(path: Path) -> Shard:
    """Check a shard and read which rows it holds; ValueError if it is not, byte for byte, what was written."""
    check_plain(path)
    with path.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != path.stem:
            raise ValueError("its bytes do not have the SHA-256 that it is named by")
    return parse_shard(path)


def parse_shard(path: Path) -> Shard:
    """As read_shard, without comparing the digest, and without reading the values: their damage is not noticed."""
    check_plain(path)
    try:
        with h5py.File(path, "r") as file:
            arrays, key = _checked(file, {"features", "rounding", "sha256", "view"}, "key")
            values, rounding, names, views = (arrays[name] for name in ("features", "rounding", "sha256", "view"))
            if not values.shape[:1] == rounding.shape == names.shape == views.shape != ():
                raise ValueError(f"its arrays have the shapes {[array.shape for array in arrays.values()]}")
            if (names.dtype, views.dtype, rounding.dtype) != ("S64", np.int32, np.float32):
                raise ValueError(f"its arrays have the types {[array.dtype.str for array in arrays.values()]}")
            errors, numbers = rounding.read(), views.read()
            if not np.isfinite(errors).all() or (numbers < 0).any():
                raise ValueError("it holds views below 0 or rounding errors that are no numbers")
            rows = _sortable(names.read().tobytes(), numbers)
            return Shard(path, key, rows, errors, values.offset, values.shape[1:], values.dtype)
    except FileNotFoundError:
        raise
    except (OSError, KeyError, RuntimeError, TypeError) as error:  # raised by h5py; TypeError: a scalar has no length
        if isinstance(error, OSError) and error.errno == errno.ESTALE:  # another machine has just removed it
            raise
        raise ValueError(" ".join(str(error).split())) from None


def write_index(path: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an index of the shards of the key `key`: the arrays of INDEX."""
    with replacing(path) as temporary:
        try:
            with h5py.File(temporary, "w") as file:
                for name in INDEX:
                    file[name] = arrays[name]
                file.attrs["digest"] = _digest(key, arrays)
        except RuntimeError as error:  # raised by HDF5 if the disk is full when it closes the file
            raise OSError(str(error)) from None


def read_index(path: Path, key: str) -> dict[str, np.ndarray]:
    """The arrays of INDEX; ValueError if they are not what `write_index` wrote for `key`, or point to nothing."""
    check_plain(path)
    try:
        with h5py.File(path, "r") as file:
            found, digest = _checked(file, {*INDEX}, "digest")
            if any((len(found[name].shape), found[name].dtype) != (1, dtype) for name, dtype in INDEX.items()):
                raise ValueError("its arrays have other types")
            arrays = {name: found[name].read() for name in INDEX}
    except (OSError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    rows, shard, position, rounding, *shards = arrays.values()
    if len({*map(len, (rows, shard, position, rounding))}) > 1 or len({*map(len, shards)}) > 1:
        raise ValueError("its arrays have other shapes")
    is_in_range = (shard >= 0).all() and (shard < len(shards[0])).all() and (position >= 0).all()
    if not (is_in_range and (position < arrays["n_rows"][shard]).all() and (arrays["offset"] >= 0).all()):
        raise ValueError("it points to rows that cannot be")
    if digest != _digest(key, arrays):
        raise ValueError("its arrays do not have the digest that it holds")
    return arrays


def _digest(key: str, arrays: Mapping[str, np.ndarray]) -> str:
    total = hashlib.sha256(key.encode())
    for name in INDEX:
        total.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return total.hexdigest()


def check_plain(path: Path) -> None:
    """ValueError for a directory, a link, or a pipe, which would block."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("it is no plain file")


def write_features(
    path: Path, values: Blocks, evaluation: Blocks | None, sha256: Sequence[str], provenance: Provenance
) -> None:
    """Write the features of training and evaluation views; `evaluation` None: the same views, which are stored once."""
    with replacing(path) as temporary:
        try:
            with h5py.File(temporary, "w") as file:
                _write_blocks(file, "features", len(sha256), values)
                if evaluation is None:
                    file["evaluation_features"] = file["features"]  # a second name of the same values
                else:
                    _write_blocks(file, "evaluation_features", len(sha256), evaluation)
                file["sha256"] = np.array([name.encode() for name in sha256], "S64")
                file.attrs["provenance"] = provenance.model_dump_json()
        except RuntimeError as error:  # raised by HDF5 if the disk is full when it closes the file
            raise OSError(str(error)) from None


def _write_blocks(file: h5py.File, name: str, n_images: int, blocks: Blocks) -> None:
    start = 0
    for block in blocks:
        dataset = file.require_dataset(name, (n_images, *block.shape[1:]), block.dtype, exact=True)
        dataset[start : start + len(block)] = block
        start += len(block)


def read_features(path: Path = FEATURES) -> Features:
    """Map data/features.h5 into memory; ValueError if it is not what `write_features` writes."""
    try:
        with h5py.File(path, "r") as file:
            arrays, provenance = _checked(file, {"features", "evaluation_features", "sha256"}, "provenance")
            values, evaluation, names = (arrays[name] for name in ("features", "evaluation_features", "sha256"))
            is_one_size = values.shape[:1] == evaluation.shape[:1] == names.shape
            if len(values.shape) < 3 or not is_one_size or values.shape[2:] != evaluation.shape[2:]:
                raise ValueError(f"its arrays have the shapes {[array.shape for array in arrays.values()]}")
            if values.dtype.kind != "f" or evaluation.dtype != values.dtype or names.dtype != "S64":
                raise ValueError(f"its arrays have the types {[array.dtype.str for array in arrays.values()]}")
            return Features(
                values=np.memmap(path, values.dtype, "r", values.offset, values.shape),
                evaluation=np.memmap(path, evaluation.dtype, "r", evaluation.offset, evaluation.shape),
                sha256=[name.decode() for name in names.read().tolist()],
                provenance=Provenance.model_validate_json(provenance),
            )
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; run: dvc repro extract") from None
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno:  # of the system (no permission, a lock), not of the content
            raise OSError(f"{path}: {reason}") from None
        raise ValueError(f"{path}: not written by this pipeline ({reason}); run: dvc repro extract") from None


def _checked(file: h5py.File, names: set[str], attribute: str) -> tuple[dict[str, _Array], str]:
    """The datasets `names` and a text; ValueError for anything more, for links, and for storage outside the file."""
    stored, size, found = file.id, Path(file.filename).stat().st_size, set()
    stored.links.iterate(found.add)
    if found != {name.encode() for name in names} or {*file.attrs} != {attribute}:
        raise ValueError(f"it holds {list(file)} and {list(file.attrs)}, not {sorted(names)} and [{attribute!r}]")
    arrays = {}
    for name in sorted(names):
        is_linked = stored.links.get_info(name.encode()).type != h5l.TYPE_HARD
        dataset: Any = None if is_linked else h5o.open(stored, name.encode())
        if not isinstance(dataset, h5d.DatasetID) or h5a.get_num_attrs(dataset):
            raise ValueError(f"{name} is no plain dataset of this file")
        plan, array = dataset.get_create_plist(), _Array(dataset, dataset.shape, dataset.dtype)
        is_contiguous = plan.get_layout() == h5d.CONTIGUOUS and not plan.get_external_count()
        if not is_contiguous or array.dtype.kind not in "fiuS" or dataset.get_offset() is None:
            raise ValueError(f"{name} is not contiguous and plain")
        if array.offset + array.dtype.itemsize * math.prod(array.shape) > size:
            raise ValueError(f"{name} is cut short")
        arrays[name] = array
    text = file.attrs[attribute]
    if not isinstance(text, str):
        raise ValueError(f"{attribute} is no text")
    return arrays, text
