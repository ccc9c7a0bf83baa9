"""Extraction: run a frozen network once over the views that the feature store lacks, and assemble what it holds.

The assembled file is in the order of images.csv, so that its bytes do not depend on how the store was filled.
"""

import logging
import math
import os
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.dataset import decoding
from pipeline.features import hdf5
from pipeline.features.hdf5 import Provenance, Row
from pipeline.features.store import Key, Store
from pipeline.features.views import Sample, load_batches
from pipeline.logs import progress
from pipeline.network import engine
from pipeline.network.backbones import Backbone
from pipeline.network.device import BATCH
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import Augmentation, FeatureOptions

SHARD_BYTES = 32 * 2**20
SHARD_ROWS = 256  # the most that is lost when the process is killed
LIBRARIES = ("torch", "torchvision", "timm", "pillow", "openvino")  # their versions can change the values
log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class Computation:
    """A frozen network from uint8 pixels to rows, and the key of what it gives."""

    key: Key
    runner: engine.Runner
    preprocessing: Preprocessing


def prepare(
    module: nn.Module,
    backbone: Backbone,
    cut: str,
    pool: str,
    augmentation: Augmentation,
    options: FeatureOptions,
    threads: int,
    device: torch.device,
) -> Computation:
    """Prepare `module`, which is `backbone` from pixels to `cut`, pooled, and describe it."""
    engine.check_precision("features.precision", options.precision, device)
    torch.set_num_threads(threads)
    shape = BATCH[device.type], *[backbone.preprocessing.crop] * 2, 3
    example = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module.eval()(example[:1]).numpy()
    runner = engine.prepare(options.engine, module, example, options.precision, device, expected)
    description = {
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "cut": cut,
        "pool": pool,
        "decoding": decoding.VERSION,
        "preprocessing": backbone.preprocessing.model_dump(mode="json"),
        "precision": options.precision,
        "store_dtype": options.store_dtype,
        "engine": runner.engine,
        "device": device.type,
        "threads": threads if (runner.engine, device.type) == ("torch", "cpu") else None,
        "versions": {library: metadata.version(library) for library in LIBRARIES},
    }
    return Computation(Key(description, augmentation, expected.shape[1:]), runner, backbone.preprocessing)


@dataclass(frozen=True)
class Share:
    """Which part of the missing rows this process computes: rank `rank` of `world_size` that fill one store."""

    rank: int
    world_size: int

    def holds(self, row: Row) -> bool:
        """Whether the row belongs to it: by the image's digest, so that all know without talking."""
        return int(row[0][:16], 16) % self.world_size == self.rank


def share_of_environment() -> Share:
    """RANK and WORLD_SIZE, as torchrun sets them; everything where they are not set."""
    of_all = os.environ.get("WORLD_SIZE", "1")
    found = {"RANK": os.environ.get("RANK", "0" if of_all == "1" else ""), "WORLD_SIZE": of_all}
    rank, world_size = (int(value) if value.isdecimal() else -1 for value in found.values())
    if not 0 <= rank < world_size:
        raise ValueError(f"environment: found {found}, expected 0 <= RANK < WORLD_SIZE, as torchrun sets them")
    return Share(rank, world_size)


def fill(
    computation: Computation, paths: dict[str, Path], rows: Sequence[Row], workers: int, max_gb: float, share: Share
) -> Store:
    """Compute the rows that are missing; `paths` says where the image of each SHA-256 lies.

    Whatever was computed stays if this is interrupted. Raises ValueError before computing anything if the rows would
    take more than `max_gb` (GB).
    """
    key = computation.key
    store, cut = Store(key), key.description["cut"]
    wanted = list(dict.fromkeys(rows))
    row_bytes = key.dtype.itemsize * math.prod(key.row_shape)
    size = len(wanted) * row_bytes / 1e9
    if size > max_gb:
        raise ValueError(
            f"params.yaml: runtime.store_max_gb: {max_gb:g}, but the cache at {cut} needs {size:.3g} GB; take fewer "
            "views, a later cut, `features.store_dtype: fp16` or `boundary_cache: off`, or raise it"
        )
    n_found, missing = len(store), store.missing(wanted)
    n_reused = len(wanted) - len(missing)
    missing = [row for row in missing if share.holds(row)]
    if missing:
        how = f"{key.description['engine']}, {key.description['precision']}"
        log.info("cache at %s (%.3g GB): %d rows to compute (%s)", cut, size, len(missing), how)
        try:
            _compute_and_write(computation, paths, missing, workers, store, row_bytes)
        finally:
            n_computed = len(store) - n_found
            if n_computed < len(missing):
                text = "cache at %s: %d of %d rows are kept; the next run computes the rest"
                log.warning(text, cut, n_reused + n_computed, len(wanted))
    n_dropped = n_found - n_reused
    text = "cache at %s: %d rows reused, %d computed, %d dropped"
    log.info(text, cut, n_reused, len(missing), n_dropped)
    return store


def _compute_and_write(
    computation: Computation, paths: dict[str, Path], rows: Sequence[Row], workers: int, store: Store, row_bytes: int
) -> None:
    """Compute `rows` in order, and write them a shard at a time while the next are computed."""
    per_shard = max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))
    written: Future[None] | None = None
    buffer: list[np.ndarray] = []
    start = 0
    with ThreadPoolExecutor(1) as writer, closing(_compute(computation, paths, rows, workers)) as computed:
        try:
            bar = iter(progress(computed, len(rows), "views", computation.key.description["cut"]))
            while start < len(rows):
                for value in islice(bar, min(per_shard, len(rows) - start)):
                    buffer.append(value)
                if written:
                    written.result()  # one shard waits in memory, not more
                written = writer.submit(store.write, rows[start : start + len(buffer)], np.stack(buffer))
                start, buffer = start + len(buffer), []
            next(bar, None)  # ends the bar
            if written:
                written.result()
        except BaseException:
            if buffer:
                with suppress(OSError, ValueError):  # told already
                    if written:
                        written.result()
                    store.write(rows[start : start + len(buffer)], np.stack(buffer))
            raise


def _compute(
    computation: Computation, paths: dict[str, Path], rows: Sequence[Row], workers: int
) -> Generator[np.ndarray, None, None]:
    size = computation.runner.size
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    samples = [[Sample(paths[name], name, view) for name, view in batch] for batch in batches]
    pixels = load_batches(samples, computation.preprocessing, computation.key.augmentation, workers)
    for batch, output in zip(batches, computation.runner.run(pixels), strict=True):
        if not np.isfinite(output).all():
            raise ValueError(f"{paths[batch[0][0]]} or a neighbour gives features that are not finite")
        yield from output


def assemble(store: Store, sha256: Sequence[str], views: int, provenance: Provenance, path: Path) -> None:
    """Write `path`: all views of the images `sha256`, in this order, in bounded memory."""
    example = store.read([(sha256[0], 0)])
    shape = (views, *example.shape[1:])
    n = max(1, min(SHARD_ROWS, SHARD_BYTES // (views * example.nbytes)))
    parts = (sha256[start : start + n] for start in range(0, len(sha256), n))
    blocks = (
        store.read([(name, view) for name in part for view in range(views)]).reshape(-1, *shape) for part in parts
    )
    hdf5.write_features(path, (len(sha256), *shape), example.dtype, blocks, sha256, provenance)
