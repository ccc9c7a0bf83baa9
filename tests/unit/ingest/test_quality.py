"""What an image looks like."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipeline.dataset.decoding import examine
from pipeline.ingest.duplicates import reduced
from pipeline.ingest.quality import look
from tests.factories import encoded

SMOOTH = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
PHOTO = SMOOTH.resize((300, 200), Image.Resampling.BICUBIC)


def seen(image: Image.Image, kind: str = "PNG", **options: int) -> tuple[str, str]:
    pixels, _, mode, _, _ = examine(encoded(image, kind, **options))
    return look(pixels, mode, reduced(pixels))


def scaled(factor: float) -> Image.Image:
    return PHOTO.point(lambda value: int(value * factor))


def sixteen(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint16))


def on_transparent() -> Image.Image:
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (10, 10, 40, 40))
    return image


LEVELS = np.arange(64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (50, 40)), "flat"),
        (Image.new("RGB", (50, 40), "white"), "flat"),
        (Image.new("RGB", (50, 40), (9, 90, 200)), "flat"),
        (on_transparent(), "flat"),
        (Image.effect_noise((300, 300), 1.5), "flat"),
        (sixteen(LEVELS % 3 * 300), "few levels"),
        (sixteen(LEVELS), "few levels"),
        (sixteen(LEVELS * 16), ""),
        (scaled(0.08), "dark"),
        (scaled(0.3), ""),
        (PHOTO, ""),
        (Image.fromarray(np.where(LEVELS % 64 < 6, 250, 5).astype(np.uint8)), ""),
        (Image.merge("RGB", [Image.fromarray((LEVELS % 2 * 255).astype(np.uint8)).resize((128, 128))] * 3), ""),
    ],
)
def test_an_image_without_content_is_told_from_others(image: Image.Image, expected: str):
    assert seen(image)[0] == expected


def test_one_colour_is_recognised_behind_the_noise_of_jpeg():
    assert seen(Image.new("RGB", (64, 64), (0, 3, 2)), "JPEG", quality=30)[0] == "flat"


def test_blur_lowers_the_sharpness_and_contrast_does_not():
    values = [float(seen(PHOTO.filter(ImageFilter.GaussianBlur(radius)))[1]) for radius in (0, 2, 5, 10)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 10 * values[3]
    assert float(seen(scaled(0.5))[1]) == pytest.approx(values[0], rel=0.1)


@pytest.mark.parametrize("image", [Image.new("L", (50, 40)), PHOTO.crop((0, 0, 7, 90))])
def test_what_is_flat_or_of_a_few_pixels_has_no_sharpness(image: Image.Image):
    assert seen(image)[1] == ""
