"""What an image looks like, measured on few of its pixels: whether it has content, is dark, and how sharp it is."""

import numpy as np
from PIL import Image

FLAT = 16  # grey levels of 255 that a picture of one colour spans at most, with the noise of a camera or of JPEG
FEW_LEVELS = 17  # grey levels of 255 that 12 bits use in a file of 16 bits, where their values were not scaled
DARK_MEAN, DARK_VALUE, DARK_SHARE = 20, 40, 0.95  # a dark picture's mean grey level (of 255), and of which share of it
ROUNDING = 20 / 12  # mean square of the Laplacian of rounding errors: 4² + 4 times the variance of one
SIDE = 128  # px of the picture whose sharpness is measured: finer details hardly reach a network


def look(image: Image.Image, mode: str, reduced: np.ndarray) -> tuple[str, str]:
    """Describe an 8-bit image (L or RGB) whose file has the mode `mode`, by Pillow's name.

    `reduced`: grey pixels (uint8) of a small copy of it. Returns what is wrong with it (`few levels`, `flat`, `dark` or
    empty), and its sharpness as text, empty for a flat or a very small picture.
    """
    is_flat = np.ptp(reduced) <= FLAT and all(np.ptp(band.getextrema()) <= FLAT for band in image.split())
    if mode.startswith("I") and (1 < np.count_nonzero(image.histogram()) <= FEW_LEVELS):
        found = "few levels"
    elif is_flat:
        found = "flat"
    else:
        is_dark = reduced.mean() < DARK_MEAN and np.mean(reduced < DARK_VALUE) > DARK_SHARE
        found = "dark" if is_dark else ""
    return found, "" if is_flat or min(image.size) < 8 else f"{_sharpness(image):.4f}"


def _sharpness(image: Image.Image) -> float:
    """The mean square of the Laplacian over the variance, at most 128 x 128 px: how much of a picture is fine detail.

    The variance of the Laplacian measures focus (Pech-Pacheco et al. 2000); the quotient does not depend on contrast.
    """
    width, height = image.size
    small = image.resize((min(width, SIDE), min(height, SIDE)), Image.Resampling.NEAREST)
    grey = np.asarray(small.convert("L")).astype(np.int16)
    laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    variance = float(grey.var(dtype=np.float64))
    detail = float(np.square(laplacian, dtype=np.int32).mean()) - ROUNDING
    return max(detail, 0.0) / variance if variance > 0 else 0.0
