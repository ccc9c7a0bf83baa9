"""Extraction: run a frozen network over the views that the feature store lacks, and assemble data/features.h5.

The assembled file is in the order of images.csv, so that its bytes do not depend on how the store was filled.
"""

import logging
import os
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from pipeline.dataset import decoding
from pipeline.dataset.manifest import Images
from pipeline.features import hdf5
from pipeline.features.hdf5 import Provenance, Row
from pipeline.features.store import Key, Store
from pipeline.features.views import Sample, load_batches
from pipeline.logs import progress
from pipeline.network import engine
from pipeline.network.cuts import Prefix
from pipeline.network.device import BATCH
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import Augmentation, FeatureOptions

SHARD_BYTES = 32 * 2**20
SHARD_ROWS = 256  # the most rows that are lost when the process is killed
LIBRARIES = ("torch", "torchvision", "timm", "pillow", "openvino")  # their versions can change the values
log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class Computation:
    """A frozen network from uint8 pixels to rows, and the key of what it gives."""

    key: Key
    runner: engine.Runner
    preprocessing: Preprocessing


def prepare(prefix: Prefix, augmentation: Augmentation, options: FeatureOptions, device: torch.device) -> Computation:
    """Make the prefix ready to run, and describe it; ValueError if the engine or the precision does not go with it."""
    engine.check_precision("features.precision", options.precision, device)
    backbone, module = prefix.backbone, prefix.module
    shape = BATCH[device.type], *[backbone.preprocessing.crop] * 2, 3
    example = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module.eval()(example[:1]).numpy()
    runner = engine.prepare(options.engine, module, example, options.precision, device, expected)
    description = {
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "cut": prefix.boundary,
        "pool": prefix.pool,
        "decoding": decoding.VERSION,
        "preprocessing": backbone.preprocessing.model_dump(mode="json"),
        "precision": options.precision,
        "store_dtype": options.store_dtype,
        "engine": runner.engine,
        "device": device.type,
        "threads": torch.get_num_threads() if (runner.engine, device.type) == ("torch", "cpu") else None,
        "versions": {library: metadata.version(library) for library in LIBRARIES},
    }
    return Computation(Key(description, augmentation, expected.shape[1:]), runner, backbone.preprocessing)


def locate(images: Images, directory: str) -> dict[str, Path]:
    """The path of each image file below `directory`, by the SHA-256 of its bytes."""
    return {sha256: Path(directory, name) for name, sha256 in zip(images.image_id, images.sha256, strict=True)}


@dataclass(frozen=True)
class Share:
    """The share of the missing rows that this process computes: rank `rank` of `world_size` that fill one store."""

    rank: int
    world_size: int

    def holds(self, row: Row) -> bool:
        """Whether the row is in this share: the image's digest decides, so the ranks need not communicate."""
        return int(row[0][:16], 16) % self.world_size == self.rank


def share_of_environment() -> Share:
    """The share of RANK and WORLD_SIZE, which torchrun sets; all rows where they are not set. ValueError if wrong."""
    size = os.environ.get("WORLD_SIZE", "1")
    found = {"RANK": os.environ.get("RANK", "0" if size == "1" else ""), "WORLD_SIZE": size}
    rank, world_size = (int(value) if value.isdecimal() else -1 for value in found.values())
    if not 0 <= rank < world_size:
        raise ValueError(f"environment: found {found}, expected 0 <= RANK < WORLD_SIZE, as torchrun sets them")
    return Share(rank, world_size)


def fill(
    computation: Computation, paths: dict[str, Path], rows: Sequence[Row], workers: int, max_gb: float, share: Share
) -> Store:
    """Compute the rows that are missing from images at `paths`, which are named by SHA-256.

    Rows that were computed before an interruption are kept. Raises ValueError before computing anything if the rows
    would take more than `max_gb` (GB).
    """
    key = computation.key
    store, cut = Store(key), key.description["cut"]
    requested = list(dict.fromkeys(rows))
    size = len(requested) * key.row_bytes / 1e9
    if size > max_gb:
        raise ValueError(
            f"params.yaml: runtime.store_max_gb: {max_gb:g}, but the cache at {cut} needs {size:.3g} GB; take fewer "
            "views, a later cut, `features.store_dtype: fp16` or `boundary_cache: off`, or raise it"
        )
    n_found, missing = len(store), store.missing(requested)
    n_reused = len(requested) - len(missing)
    missing = [row for row in missing if share.holds(row)]
    if missing:
        engine_name, precision = key.description["engine"], key.description["precision"]
        log.info("cache at %s (%.3g GB): %d rows to compute (%s, %s)", cut, size, len(missing), engine_name, precision)
        try:
            _compute_and_write(computation, paths, missing, workers, store)
        finally:
            n_computed = len(store) - n_found
            if n_computed < len(missing):
                text = "cache at %s: %d of %d rows are kept; the next run computes the rest"
                log.warning(text, cut, n_reused + n_computed, len(requested))
    text = "cache at %s: %d rows reused, %d computed, %d dropped"
    log.info(text, cut, n_reused, len(missing), n_found - n_reused)
    return store


def _compute_and_write(
    computation: Computation, paths: dict[str, Path], rows: Sequence[Row], workers: int, store: Store
) -> None:
    """Compute `rows` in order, and write them a shard at a time while the next are computed."""
    n_per_shard = max(1, min(SHARD_ROWS, SHARD_BYTES // computation.key.row_bytes))
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer, closing(_compute(computation, paths, rows, workers)) as computed:
        values = iter(progress(computed, len(rows), "views", computation.key.description["cut"]))
        for start in range(0, len(rows), n_per_shard):
            buffer: list[np.ndarray] = []
            try:
                for value in islice(values, min(n_per_shard, len(rows) - start)):
                    buffer.append(value)  # one by one: what there is when an error comes is written too
            finally:
                if buffer:
                    part, previous = rows[start : start + len(buffer)], writing
                    writing = writer.submit(store.write, part, np.stack(buffer))
                    if previous:
                        previous.result()  # one shard waits in memory, not more
        next(values, None)  # ends the bar
        if writing:
            writing.result()


def _compute(
    computation: Computation, paths: dict[str, Path], rows: Sequence[Row], workers: int
) -> Generator[np.ndarray, None, None]:
    """The values of `rows`, one by one; ValueError if one is not finite."""
    size = computation.runner.size
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    samples = [[Sample(paths[name], name, view) for name, view in batch] for batch in batches]
    pixels = load_batches(samples, computation.preprocessing, computation.key.augmentation, workers)
    for batch, output in zip(batches, computation.runner.run(pixels), strict=True):
        if not np.isfinite(output).all():
            raise ValueError(f"{paths[batch[0][0]]} or a neighbour gives features that are not finite")
        yield from output


def assemble(store: Store, sha256: Sequence[str], views: int, provenance: Provenance, path: Path) -> None:
    """Write all views of the images `sha256` to `path`, in this order, in bounded memory."""
    example = store.read([(sha256[0], 0)])
    shape = (views, *example.shape[1:])
    n = max(1, min(SHARD_ROWS, SHARD_BYTES // (views * example.nbytes)))
    blocks = (
        store.read([(name, view) for name in sha256[start : start + n] for view in range(views)]).reshape(-1, *shape)
        for start in range(0, len(sha256), n)
    )
    hdf5.write_features(path, (len(sha256), *shape), example.dtype, blocks, sha256, provenance)
