"""Views of images: deterministic augmentation, from the pixels of pixels.py to uint8 (n, crop, crop, 3).

A view is named by its code. Codes below AUGMENTED are the symmetries of view 0, the evaluation transform, in the order
of SYMMETRIES; they do not depend on the augmentation. Code AUGMENTED + k is the augmented training view k.

Only geometry and colour change here. Scaling to floats is the first layer of the network (preprocessing.Normalize), so
that the decoding processes send a quarter of the bytes.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
from PIL import Image

from pipeline.dataset.decoding import sha256
from pipeline.features import pixels
from pipeline.features.pixels import Kind
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import FLIPS, Augmentation

Transform = Callable[[Image.Image], Image.Image]
SYMMETRIES = {  # flipped left to right or not, and then turned counter-clockwise by so many right angles
    "identity": (False, 0),
    "flip_horizontal": (True, 0),
    "flip_vertical": (True, 2),
    "rotate_180": (False, 2),
    "rotate_90": (False, 1),
    "rotate_270": (False, 3),
    "transpose": (True, 1),
    "transverse": (True, 3),
}
AUGMENTED = len(SYMMETRIES)


def training_views(augmentation: Augmentation, n: int) -> list[int]:
    """The codes of the training views 0 to n - 1; the same pixels have the same code."""
    if _is_random(augmentation):
        return [AUGMENTED + k if k else 0 for k in range(n)]
    return [list(SYMMETRIES.values()).index(_symmetry(k, augmentation)) for k in range(n)]


def evaluation_views(names: Sequence[str]) -> list[int]:
    """The codes of the symmetries `names` of view 0."""
    return [list(SYMMETRIES).index(name) for name in names]


def kind_of(code: int, augmentation: Augmentation) -> Kind:
    """Which pixels a view is made of: the whole image where it is a random crop of it."""
    has_crops = not augmentation.crop_area == augmentation.crop_aspect == (1.0, 1.0)
    return "whole" if code >= AUGMENTED and has_crops else "crop"


def make_views(
    content: bytes, name: str, views: Sequence[int], preprocessing: Preprocessing, augmentation: Augmentation
) -> np.ndarray:
    """The views with the codes `views` of an image file: uint8 (len(views), crop, crop, 3).

    `name`: the SHA-256 of its bytes `content`. ValueError in one line if they cannot be decoded.
    """
    kinds: set[Kind] = {kind_of(code, augmentation) for code in views}
    rows = {kind: pixels.make(content, kind, preprocessing, augmentation) for kind in kinds}
    made = [view_of(rows[kind_of(code, augmentation)], name, code, preprocessing, augmentation) for code in views]
    return np.stack(made)


def view_of(
    row: np.ndarray, name: str, code: int, preprocessing: Preprocessing, augmentation: Augmentation
) -> np.ndarray:
    """The view `code` of the image `name`, from its pixels of the kind that `kind_of` names: uint8 (crop, crop, 3).

    An augmented view depends on the pixels, augmentation.seed, name and number alone.
    """
    if code < AUGMENTED:
        return _turned(row, *list(SYMMETRIES.values())[code])
    k = code - AUGMENTED
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which also records its caller for GPUs that are not initialised yet
        torch.default_generator.manual_seed(int(sha256(f"{augmentation.seed} {name} {k}".encode())[:15], 16))
        augment = _augment(preprocessing, augmentation)  # pyright: ignore[reportArgumentType] (both are hashable)
        if augment is not None:
            row = np.asarray(augment(pixels.to_image(row, kind_of(code, augmentation))))
        view = _turned(row, *_symmetry(k, augmentation))
        if augmentation.noise_std:
            noise = augmentation.noise_std * torch.randn(view.shape).numpy()
            view = np.clip(np.round(view + noise), 0, 255).astype(np.uint8)
    return view


def _is_random(a: Augmentation) -> bool:
    """Whether training views differ by more than flips and right angles."""
    amounts = a.rotation_degrees, a.shift_fraction, a.brightness, a.contrast, a.saturation, a.hue, a.noise_std
    return any(amounts) or not a.scale == a.crop_area == a.crop_aspect == (1.0, 1.0)


@cache
def _augment(preprocessing: Preprocessing, a: Augmentation) -> Transform | None:
    """The random transform from the pixels of augmented views to crop x crop px, without symmetries; None: none."""
    from torchvision.transforms import InterpolationMode, v2

    random: list = []
    if kind_of(AUGMENTED, a) == "whole":
        interpolation = InterpolationMode(preprocessing.interpolation)
        random_crop = v2.RandomResizedCrop(preprocessing.crop, a.crop_area, a.crop_aspect, interpolation=interpolation)
        random.append(random_crop if preprocessing.geometry == "crop" else partial(_random_box, preprocessing, a))
    if a.rotation_degrees or a.shift_fraction or a.scale != (1.0, 1.0):
        shift, fill = (a.shift_fraction, a.shift_fraction), list(preprocessing.mean_colour)
        degrees, bilinear = (-a.rotation_degrees, a.rotation_degrees), InterpolationMode.BILINEAR
        random.append(v2.RandomAffine(degrees, shift, a.scale, interpolation=bilinear, fill=fill))
    colours = a.brightness, a.contrast, a.saturation, a.hue
    if any(colours):
        random.append(v2.ColorJitter(*colours))
    return v2.Compose(random) if random else None


def _random_box(preprocessing: Preprocessing, a: Augmentation, image: Image.Image) -> Image.Image:
    """A random box of the whole image, which takes its place as a square, squashed or padded.

    The aspect of the box is relative to that of the image, so that a box of a wide image is wide, and holds no padding.
    """
    from torchvision.transforms import RandomResizedCrop

    aspects = [relative * image.width / image.height for relative in a.crop_aspect]
    top, left, rows, columns = RandomResizedCrop.get_params(image, [*a.crop_area], aspects)  # pyright: ignore[reportArgumentType] (it takes images too)
    box = image.crop((left, top, left + max(1, columns), top + max(1, rows)))
    return pixels.fit(box, preprocessing, image.size)


def _symmetry(k: int, a: Augmentation) -> tuple[bool, int]:
    """The symmetry of training view k, as in SYMMETRIES.

    View k takes element k of the symmetry group that is allowed, so that successive views show every element once:
    with `flips: both`, views 0 to 3 are the four flips.
    """
    flips, n_turns = FLIPS[a.flips], 4 if a.right_angles else 1
    turn, flip = divmod(k % (len(flips) * n_turns), len(flips))
    is_flipped, turns = SYMMETRIES[flips[flip]]
    return is_flipped, (turns + turn) % 4


def _turned(row: np.ndarray, is_flipped: bool, turns: int) -> np.ndarray:
    """Flip, and rotate by right angles, exactly."""
    return np.rot90(row[:, ::-1] if is_flipped else row, turns)
