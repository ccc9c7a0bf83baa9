"""What a frozen network says of each view of each image, computed once; the only module with HDF5.

The store is a directory of shards per key, and the key digests everything that can change a value.
A row is found by (SHA-256 of the image file, view). A shard is written under another name, then
renamed: it is whole or absent. data/features.h5 is assembled from the store in the order of
images.csv, so that its bytes do not depend on how the store was filled.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
from pipeline.params import Augmentation

FEATURES = Path("data/features.h5")
SCHEMA = 1
SHARD_BYTES = 32 * 2**20
SHARD_ROWS = 1024
log = logging.getLogger("pipeline")

Row = tuple[str, int]  # SHA-256 of the image file, view


class OverBudgetError(ValueError):
    """The rows asked for would take more than the limit."""


@dataclass(frozen=True)
class Features:
    """data/features.h5, mapped into memory: `values` (n_images, n_views, d) float32.

    `sha256` (n_images,) names the images; `provenance` says how the values were made.
    """

    values: np.ndarray
    sha256: list[str]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Computation:
    """A frozen network from uint8 pixels to float32 rows, and everything that can change a row."""

    module: nn.Module
    preprocessing: Preprocessing
    augmentation: Augmentation
    engine: str
    precision: str
    device: torch.device
    row_shape: tuple[int, ...]
    description: dict[str, Any]

    def key(self, view: int) -> str:
        """The key of the store: the augmentation counts for views other than 0."""
        augmentation = self.augmentation.model_dump(mode="json") if view else None
        return digest({**self.description, "augmentation": augmentation})[:32]


def computation(
    module: nn.Module,
    backbone: Backbone,
    cut: str,
    augmentation: Augmentation,
    requested_engine: str,
    precision: str,
    device: torch.device,
) -> Computation:
    """Resolve the engine and describe `module`: `backbone` from its pixels to `cut`."""
    engine.check_precision("features.precision", precision, device)
    example = np.zeros((engine.BATCH, *[backbone.preprocessing.crop] * 2, 3), np.uint8)
    chosen = engine.choose_engine(requested_engine, module, example, device)
    with torch.no_grad():
        row_shape = tuple(module.eval()(torch.from_numpy(example[:1])).shape[1:])
    description = {
        "schema": SCHEMA,
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "cut": cut,
        "preprocessing": asdict(backbone.preprocessing),
        "precision": precision,
        "store_dtype": "fp32",
        "engine": chosen,
        "device": device.type,
        "versions": {
            library.__name__: library.__version__.partition("-")[0]
            for library in (torch, torchvision, timm, PIL, openvino)
        },
    }
    return Computation(module, backbone.preprocessing, augmentation, chosen, precision, device, row_shape, description)


class Store:
    """The rows of one computation that are on disk."""

    def __init__(self, computation: Computation) -> None:
        self.computation = computation
        self.root = Path(os.environ.get("DVC_ROOT", "."), "data", ".feature_store")
        self._rows: dict[Row, tuple[np.ndarray, int]] = {}
        for directory in {self._directory(0), self._directory(1)}:
            for shard in sorted(directory.glob("*.h5")):
                self._index(shard)

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Those of `rows` that are not on disk, each once, in order."""
        return [row for row in dict.fromkeys(rows) if row not in self._rows]

    def read(self, rows: Sequence[Row]) -> np.ndarray:
        """Values (len(rows), *row_shape) float32, in any order; KeyError for a missing row."""
        found = (self._rows[row] for row in rows)
        return np.stack([values[position] for values, position in found])

    def write(self, rows: Sequence[Row], values: np.ndarray) -> None:
        """Add one shard for view 0 and one for the others, whichever have rows."""
        is_plain = np.array([view == 0 for _, view in rows])
        for chosen, view in ((is_plain, 0), (~is_plain, 1)):
            if not chosen.any():
                continue
            directory = self._directory(view)
            part = [row for row, is_chosen in zip(rows, chosen, strict=True) if is_chosen]
            if not (directory / "key.json").exists():
                augmentation = self.computation.augmentation.model_dump(mode="json")
                described = {"augmentation": augmentation if view else None}
                write_json(directory / "key.json", self.computation.description | described)
            shard = directory / f"{digest(part)[:32]}.h5"
            with replacing(shard) as temporary, h5py.File(temporary, "w") as file:
                file["features"] = values[chosen]
                file["sha256"] = np.array([sha256.encode() for sha256, _ in part], "S64")
                file["view"] = np.array([view for _, view in part], np.int32)
            self._index(shard)

    def _directory(self, view: int) -> Path:
        return self.root / self.computation.key(view)

    def _index(self, shard: Path) -> None:
        try:
            with h5py.File(shard, "r") as file:
                values = _map(file, "features", shard)
                sha256, view = _map(file, "sha256", shard), _map(file, "view", shard)
            if values.shape != (len(sha256), *self.computation.row_shape) or len(view) != len(sha256):
                raise ValueError(f"rows of shape {values.shape}")
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s is damaged (%s); set aside, its rows are computed again", shard, error)
            shard.replace(shard.with_suffix(".damaged"))
            return
        for position, (name, number) in enumerate(zip(sha256.tolist(), view.tolist(), strict=True)):
            self._rows[name.decode(), number] = (values, position)


