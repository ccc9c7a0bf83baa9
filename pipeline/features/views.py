"""Views of images: preprocessing and deterministic augmentation, from image files to uint8 (n, crop, crop, 3).

A view is named by its code. Codes below AUGMENTED are the symmetries of view 0, the evaluation transform, in the order
of SYMMETRIES; they do not depend on the augmentation. Code AUGMENTED + k is the augmented training view k.

Only geometry and colour change here. Scaling to floats is the first layer of the network (preprocessing.Normalize), so
that the decoding processes send a quarter of the bytes.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from pipeline.dataset.decoding import decode, sha256
from pipeline.logs import explain, leave_signals
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import Augmentation

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
PREFETCHED = 4  # batches for each worker
SHARED_MEMORY = "/dev/shm"
FLIPS = {
    "none": ("identity",),
    "horizontal": ("identity", "flip_horizontal"),
    "vertical": ("identity", "flip_vertical"),
    "both": ("identity", "flip_horizontal", "flip_vertical", "rotate_180"),
}


@dataclass(frozen=True)
class Sample:
    """One view, by its code, of one image file, whose bytes must have this SHA-256."""

    path: Path
    sha256: str
    view: int


def training_views(augmentation: Augmentation, n: int) -> list[int]:
    """The codes of the training views 0 to n - 1; the same pixels have the same code."""
    if _is_random(augmentation):
        return [AUGMENTED + k if k else 0 for k in range(n)]
    return [list(SYMMETRIES.values()).index(_symmetry(k, augmentation)) for k in range(n)]


def evaluation_views(names: Sequence[str]) -> list[int]:
    """The codes of the symmetries `names` of view 0."""
    return [list(SYMMETRIES).index(name) for name in names]


def make_views(
    image: Image.Image, name: str, views: Sequence[int], preprocessing: Preprocessing, augmentation: Augmentation
) -> np.ndarray:
    """The views with the codes `views` of the image named `name` (its SHA-256): uint8 (len(views), crop, crop, 3).

    An augmented view depends on augmentation.seed, name and number alone.
    """
    evaluation_crop, augment = _transforms(preprocessing, augmentation)  # pyright: ignore[reportArgumentType] (both are hashable)
    plain = evaluation_crop(image) if augment is None or min(views) < AUGMENTED else image
    pixels = []
    for code in views:
        if code < AUGMENTED:
            pixels.append(_turned(plain, *list(SYMMETRIES.values())[code]))
            continue
        k = code - AUGMENTED
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which also records its caller for GPUs that are not initialised yet
            torch.default_generator.manual_seed(int(sha256(f"{augmentation.seed} {name} {k}".encode())[:15], 16))
            view = plain if augment is None else augment(image.convert("RGB"))
            array = _turned(view, *_symmetry(k, augmentation))
            if augmentation.noise_std:
                noise = augmentation.noise_std * torch.randn(array.shape).numpy()
                array = np.clip(np.round(array + noise), 0, 255).astype(np.uint8)
        pixels.append(array)
    return np.stack(pixels)


def _is_random(a: Augmentation) -> bool:
    """Whether training views differ by more than flips and right angles."""
    amounts = a.rotation_degrees, a.shift_fraction, a.brightness, a.contrast, a.saturation, a.hue, a.noise_std
    return any(amounts) or not a.scale == a.crop_area == a.crop_aspect == (1.0, 1.0)


@cache
def _transforms(preprocessing: Preprocessing, a: Augmentation) -> tuple[Transform, Transform | None]:
    """The evaluation crop, and the random transform of augmented views (None if there is none)."""
    from torchvision.transforms import InterpolationMode, v2

    interpolation, size = InterpolationMode(preprocessing.interpolation), preprocessing.crop
    evaluation: list = [v2.Resize(list(preprocessing.resize), interpolation=interpolation), v2.CenterCrop(size)]
    random_crop = v2.RandomResizedCrop(size, a.crop_area, a.crop_aspect, interpolation=interpolation)
    if preprocessing.geometry != "crop":
        evaluation = [partial(_whole, preprocessing, (1.0, 1.0), (1.0, 1.0))]
        random_crop = partial(_whole, preprocessing, a.crop_area, a.crop_aspect)
    crops = (a.crop_area, a.crop_aspect) != ((1.0, 1.0), (1.0, 1.0))
    moves = a.rotation_degrees or a.shift_fraction or a.scale != (1.0, 1.0)
    colours = a.brightness, a.contrast, a.saturation, a.hue
    random: list = []
    if crops:
        random.append(random_crop)
    if moves:
        shift, fill = (a.shift_fraction, a.shift_fraction), list(preprocessing.mean_colour)
        bilinear = InterpolationMode.BILINEAR
        random.append(
            v2.RandomAffine(
                (-a.rotation_degrees, a.rotation_degrees), shift, a.scale, interpolation=bilinear, fill=fill
            )
        )
    if any(colours):
        random.append(v2.ColorJitter(*colours))
    return v2.Compose(evaluation), v2.Compose(([] if crops else evaluation) + random) if random else None


def _whole(
    preprocessing: Preprocessing, area: tuple[float, float], aspect: tuple[float, float], image: Image.Image
) -> Image.Image:
    """The whole image as a square, squashed or padded, or a random box that takes its place.

    `area`: share of the image's area; `aspect`: width / height of the box, relative to that of the image. So a box of a
    wide image is wide, and holds no padding.
    """
    from torchvision.transforms import RandomResizedCrop

    (width, height), side = image.size, preprocessing.crop
    size = side, side
    if preprocessing.geometry == "pad":
        longer = max(image.size)
        size = max(1, round(side * width / longer)), max(1, round(side * height / longer))
    if (area, aspect) != ((1.0, 1.0), (1.0, 1.0)):
        aspects = [relative * width / height for relative in aspect]
        top, left, rows, columns = RandomResizedCrop.get_params(image, [*area], aspects)  # pyright: ignore[reportArgumentType] (it takes images too)
        image = image.crop((left, top, left + max(1, columns), top + max(1, rows)))
    small = image.resize(size, Image.Resampling[preprocessing.interpolation.upper()]).convert("RGB")
    square = Image.new("RGB", (side, side), preprocessing.mean_colour)
    square.paste(small, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _symmetry(k: int, a: Augmentation) -> tuple[bool, int]:
    """The symmetry of training view k, as in SYMMETRIES.

    View k takes element k of the symmetry group that is allowed, so that successive views show every element once:
    with `flips: both`, views 0 to 3 are the four flips.
    """
    flips, n_turns = FLIPS[a.flips], 4 if a.right_angles else 1
    turn, flip = divmod(k % (len(flips) * n_turns), len(flips))
    is_flipped, turns = SYMMETRIES[flips[flip]]
    return is_flipped, (turns + turn) % 4


def _turned(image: Image.Image, is_flipped: bool, turns: int) -> np.ndarray:
    """Flip, and rotate by right angles, exactly."""
    pixels = np.asarray(image.convert("RGB"))
    return np.rot90(pixels[:, ::-1] if is_flipped else pixels, turns)


def load_batches(
    batches: Sequence[Sequence[Sample]], preprocessing: Preprocessing, augmentation: Augmentation, workers: int
) -> Iterator[torch.Tensor]:
    """Decode batches in order, in worker processes: uint8 (len(batch), crop, crop, 3) each.

    Raises ValueError for a file that cannot be read or that changed since it was indexed, MemoryError if there is too
    little memory.
    """
    workers = min(workers, len(batches))
    n_waiting, largest = PREFETCHED * workers + 2, max(map(len, batches), default=0)
    is_piped = workers > 0 and not _has_shared_memory(n_waiting * largest * 3 * preprocessing.crop**2)
    loader = DataLoader(
        batches,  # pyright: ignore[reportArgumentType] (a sequence does)
        batch_size=None,
        collate_fn=partial(_load, preprocessing, augmentation, is_piped),
        num_workers=workers,
        pin_memory=torch.cuda.is_initialized(),  # a GPU was chosen; the question alone makes no context
        worker_init_fn=leave_signals,
        prefetch_factor=PREFETCHED if workers else None,
        generator=torch.Generator(),  # not the global one, from which dropout draws
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield torch.from_numpy(batch) if isinstance(batch, np.ndarray) else batch


def _has_shared_memory(n_bytes: int) -> bool:
    """Whether /dev/shm has room for `n_bytes`, twice over for who else uses it; a container often has only 64 MB.

    Systems without this directory have no such limit.
    """
    with suppress(OSError):
        return shutil.disk_usage(SHARED_MEMORY).free >= 2 * n_bytes
    return True


def _load(
    preprocessing: Preprocessing, augmentation: Augmentation, is_piped: bool, batch: Sequence[Sample]
) -> torch.Tensor | np.ndarray | Exception:
    """A batch, or the error to raise in the main process: one that is raised in a worker comes with a traceback.

    A worker hands over a tensor in shared memory, and an array (`is_piped`) through a pipe.
    """
    pixels = []
    for path, group in groupby(batch, lambda sample: sample.path):
        samples = list(group)  # the views of one image, which is decoded once
        name, views = samples[0].sha256, [sample.view for sample in samples]
        try:
            content = path.read_bytes()
            if sha256(content) != name:
                raise ValueError("the file changed since it was indexed; run: dvc repro")
            pixels.extend(make_views(decode(content), name, views, preprocessing, augmentation))
        except MemoryError as error:
            return MemoryError(f"{path}: {str(error) or 'cannot be decoded in the memory there is'}")
        except (OSError, ValueError) as error:
            return ValueError(f"{path}: {error}")
    if is_piped:
        return np.stack(pixels)
    try:
        return default_collate([torch.from_numpy(view) for view in pixels])
    except RuntimeError as error:
        if explain(error) is None:
            raise
        return error
