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
    try:
        with cast(IO[bytes], gzip.open(path)) if _is_packed(path) else path.open("rb") as file:
            shape = _read_shape(path, file, n_dimensions)
            if expected and shape[0] != expected[0]:
                raise ValueError(f"{path}: {shape[0]} labels; expected {expected[0]}, one per image of {expected[1]}")
            _check_size(path, shape)
            content = file.read(math.prod(shape) + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from None
    if len(content) < math.prod(shape):
        raise ValueError(f"{path}: ends before its header says")
    if len(content) > math.prod(shape):
        raise ValueError(f"{path}: goes on where it should end by its header")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _read_shape(path: Path, file: IO[bytes], n_dimensions: int) -> tuple[int, ...]:
    header = file.read(4 + 4 * n_dimensions)
    if len(header) >= 4 and header[:4] != bytes([0, 0, 8, n_dimensions]):
        expected = f"0000080{n_dimensions}: unsigned bytes in {n_dimensions} dimensions"
        raise ValueError(f"{path}: begins with {header[:4].hex()}; expected {expected}")
    if len(header) < 4 + 4 * n_dimensions:
        raise ValueError(f"{path}: ends before its header says")
    shape = tuple(np.frombuffer(header, ">u4", offset=4).tolist())
    if not all(shape):
        raise ValueError(f"{path}: its header says {' x '.join(map(str, shape))}; expected none of them 0")
    return shape


def _check_size(path: Path, shape: tuple[int, ...]) -> None:
    """Compare what the header announces with the file's size; sorted labels may shrink to nothing."""
    if math.prod(shape[1:]) > LARGEST_IMAGE:
        raise ValueError(f"{path}: images of {shape[2]} x {shape[1]} px; expected at most {LARGEST_IMAGE} pixels")
    announced, size_bytes = 4 + 4 * len(shape) + math.prod(shape), path.stat().st_size
    if not _is_packed(path) and size_bytes != announced:
        raise ValueError(f"{path}: {size_bytes} bytes; expected {announced}, as its header says")
    if len(shape) == 3 and announced > LARGEST_RATIO * size_bytes:
        problem = f"its header says {announced} bytes, {announced // size_bytes} times its size"
        raise ValueError(f"{path}: {problem}: taken for a decompression bomb; unpack it if it is not")
