"""Files as cameras, scanners and graphics programs write them, and what the network sees of them."""

import hashlib
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset import decoding
from pipeline.dataset.decoding import decode, examine, sha256
from tests.factories import encoded, noise, photograph


def test_an_image_is_named_by_the_digest_of_its_bytes():
    assert sha256(b"abc") == hashlib.sha256(b"abc").hexdigest()


def test_pixels_come_out_as_they_went_in():
    for pixels in (noise(5, 4, 3), noise(5, 4)):
        assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(pixels)))), pixels)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda pixels: pixels),
        (2, lambda pixels: pixels[:, ::-1]),
        (3, lambda pixels: np.rot90(pixels, 2)),
        (4, lambda pixels: pixels[::-1]),
        (6, lambda pixels: np.rot90(pixels, -1)),
        (8, lambda pixels: np.rot90(pixels, 1)),
    ],
)
def test_an_image_is_turned_upright_as_its_exif_says(orientation: int, upright: Any):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise(5, 4, 3)
    assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(pixels), exif=exif))), upright(pixels))


def test_sixteen_bits_are_scaled_by_their_full_range_and_not_by_what_occurs():
    deep = np.array([[0, 256, 257, 1000], [128, 129, 32768, 65535]], np.uint16)
    image = decode(encoded(Image.fromarray(deep)))
    assert image.mode == "L"
    assert np.asarray(image).tolist() == [[0, 1, 1, 4], [0, 1, 128, 255]]


def test_pixels_of_thirty_two_bits_may_use_sixteen_of_them():
    deep = np.array([[0, 257, 65535]], np.int32)
    assert np.asarray(decode(encoded(Image.fromarray(deep), "TIFF"))).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("value", [-1, 65536])
def test_pixels_of_thirty_two_bits_outside_sixteen_are_refused_since_their_range_is_unknown(value: int):
    deep = Image.fromarray(np.array([[0, value]], np.int32))
    with pytest.raises(ValueError, match=f"32-bit pixels from .*{value}.*; expected 0 to 65535"):
        decode(encoded(deep, "TIFF"))


@pytest.mark.parametrize(
    ("mode", "kind", "colour", "expected"),
    [
        ("P", "PNG", None, (250, 10, 20)),
        ("RGBA", "PNG", (250, 10, 20, 255), (250, 10, 20)),
        ("RGBA", "PNG", (250, 10, 20, 0), (255, 255, 255)),
        ("RGBA", "PNG", (255, 55, 5, 51), (255, 215, 205)),
        ("CMYK", "TIFF", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", "JPEG", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_every_kind_of_colour_becomes_rgb_on_white(mode: str, kind: str, colour: Any, expected: tuple):
    image = Image.new(mode, (8, 8), colour or 0)
    if mode == "P":
        image.putpalette([250, 10, 20])
    decoded = decode(encoded(image, kind))
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).astype(int) - expected).max() <= 2


def test_floating_point_pixels_are_refused_since_their_range_is_unknown():
    with pytest.raises(ValueError, match="floating-point pixels; expected 8 or 16 bits"):
        decode(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))


