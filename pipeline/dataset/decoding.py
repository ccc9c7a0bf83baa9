"""Decode image files: the bytes of any file -> an upright 8-bit image (L or RGB), or the reason why not.

Colour profiles are ignored, as in the training of the pretrained weights. A file with several pictures of equal rank
is refused.
"""

import hashlib
import io
import warnings
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

EXTENSIONS = {  # of the formats that are read; none of them runs a program
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "MPO": (".mpo", ".jpg", ".jpeg"),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
FORMATS = tuple(kind for kind in EXTENSIONS if kind != "MPO")  # for Pillow, MPO is a kind of JPEG
MAX_ASPECT = 50  # of the sides: when the shorter one is resized to 224 px, the longer one has up to 11,200
MAX_SCANNED = 2e10  # px in all scans of a JPEG, about a minute; files of cameras have ten scans
TURNS = {  # how to turn a picture upright, by the orientation in its EXIF block
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FIRST_LYING = 5  # from this orientation on, the sides of the stored picture are swapped
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF


def sha256(content: bytes) -> str:
    """SHA-256 (hex) of a file's bytes, which identifies an image wherever it is stored."""
    return hashlib.sha256(content).hexdigest()


class Decoded(NamedTuple):
    """An upright image (mode L or RGB), and what its file says of it.

    Its format and mode by Pillow's names, its EXIF orientation (1 to 8), and its upright size in px, which is larger
    than that of `image` where a JPEG was decoded at reduced size.
    """

    image: Image.Image
    kind: str
    mode: str
    orientation: int
    size: tuple[int, int]


def decode(content: bytes, least_side: int | None = None) -> Image.Image:
    """The image alone; as `examine`."""
    return examine(content, least_side).image


def examine(content: bytes, least_side: int | None = None) -> Decoded:
    """Decode the whole file; ValueError with one line, the same in every run, if it cannot be read.

    With `least_side`, a JPEG may come at a half, a quarter or an eighth of its size, with that many px on its shorter
    side at least: libjpeg then computes fewer pixels of each block of 8 x 8, which is faster than to resize later.

    Grey stays grey (one channel to resize instead of three, with the same result). 16 bits are scaled by their full
    range, not by the values that occur. Transparent pixels become white, as in viewers: the colours underneath are
    arbitrary. Decompression bombs (over 89 megapixels) are refused by their header.
    """
    if not content:
        raise ValueError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an image with a broken EXIF block is usable
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                kind, mode, size = str(image.format), image.mode, image.size
                _check_header(image, content)
                orientation = _orientation(image)
                if least_side is not None and kind in ("JPEG", "MPO"):
                    image.draft(None, (least_side, least_side))
                image.load()
                pixels = _eight_bits(image)
    except UnidentifiedImageError:  # its text contains an address in memory, so it differs from run to run
        if content.startswith((b"II*\0", b"MM\0*")):
            raise ValueError("a TIFF of a kind that is not read; expected 8- or 16-bit grey, or RGB") from None
        raise ValueError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except MemoryError:  # not the fault of the file
        raise
    # Pillow's decoders raise almost any exception on broken input, so the file is at fault
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    if orientation in TURNS and kind != "TIFF":  # Pillow turns a TIFF itself
        pixels = pixels.transpose(TURNS[orientation])
        size = (size[1], size[0]) if orientation >= FIRST_LYING else size
    return Decoded(pixels, kind, mode, orientation, pixels.size if kind == "TIFF" else size)


def check_sums(content: bytes) -> None:
    """ValueError for a PNG whose checksums do not fit its bytes; other formats have no checksums.

    Decoding alone checks neither the checksums of the pixels nor that the end of the file is there.
    """
    if not content.startswith(b"\x89PNG"):
        return
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.verify()
    except MemoryError:  # as above
        raise
    except Exception as error:  # as above
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _check_header(image: Image.Image, content: bytes) -> None:
    width, height = image.size
    if not width or not height:
        raise ValueError(f"{width} x {height} px; expected at least one pixel")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width} x {height} px; expected a side at most {MAX_ASPECT} times the other")
    # In a camera's MPO, the other pictures are previews or second views of the first
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ValueError("several frames or pages; expected a single picture")  # not counted: that may take long
    # A scan of a progressive JPEG needs few bytes, but decoding it visits all pixels
    if image.format in ("JPEG", "MPO") and content.count(b"\xff\xda") * width * height > MAX_SCANNED:
        raise ValueError(f"a JPEG of {width} x {height} px in too many scans")


def _orientation(image: Image.Image) -> int:
    """The orientation in the EXIF block; 1 (upright) if there is none or it cannot be read."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # as above
        return 1
    return orientation if isinstance(orientation, int) and orientation in TURNS else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels; expected 8 or 16 bits")
    if image.mode.startswith("I"):
        return _scaled(image)
    if image.has_transparency_data:
        return _on_white(image)
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _lab_to_srgb()) or image
    return image if image.mode == "L" else image.convert("L" if image.mode == "1" else "RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Scale integers of more than 8 bits to 8 bits, by the full range of their type."""
    pixels, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits, is_signed = tags.get(BITS, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0] == 2
    if bits > 16:  # most such files use a smaller range, and do not state it
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"{bits}-bit pixels from {pixels.min()} to {pixels.max()}; expected 0 to 65535")
        bits, is_signed = 16, False
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    table = np.round(np.arange(high - low + 1) * (255 / (high - low))).astype(np.uint8)
    grey = table[np.clip(pixels.astype(np.int32), low, high) - low]
    if tags.get(PHOTOMETRIC) == 0:  # zero means white
        grey = 255 - grey
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[pixels == transparent] = 255
    return Image.fromarray(grey)


def _on_white(image: Image.Image) -> Image.Image:
    is_grey = image.mode in ("1", "L", "LA", "La")
    layered = image.convert("LA" if is_grey else "RGBA")
    flat = Image.new("L" if is_grey else "RGB", image.size, "white")
    flat.paste(layered.convert(flat.mode), mask=layered.getchannel("A"))
    return flat


@cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
