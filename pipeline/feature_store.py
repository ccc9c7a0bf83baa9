"""What a frozen network says of each view of each image, computed once; the only module with HDF5.

The store is a directory of shards per key, and the key digests everything that can change a value. A row is found by
(SHA-256 of the image file, view). A shard is whole or absent. data/features.h5 is assembled from the store in the
order of images.csv, so that its bytes do not depend on how the store was filled.
"""

import json
import logging
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
from pipeline.params import Augmentation, FeatureOptions

FEATURES = Path("data/features.h5")
SCHEMA = 1
SHARD_BYTES = 32 * 2**20
SHARD_ROWS = 1024
log = logging.getLogger("pipeline")

Row = tuple[str, int]  # SHA-256 of the image file, view


@dataclass(frozen=True)
class Features:
    """data/features.h5, mapped into memory: `values` (n_images, n_views, d) float32.

    `sha256` (n_images) names the images; `provenance` says how the values were made.
    """

    values: np.ndarray
    sha256: list[str]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Computation:
    """A frozen network from uint8 pixels to float32 rows, and in `description` everything that can change a row."""

    module: nn.Module
    preprocessing: Preprocessing
    augmentation: Augmentation
    device: torch.device
    row_shape: tuple[int, ...]
    description: dict[str, Any]

    def describe(self, view: int) -> dict[str, Any]:
        """What a row of this view depends on: on the augmentation only if it is not view 0."""
        augmentation = self.augmentation.model_dump(mode="json") if view else None
        return {**self.description, "augmentation": augmentation}


def computation(
    module: nn.Module,
    backbone: Backbone,
    cut: str,
    augmentation: Augmentation,
    options: FeatureOptions,
    device: torch.device,
) -> Computation:
    """Resolve the engine and describe `module`, which is `backbone` from pixels to `cut`."""
    engine.check_precision("features.precision", options.precision, device)
    example = torch.zeros(engine.BATCH, *[backbone.preprocessing.crop] * 2, 3, dtype=torch.uint8)
    with torch.no_grad():
        row_shape = tuple(module.eval()(example[:1]).shape[1:])
    description = {
        "schema": SCHEMA,
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "cut": cut,
        "preprocessing": backbone.preprocessing.model_dump(mode="json"),
        "precision": options.precision,
        "engine": engine.choose_engine(options.engine, module, example.numpy(), device),
        "device": device.type,
        "versions": {library.__name__: library.__version__ for library in (torch, torchvision, timm, PIL, openvino)},
    }
    return Computation(module, backbone.preprocessing, augmentation, device, row_shape, description)


class Store:
    """The rows of one computation that are on disk."""

    def __init__(self, computation: Computation) -> None:
        self._computation = computation
        self._root = Path(os.environ.get("DVC_ROOT", "."), "data", ".feature_store")
        self._rows: dict[Row, tuple[np.ndarray, int]] = {}
        for directory in (self._directory(0), self._directory(1)):
            for shard in sorted(directory.glob("*.h5")):
                self._index(shard)

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Those of `rows` that are not on disk, each once, in order."""
        return [row for row in dict.fromkeys(rows) if row not in self._rows]

    def read(self, rows: Sequence[Row]) -> np.ndarray:
        """Values (len(rows), *row_shape) float32, in any order; KeyError for a missing row."""
        return np.stack([values[position] for values, position in (self._rows[row] for row in rows)])

    def write(self, rows: Sequence[Row], values: Sequence[np.ndarray]) -> None:
        """Add one shard for view 0 and one for the others, whichever have rows."""
        for is_plain in (True, False):
            part = [i for i, (_, view) in enumerate(rows) if (view == 0) == is_plain]
            if part:
                description = self._computation.describe(rows[part[0]][1])
                directory = self._directory(rows[part[0]][1])
                if not (directory / "key.json").exists():
                    write_json(directory / "key.json", description)
                shard = directory / f"{digest([rows[i] for i in part])[:32]}.h5"
                with replacing(shard) as temporary, h5py.File(temporary, "w") as file:
                    file["features"] = np.stack([values[i] for i in part])
                    file["sha256"] = np.array([rows[i][0].encode() for i in part], "S64")
                    file["view"] = np.array([rows[i][1] for i in part], np.int32)
                self._index(shard)

    def _directory(self, view: int) -> Path:
        return self._root / digest(self._computation.describe(view))[:32]

    def _index(self, shard: Path) -> None:
        try:
            with h5py.File(shard, "r") as file:
                values, names, views = (_map(file, name) for name in ("features", "sha256", "view"))
            if values.shape != (len(names), *self._computation.row_shape) or len(views) != len(names):
                raise ValueError(f"rows of shape {values.shape[1:]}")
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s is damaged (%s); set aside, its rows are computed again", shard, error)
            shard.replace(shard.with_suffix(".damaged"))
            return
        for position, (name, view) in enumerate(zip(names.tolist(), views.tolist(), strict=True)):
            self._rows[name.decode(), view] = (values, position)


def _map(file: h5py.File, name: str) -> np.ndarray:
    """Map a contiguous dataset into memory; ValueError for links and for storage outside the file."""
    dataset = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise ValueError(f"{name} is no dataset of this file")
    offset = dataset.id.get_offset()
    if dataset.dtype.kind not in "fiS" or offset is None:
        raise ValueError(f"{name} is not contiguous and plain")
    return np.memmap(file.filename, dataset.dtype, "r", offset, dataset.shape)


def fill(
    computation: Computation, paths: dict[str, Path], rows: Sequence[Row], workers: int, max_bytes: float = float("inf")
) -> Store:
    """Compute the rows that are missing; `paths` says where the image of each SHA-256 lies.

    Finished shards stay if this is interrupted. Raises ValueError before computing anything if the rows would take
    more than `max_bytes`.
    """
    store, cut = Store(computation), computation.description["cut"]
    missing, n_rows = store.missing(rows), len(set(rows))
    row_bytes = 4 * int(np.prod(computation.row_shape))
    if n_rows * row_bytes > max_bytes:
        raise ValueError(
            f"params.yaml: runtime.store_max_gb: {max_bytes / 1e9:g}, but the cache at {cut} needs "
            f"{n_rows * row_bytes / 1e9:.3g} GB; take fewer views, a later cut or `boundary_cache: off`, or raise it"
        )
    how = f"{computation.description['engine']}, {computation.description['precision']}"
    log.info("features at %s: %d rows reused, %d to compute (%s)", cut, n_rows - len(missing), len(missing), how)
    computed = iter(progress(_compute(computation, paths, missing, workers), len(missing), "images", cut))
    per_shard = max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))
    for start in range(0, len(missing), per_shard):
        part = missing[start : start + per_shard]
        store.write(part, list(islice(computed, len(part))))
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
        shape = (len(sha256), views, *store.read([(sha256[0], 0)]).shape[1:])
        values = file.create_dataset("features", shape, np.float32)
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
            values, names = _map(file, "features"), _map(file, "sha256")
            provenance = json.loads(str(file.attrs["provenance"]))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not written by this pipeline ({error}); run: dvc repro extract") from None
    return Features(values, [name.decode() for name in names.tolist()], provenance)
