"""Preprocessing: the geometry and the scaling of the images that pretrained weights expect."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pipeline.params import Geometry, JpegDecoding, Record

LARGEST_SHARE = 0.1  # of the area of images, on average, that a crop may cut away without a note


class Preprocessing(Record):
    """The evaluation transform of the weights.

    `geometry`: how an image becomes a square of `crop` px. crop: it is resized to `resize` px, (shorter side,) or
    (height, width), and the centre is cut out; squash: it is resized to the square; pad: its longer side is, and the
    rest is filled. `interpolation`: bilinear, bicubic, …; `mean`, `std`: per channel, of values from 0 to 1.
    `jpeg_decoding`: whether large JPEGs are decoded at reduced size (fast) or at full size (exact).
    """

    geometry: Geometry
    jpeg_decoding: JpegDecoding
    resize: tuple[int, ...]
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def mean_colour(self) -> tuple[int, ...]:
        """The mean as a colour of 8 bits, which fills what shows no image: the network gets zeros there."""
        return tuple(round(255 * mean) for mean in self.mean)

    def cut_away(self, width: Sequence[int], height: Sequence[int]) -> np.ndarray:
        """The share (0 to 1) of the area of images of these sizes (px) that is not in view 0, (n_images,)."""
        sides = np.array([height, width], np.float64)
        if self.geometry != "crop":
            return np.zeros(len(width))
        resized = self.resize[0] * sides / sides.min(axis=0)
        if len(self.resize) == 2:  # every image gets this height and width
            resized[:] = np.array(self.resize)[:, None]
        return 1 - np.minimum(1, self.crop / resized).prod(axis=0)


class Normalize(nn.Module):
    """uint8 (n, crop, crop, 3) -> float32 (n, 3, crop, crop), channels-last in memory."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        for name, value in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, 255 * torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Permute and scale."""
        return (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std
