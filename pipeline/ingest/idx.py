"""Read MNIST's file format, IDX: pairs of files, images (n, height, width) and labels (n,), all uint8, gzipped or not.

A header is believed only if the size of its file agrees, and no more is read than it announces.
"""

import gzip
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np

NAME = re.compile(r"(.*?)images[-.]idx3[-.]ubyte(\.gz)?$", re.IGNORECASE)
SPLITS = {"train": "train", "t10k": "test", "test": "test", "val": "val", "valid": "val", "validation": "val"}
LARGEST_RATIO = 200  # of images to their gzipped file; MNIST's is 5, that of a decompression bomb 1,000
LARGEST_IMAGE = 89_000_000  # pixels, as in decoding


@dataclass(frozen=True)
class Pair:
    """Files of images and of their labels; `split`: train, val, test or "", as their names say."""

    split: str
    images: Path
    labels: Path


def find_pairs(directory: Path) -> list[Pair]:
    """The pairs in a directory; ValueError if there is none, labels are missing, or two pairs are of one split."""
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
        split = next((SPLITS[word] for word in re.split(r"[-_.]", match[1].lower()) if word in SPLITS), "")
        if split in found:
            first = found[split].images.name
            raise ValueError(f"{directory}: {first} and {name} are both of {split or 'no split'}; expected one of them")
        found[split] = Pair(split, directory / name, directory / labels)
    if not found:
        raise ValueError(f"{directory}: no IDX files; expected train-images-idx3-ubyte, train-labels-idx1-ubyte, …")
    return list(found.values())


def read(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, height, width) and labels (n,), both uint8; ValueError for a file that contradicts its header."""
    images = _read(pair.images, 3)
    return images, _read(pair.labels, 1, (len(images), pair.images.name))


def _read(path: Path, n_dimensions: int, expected: tuple[int, str] | None = None) -> np.ndarray:
    """The array of one file. `expected`, for labels: the number of images, and the name of their file."""
    is_packed = path.suffix.lower() == ".gz"
    try:
        with cast(IO[bytes], gzip.open(path)) if is_packed else path.open("rb") as file:
            shape = _read_shape(path, file, n_dimensions)
            if expected and shape[0] != expected[0]:
                raise ValueError(f"{path}: {shape[0]} labels; expected {expected[0]}, one per image of {expected[1]}")
            if math.prod(shape[1:]) > LARGEST_IMAGE:
                size = f"{shape[2]} x {shape[1]} px"
                raise ValueError(f"{path}: images of {size}; expected at most {LARGEST_IMAGE} pixels")
            n_values, size_bytes = math.prod(shape), path.stat().st_size
            announced = 4 + 4 * n_dimensions + n_values
            if not is_packed and size_bytes != announced:
                raise ValueError(f"{path}: {size_bytes} bytes; expected {announced}, as its header says")
            if n_dimensions == 3 and announced > LARGEST_RATIO * size_bytes:  # sorted labels may shrink to nothing
                problem = f"its header says {announced} bytes, {announced // size_bytes} times its size"
                raise ValueError(f"{path}: {problem}: taken for a decompression bomb; unpack it if it is not")
            content = file.read(n_values + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from None
    if len(content) != n_values:
        found = "ends before" if len(content) < n_values else "goes on after"
        raise ValueError(f"{path}: {found} the {n_values} bytes that its header says")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_shape(path: Path, file: IO[bytes], n_dimensions: int) -> tuple[int, ...]:
    header, start = file.read(4 + 4 * n_dimensions), bytes([0, 0, 8, n_dimensions])
    if len(header) >= 4 and not header.startswith(start):
        expected = f"{start.hex()}: unsigned bytes in {n_dimensions} dimensions"
        raise ValueError(f"{path}: begins with {header[:4].hex()}; expected {expected}")
    if len(header) < 4 + 4 * n_dimensions:
        raise ValueError(f"{path}: ends before its header says")
    shape = tuple(np.frombuffer(header, ">u4", offset=4).tolist())
    if not all(shape):
        raise ValueError(f"{path}: its header says {' x '.join(map(str, shape))}; expected none of them 0")
    return shape
