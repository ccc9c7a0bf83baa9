"""Decode image files as the network sees them: the bytes of any file -> upright 8-bit L or RGB, or the reason why not.

Colour profiles are ignored, as where the pretrained weights come from. Of a file with several pictures of equal rank
none is chosen: it is refused.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

VERSION = 2  # raise it when other pixels come out: features and the memory of `index` are then made anew
EXTENSIONS = {  # of the formats that are read, none of which runs a program
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
FORMATS = tuple(kind for kind in EXTENSIONS if kind != "MPO")  # as Pillow opens them; MPO comes as a kind of JPEG
MAX_ASPECT = 50  # of an image: resizing the shorter side makes the longer one so many times as long
MOST_SCANNED = 2e10  # px that all scans of a JPEG pass over, about a minute; cameras' files have ten scans
TURNS = {  # what makes a picture upright, by the orientation that its EXIF block states
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF


@dataclass(frozen=True)
class Decoded:
    """An upright image (mode L or RGB), and the format, mode and EXIF orientation (1 to 8) of its file."""

    image: Image.Image
    format: str
    mode: str
    orientation: int


def sha256(content: bytes) -> str:
    """SHA-256 (hex), which names an image wherever it lies."""
    return hashlib.sha256(content).hexdigest()


def decode(content: bytes) -> Image.Image:
    """The image alone, as `examine` gives it."""
    return examine(content).image


def examine(content: bytes) -> Decoded:
    """Decode the whole file; ValueError says in one line why it cannot be read, the same words in every run.

    Grey stays grey (one channel to resize instead of three, the same result). 16 bits are scaled by their full range,
    never by what occurs. What is transparent becomes white, as viewers show it: the colours underneath are whatever
    the writer left there. Decompression bombs (over 89 megapixels) are refused by their header.
    """
    if not content:
        raise ValueError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a broken EXIF block is no broken image
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                kind, mode = str(image.format), image.mode
                _check_header(image, content)
                orientation = _orientation(image)
                image.load()
                pixels = _eight_bits(image)
    except UnidentifiedImageError:  # whose text holds an address in memory
        if content.startswith((b"II*\0", b"MM\0*")):
            raise ValueError("a TIFF of a kind that is not read; expected 8- or 16-bit grey, or RGB") from None
        raise ValueError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except MemoryError:  # which says nothing of the file
        raise
    # Pillow's decoders raise almost anything on broken input; whatever it is, the file is at fault
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    if orientation in TURNS and kind != "TIFF":  # which Pillow turns itself
        pixels = pixels.transpose(TURNS[orientation])
    return Decoded(pixels, kind, mode, orientation)


def check_sums(content: bytes) -> None:
    """ValueError for a PNG whose checksums say that its bytes are not those that were written; other formats have none.

    Decoding does not check those of the pixels, nor that the end is there.
    """
    if not content.startswith(b"\x89PNG"):
        return
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.verify()
    except Exception as error:  # as above
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _check_header(image: Image.Image, content: bytes) -> None:
    width, height = image.size
    if not width or not height:
        raise ValueError(f"{width} x {height} px; expected at least one pixel")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width} x {height} px; expected a side at most {MAX_ASPECT} times the other")
    # The other pictures of a camera's MPO are previews and second views of the first
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ValueError("several frames or pages; expected a single picture")  # to count thousands takes long
    # Each scan of a progressive JPEG passes over all pixels, and takes few bytes
    if image.format in ("JPEG", "MPO") and content.count(b"\xff\xda") * width * height > MOST_SCANNED:
        raise ValueError(f"a JPEG of {width} x {height} px in too many scans")


def _orientation(image: Image.Image) -> int:
    """What the EXIF block says, 1 (upright) where there is none or it cannot be read."""
    try:
        stated = image.getexif().get(0x0112)
    except Exception:  # as above
        return 1
    return stated if isinstance(stated, int) and stated in TURNS else 1


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
    """Whole numbers of more than 8 bits, by the range that the file's type has."""
    pixels, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits, is_signed = tags.get(BITS, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0] == 2
    if bits > 16:  # of which most files use a part, and say not which
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"{bits}-bit pixels from {pixels.min()} to {pixels.max()}; expected 0 to 65535")
        bits, is_signed = 16, False
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    table = np.round(np.arange(high - low + 1) * (255 / (high - low))).astype(np.uint8)
    grey = table[np.clip(pixels.astype(np.int32), low, high) - low]
    if tags.get(PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[pixels == transparent] = 255
    return Image.fromarray(grey)


def _on_white(image: Image.Image) -> Image.Image:
    is_grey = image.mode in ("1", "L", "LA", "La")
    layered = image.convert("LA" if is_grey else "RGBA")
    opaque = layered.convert("L" if is_grey else "RGB")
    flat = Image.new(opaque.mode, opaque.size, "white")
    flat.paste(opaque, mask=layered.getchannel("A"))
    return flat


@cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
