"""Boundary zero: the pixels that views are made of, from the bytes of an image file to uint8 rows.

There are two kinds. A *crop* is view 0: uint8 (crop, crop, 3). A *whole* is the whole image in as many pixels as the
smallest random crop needs, of which such crops are cut; as a row, uint8 (8 + 3 * n,), it begins with its width and
height. The mean and deviation that scale pixels are part of neither, so networks with the same geometry share them.
"""

import math
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.dataset.decoding import decode
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import Augmentation

Kind = Literal["crop", "whole"]
MARGIN = 2  # a JPEG that is decoded at reduced size has so many times the px that are needed, along each side
HEADER = np.dtype("<u4")  # of width and height, px


def make(content: bytes, kind: Kind, preprocessing: Preprocessing, augmentation: Augmentation) -> np.ndarray:
    """Decode a file's bytes to a row of this kind, uint8; raises as `decode` does."""
    side = _side(kind, preprocessing, augmentation)
    needed = max(side, *preprocessing.resize) if (kind, preprocessing.geometry) == ("crop", "crop") else side
    image = decode(content, MARGIN * needed if preprocessing.jpeg_decoding == "fast" else None)
    return crop(image, preprocessing) if kind == "crop" else _whole(image, side, preprocessing)


def row_shape(kind: Kind, preprocessing: Preprocessing, augmentation: Augmentation) -> tuple[int, ...]:
    """The shape of a row of this kind."""
    side = _side(kind, preprocessing, augmentation)
    return (side, side, 3) if kind == "crop" else (2 * HEADER.itemsize + 3 * side**2,)


def crop(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """The evaluation transform: uint8 (crop, crop, 3).

    That of torchvision's Resize and CenterCrop, without the import, which takes longer than hundreds of images do.
    """
    if preprocessing.geometry != "crop":
        return np.array(fit(image, preprocessing, image.size))
    resize, side = preprocessing.resize, preprocessing.crop
    width, height = resize[::-1] if len(resize) == 2 else (int(resize[0] * n / min(image.size)) for n in image.size)
    left, top = (round((n - side) / 2) if n >= side else -((side - n) // 2) for n in (width, height))
    small = image.resize((width, height), _filter(preprocessing))
    return np.array(small.crop((left, top, left + side, top + side)).convert("RGB"))


def fit(image: Image.Image, preprocessing: Preprocessing, shape: tuple[int, int]) -> Image.Image:
    """The whole image as a square: squashed, or padded as an image of the width and height `shape` is."""
    side = preprocessing.crop
    size = side, side
    if preprocessing.geometry == "pad":
        size = max(1, round(side * shape[0] / max(shape))), max(1, round(side * shape[1] / max(shape)))
    square = Image.new("RGB", (side, side), preprocessing.mean_colour)
    small = image.resize(size, _filter(preprocessing)).convert("RGB")
    square.paste(small, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def to_image(row: np.ndarray, kind: Kind) -> Image.Image:
    """The picture (mode RGB) that a row holds."""
    if kind == "crop":
        return Image.fromarray(row)
    start = 2 * HEADER.itemsize
    width, height = row[:start].view(HEADER).tolist()
    return Image.fromarray(row[start : start + 3 * width * height].reshape(height, width, 3))


def _side(kind: Kind, preprocessing: Preprocessing, augmentation: Augmentation) -> int:
    """The side (px) of a crop; for a whole, of a square of which the smallest random crop has `crop` px square."""
    smallest = augmentation.crop_area[0] if kind == "whole" else 1.0
    return math.ceil(preprocessing.crop / math.sqrt(smallest))


def _whole(image: Image.Image, side: int, preprocessing: Preprocessing) -> np.ndarray:
    shrink = min(1.0, side / math.sqrt(image.width * image.height))
    size = max(1, int(shrink * image.width)), max(1, int(shrink * image.height))
    small = image.resize(size, _filter(preprocessing)).convert("RGB")
    row = np.zeros(2 * HEADER.itemsize + 3 * side**2, np.uint8)
    content = np.array(size, HEADER).tobytes() + small.tobytes()
    row[: len(content)] = np.frombuffer(content, np.uint8)
    return row


def _filter(preprocessing: Preprocessing) -> Image.Resampling:
    return Image.Resampling[preprocessing.interpolation.upper()]
