"""Extraction: run a frozen network over the views that the feature store lacks, and assemble data/features.h5.

The assembled file is in the order of images.csv, so that its bytes do not depend on how the store was filled.
"""

import logging
import os
from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from itertools import chain, islice, zip_longest
from pathlib import Path
from random import Random

import numpy as np
import torch

from pipeline.dataset.manifest import Images
from pipeline.features import engine, hdf5, pixel_store
from pipeline.features.code_digest import digest_of_code
from pipeline.features.hdf5 import Provenance, Row
from pipeline.features.loading import Loader
from pipeline.features.store import SHARD_BYTES, Key, Store
from pipeline.features.views import AUGMENTED
from pipeline.logs import progress
from pipeline.network.cuts import Prefix
from pipeline.params import Augmentation, FeatureOptions

SHARD_ROWS = 256  # the most rows that are lost when the process is killed
LIBRARIES = ("torch", "torchvision", "timm", "openvino")  # with those of the pixels, their versions can change a row
N_CHECKED = 8  # stored rows that are computed again, one batch on a CPU
log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class Computation:
    """A frozen network from uint8 pixels to rows, and the key of what it gives."""

    key: Key
    runner: engine.Runner


def prepare(prefix: Prefix, augmentation: Augmentation, options: FeatureOptions, device: torch.device) -> Computation:
    """Make the prefix ready to run, and describe it; ValueError if the engine or the precision does not go with it."""
    engine.check_precision("features.precision", options.precision, device)
    backbone, module = prefix.backbone, prefix.module
    shape = options.batch_size.on(device.type), *[backbone.preprocessing.crop] * 2, 3
    example = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module.eval()(example[:1]).numpy()
    runner = engine.prepare(options.engine, module, example, options.precision, device, expected)
    if device.type == "cuda":  # the first use of each kernel takes seconds, in which workers decode already
        deque(runner.run(example.split(runner.piece)), maxlen=0)
    description = {
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "cut": prefix.boundary,
        "pool": prefix.pool,
        "code": digest_of_code(),
        "preprocessing": backbone.preprocessing.model_dump(mode="json"),
        "precision": options.precision,
        "store_dtype": options.store_dtype,
        "engine": runner.engine,
        "device": device.type,
        "machine": engine.machine(runner.engine, device),
        "batch": list(shape),
        "threads": torch.get_num_threads() if (runner.engine, device.type) == ("torch", "cpu") else None,
        "versions": versions(),
    }
    if prefix.taps:  # not in the key of rows of one cut, so that it stays as it was
        description["taps"] = dict(prefix.taps)
    return Computation(Key(description, augmentation, expected.shape[1:]), runner)


def versions() -> dict[str, str | None]:
    """The versions of the libraries that can change a row; None for a decoder that Pillow has not, and no OpenVINO."""
    installed = {name: metadata.version(name) for name in LIBRARIES if name != "openvino" or find_spec(name)}
    return dict.fromkeys(LIBRARIES) | installed | pixel_store.versions()


def locate(images: Images, directory: str) -> dict[str, Path]:
    """The path of each image file below `directory`, by the SHA-256 of its bytes."""
    return {sha256: Path(directory, name) for name, sha256 in zip(images.image_id, images.sha256, strict=True)}


@dataclass(frozen=True)
class Share:
    """The share of the missing rows that this process computes: rank `rank` of `world_size` that fill one store.

    `local_rank` numbers the GPU of this process on its machine.
    """

    rank: int
    world_size: int
    local_rank: int = 0

    def holds(self, row: Row) -> bool:
        """Whether the row is in this share: the image's digest decides, so the ranks need not communicate."""
        return int(row[0][:16], 16) % self.world_size == self.rank


