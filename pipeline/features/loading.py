"""Load views of images in worker processes: from pixels in the feature store, or from image files."""

import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, groupby, takewhile
from pathlib import Path
from threading import Event, Thread

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from pipeline.dataset.decoding import sha256
from pipeline.features import pixels
from pipeline.features.hdf5 import Row
from pipeline.features.pixel_store import PixelStore, open_pixels
from pipeline.features.pixels import Kind
from pipeline.features.store import Place
from pipeline.features.views import kind_of, view_of
from pipeline.logs import explain, leave_signals
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import Augmentation, Runtime

PREFETCHED = 4  # batches for each worker
LOCATED = 256  # batches whose pixels are looked up at once
AHEAD = 8  # images in a batch that is decoded ahead; what was asked for is waited for
SHARED_MEMORY = "/dev/shm"
# Pixels that were decoded: their kind, the SHA-256 of the image, and which view of the batch they are, or the pixels
Fresh = list[tuple[Kind, str, int | np.ndarray]]
Answer = tuple[torch.Tensor | np.ndarray | Exception, Fresh]
log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class Sample:
    """Views, by their codes, of one image: its file, whose bytes must have this SHA-256, and where its pixels are."""

    path: Path
    sha256: str
    views: tuple[int, ...]
    places: dict[Kind, Place]


@dataclass(frozen=True)
class Request:
    """A batch: a worker hands it over in shared memory or through a pipe, and keeps the pixels it decoded or not."""

    samples: list[Sample]
    is_piped: bool
    is_kept: bool


@dataclass(frozen=True)
class Decoder(Dataset):
    """What a worker does."""

    preprocessing: Preprocessing
    augmentation: Augmentation

    def __getitem__(self, request: Request) -> Answer:
        """The views of a batch, and the pixels that were decoded for it.

        Instead of views the error to raise in the main process: one that is raised in a worker comes with a traceback.
        """
        views: list[np.ndarray] = []
        fresh: Fresh = []
        for sample in request.samples:
            try:
                views += self._views(sample, len(views), fresh)
            except MemoryError as error:
                return MemoryError(f"{sample.path}: {str(error) or 'cannot be decoded in the memory there is'}"), []
            except (OSError, ValueError) as error:
                return ValueError(f"{sample.path}: {error}"), []
        fresh = fresh if request.is_kept else []
        if request.is_piped:
            return np.stack(views), fresh
        try:
            return default_collate([torch.from_numpy(np.require(view, None, ["C", "W"])) for view in views]), fresh
        except RuntimeError as error:
            if explain(error) is None:
                raise
            return error, []

    def _views(self, sample: Sample, start: int, fresh: Fresh) -> Iterator[np.ndarray]:
        """The views of one image, from `start` in the batch; its file is read once, if its pixels are not stored."""
        rows = {}
        content = None
        for code in sample.views:
            kind = kind_of(code, self.augmentation)
            if kind not in rows and kind in sample.places:
                with suppress(OSError):  # removed meanwhile, by this machine or another
                    rows[kind] = self._stored(sample.places[kind], kind)
            if kind not in rows:
                content = content or _read(sample)
                rows[kind] = pixels.make(content, kind, self.preprocessing, self.augmentation)
                is_view = kind == "crop" and 0 in sample.views
                found = start + sample.views.index(0) if is_view else rows[kind]
                fresh.append((kind, sample.sha256, found))
            yield view_of(rows[kind], sample.sha256, code, self.preprocessing, self.augmentation)

    def _stored(self, place: Place, kind: Kind) -> np.ndarray:
        path, offset = place
        shape = pixels.row_shape(kind, self.preprocessing, self.augmentation)
        row = np.fromfile(path, np.uint8, math.prod(shape), offset=offset)
        if row.size != math.prod(shape):
            raise OSError(f"its pixels in {path} were cut short")
        return row.reshape(shape)


def _read(sample: Sample) -> bytes:
    content = sample.path.read_bytes()
    if sha256(content) != sample.sha256:
        raise ValueError("the file changed since it was indexed; run: dvc repro")
    return content


class _Requests:
    """Yields the requests that were set last, each time that it is iterated over."""

    def __init__(self) -> None:
        self.current: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.current)


