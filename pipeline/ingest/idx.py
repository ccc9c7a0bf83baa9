"""MNIST's file format, IDX: pairs of files, of images (n, height, width) and labels (n,), all bytes, gzipped or not.

Nothing is read beyond what a header announces, and no header is believed that
the size of its file contradicts.
"""

import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np

NAME = re.compile(r"(.*?)images[-.]idx3[-.]ubyte(\.gz)?$", re.IGNORECASE)
PARTS = {"train": "train", "t10k": "test", "test": "test", "val": "val", "valid": "val", "validation": "val"}
LARGEST_RATIO = 200  # of images to their gzipped file; MNIST's is 5, that of a decompression bomb 1,000
LARGEST_IMAGE = 89_000_000  # pixels, as in decoding


@dataclass(frozen=True)
class Pair:
    """Files of images and of their labels; `part`: train, val, test or "", as their names say."""

    part: str
    images: Path
    labels: Path


def find_pairs(directory: Path) -> list[Pair]:
    """The pairs in a directory, one a part; ValueError if there is none, one is half, or two are of one part."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: not a directory")
    names = {path.name for path in directory.iterdir() if path.is_file()}
    found: dict[str, Pair] = {}
    for name in sorted(names):
        match = NAME.match(name)
        if not match or (match[2] and name.removesuffix(match[2]) in names):  # unpacked beside it
            continue
        stem = re.sub("images(.)idx3", r"labels\1idx1", name, flags=re.IGNORECASE).removesuffix(match[2] or "")
        labels = next((other for other in (stem, f"{stem}.gz") if other in names), None)
        if labels is None:
            raise ValueError(f"{directory / name}: its labels are missing; expected {stem} or {stem}.gz beside it")
        part = next((PARTS[word] for word in re.split(r"[-_.]", match[1].lower()) if word in PARTS), "")
        if part in found:
            first = found[part].images.name
            raise ValueError(f"{directory}: {first} and {name} are both of {part or 'no part'}; expected one of them")
        found[part] = Pair(part, directory / name, directory / labels)
    if not found:
        raise ValueError(f"{directory}: no IDX files; expected train-images-idx3-ubyte, train-labels-idx1-ubyte, …")
    return list(found.values())


def read(pair: Pair) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Labels (n,) uint8, and each image (height, width) uint8; ValueError for a file that is not as its header says."""
    with _open(pair.images) as images, _open(pair.labels) as labels:
        n, height, width = _header(pair.images, images, 3)
        (n_labels,) = _header(pair.labels, labels, 1)
        if n_labels != n:
            raise ValueError(f"{pair.labels}: {n_labels} labels; expected {n}, one per image of {pair.images.name}")
        if height * width > LARGEST_IMAGE:
            raise ValueError(f"{pair.images}: images of {width} x {height} px; expected at most {LARGEST_IMAGE} pixels")
        _check_size(pair.images, 16 + n * height * width, LARGEST_RATIO)
        _check_size(pair.labels, 8 + n, math.inf)  # sorted ones shrink to nothing, and are as many as the images
        label = np.frombuffer(_take(pair.labels, labels, n), np.uint8)
        _check_end(pair.labels, labels)
    return label, _read_images(pair.images)


def _read_images(path: Path) -> Iterator[np.ndarray]:
    with _open(path) as file:
        n, height, width = _header(path, file, 3)
        for _ in range(n):
            yield np.frombuffer(_take(path, file, height * width), np.uint8).reshape(height, width)
        _check_end(path, file)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _header(path: Path, file: IO[bytes], n_dimensions: int) -> tuple[int, ...]:
    magic = _take(path, file, 4)
    if magic != bytes([0, 0, 8, n_dimensions]):
        raise ValueError(
            f"{path}: begins with {magic.hex()}; expected 0000080{n_dimensions}: unsigned bytes in {n_dimensions} "
            "dimensions"
        )
    sizes = struct.unpack(f">{n_dimensions}I", _take(path, file, 4 * n_dimensions))
    if not all(sizes):
        raise ValueError(f"{path}: its header says {' x '.join(map(str, sizes))}; expected none of them 0")
    return sizes


def _check_size(path: Path, expected: int, largest_ratio: float) -> None:
    size_bytes = path.stat().st_size
    if path.suffix.lower() != ".gz":
        if size_bytes != expected:
            raise ValueError(f"{path}: {size_bytes} bytes; expected {expected}, as its header says")
    elif expected > largest_ratio * size_bytes:
        raise ValueError(
            f"{path}: its header says {expected} bytes, {expected // size_bytes} times its size: taken for a "
            "decompression bomb; unpack it if it is not"
        )


def _check_end(path: Path, file: IO[bytes]) -> None:
    if _read(path, file, 1):
        raise ValueError(f"{path}: goes on where it should end by its header")


def _take(path: Path, file: IO[bytes], n: int) -> bytes:
    content = _read(path, file, n)
    if len(content) < n:
        raise ValueError(f"{path}: ends before its header says")
    return content


def _read(path: Path, file: IO[bytes], n: int) -> bytes:
    try:
        return file.read(n)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from None
