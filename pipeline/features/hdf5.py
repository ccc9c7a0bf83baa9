"""The two kinds of HDF5 file: shards of the feature store, and data/features.h5. No other module opens them.

Both hold plain arrays. A file that holds anything else (links, virtual datasets, further objects) is refused. A shard
is named by the SHA-256 of its bytes, so that damage is found before it is parsed.
"""

import hashlib
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from pipeline.files import replacing
from pipeline.network.plans import BackbonePlan
from pipeline.params import Augmentation, Record

FEATURES = Path("data/features.h5")
Blocks = Iterable[np.ndarray]  # features (…, n_views, *shape) of the next images, until all have come
Row = tuple[str, int]  # SHA-256 of the image file, code of the view (views.py)


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
    """A shard that was checked: its rows, and the offset in the file of their values (n_rows, *shape), in bytes.

    `rounding` (n_rows,) float32: the largest error of storing a row, relative to the row's largest value.
    """

    path: Path
    key: str
    rows: list[Row]
    rounding: np.ndarray
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


def write_shard(directory: Path, key: str, rows: Sequence[Row], values: np.ndarray, rounding: np.ndarray) -> Path:
    """Write a shard for the key `key`; its path. The same rows always give the same name and bytes."""
    with h5py.File("shard", "w", driver="core", backing_store=False) as file:
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
    _check_plain(path)
    with path.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != path.stem:
            raise ValueError("its bytes do not have the SHA-256 that it is named by")
    return parse_shard(path)


def parse_shard(path: Path) -> Shard:
    """As read_shard, without comparing the digest: changed values are not noticed."""
    _check_plain(path)
    try:
        with h5py.File(path, "r") as file:
            arrays, key = _checked(file, {"features", "rounding", "sha256", "view"}, "key")
            values, rounding, names, views = (arrays[name] for name in ("features", "rounding", "sha256", "view"))
            if not (len(values),) == rounding.shape == names.shape == views.shape:
                raise ValueError(f"its arrays have the shapes {[array.shape for array in arrays.values()]}")
            if (names.dtype, views.dtype, rounding.dtype) != ("S64", np.int32, np.float32):
                raise ValueError(f"its arrays have the types {[array.dtype.str for array in arrays.values()]}")
            errors, numbers = rounding[()], views[()]
            if not np.isfinite(errors).all() or (numbers < 0).any():
                raise ValueError("it holds views below 0 or rounding errors that are no numbers")
            rows = [(name.decode(), view) for name, view in zip(names[()].tolist(), numbers.tolist(), strict=True)]
            return Shard(path, key, rows, errors, values.id.get_offset(), values.shape[1:], values.dtype)
    except FileNotFoundError:
        raise
    except (OSError, KeyError, RuntimeError, TypeError) as error:  # raised by h5py; TypeError: a scalar has no length
        raise ValueError(" ".join(str(error).split())) from None


def _check_plain(path: Path) -> None:
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
            if values.ndim < 3 or not is_one_size or values.shape[2:] != evaluation.shape[2:]:
                raise ValueError(f"its arrays have the shapes {[array.shape for array in arrays.values()]}")
            if values.dtype.kind != "f" or evaluation.dtype != values.dtype or names.dtype != "S64":
                raise ValueError(f"its arrays have the types {[array.dtype.str for array in arrays.values()]}")
            return Features(
                values=np.memmap(path, values.dtype, "r", values.id.get_offset(), values.shape),
                evaluation=np.memmap(path, evaluation.dtype, "r", evaluation.id.get_offset(), evaluation.shape),
                sha256=[name.decode() for name in names[()].tolist()],
                provenance=Provenance.model_validate_json(provenance),
            )
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; run: dvc repro extract") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno:  # of the system (no permission, a lock), not of the content
            raise OSError(f"{path}: {reason}") from None
        raise ValueError(f"{path}: not written by this pipeline ({reason}); run: dvc repro extract") from None


def _checked(file: h5py.File, names: set[str], attribute: str) -> tuple[dict[str, h5py.Dataset], str]:
    """The datasets `names` and a text; ValueError for anything more, for links, and for storage outside the file."""
    if set(file) != names or set(file.attrs) != {attribute}:
        raise ValueError(f"it holds {list(file)} and {list(file.attrs)}, not {sorted(names)} and [{attribute!r}]")
    arrays = {}
    for name in sorted(names):
        dataset = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
        if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual or dataset.attrs:
            raise ValueError(f"{name} is no plain dataset of this file")
        offset = dataset.id.get_offset()
        if dataset.dtype.kind not in "fiuS" or offset is None:
            raise ValueError(f"{name} is not contiguous and plain")
        if offset + dataset.nbytes > Path(file.filename).stat().st_size:
            raise ValueError(f"{name} is cut short")
        arrays[name] = dataset
    text = file.attrs[attribute]
    if not isinstance(text, str):
        raise ValueError(f"{attribute} is no text")
    return arrays, text