def share_of_environment() -> Share:
    """The share of RANK, WORLD_SIZE and LOCAL_RANK, which torchrun sets; all rows where they are not set.

    A stage that DVC runs must write its outputs, so it is never one of several ranks: what a cluster or a notebook has
    set for another program is left out there, with a warning. ValueError for values that make no sense.
    """
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ}
    size = found.get("WORLD_SIZE", "1")
    if "DVC_STAGE" in os.environ:
        if (found.get("RANK", "0"), size) != ("0", "1"):
            log.warning(
                "environment: %s is not for a stage that dvc runs, and ignored; to run ranks: torchrun "
                "--nproc-per-node N -m pipeline.stages.extract && dvc repro",
                found,
            )
        return Share(0, 1)
    if "WORLD_SIZE" not in found and (n_tasks := os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
        log.warning(
            "environment: srun runs %s of these, and each computes all rows; to share them: srun bash -c "
            "'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS python -m pipeline.stages.extract'",
            n_tasks,
        )
    given = (found.get("RANK", "0" if size == "1" else ""), size, found.get("LOCAL_RANK", "0") if size != "1" else "0")
    rank, world_size, local_rank = (int(value) if value.isdecimal() else -1 for value in given)
    if not (0 <= rank < world_size and local_rank >= 0):
        raise ValueError(
            f"environment: found {found}, expected 0 <= RANK < WORLD_SIZE; to run ranks: torchrun --nproc-per-node N "
            "-m pipeline.stages.extract && dvc repro; for one process, unset them"
        )
    return Share(rank, world_size, local_rank)


def fill(computation: Computation, loader: Loader, rows: Sequence[Row], max_gb: float, share: Share) -> Store:
    """Compute the rows that are missing, from the views that `loader` loads.

    Rows that were computed before an interruption are kept. Where rows are missing, a few stored ones are computed too:
    if they differ, all are set aside, with a warning, and computed again. Raises ValueError before computing anything
    if the rows would take more than `max_gb` (GB), and if a row that was computed again differs once more.
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
    doubted = {}
    if any(map(share.holds, store.missing(requested))):
        again = _compute_again(computation, loader, store, requested)
        if not store.agrees(again):
            aside, doubted = ", ".join(map(str, store.set_aside())), again
            log.warning("cache at %s: stored rows differ from the same rows computed now; set aside: %s", cut, aside)
            store = Store(key)
    n_found, missing = len(store), store.missing(requested)
    n_reused = len(requested) - len(missing)
    missing = [row for row in missing if share.holds(row)]
    if missing:
        engine_name, precision = key.description["engine"], key.description["precision"]
        log.info("cache at %s (%.3g GB): %d rows to compute (%s, %s)", cut, size, len(missing), engine_name, precision)
        try:
            _compute_and_write(computation, loader, missing, store)
        finally:
            n_computed = len(store) - n_found
            if n_computed < len(missing) and store.is_in_place():
                n_kept, total = n_reused + n_computed, len(requested)
                log.warning("cache at %s: %d of %d rows are kept; the next run computes the rest", cut, n_kept, total)
    if not store.agrees({row: value for row, value in doubted.items() if share.holds(row)}):
        store.set_aside()
        raise ValueError(
            f"cache at {cut}: the same rows, computed twice in this run, differ; expected an engine that repeats its "
            f"results, found {key.description['engine']} on {key.description['device']} (params.yaml: "
            "features.engine, runtime.device)"
        )
    store.save_index()
    log.info("cache at %s: %d rows reused, %d computed, %d dropped", cut, n_reused, len(missing), n_found - n_reused)
    return store


def _compute_again(
    computation: Computation, loader: Loader, store: Store, rows: Sequence[Row]
) -> dict[Row, np.ndarray]:
    """Compute at most N_CHECKED stored rows from image files: of each format, symmetries and others; others each time.

    Stored pixels are compared with those that are decoded for it.
    """
    missing, groups = {*store.missing(rows)}, defaultdict(list)
    stored = [row for row in rows if row not in missing]
    for name, view in Random(len(missing)).sample(stored, len(stored)):
        groups[view < AUGMENTED, loader.paths[name].suffix.lower()].append((name, view))
    in_turn = chain.from_iterable(zip_longest(*groups.values()))
    chosen = [*islice(filter(None, in_turn), N_CHECKED)]
    return dict(zip(chosen, _compute(computation, loader, chosen, is_check=True), strict=True))


def _compute_and_write(computation: Computation, loader: Loader, rows: Sequence[Row], store: Store) -> None:
    """Compute `rows` in order, and write them a shard at a time while the next are computed."""
    n_per_shard = max(1, min(SHARD_ROWS, SHARD_BYTES // computation.key.row_bytes))
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer, closing(_compute(computation, loader, rows)) as computed:
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
    computation: Computation, loader: Loader, rows: Sequence[Row], *, is_check: bool = False
) -> Generator[np.ndarray, None, None]:
    """The values of `rows`, one by one; ValueError if one is not finite."""
    size = computation.runner.piece
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    for batch, output in zip(batches, computation.runner.run(loader.load(batches, is_check=is_check)), strict=True):
        if not np.isfinite(output).all():
            raise ValueError(f"{loader.paths[batch[0][0]]} or a neighbour gives features that are not finite")
        yield from output


def assemble(
    store: Store,
    sha256: Sequence[str],
    views: Sequence[int],
    evaluation_views: Sequence[int],
    provenance: Provenance,
    path: Path,
) -> None:
    """Write the training and evaluation views (codes) of the images `sha256` to `path`, in order, in bounded memory."""
    example = store.read([(sha256[0], views[0])])

    def read(codes: Sequence[int]) -> Iterator[np.ndarray]:
        n = max(1, min(SHARD_ROWS, SHARD_BYTES // (len(codes) * example.nbytes)))
        for start in range(0, len(sha256), n):
            values = store.read([(name, code) for name in sha256[start : start + n] for code in codes])
            yield values.reshape(-1, len(codes), *example.shape[1:])

    evaluation = None if [*views] == [*evaluation_views] else read(evaluation_views)
    hdf5.write_features(path, read(views), evaluation, sha256, provenance)