def _map(file: h5py.File, name: str, path: Path) -> np.ndarray:
    """Map a contiguous dataset into memory; refuse links and storage outside the file."""
    link = file.get(name, getlink=True)
    dataset = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise ValueError(f"{path}: {name} is no dataset of this file")
    offset = dataset.id.get_offset()
    if dataset.dtype.kind not in "fiS" or offset is None:
        raise ValueError(f"{path}: {name} is not plain contiguous numbers")
    return np.memmap(path, dataset.dtype, "r", offset, dataset.shape)


def fill(
    computation: Computation, paths: dict[str, Path], rows: Sequence[Row], workers: int, max_bytes: float | None = None
) -> Store:
    """Compute the rows that are missing; `paths` says where the image of each SHA-256 lies.

    Finished shards stay if this is interrupted. Raises ValueError before computing anything if the
    rows would take more than `max_bytes`.
    """
    store = Store(computation)
    missing = store.missing(rows)
    row_bytes = 4 * int(np.prod(computation.row_shape))
    wanted_bytes = row_bytes * len(set(rows))
    if max_bytes is not None and wanted_bytes > max_bytes:
        raise OverBudgetError(
            f"the cache at {computation.description['cut']} needs {wanted_bytes / 1e9:.3g} GB, over "
            f"runtime.store_max_gb ({max_bytes / 1e9:g}); take fewer views, a later cut or "
            "`boundary_cache: off`, or raise the limit"
        )
    name = computation.description["cut"]
    log.info(
        "features at %s: %d rows reused, %d to compute (%s, %s)",
        name,
        len(set(rows)) - len(missing),
        len(missing),
        computation.engine,
        computation.precision,
    )
    per_shard = max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))
    computed = progress(_compute(computation, paths, missing, workers), len(missing), "images", name)
    pending: list[tuple[Row, np.ndarray]] = []
    for pair in computed:
        pending.append(pair)
        if len(pending) == per_shard:
            _flush(store, pending)
    _flush(store, pending)
    return store


def _flush(store: Store, pending: list[tuple[Row, np.ndarray]]) -> None:
    if pending:
        store.write([row for row, _ in pending], np.stack([value for _, value in pending]))
        pending.clear()


def _compute(
    computation: Computation, paths: dict[str, Path], rows: Sequence[Row], workers: int
) -> Iterator[tuple[Row, np.ndarray]]:
    if not rows:
        return
    batches = [rows[i : i + engine.BATCH] for i in range(0, len(rows), engine.BATCH)]
    samples = [[Sample(paths[sha256], sha256, view) for sha256, view in rows] for rows in batches]
    pixels = load_batches(samples, computation.preprocessing, computation.augmentation, workers)
    outputs = engine.run(computation.module, pixels, computation.engine, computation.precision, computation.device)
    for batch, output in zip(batches, outputs, strict=True):
        if not np.isfinite(output).all():
            raise ValueError(f"{paths[batch[0][0]]} or a neighbour: its features are not finite")
        yield from zip(batch, output, strict=True)


def assemble(path: Path, store: Store, sha256: Sequence[str], views: int, provenance: dict[str, Any]) -> None:
    """Write `path`: all views of the images `sha256`, in this order, in bounded memory."""
    description = {
        **store.computation.description,
        **provenance,
        "augmentation": store.computation.augmentation.model_dump(mode="json"),
    }
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        shape = (len(sha256), views, *store.computation.row_shape)
        values = file.create_dataset("features", shape, np.float32)
        for start in range(0, len(sha256), SHARD_ROWS):
            part = sha256[start : start + SHARD_ROWS]
            rows = store.read([(name, view) for name in part for view in range(views)])
            values[start : start + len(part)] = rows.reshape(len(part), *shape[1:])
        file["sha256"] = np.array([name.encode() for name in sha256], "S64")
        file.attrs["provenance"] = json.dumps(description, sort_keys=True)


def read(path: Path = FEATURES) -> Features:
    """Map data/features.h5 into memory; ValueError if it is not what `assemble` writes."""
    with h5py.File(path, "r") as file:
        values, sha256 = _map(file, "features", path), _map(file, "sha256", path)
        provenance = json.loads(str(file.attrs["provenance"]))
    if values.ndim != 3 or len(sha256) != len(values) or provenance.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not written by this version; run: dvc repro extract")
    return Features(values, [name.decode() for name in sha256.tolist()], provenance)
