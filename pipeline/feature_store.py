"""What a frozen network says of each view of each image, computed once; the only module with HDF5.

The store is a directory of shards per key, and the key digests everything that can change a value. A row is found by
(SHA-256 of the image file, view). A shard is whole or absent. data/features.h5 is assembled from the store in the
order of images.csv, so that its bytes do not depend on how the store was filled.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openvino
import PIL
import timm
import torch
import torchvision
from torch import nn

from pipeline import engine
from pipeline.backbones import Backbone
from pipeline.files import digest, replacing, write_json
from pipeline.images import Preprocessing, Sample, load_batches
from pipeline.logs import progress
from pipeline.params import STORE_DTYPES, Augmentation, FeatureOptions

FEATURES = Path("data/features.h5")
SCHEMA = 2
SHARD_BYTES = 32 * 2**20
SHARD_ROWS = 1024
log = logging.getLogger("pipeline")

Row = tuple[str, int]  # SHA-256 of the image file, view


@dataclass(frozen=True)
class Features:
    """data/features.h5, mapped into memory: `values` (n_images, n_views, *shape), as `features.store_dtype` says.

    `sha256` (n_images) names the images; `provenance` says how the values were made.
    """

    values: np.ndarray
    sha256: list[str]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Computation:
    """A frozen network from uint8 pixels to rows, and in `description` everything that can change one."""

    module: nn.Module
    preprocessing: Preprocessing
    augmentation: Augmentation
    device: torch.device
    row_shape: tuple[int, ...]
    description: dict[str, Any]

    @property
    def dtype(self) -> np.dtype:
        """In which rows are stored."""
        return np.dtype(STORE_DTYPES[self.description["store_dtype"]])

    def describe(self, view: int) -> dict[str, Any]:
        """What a row of this view depends on: on the augmentation only if it is not view 0."""
        augmentation = self.augmentation.model_dump(mode="json") if view else None
        return {**self.description, "augmentation": augmentation}


def computation(
    module: nn.Module,
    backbone: Backbone,
    cut: str,
    pool: str,
    augmentation: Augmentation,
    options: FeatureOptions,
    device: torch.device,
) -> Computation:
    """Resolve the engine and describe `module`, which is `backbone` from pixels to `cut`, pooled."""
    engine.check_precision("features.precision", options.precision, device)
    example = torch.zeros(engine.BATCH, *[backbone.preprocessing.crop] * 2, 3, dtype=torch.uint8)
    with torch.no_grad():
        row_shape = tuple(module.eval()(example[:1]).shape[1:])
    description = {
        "schema": SCHEMA,
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "cut": cut,
        "pool": pool,
        "preprocessing": backbone.preprocessing.model_dump(mode="json"),
        "precision": options.precision,
        "store_dtype": options.store_dtype,
        "engine": engine.choose_engine(options.engine, module, example.numpy(), device),
        "device": device.type,
        "versions": {library.__name__: library.__version__ for library in (torch, torchvision, timm, PIL, openvino)},
    }
    return Computation(module, backbone.preprocessing, augmentation, device, row_shape, description)


@dataclass(frozen=True)
class _Shard:
    path: Path
    offset: int  # of the values in the file, which follow each other without gaps
    rounding: np.ndarray  # (rows,) largest rounding error of each row, relative to its largest value


class Store:
    """The rows of one computation that are on disk."""

    def __init__(self, computation: Computation) -> None:
        self._computation = computation
        self._dtype = computation.dtype
        self._root = Path(os.environ.get("DVC_ROOT", "."), "data", ".feature_store")
        self._rows: dict[Row, tuple[_Shard, int]] = {}
        for directory in (self._directory(0), self._directory(1)):
            for path in sorted(directory.glob("*.h5")):
                self._index(path)

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Those of `rows` that are not on disk, each once, in order."""
        return [row for row in dict.fromkeys(rows) if row not in self._rows]

    def read(self, rows: Sequence[Row]) -> np.ndarray:
        """Values (len(rows), *row_shape) as stored, in any order; KeyError for a missing row."""
        values = np.empty((len(rows), *self._computation.row_shape), self._dtype)
        for value, row in zip(values, rows, strict=True):
            shard, position = self._rows[row]
            with shard.path.open("rb", buffering=0) as file:  # not mapped: what is read does not stay in memory
                file.seek(shard.offset + position * value.nbytes)
                if file.readinto(value.reshape(-1).data.cast("B")) != value.nbytes:
                    raise OSError(f"{shard.path} was cut short while it was read")
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
                description = self._computation.describe(rows[part[0]][1])
                directory = self._directory(rows[part[0]][1])
                if not (directory / "key.json").exists():
                    write_json(directory / "key.json", description)
                path = directory / f"{digest([rows[i] for i in part])[:32]}.h5"
                with replacing(path) as temporary, h5py.File(temporary, "w") as file:
                    file["features"] = stored[part]
                    file["rounding"] = rounding[part]
                    file["sha256"] = np.array([rows[i][0].encode() for i in part], "S64")
                    file["view"] = np.array([rows[i][1] for i in part], np.int32)
                self._index(path)

    def _rounded(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values in the stored type, and of each row the largest error relative to its largest value."""
        with np.errstate(over="ignore"):
            stored = values.astype(self._dtype)
        largest = np.abs(values).reshape(len(values), -1).max(axis=1)
        if not np.isfinite(stored).all():
            raise ValueError(
                f"params.yaml: features.store_dtype: {self._computation.description['store_dtype']} cannot hold "
                f"{largest.max():.4g}, found at {self._computation.description['cut']}; expected fp32"
            )
        error = np.abs(stored.astype(np.float32) - values).reshape(len(values), -1).max(axis=1)
        return stored, error / np.maximum(largest, np.finfo(np.float32).tiny)

    def _directory(self, view: int) -> Path:
        return self._root / digest(self._computation.describe(view))[:32]

    def _index(self, path: Path) -> None:
        shape, dtype = self._computation.row_shape, self._dtype
        try:
            with h5py.File(path, "r") as file:
                names, views, rounding = (np.array(_plain(file, name)) for name in ("sha256", "view", "rounding"))
                values = _plain(file, "features")
                is_row_each = (values.shape, values.dtype) == ((len(names), *shape), dtype)
                if not is_row_each or not views.shape == rounding.shape == (len(names),) or names.dtype != "S64":
                    raise ValueError(f"values of shape {values.shape} and type {values.dtype}")
                shard = _Shard(path, values.id.get_offset(), rounding)
            if shard.offset + len(names) * math.prod(shape) * dtype.itemsize > path.stat().st_size:
                raise ValueError("cut short")
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s is damaged (%s); set aside, its rows are computed again", path, error)
            path.replace(path.with_suffix(".damaged"))
            return
        for position, (name, view) in enumerate(zip(names.tolist(), views.tolist(), strict=True)):
            self._rows[name.decode(), view] = (shard, position)


def _plain(file: h5py.File, name: str) -> h5py.Dataset:
    """A contiguous dataset of numbers or bytes; ValueError for links and for storage outside the file."""
    dataset = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise ValueError(f"{name} is no dataset of this file")
    if dataset.dtype.kind not in "fiS" or dataset.id.get_offset() is None:
        raise ValueError(f"{name} is not contiguous and plain")
    return dataset


def fill(computation: Computation, paths: dict[str, Path], rows: Sequence[Row], workers: int, max_gb: float) -> Store:
    """Compute the rows that are missing; `paths` says where the image of each SHA-256 lies.

    Finished shards stay if this is interrupted. Raises ValueError before computing anything if the rows would take
    more than `max_gb` (GB).
    """
    store, cut = Store(computation), computation.description["cut"]
    missing, n_rows = store.missing(rows), len(set(rows))
    row_bytes = computation.dtype.itemsize * math.prod(computation.row_shape)
    size = n_rows * row_bytes / 1e9
    if size > max_gb:
        raise ValueError(
            f"params.yaml: runtime.store_max_gb: {max_gb:g}, but the cache at {cut} needs {size:.3g} GB; take fewer "
            "views, a later cut, `features.store_dtype: fp16` or `boundary_cache: off`, or raise it"
        )
    how = f"{computation.description['engine']}, {computation.description['precision']}"
    n_reused = n_rows - len(missing)
    log.info("cache at %s (%.3g GB): %d rows reused, %d to compute (%s)", cut, size, n_reused, len(missing), how)
    computed = iter(progress(_compute(computation, paths, missing, workers), len(missing), "views", cut))
    per_shard = max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))
    for start in range(0, len(missing), per_shard):
        part = missing[start : start + per_shard]
        store.write(part, np.stack(list(islice(computed, len(part)))))
    next(computed, None)  # ends the bar
    return store


def _compute(
    computation: Computation, paths: dict[str, Path], rows: Sequence[Row], workers: int
) -> Iterator[np.ndarray]:
    batches = [rows[i : i + engine.BATCH] for i in range(0, len(rows), engine.BATCH)]
    samples = [[Sample(paths[name], name, view) for name, view in batch] for batch in batches]
    pixels = load_batches(samples, computation.preprocessing, computation.augmentation, workers)
    how = computation.description["engine"], computation.description["precision"]
    outputs = engine.run(computation.module, pixels, *how, computation.device)
    for batch, output in zip(batches, outputs, strict=True):
        if not np.isfinite(output).all():
            raise ValueError(f"{paths[batch[0][0]]} or a neighbour gives features that are not finite")
        yield from output


def assemble(store: Store, sha256: Sequence[str], views: int, provenance: dict[str, Any], path: Path) -> None:
    """Write `path`: all views of the images `sha256`, in this order, in bounded memory."""
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        example = store.read([(sha256[0], 0)])
        shape = (len(sha256), views, *example.shape[1:])
        values = file.create_dataset("features", shape, example.dtype)
        for start in range(0, len(sha256), SHARD_ROWS):
            part = sha256[start : start + SHARD_ROWS]
            rows = store.read([(name, view) for name in part for view in range(views)])
            values[start : start + len(part)] = rows.reshape(len(part), *shape[1:])
        file["sha256"] = np.array([name.encode() for name in sha256], "S64")
        file.attrs["provenance"] = json.dumps(provenance, sort_keys=True)


def read(path: Path = FEATURES) -> Features:
    """Map data/features.h5 into memory; ValueError if it is not what `assemble` writes."""
    try:
        with h5py.File(path, "r") as file:
            values, names = _plain(file, "features"), np.array(_plain(file, "sha256"))
            values = np.memmap(path, values.dtype, "r", values.id.get_offset(), values.shape)
            provenance = json.loads(str(file.attrs["provenance"]))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not written by this pipeline ({error}); run: dvc repro extract") from None
    return Features(values, [name.decode() for name in names.tolist()], provenance)
