"""Preprocessing: the geometry and the scaling of the images that pretrained weights expect."""

import torch
from torch import nn

from pipeline.params import Record


class Preprocessing(Record):
    """The evaluation transform of the weights.

    `resize`: px, (shorter side,) or (height, width); `crop`: px, side of the centre crop; `interpolation`: bilinear,
    bicubic, …; `mean`, `std`: per channel, of values from 0 to 1.
    """

    resize: tuple[int, ...]
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


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