class Loader:
    """Loads views of the image files `paths`, by SHA-256, with `workers` processes that live as long as it does.

    0: in this process. `store`: where pixels are kept, if anywhere. One batch after the other: to load others ends what
    was being loaded.
    """

    def __init__(
        self,
        paths: dict[str, Path],
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        store: PixelStore | None,
        workers: int,
        device: torch.device,
    ) -> None:
        self.paths = paths
        self._store, self._workers, self._augmentation = store, workers, augmentation
        self._view_bytes = 3 * preprocessing.crop**2
        self._requests = _Requests()
        self._loader: DataLoader | None = DataLoader(
            Decoder(preprocessing, augmentation),
            batch_size=None,
            sampler=self._requests,
            collate_fn=_same,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=leave_signals,
            prefetch_factor=PREFETCHED if workers else None,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # not the global one, from which dropout draws
        )

    def load(self, batches: Sequence[Sequence[Row]], *, is_check: bool = False) -> Iterator[torch.Tensor]:
        """The batches in order: uint8 (len(batch), crop, crop, 3) each.

        `is_check`: from image files, even where pixels are stored, which are compared with those of the files.
        Raises ValueError for a file that cannot be read or that changed since it was indexed, MemoryError if there is
        too little memory.
        """
        if self._store is not None:
            self._store.flush()
        return self._start(self._make_requests(batches, is_check=is_check), is_check=is_check)

    def _start(self, requests: Iterable[Request], *, is_check: bool = False) -> Iterator[torch.Tensor]:
        self._requests.current = requests
        assert self._loader is not None
        return self._receive(iter(self._loader), is_check=is_check)  # workers begin now, not with the first batch

    def _make_requests(self, batches: Sequence[Sequence[Row]], *, is_check: bool = False) -> Iterator[Request]:
        n_waiting, largest = PREFETCHED * self._workers + 2, max(map(len, batches), default=0)
        is_piped = self._workers > 0 and not _has_shared_memory(n_waiting * largest * self._view_bytes)
        for start in range(0, len(batches), LOCATED):
            part = batches[start : start + LOCATED]
            names: dict[Kind, list[str]] = {}
            for name, code in chain.from_iterable(part):
                names.setdefault(kind_of(code, self._augmentation), []).append(name)
            places: list[tuple[Kind, dict[str, Place]]] = []
            if self._store is not None and not is_check:
                places = [(kind, self._store.locate(named, kind)) for kind, named in names.items()]
            for batch in part:
                samples = []
                for name, rows in groupby(batch, lambda row: row[0]):  # the views of one image
                    found: dict[Kind, Place] = {kind: at[name] for kind, at in places if name in at}
                    samples.append(Sample(self.paths[name], name, tuple(code for _, code in rows), found))
                yield Request(samples, is_piped, self._store is not None)

    def _receive(self, answers: Iterator[Answer], *, is_check: bool) -> Iterator[torch.Tensor]:
        for views, fresh in answers:
            if isinstance(views, Exception):
                raise views
            batch = torch.from_numpy(views) if isinstance(views, np.ndarray) else views
            if self._store is not None:
                keep = self._store.compare if is_check else self._store.add
                for kind, name, found in fresh:
                    keep(kind, name, batch[found].numpy() if isinstance(found, int) else found)
            yield batch

    @contextmanager
    def decoding_ahead(self, names: Sequence[str]) -> Iterator[None]:
        """Meanwhile, have the workers decode those images whose pixels are not stored."""
        store, stop = self._store, Event()
        if store is None or not self._workers:
            yield
            return
        there = store.locate(names, "crop")
        missing = [name for name in names if name not in there]
        batches = [[(name, 0) for name in missing[i : i + AHEAD]] for i in range(0, len(missing), AHEAD)]
        requests = self._make_requests(batches)
        # Requests end, not answers: what was asked for is not thrown away
        answers = self._start(takewhile(lambda _: not stop.is_set(), requests))

        def receive() -> None:
            try:
                for _ in answers:
                    pass
            except (ValueError, MemoryError, OSError, RuntimeError) as error:  # it comes again when the image is needed
                log.debug("decoding ahead has ended: %s", error)

        thread = Thread(target=receive)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def close(self) -> None:
        """End the workers; wait until all pixels are on disk."""
        self._loader = None
        if self._store is not None:
            self._store.close()


def open_loader(
    paths: dict[str, Path],
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    codes: Sequence[int],
    runtime: Runtime,
    device: torch.device,
) -> Loader:
    """A loader of the views `codes`, as `runtime` says; raises as `open_pixels` does."""
    store = open_pixels(preprocessing, augmentation, codes, len(paths), runtime)
    return Loader(paths, preprocessing, augmentation, store, runtime.workers, device)


def _same(batch: object) -> object:
    return batch


def _has_shared_memory(n_bytes: int) -> bool:
    """Whether /dev/shm has room for `n_bytes`, twice over for who else uses it; a container often has only 64 MB.

    Systems without this directory have no such limit.
    """
    with suppress(OSError):
        return shutil.disk_usage(SHARED_MEMORY).free >= 2 * n_bytes
    return True