def test_a_broken_exif_block_is_no_broken_image():
    image = Image.fromarray(noise(4, 4, 3))
    assert decode(encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")).size == (4, 4)


BROKEN = {
    "an empty file": b"",
    "a text file": b"path,label\na.png,cat\n",
    "a truncated PNG": encoded(photograph())[:-200],
    "a truncated JPEG": encoded(photograph(), "JPEG")[:-100],
    "a header alone": encoded(photograph())[:20],
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_whole_image_is_one_line(content: bytes):
    with pytest.raises(ValueError, match=r".") as error:
        decode(content)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_the_reason_is_the_same_in_every_run(content: bytes):
    with pytest.raises(ValueError, match=r"^((?!0x).)*$"):  # no address of an object: it goes into rejected.csv
        decode(content)


@pytest.mark.parametrize(
    "limit", [100 * 100 - 1, 100 * 100 // 2 - 1], ids=["a warning of Pillow", "an error of Pillow"]
)
def test_a_decompression_bomb_is_refused(limit: int, monkeypatch: pytest.MonkeyPatch):
    content = encoded(Image.new("L", (100, 100)))
    assert decode(content).size == (100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match="decompression bomb"):
        decode(content)


@pytest.mark.parametrize("size", [(1, 60), (120, 2)])
def test_image_that_resizing_would_blow_up_is_refused(size: tuple[int, int]):
    content = io.BytesIO()
    Image.new("L", size).save(content, "PNG")
    with pytest.raises(ValueError, match=r"px; expected a side at most 50 times the other"):
        decode(content.getvalue())


def test_format_that_runs_a_program_is_refused():
    with pytest.raises(ValueError, match="not an image of a known format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")


def test_a_jpeg_in_thousands_of_scans_is_refused_before_it_is_decoded():
    stream = io.BytesIO()
    Image.new("L", (2000, 2000)).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    assert decode(content).size == (2000, 2000)
    start = content.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match="a JPEG of 2000 x 2000 px in too many scans"):
        decode(content[:-2] + content[start:-2] * 6000 + content[-2:])


def test_too_little_memory_says_nothing_of_the_file(monkeypatch: pytest.MonkeyPatch):
    def fail(_image: Image.Image) -> Image.Image:
        raise MemoryError

    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    monkeypatch.setattr("pipeline.dataset.decoding._eight_bits", fail)
    with pytest.raises(MemoryError):
        decode(stream.getvalue())


def test_a_png_is_what_was_written_or_is_refused():
    whole = encoded(photograph())
    decoding.check_sums(whole)
    decoding.check_sums(encoded(photograph(), "BMP"))  # has no checksums
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for broken in (bytes(flipped), whole[:-12]):
        assert decode(broken).size == photograph().size, "decoding alone does not see it"
        with pytest.raises(ValueError, match=r"checksum|truncated"):
            decoding.check_sums(broken)


@pytest.mark.parametrize("start", [b"II*\0", b"MM\0*"])
def test_a_tiff_that_is_not_read_is_reported_as_that(start: bytes):
    with pytest.raises(ValueError, match="a TIFF of a kind that is not read"):
        decode(start + bytes(20))


# JPEGs at reduced size


def smooth(width: int, height: int) -> Image.Image:
    """A photograph without fine detail, dark at its top and bright at its left."""
    return photograph().resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("least", "expected"), [(None, 1), (500, 1), (150, 2), (75, 4), (38, 8), (1, 8)])
def test_a_jpeg_has_at_least_the_px_that_are_needed_along_each_side(least: int | None, expected: int, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(smooth(400, 304), "JPEG", exif=exif.tobytes(), quality=95)
    found, whole = examine(content, least), examine(content)
    size = (400, 304) if orientation < 5 else (304, 400)
    assert found.size == whole.size == whole.image.size == size
    assert found.image.size == (size[0] // expected, size[1] // expected)
    small = whole.image.resize(found.image.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(found.image)).mean() < 2, "the same picture, upright"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_only_jpegs_are_decoded_at_reduced_size(kind: str):
    content = encoded(smooth(400, 304), kind)
    assert np.array_equal(np.asarray(decode(content, 10)), np.asarray(decode(content)))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_jpeg_is_found_at_reduced_size_too(share: float):
    content = encoded(smooth(800, 608), "JPEG")
    with pytest.raises(ValueError, match="truncated"):
        decode(content[: int(share * len(content))], 50)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_are_decoded_at_reduced_size(mode: str):
    content = encoded(smooth(400, 304).convert(mode), "JPEG")
    found, whole = decode(content, 50), decode(content)
    assert (found.size, found.mode) == ((100, 76), whole.mode)
    small = np.asarray(whole.resize(found.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(small - np.asarray(found)).mean() < 2
