"""Decode, preprocess, and deterministic augmented views: image files -> uint8 (views, size, size, 3).

What happens here is geometry and colour in uint8; scaling to floats is the first layer of the
network (backbones.Normalize), so that workers hand over a quarter of the bytes.
"""

import hashlib
import io
import math
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from pipeline.params import Augmentation


@dataclass(frozen=True)
class Preprocessing:
    """The evaluation transform of the weights.

    `resize`: px, (shorter side,) or (height, width); `crop`: px, side of the centre crop;
    `interpolation`: bilinear, bicubic, …; `mean`, `std`: per channel, of values from 0 to 1.
    """

    resize: tuple[int, ...]
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Sample:
    """One view of one image file, whose bytes must have this SHA-256."""

    path: Path
    sha256: str
    view: int


def decode(content: bytes) -> Image.Image:
    """Decode the whole image, upright, as 8-bit L or RGB; ValueError says why it cannot be read.

    Grey stays grey (one channel to resize instead of three, the same result); 16 bits are scaled
    by their full range; alpha is dropped; decompression bombs (over 89 megapixels) are refused.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # a broken EXIF block is no broken image
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                upright = ImageOps.exif_transpose(image)
    # Pillow's decoders raise almost anything on broken input; whatever it is, the file is at fault
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    if min(upright.size) < 1:
        raise ValueError("no pixels")
    if upright.mode.startswith("I"):
        levels = np.clip(np.asarray(upright), 0, 65535)
        return Image.fromarray(np.round(levels / 257).astype(np.uint8))
    if upright.mode == "F":
        raise ValueError("floating-point pixels; expected 8 or 16 bits")
    return upright if upright.mode == "L" else upright.convert("RGB")


def sha256(content: bytes) -> str:
    """SHA-256 (hex), which names an image wherever it lies."""
    return hashlib.sha256(content).hexdigest()


def views(
    image: Image.Image, name: str, which: Sequence[int], preprocessing: Preprocessing, augmentation: Augmentation
) -> np.ndarray:
    """The views numbered `which` of the image called `name` (its SHA-256): uint8 (n, crop, crop, 3)."""
    return np.stack([_view(image, name, k, preprocessing, augmentation) for k in which])


def _view(image: Image.Image, name: str, k: int, preprocessing: Preprocessing, a: Augmentation) -> np.ndarray:
    interpolation = InterpolationMode(preprocessing.interpolation)
    if k == 0:
        return _array(_evaluation_crop(image, preprocessing, interpolation))
    rng = np.random.default_rng([a.seed, k, *bytes.fromhex(name)])
    area, aspect = rng.uniform(*a.crop_area), math.exp(rng.uniform(*np.log(a.crop_aspect)))
    corner = rng.random(2)
    angle = rng.uniform(-1, 1) * a.rotation_degrees
    shift = rng.uniform(-1, 1, 2) * a.shift_fraction * preprocessing.crop
    scale = rng.uniform(*a.scale)
    if a.crop_area == (1.0, 1.0) and a.crop_aspect == (1.0, 1.0):
        crop = _evaluation_crop(image, preprocessing, interpolation)
    else:
        crop = _random_crop(image, area, aspect, corner, preprocessing.crop, interpolation)
    if angle or shift.any() or scale != 1:
        fill = [255 * mean for mean in preprocessing.mean]
        crop = tv.affine(
            crop.convert("RGB"),
            angle=angle,
            translate=shift.tolist(),
            scale=scale,
            shear=[0.0, 0.0],
            interpolation=InterpolationMode.BILINEAR,
            fill=[round(level) for level in fill],
        )
    for adjust, spread in (
        (tv.adjust_brightness, a.brightness),
        (tv.adjust_contrast, a.contrast),
        (tv.adjust_saturation, a.saturation),
    ):
        factor = 1 + rng.uniform(-1, 1) * spread
        if spread:
            crop = adjust(crop, factor)
    turn = rng.uniform(-1, 1) * a.hue
    if a.hue:
        crop = tv.adjust_hue(crop.convert("RGB"), turn)
    pixels = _symmetry(_array(crop), k, a)
    if a.noise_std:
        noisy = pixels + rng.normal(0, a.noise_std, pixels.shape)
        pixels = np.clip(np.round(noisy), 0, 255).astype(np.uint8)
    return pixels


def _evaluation_crop(image: Image.Image, preprocessing: Preprocessing, interpolation: InterpolationMode) -> Image.Image:
    resized = tv.resize(image, list(preprocessing.resize), interpolation)
    return tv.center_crop(resized, [preprocessing.crop])


def _random_crop(
    image: Image.Image, area: float, aspect: float, corner: np.ndarray, size: int, interpolation: InterpolationMode
) -> Image.Image:
    """A box of this share of the area and this aspect, cut to the image, scaled to size."""
    pixels = image.width * image.height * area
    width = min(image.width, max(1, round(math.sqrt(pixels * aspect))))
    height = min(image.height, max(1, round(math.sqrt(pixels / aspect))))
    left = int(corner[0] * (image.width - width + 1))
    top = int(corner[1] * (image.height - height + 1))
    return tv.resized_crop(image, top, left, height, width, [size, size], interpolation)


def _symmetry(pixels: np.ndarray, k: int, a: Augmentation) -> np.ndarray:
    """Flip, and turn by 90 degrees, exactly.

    View k takes element k of the group that is allowed, so that a round of views shows every
    element once: with `flips: both`, views 0 to 3 are the four flips.
    """
    flips = {"none": [""], "horizontal": ["", "h"], "vertical": ["", "v"], "both": ["", "h", "v", "hv"]}
    elements = flips[a.flips]
    turn, flip = divmod(k % (len(elements) * (4 if a.right_angles else 1)), len(elements))
    if "h" in elements[flip]:
        pixels = pixels[:, ::-1]
    if "v" in elements[flip]:
        pixels = pixels[::-1]
    return np.rot90(pixels, turn)


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def load_batches(
    batches: Sequence[Sequence[Sample]], preprocessing: Preprocessing, augmentation: Augmentation, workers: int
) -> Iterator[torch.Tensor]:
    """Decode batches in order, in worker processes: uint8 (len(batch), crop, crop, 3) each.

    Raises ValueError for a file that cannot be read or whose bytes are not those that were indexed.
    """
    loader = DataLoader(
        _Batches(batches, preprocessing, augmentation),
        batch_size=None,
        shuffle=False,
        num_workers=min(workers, len(batches)),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupts,
        prefetch_factor=4 if min(workers, len(batches)) else None,
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        yield batch


def _ignore_interrupts(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers


class _Batches(Dataset):
    """A batch, or the ValueError that stands for it (raised, a worker's error has no one line)."""

    def __init__(
        self, batches: Sequence[Sequence[Sample]], preprocessing: Preprocessing, augmentation: Augmentation
    ) -> None:
        self.batches = batches
        self.preprocessing = preprocessing
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> torch.Tensor | ValueError:
        opened, image, parts = None, None, []
        for sample in self.batches[index]:
            try:
                if image is None or sample.path != opened:
                    image, opened = _read(sample), sample.path
                parts.append(views(image, sample.sha256, [sample.view], self.preprocessing, self.augmentation))
            except (OSError, ValueError) as error:
                return ValueError(f"{sample.path}: {error}")
        return torch.from_numpy(np.concatenate(parts))


def _read(sample: Sample) -> Image.Image:
    content = sample.path.read_bytes()
    if sha256(content) != sample.sha256:
        raise ValueError("other bytes than were indexed; run: dvc repro")
    return decode(content)
