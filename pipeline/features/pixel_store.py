"""Pixels in the feature store, so that each image file is decoded once (`runtime.pixel_cache`)."""

import logging
import math
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from typing import Any

import numpy as np
from PIL import features as pillow

from pipeline.features import pixels
from pipeline.features.code_digest import digest_of_code
from pipeline.features.pixels import Kind
from pipeline.features.store import SHARD_BYTES, Key, Place, Store
from pipeline.features.views import kind_of
from pipeline.logs import one_line
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import Augmentation, Runtime

DECODERS = ("jpg", "libjpeg_turbo", "jpg_2000", "zlib", "zlib_ng", "libtiff", "webp", "avif", "littlecms2")  # of Pillow
PIXEL_CODE = ("dataset/decoding.py", "features/pixels.py", "network/preprocessing.py")
log = logging.getLogger("pipeline")


def versions() -> dict[str, str | None]:
    """The versions of the libraries that can change pixels; None for a decoder that Pillow has not."""
    return {"pillow": metadata.version("pillow")} | {name: pillow.version(name) for name in DECODERS}


class PixelStore:
    """The pixels in the feature store, by kind; those that are added are written by a thread, a shard at a time.

    Where they cannot be written (a full disk, no permission), that is an error if they are `needed`; if not, a warning,
    and no more are kept.
    """

    def __init__(
        self, preprocessing: Preprocessing, augmentation: Augmentation, kinds: Iterable[Kind], *, needed: bool
    ) -> None:
        self._is_needed, self._is_open = needed, True
        self._keys: dict[Kind, Key] = {kind: _key(kind, preprocessing, augmentation) for kind in kinds}
        self._stores: dict[Kind, Store] = {kind: Store(key) for kind, key in self._keys.items()}
        self._waiting: dict[Kind, tuple[list[str], np.ndarray]] = {kind: self._empty(kind) for kind in self._stores}
        self._added: set[tuple[Kind, str]] = set()  # since the last flush
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def locate(self, names: Iterable[str], kind: Kind) -> dict[str, Place]:
        """Where the pixels of the images with these SHA-256 are; those that are not on disk are left out."""
        found = self._stores[kind].locate([(name, 0) for name in dict.fromkeys(names)])
        return {name: place for (name, _), place in found.items()}

    def compare(self, kind: Kind, name: str, row: np.ndarray) -> None:
        """Set all pixels of this kind aside if those of the image are not `row`, which was decoded now."""
        key, store = (name, 0), self._stores[kind]
        if key in store and not np.array_equal(store.read([key])[0], row):
            aside = ", ".join(map(str, store.set_aside()))
            log.warning("stored pixels differ from the same pixels decoded now; set aside: %s", aside)
            self._stores[kind] = Store(self._keys[kind])

    def add(self, kind: Kind, name: str, row: np.ndarray) -> None:
        """Keep the pixels of an image."""
        if self._is_open and (kind, name) not in self._added:
            self._added.add((kind, name))
            names, values = self._waiting[kind]
            values[len(names)] = row
            names.append(name)
            if len(names) == len(values):
                self._write(kind)

    def flush(self) -> None:
        """Wait until all that was added is on disk."""
        for kind in self._waiting:
            self._write(kind)
        self._wait()
        self._added.clear()

    def close(self) -> None:
        """Flush; save the index of what is there."""
        self.flush()
        for store in self._stores.values():
            store.save_index()

    def _empty(self, kind: Kind) -> tuple[list[str], np.ndarray]:
        """Room for a shard: no names, and values of which only what is written takes memory."""
        shape = self._keys[kind].row_shape
        return [], np.empty((max(1, SHARD_BYTES // math.prod(shape)), *shape), np.uint8)

    def _write(self, kind: Kind) -> None:
        self._wait()  # one shard waits in memory, not more
        names, values = self._waiting[kind]
        if names and self._is_open:
            self._waiting[kind] = self._empty(kind)
            rows = [(name, 0) for name in names]
            self._writing = self._writer.submit(self._stores[kind].write, rows, values[: len(names)])

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except (OSError, ValueError) as error:
            if self._is_needed:
                raise
            self._is_open = False
            log.warning("pixels are not kept any more (%s): image files are decoded each time", one_line(error))


def _key(kind: Kind, preprocessing: Preprocessing, augmentation: Augmentation) -> Key:
    """What pixels depend on; the augmentation only by the shape of a row, the mean only as the colour of a border."""
    shape = pixels.row_shape(kind, preprocessing, augmentation)
    description: dict[str, Any] = {
        "pixels": kind,
        "shape": list(shape),
        "interpolation": preprocessing.interpolation,
        "jpeg_decoding": preprocessing.jpeg_decoding,
        "code": digest_of_code(modules=PIXEL_CODE),
        "store_dtype": "uint8",
        "versions": versions(),
    }
    if kind == "crop":
        used = {"crop": preprocessing.resize, "squash": None, "pad": preprocessing.mean_colour}
        description["geometry"] = [preprocessing.geometry, used[preprocessing.geometry]]
    return Key(description, augmentation, shape)


def open_pixels(
    preprocessing: Preprocessing, augmentation: Augmentation, codes: Iterable[int], n_images: int, runtime: Runtime
) -> PixelStore | None:
    """The store of the pixels of which the views `codes` are made; None where `runtime.pixel_cache` has none.

    ValueError if it is on and the pixels of `n_images` take more than `runtime.store_max_gb`.
    """
    kinds: set[Kind] = {kind_of(code, augmentation) for code in codes}
    shapes = [pixels.row_shape(kind, preprocessing, augmentation) for kind in kinds]
    size = n_images * sum(map(math.prod, shapes)) / 1e9
    if runtime.pixel_cache == "off":
        return None
    if size <= runtime.store_max_gb:
        log.info("pixels of %d images (%.3g GB): decoded once, then read from the feature store", n_images, size)
        return PixelStore(preprocessing, augmentation, kinds, needed=runtime.pixel_cache == "on")
    if runtime.pixel_cache == "on":
        raise ValueError(
            f"params.yaml: runtime.pixel_cache: on, but the pixels of {n_images} images take {size:.3g} GB, more than "
            f"runtime.store_max_gb ({runtime.store_max_gb:g}); raise it, or choose auto"
        )
    log.info(
        "pixels of %d images would take %.3g GB, more than runtime.store_max_gb (%g): files are decoded each time",
        *(n_images, size, runtime.store_max_gb),
    )
    return None
