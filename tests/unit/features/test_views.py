"""Decoding, the evaluation transform, and augmented views that depend on seed, image and number alone."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.features import views
from pipeline.features.views import AUGMENTED, SYMMETRIES, evaluation_views, training_views
from pipeline.params import Augmentation, Symmetry
from tests.factories import PLAIN, PREPROCESSING, encoded, photograph

KNOBS: list[dict[str, Any]] = [
    {"flips": "horizontal"},
    {"flips": "vertical"},
    {"flips": "both"},
    {"right_angles": True},
    {"rotation_degrees": 40.0},
    {"shift_fraction": 0.5},
    {"scale": (1.2, 1.5)},
    {"crop_area": (0.2, 0.5)},
    {"crop_aspect": (1.5, 2.0)},
    {"brightness": 0.9},
    {"contrast": 0.9},
    {"saturation": 0.9},
    {"hue": 0.5},
    {"noise_std": 20.0},
]
EVERYTHING: dict[str, Any] = {key: value for knob in KNOBS for key, value in knob.items()}
SMALL = PREPROCESSING.model_copy(
    update={"resize": (20,), "crop": 16, "interpolation": "bicubic", "mean": (0.5, 0.4, 0.3)}
)
NAME = "0" * 64


def augmentation(**changes: Any) -> Augmentation:
    return PLAIN.model_copy(update=changes)


def augmented(*numbers: int) -> list[int]:
    """Codes of augmented views, whose pixels may be those of a symmetry."""
    return [AUGMENTED + k for k in numbers]


def make_views(image: Image.Image, *arguments: Any) -> np.ndarray:
    return views.make_views(encoded(image), *arguments)


def view(k: int, options: Augmentation, image: Image.Image | None = None, name: str = NAME) -> np.ndarray:
    """Training view k."""
    return make_views(image or photograph(), name, training_views(options, k + 1)[-1:], SMALL, options)[0]


def training(n: int, options: Augmentation) -> np.ndarray:
    return make_views(photograph(), NAME, training_views(options, n), SMALL, options)


# views


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("options", [PLAIN, augmentation(flips="both"), augmentation(**EVERYTHING)])
def test_a_grey_image_gives_what_it_gives_as_rgb(interpolation: str, options: Augmentation):
    grey = photograph().convert("L")
    how = SMALL.model_copy(update={"interpolation": interpolation}), options
    codes = [*range(4), *augmented(1, 2, 3)]
    assert np.array_equal(make_views(grey, NAME, codes, *how), make_views(grey.convert("RGB"), NAME, codes, *how))


def test_view_0_is_resized_by_its_shorter_side_and_cropped_in_the_middle():
    resized = photograph().resize((25, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(view(0, PLAIN), np.asarray(resized.crop((4, 2, 20, 18))))


def test_a_resize_to_height_and_width_changes_the_aspect():
    squashed = SMALL.model_copy(update={"resize": (16, 16)})
    expected = np.asarray(photograph().resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(make_views(photograph(), NAME, [0], squashed, PLAIN)[0], expected)


@pytest.mark.parametrize("knob", [*KNOBS, EVERYTHING, {"seed": 5}])
def test_view_0_is_the_evaluation_transform_whatever_the_augmentation(knob: dict[str, Any]):
    assert np.array_equal(view(0, augmentation(**knob)), view(0, PLAIN))


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: next(iter(knob)))
def test_every_knob_on_its_own_changes_view_1_and_keeps_its_kind(knob: dict[str, Any]):
    changed = view(1, augmentation(**knob))
    assert (changed.shape, changed.dtype) == ((16, 16, 3), np.uint8)
    assert not np.array_equal(changed, view(1, PLAIN))


def test_without_augmentation_all_views_are_the_same():
    assert np.array_equal(view(3, PLAIN), view(0, PLAIN))


@pytest.mark.parametrize(("flips", "axis"), [("horizontal", 1), ("vertical", 0)])
def test_one_flip_alternates(flips: str, axis: int):
    options = augmentation(flips=flips)
    for k in range(4):
        expected = np.flip(view(0, PLAIN), axis) if k % 2 else view(0, PLAIN)
        assert np.array_equal(view(k, options), expected)


def test_with_both_flips_a_round_is_the_four_flips_exactly():
    original = view(0, PLAIN)
    four = [original, original[:, ::-1], original[::-1], original[::-1, ::-1]]
    found = training(8, augmentation(flips="both"))
    assert np.array_equal(found, [*four, *four])


def test_right_angles_alone_are_the_four_turns():
    found = training(5, augmentation(right_angles=True))
    assert np.array_equal(found, [np.rot90(view(0, PLAIN), turn) for turn in range(5)])


@pytest.mark.parametrize("flips", ["horizontal", "vertical", "both"])
def test_flips_and_right_angles_show_each_symmetry_of_the_square_once_in_eight_views(flips: str):
    original = view(0, PLAIN)
    symmetries = {np.rot90(side, turn).tobytes() for side in (original, original[::-1]) for turn in range(4)}
    found = training(16, augmentation(flips=flips, right_angles=True))
    assert len(symmetries) == 8
    assert {pixels.tobytes() for pixels in found[:8]} == symmetries
    assert {pixels.tobytes() for pixels in found[8:]} == symmetries


@pytest.mark.parametrize("knob", [{"rotation_degrees": 40.0}, {"noise_std": 20.0}, EVERYTHING])
def test_a_view_depends_on_seed_image_and_number_and_on_nothing_else(knob: dict[str, Any]):
    options = augmentation(**knob)
    reference = view(1, options)
    torch.manual_seed(99)
    together = make_views(photograph(), NAME, [*augmented(5, 1), 0], SMALL, options)
    assert np.array_equal(together[1], reference)
    assert not np.array_equal(together[0], reference)
    assert not np.array_equal(view(1, augmentation(**knob, seed=1)), reference)
    assert not np.array_equal(view(1, options, name="1" * 64), reference)


@pytest.mark.parametrize("knob", [{}, {"crop_area": (0.3, 0.5)}, {"seed": 3}, EVERYTHING])
def test_evaluation_views_are_symmetries_of_view_0_whatever_the_augmentation(knob: dict[str, Any]):
    codes = evaluation_views(list(SYMMETRIES))
    assert codes == list(range(AUGMENTED))
    original = Image.fromarray(view(0, PLAIN))
    turned = [
        np.asarray(original if turn is None else original.transpose(turn))
        for turn in (
            *(None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180),
            *(Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270),
            *(Image.Transpose.TRANSPOSE, Image.Transpose.TRANSVERSE),
        )
    ]
    assert np.array_equal(make_views(photograph(), NAME, codes, SMALL, augmentation(**knob)), turned)


def test_names_of_symmetries_are_those_of_params():
    assert get_args(Symmetry) == tuple(SYMMETRIES)


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({}, [0, 0, 0, 0, 0, 0]),
        ({"seed": 7}, [0, 0, 0, 0, 0, 0]),
        ({"flips": "horizontal"}, [0, 1, 0, 1, 0, 1]),
        ({"flips": "vertical"}, [0, 2, 0, 2, 0, 2]),
        ({"flips": "both"}, [0, 1, 2, 3, 0, 1]),
        ({"right_angles": True}, [0, 4, 3, 5, 0, 4]),
        ({"flips": "horizontal", "right_angles": True}, [0, 1, 4, 6, 3, 2]),
        *((knob, [0, *augmented(1, 2, 3, 4, 5)]) for knob in KNOBS[4:]),
    ],
)
def test_training_views_with_the_same_pixels_have_the_same_code(changes: dict[str, Any], codes: list[int]):
    options = augmentation(**changes)
    assert training_views(options, 6) == codes
    found = training(6, options)
    if max(codes) < AUGMENTED:
        assert len({pixels.tobytes() for pixels in found}) == len(set(codes))
    numbered = make_views(photograph(), NAME, [0, *augmented(1, 2, 3, 4, 5)], SMALL, options)
    assert np.array_equal(found, numbered), "code or number, the pixels are those that the number has always had"


def test_noise_has_the_deviation_that_was_asked_for():
    grey = Image.new("L", (64, 64), 128)
    large = SMALL.model_copy(update={"resize": (64,), "crop": 64})
    (noisy,) = make_views(grey, NAME, augmented(1), large, augmentation(noise_std=10.0))
    assert noisy.std() == pytest.approx(10, abs=0.5)
    assert noisy.mean() == pytest.approx(128, abs=0.5)


def test_what_a_rotation_uncovers_is_filled_with_the_mean_of_the_weights():
    turned = view(1, augmentation(rotation_degrees=180.0), Image.new("RGB", (40, 40)))
    assert turned.reshape(-1, 3).max(axis=0).tolist() == [128, 102, 76]


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    make_views(photograph(), NAME, [0, *augmented(0, 1, 2)], SMALL, augmentation(**EVERYTHING))
    assert torch.equal(torch.get_rng_state(), before)


# geometry

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)
SHAPES = [(400, 40), (40, 400), (60, 50), (50, 50), (16, 16), (5, 3), (100, 2), (2, 100)]


def marked(width: int, height: int) -> Image.Image:
    """White, with a red mark at the start of the longer side and a blue one at its end."""
    image = Image.new("RGB", (width, height), WHITE)
    mark = max(1, round(max(width, height) / 8))
    size = (mark, height) if width >= height else (width, mark)
    image.paste(RED, (0, 0, *size))
    image.paste(BLUE, (width - size[0], height - size[1], width, height))
    return image


def fitted(geometry: str, image: Image.Image, options: Augmentation = PLAIN, code: int = 0) -> np.ndarray:
    return make_views(image, NAME, [code], SMALL.model_copy(update={"geometry": geometry}), options)[0]


def amount(pixels: np.ndarray, colour: tuple[int, ...]) -> float:
    """How many pixels have about this colour."""
    return float((np.abs(pixels.astype(int) - colour).max(axis=2) < 100).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_squash_and_pad_show_both_ends_of_the_image_and_crop_shows_the_middle_of_a_long_one(shape: tuple[int, int]):
    image = marked(*shape)
    for geometry in ("squash", "pad"):
        pixels = fitted(geometry, image)
        assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
        assert amount(pixels, RED) > 0
        assert amount(pixels, BLUE) > 0
    if max(shape) > 2 * min(shape):
        assert (fitted("crop", image) == WHITE).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_squash_fills_the_square_and_pad_keeps_the_shape_on_the_mean_colour(shape: tuple[int, int]):
    image, mean = Image.new("RGB", shape, WHITE), SMALL.mean_colour
    assert mean == (128, 102, 76)
    assert (fitted("squash", image) == 255).all()
    pixels = fitted("pad", image)
    is_image = (pixels == 255).all(axis=2)
    assert (pixels[~is_image] == mean).all()
    rows, columns = is_image.any(axis=1).nonzero()[0], is_image.any(axis=0).nonzero()[0]
    found = len(columns), len(rows)
    assert found == tuple(max(1, round(16 * side / max(shape))) for side in shape)
    assert is_image.sum() == found[0] * found[1]
    for seen in (rows, columns):
        assert abs(seen[0] - (15 - seen[-1])) <= 1, "in the middle"


@pytest.mark.parametrize("knob", [{}, *KNOBS, EVERYTHING])
@pytest.mark.parametrize("side", [7, 16, 50])
def test_of_a_square_image_pad_gives_what_squash_gives(side: int, knob: dict[str, Any]):
    image, options = photograph().resize((side, side)), augmentation(**knob)
    for code in (0, 1, *augmented(0, 1, 2)):
        assert np.array_equal(fitted("pad", image, options, code), fitted("squash", image, options, code))


@pytest.mark.parametrize("geometry", ["squash", "pad"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_whole_view_is_pillows_resize(geometry: str, mode: str):
    image = photograph().convert(mode)
    size = (16, 16) if geometry == "squash" else (16, round(16 * image.height / image.width))
    expected = np.asarray(image.resize(size, Image.Resampling.BICUBIC).convert("RGB"))
    top = (16 - size[1]) // 2
    assert np.array_equal(fitted(geometry, image)[top : top + size[1]], expected)


@pytest.mark.parametrize("geometry", ["squash", "pad"])
@pytest.mark.parametrize("knob", [*KNOBS[:4], {"rotation_degrees": 2.0}, {"shift_fraction": 0.02}, {"noise_std": 5.0}])
def test_augmented_views_show_both_ends_too(geometry: str, knob: dict[str, Any]):
    for k in range(8):
        pixels = fitted(geometry, marked(400, 40), augmentation(**knob), *augmented(k))
        assert amount(pixels, RED) > 0
        assert amount(pixels, BLUE) > 0


@pytest.mark.parametrize("geometry", ["squash", "pad"])
def test_a_random_crop_is_a_part_of_the_image_in_the_place_of_the_whole(geometry: str):
    """A wide image whose columns grow from dark to bright: how much of the range is seen is the width of the box."""
    ramp = np.broadcast_to(np.linspace(0, 250, 400), (40, 400)).astype(np.uint8)
    plain = fitted(geometry, Image.fromarray(ramp))
    shares = []
    for k in range(20):
        pixels = fitted(geometry, Image.fromarray(ramp), augmentation(crop_area=(0.25, 0.25)), *augmented(k + 1))
        is_image = slice(None) if geometry == "squash" else slice(7, 9)  # rows
        assert (pixels[~np.isin(np.arange(16), np.arange(16)[is_image])] == SMALL.mean_colour).all()
        shares.append(np.ptp(pixels[is_image].astype(int)) / np.ptp(plain[is_image].astype(int)))
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05), "half as wide and half as high: a quarter of the area"


def test_a_random_crop_of_an_image_of_a_few_pixels_has_at_least_one():
    options = augmentation(crop_area=(0.01, 0.02), crop_aspect=(2.0, 2.0))
    for shape in (*SHAPES, (50, 1)):
        for geometry in ("squash", "pad"):
            pixels = fitted(geometry, marked(*shape), options, *augmented(1))
            assert (pixels.max(axis=2) > 100).all(), "nothing is black, as a part without pixels would be"
