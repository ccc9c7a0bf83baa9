"""A folder of everything that is odd or broken: each file is accepted rightly or rejected with a reason.

On `python -m pipeline.stages.index`, as another user than root where permissions matter, and through `dvc repro` with
the files that DVC can hash.
"""

import csv
import hashlib
import io
import json
import os
import re
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from ruamel.yaml import YAML

from pipeline.dataset.decoding import decode
from pipeline.features import hdf5
from tests.factories import REPOSITORY, carry

pytestmark = pytest.mark.end_to_end

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (12, 16, 3), dtype=np.uint8)
GREY = RANDOM.integers(0, 256, (12, 16), dtype=np.uint8)
RED = np.full((12, 16, 3), (255, 0, 0), np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def distinct() -> bytes:
    """A good PNG of its own bytes."""
    return encoded(RANDOM.integers(0, 256, (12, 16, 3), dtype=np.uint8), "PNG")


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand: what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(pixels: bytes, width: int, height: int, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A grey little-endian TIFF by hand."""
    tags = [
        (256, 3, width),
        (257, 3, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, height),
        (279, 4, len(pixels)),
        (339, 3, sample_format),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def bmp(bits: int, rows: bytes, palette: bytes = b"") -> bytes:
    """A BMP of 4 x 2 px by hand."""
    start = 14 + 40 + len(palette)
    information = struct.pack("<IiiHHIIiiII", 40, 4, 2, 1, bits, 0, len(rows), 0, 0, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + information + palette + rows


def oriented(kind: str, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(RGB, kind, exif=exif, **options)


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, 1),
}


def ycck() -> bytes:
    """A JPEG in YCCK, as Photoshop writes it: C, M and Y (of red: 0, 255, 255) as if RGB; K inverted."""
    channels = [band.point(lambda value: 255 - value) for band in Image.fromarray(255 - RED).convert("YCbCr").split()]
    image = Image.merge("CMYK", [*channels, Image.new("L", (16, 12), 0)])  # Pillow inverts all when it writes CMYK
    content = encoded(image, "JPEG", quality=100, subsampling=0)
    at = content.index(b"Adobe") + 11
    return content[:at] + b"\x02" + content[at + 1 :]


def palette(*, is_transparent: bool) -> bytes:
    image = Image.fromarray((GREY // 64).astype(np.uint8), "P")
    image.putpalette([250, 10, 20, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    return encoded(image, "PNG", **({"transparency": 0} if is_transparent else {}))


COLOURS = np.array([[250, 10, 20], [0, 200, 0], [0, 0, 200], [9, 9, 9]], np.uint8)
ON_WHITE = np.array([[255, 255, 255], *COLOURS[1:].tolist()], np.uint8)
DEEP = RANDOM.integers(0, 65536, (12, 16)).astype(np.uint16)
TWELVE = np.array([[0, 1000, 2048, 4095]], np.uint16)
TWELVE_PACKED = bytes([0x00, 0x03, 0xE8, 0x80, 0x0F, 0xFF])  # big end first, as TIFF packs bits
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SPLIT = np.where(np.arange(16) < 8, 0, 255).astype(np.uint8)[None].repeat(12, 0)  # left half transparent
FRAMES = [Image.fromarray(np.roll(GREY, n)) for n in range(3)]
ANIMATION = {"save_all": True, "append_images": FRAMES[1:]}


@dataclass(frozen=True)
class Good:
    """A file that must come out as these pixels, to within `tolerance` grey levels (None: any pixels)."""

    content: bytes
    pixels: np.ndarray | None = None
    tolerance: int = 0


def good() -> dict[str, Good]:
    """Odd files that are fine, by name."""
    rgba = Image.fromarray(RGB).copy()
    rgba.putalpha(Image.fromarray(SPLIT))
    la = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(SPLIT)])
    lab = Image.new("LAB", (16, 12), (138, 128 + 81 - 128, 70))
    photograph = Image.fromarray(RGB).resize((64, 48), Image.Resampling.BICUBIC)
    smooth = np.asarray(photograph)
    wide = np.ascontiguousarray(RANDOM.integers(0, 256, (4, 6, 3, 2), dtype=np.uint8))  # 16 bits, big end first
    found = {
        "plain.png": Good(encoded(RGB, "PNG"), RGB),
        "grey.png": Good(encoded(GREY, "PNG"), GREY),
        "one_bit.png": Good(encoded(Image.fromarray(GREY > 99), "PNG"), np.where(GREY > 99, 255, 0)),
        "palette.png": Good(palette(is_transparent=False), COLOURS[GREY // 64]),
        "palette_transparent.png": Good(palette(is_transparent=True), ON_WHITE[GREY // 64]),
        "grey_alpha.png": Good(encoded(la, "PNG"), np.where(SPLIT == 0, 255, GREY)),
        "alpha.png": Good(encoded(rgba, "PNG"), np.where(SPLIT[..., None] == 0, 255, RGB)),
        "alpha.webp": Good(encoded(rgba, "WEBP", lossless=True), np.where(SPLIT[..., None] == 0, 255, RGB)),
        "transparent_colour.png": Good(
            encoded(COLOURS[GREY // 64], "PNG", transparency=(250, 10, 20)), ON_WHITE[GREY // 64]
        ),
        "transparent_grey.png": Good(encoded(GREY, "PNG", transparency=7), np.where(GREY == 7, 255, GREY)),
        "grey16.png": Good(encoded(DEEP, "PNG"), np.round(DEEP / 257)),
        "rgb16.png": Good(png(6, 4, 16, 2, b"".join(b"\0" + row.tobytes() for row in wide)), wide[..., 0], 1),
        "transparent_grey16.png": Good(
            png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 1000, 65535), (b"tRNS", struct.pack(">H", 1000))),
            np.array([[255, 255]]),
        ),
        "transparent_rgb16.png": Good(
            png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 257, 514, 771), (b"tRNS", struct.pack(">3H", 1, 65535, 300)))
        ),
        "grey16.tif": Good(encoded(DEEP, "TIFF"), np.round(DEEP / 257)),
        "grey16_big_endian.pgm": Good(b"P5 16 12 65535\n" + DEEP.astype(">u2").tobytes(), np.round(DEEP / 257)),
        "white_is_zero16.tif": Good(tiff(DEEP.tobytes(), 16, 12, 16, photometric=0), np.round((65535 - DEEP) / 257), 1),
        "signed16.tif": Good(
            tiff((DEEP.astype(int) - 32768).astype("<i2").tobytes(), 16, 12, 16, sample_format=2), np.round(DEEP / 257)
        ),
        "grey12.tif": Good(tiff(TWELVE_PACKED, 4, 1, 12), np.round(TWELVE / 4095 * 255)),
        "cmyk.jpg": Good(encoded(Image.new("CMYK", (16, 12), (0, 255, 255, 0)), "JPEG"), RED, 3),
        "ycck.jpg": Good(ycck(), RED, 6),
        "cmyk.tif": Good(encoded(Image.new("CMYK", (16, 12), (0, 255, 255, 0)), "TIFF"), RED),
        "lab.tif": Good(encoded(lab, "TIFF")),
        "ycbcr.tif": Good(encoded(Image.fromarray(RED).convert("YCbCr"), "TIFF"), RED, 3),
        "progressive.jpg": Good(encoded(photograph, "JPEG", progressive=True, quality=100, subsampling=0), smooth, 12),
        "profile.jpg": Good(encoded(photograph, "JPEG", icc_profile=PROFILE, quality=100, subsampling=0), smooth, 12),
        "broken_profile.png": Good(encoded(RGB, "PNG", icc_profile=b"\0" * 50), RGB),
        "really_a_jpeg.png": Good(encoded(photograph, "JPEG", quality=100, subsampling=0), smooth, 12),
        "no_extension": Good(encoded(RGB[::-1], "PNG"), RGB[::-1]),
        "shot.mpo": Good(encoded(photograph, "MPO", save_all=True, append_images=[photograph], quality=95)),
        "bits1.bmp": Good(
            bmp(1, b"\xa0\0\0\0\x50\0\0\0", bytes([0, 0, 0, 0, 255, 255, 255, 0])),
            np.tile([[[0], [255], [0], [255]], [[255], [0], [255], [0]]], 3),
        ),
        "bits4.bmp": Good(bmp(4, b"\x01\x01\0\0\x10\x10\0\0", bytes([0, 0, 255, 0, 0, 255, 0, 0]) + bytes(56))),
        "bits16.bmp": Good(bmp(16, struct.pack("<8H", *[0x7C00] * 8)), np.full((2, 4, 3), (255, 0, 0))),
        "bits24.bmp": Good(encoded(RGB, "BMP"), RGB),
        "bits32.bmp": Good(bmp(32, bytes([0, 0, 255, 0]) * 8), np.full((2, 4, 3), (255, 0, 0))),
        "ascii.ppm": Good(b"P3\n# made by hand\n2 1\n255\n255 0 0  0 0 255\n", np.array([[[255, 0, 0], [0, 0, 255]]])),
        "ascii16.pgm": Good(b"P2 2 1 65535\n257 65535\n", np.array([[1, 255]])),
        "still.gif": Good(encoded(GREY, "GIF"), np.stack([GREY] * 3, axis=-1)),
        "still.webp": Good(encoded(RGB, "WEBP", lossless=True), RGB),
        "still.jp2": Good(encoded(RGB, "JPEG2000"), RGB),
        "still.avif": Good(encoded(photograph, "AVIF", quality=100, subsampling="4:4:4"), smooth, 12),
        "one_pixel.png": Good(encoded(RGB[:1, :1], "PNG"), RGB[:1, :1]),
        "broken_exif.jpg": Good(encoded(photograph, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")),
        "nonsense_orientation.png": Good(oriented("PNG", 99), RGB),
        "tail.png": Good(encoded(RGB[:, ::-1], "PNG") + b"what someone appended", RGB[:, ::-1]),
    }
    for orientation, turn in UPRIGHT.items():
        found[f"orientation_{orientation}.png"] = Good(oriented("PNG", orientation), turn(RGB))
        found[f"orientation_{orientation}.tif"] = Good(oriented("TIFF", orientation), turn(RGB))
        squeezed = oriented("TIFF", orientation, compression="tiff_lzw")
        found[f"orientation_{orientation}_lzw.tif"] = Good(squeezed, turn(RGB))
    names = [
        "a,b.png",
        "q\"uo'te.png",
        "new\nline.png",
        "carriage\rreturn.png",
        "tab\t.png",
        " leading and trailing .png",
        "-rf.png",
        "NA",
        "back\\slash.png",
        "100%.png",
        "=1+1.png",
        "日本語.png",
        unicodedata.normalize("NFC", "é.png"),
        unicodedata.normalize("NFD", "é.png"),
        "😀.png",
        "\u202egnp.exe",
        "l" * 251 + ".png",
        "/".join(["deep"] * 150) + "/d.png",
        "/".join(["n" * 200] * 15) + "/n.png",
    ]
    return found | {name: Good(distinct()) for name in names}


def flipped(content: bytes) -> bytes:
    return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]


def bad() -> dict[str, tuple[bytes, str]]:
    """Files that are no image, with the pattern of the reason, by name."""
    jpeg = encoded(Image.fromarray(RGB).resize((200, 150)), "JPEG")
    big = encoded(RANDOM.integers(0, 256, (90, 90), dtype=np.uint8), "TIFF", compression="tiff_lzw")
    bomb = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9))
    unknown = "not an image of a known format"
    return {
        "empty.png": (b"", "empty file"),
        "text.png": (b"path,label\na.png,cat\n", unknown),
        "page.jpg": (b"<!doctype html><title>404</title>", unknown),
        "zeros.jpg": (bytes(5000), unknown),
        "noise.png": (RANDOM.bytes(5000), unknown),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", unknown),
        "figure.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", unknown),
        "figure_named.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", unknown),
        "photo.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), unknown),
        "icon.ico": (encoded(RGB, "ICO"), unknown),
        "header.png": (encoded(RGB, "PNG")[:20], "Truncated"),
        "truncated.png": (encoded(RGB, "PNG")[:-200], "."),
        "no_end.png": (encoded(RGB, "PNG")[:-12], "truncated"),
        "a bit flipped.png": (flipped(encoded(RGB, "PNG")), "checksum"),
        "truncated.jpg": (jpeg[:-300], "truncated"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.tif": (encoded(RGB, "TIFF")[:-200], "."),
        "truncated_lzw.tif": (big[:8] + bytes(50) + big[58:], "."),
        "truncated.webp": (encoded(RGB, "WEBP", lossless=True)[:-90], "."),
        "truncated.gif": (encoded(GREY, "GIF")[:-60], "."),
        "truncated.bmp": (encoded(RGB, "BMP")[:-60], "."),
        "truncated.jp2": (encoded(RGB, "JPEG2000")[:-300], "."),
        "animation.gif": (encoded(FRAMES[0], "GIF", **ANIMATION), "several frames or pages"),
        "animation.webp": (encoded(FRAMES[0], "WEBP", **ANIMATION), "several frames or pages"),
        "animation.png": (encoded(FRAMES[0], "PNG", **ANIMATION), "several frames or pages"),
        "animation.avif": (encoded(FRAMES[0].convert("RGB"), "AVIF", **ANIMATION), "several frames or pages"),
        "pages.tif": (encoded(FRAMES[0], "TIFF", **ANIMATION), "several frames or pages"),
        "thin.png": (encoded(Image.new("L", (1, 10_000)), "PNG"), r"1 x 10000 px; expected a side at most 50 times"),
        "bomb.png": (png(40_000, 40_000, 8, 0, b"\0"), "decompression bomb"),
        "bomb.tif": (tiff(bytes(64), 40_000, 40_000, 8), "decompression bomb"),
        "bomb.gif": (
            encoded(GREY, "GIF")[:6] + struct.pack("<HH", 65535, 65535) + encoded(GREY, "GIF")[10:],
            "decompression bomb",
        ),
        "bomb_in_text.png": (png(1, 1, 8, 0, b"\0\0", bomb), "[Dd]ecompressed data too large"),
        "no_width.png": (png(0, 4, 8, 0, b""), "."),
        "no_height.bmp": (bmp(24, b"")[:22] + struct.pack("<i", 0) + bmp(24, b"")[26:], "."),
        "float.tif": (encoded(GREY.astype(np.float32), "TIFF"), "floating-point pixels"),
        "counts32.tif": (encoded(GREY.astype(np.int32) * 70_000, "TIFF"), "32-bit pixels from"),
    }


BESIDE = {  # files that claim no image format
    "notes.txt": b"Buy milk.",
    "caption.txt": b"P1 is the name of a patient, and of a format",
    "archive.zip": b"PK\x05\x06" + bytes(18),
    "paper.pdf": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\n%%EOF",
    "plain.png:Zone.Identifier": b"[ZoneTransfer]\nZoneId=3\n",
    "plain.credits": b"",
}
IGNORED = (".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png", "._photo.png", ".thumbs/t.png", "__MACOSX/x.png")


@dataclass
class Folder:
    """A data set with a class of odd files and one of plain ones, outside of which lies `outside`."""

    root: Path
    good: dict[str, Good] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)

    @property
    def odd(self) -> Path:
        return self.root / "odd"

    def write(self, name: str, content: bytes) -> None:
        path = self.odd / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def make(root: Path) -> Folder:
    """What every tool can hash."""
    folder = Folder(root)
    for number in range(3):
        path = root / "plain" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(distinct())
    for name, file in good().items():
        folder.write(name, file.content)
        folder.good[name] = file
    for name, (content, reason) in bad().items():
        folder.write(name, content)
        folder.bad[name] = reason
    for name, content in BESIDE.items():
        folder.write(name, content)
    for name in IGNORED:
        folder.write(name, distinct())
    outside = root.parent / "outside"
    (outside / "folder").mkdir(parents=True)
    for path in (outside / "secret.png", outside / "folder" / "secret.png"):
        path.write_bytes(distinct())
    link(folder, "link.png", "plain.png")
    folder.good["link.png"] = folder.good["plain.png"]
    return folder


def link(folder: Folder, name: str, target: str, reason: str = "") -> None:
    (folder.odd / name).symlink_to(target)
    if reason:
        folder.bad[name] = reason


def make_worse(folder: Folder) -> None:
    """What DVC hangs on, fails on, or replaces by a copy of what a link points to."""
    for name, target, reason in (
        ("out.png", "../../outside/secret.png", "a link that leads out of the directory"),
        ("out_absolute.png", str(folder.root.parent / "outside/secret.png"), "a link that leads out of the directory"),
        ("broken.png", "nowhere.png", "a broken link"),
        ("circle.png", "circle.png", "a link that runs in a circle"),
        ("there.png", "back.png", "a link that runs in a circle"),
        ("back.png", "there.png", "a link that runs in a circle"),
        ("parent", "..", "a link"),
        ("itself", ".", "a link to a directory, which is not followed"),
        ("folder_outside", "../../outside/folder", "a link that leads out of the directory"),
        ("root.png", "/", "a link that leads out of the directory"),
        ("zero.png", "/dev/zero", "a link that leads out of the directory"),
    ):
        link(folder, name, target, reason)
    os.mkfifo(folder.odd / "pipe.png")
    folder.bad["pipe.png"] = "a pipe"
    here = os.getcwd()
    os.chdir(folder.odd)  # the path of a socket is at most 107 bytes long
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.png")
    os.chdir(here)
    folder.bad["socket.png"] = "a socket"
    try:
        os.mknod(folder.odd / "device.png", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
        folder.bad["device.png"] = "a device"
    except PermissionError:
        pass  # only root may
    (Path(os.fsdecode(os.fsencode(folder.odd) + b"/latin-\xe9.png"))).write_bytes(distinct())
    folder.bad["latin-\\xe9.png"] = "a name that is not UTF-8"


Snapshot = dict[str, tuple]


def snapshot(root: Path) -> Snapshot:
    """Everything of a directory that could be modified."""
    found = {}
    for parent, folders, files in os.walk(root):
        for name in [*folders, *files, "."]:
            path = os.path.join(parent, name)
            info = os.lstat(path)
            content = os.readlink(path) if stat.S_ISLNK(info.st_mode) else None
            if stat.S_ISREG(info.st_mode):
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            found[path] = (info.st_mode, info.st_uid, info.st_mtime_ns, info.st_size, info.st_ino, content)
    return found


def configure(workspace: Path, directory: Path, **dataset: Any) -> None:
    yaml = YAML()
    params = yaml.load(REPOSITORY / "params.yaml")
    params["dataset"].update({"fetch": [], "path": str(directory), "max_rejected_fraction": 1.0} | dataset)
    workspace.mkdir(parents=True, exist_ok=True)
    yaml.dump(params, workspace / "params.yaml")


def index(
    workspace: Path, *arguments: str, program: str = "", n_seconds: int = 240
) -> subprocess.CompletedProcess[str]:
    """Run the stage; a program that it starts from PATH leaves a trace."""
    tools = workspace / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("gs", "convert", "magick", "rsvg-convert", "pdftoppm", "inkscape", "ffmpeg"):
        (tools / name).write_text(f"#!/bin/sh\ntouch '{workspace}/started'\nexit 1\n")
        (tools / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DVC")}
    environment |= {
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, *(["-c", program] if program else ["-m", "pipeline.stages.index"]), *arguments]
    return subprocess.run(
        command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=n_seconds, check=False
    )


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Indexed:
    folder: Folder
    workspace: Path
    done: subprocess.CompletedProcess[str]
    is_untouched: bool

    @property
    def images(self) -> dict[str, dict[str, str]]:
        return {row["image_id"]: row for row in table(self.workspace / "data" / "images.csv")}

    @property
    def rejected(self) -> dict[str, str]:
        return {row["path"]: row["reason"] for row in table(self.workspace / "reports" / "data" / "rejected.csv")}

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.workspace / "reports" / "data" / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """A temporary directory that every user can look into, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def indexed(open_folder: Path) -> Indexed:
    folder = make(open_folder / "images")
    make_worse(folder)
    before = snapshot(open_folder / "images")
    workspace = open_folder / "workspace"
    configure(workspace, folder.root)
    done = index(workspace)
    return Indexed(folder, workspace, done, snapshot(open_folder / "images") == before)


def test_the_folder_is_indexed_and_nothing_in_it_is_modified(indexed: Indexed) -> None:
    assert indexed.done.returncode == 0, indexed.done.stderr[-3000:]
    assert "Traceback" not in indexed.done.stderr
    assert indexed.is_untouched


def test_no_program_is_started(indexed: Indexed) -> None:
    assert not (indexed.workspace / "started").exists()


def test_there_are_kinds_enough(indexed: Indexed) -> None:
    assert len(indexed.folder.good) + len(indexed.folder.bad) > 130


def test_every_good_file_is_accepted_and_no_other(indexed: Indexed) -> None:
    expected = {f"odd/{name}" for name in indexed.folder.good} | {f"plain/{number}.png" for number in range(3)}
    assert set(indexed.images) == expected


@pytest.mark.parametrize("name", [name for name, file in good().items() if file.pixels is not None])
def test_a_good_file_has_the_right_pixels_and_size(name: str, indexed: Indexed) -> None:
    file, row = indexed.folder.good[name], indexed.images[f"odd/{name}"]
    assert file.pixels is not None
    decoded = decode(file.content)
    assert (row["width"], row["height"]) == (str(file.pixels.shape[1]), str(file.pixels.shape[0]))
    assert row["sha256"] == hashlib.sha256(file.content).hexdigest()
    pixels = np.asarray(decoded if file.pixels.ndim == 2 else decoded.convert("RGB")).astype(float)
    assert pixels.shape == file.pixels.shape
    assert np.abs(pixels - file.pixels).max() <= file.tolerance


def test_every_bad_file_is_rejected_and_no_other(indexed: Indexed) -> None:
    assert set(indexed.rejected) == {f"odd/{name}" for name in indexed.folder.bad}


def test_the_reason_says_what_is_wrong_in_one_line(indexed: Indexed) -> None:
    rejected = indexed.rejected
    for name, pattern in indexed.folder.bad.items():
        reason = rejected[f"odd/{name}"]
        assert re.search(pattern, reason), (name, reason)
        assert len(reason.splitlines()) == 1
        assert "0x" not in reason


def test_the_summary_counts_and_warns(indexed: Indexed) -> None:
    summary, images = indexed.summary, indexed.images
    assert summary["n_images"] == len(images)
    assert summary["n_rejected"] == len(indexed.rejected)
    assert summary["n_distinct"] == len({row["sha256"] for row in images.values()})
    assert sum(summary["formats"].values()) == sum(summary["modes"].values()) == len(images)
    assert set(summary["orientations"]) == set("12345678")
    assert ["odd/link.png", "odd/plain.png"] in [sorted(group) for group in summary["exact_duplicates"]]
    (misnamed,) = (text for text in summary["warnings"] if "extension" in text)
    assert "odd/really_a_jpeg.png (JPEG)" in misnamed
    assert "odd/plain.png" not in misnamed
    (ignored,) = (text for text in summary["warnings"] if "hidden or system" in text)
    assert ignored.startswith("7 ")
    assert summary["skipped"] == {"hidden or of the system": 7, "no images": len(BESIDE)}


def test_indexing_again_from_memory_gives_the_same_bytes_and_reads_what_was_refused_to_be_read(
    indexed: Indexed,
) -> None:
    outputs = [
        indexed.workspace / name
        for name in ("data/images.csv", "data/labels.csv", "reports/data/summary.json", "reports/data/rejected.csv")
    ]
    before = [path.read_bytes() for path in outputs]
    again = index(indexed.workspace)
    assert again.returncode == 0
    assert " read, " in again.stderr
    assert [path.read_bytes() for path in outputs] == before
    verified = index(indexed.workspace, "--verify")
    assert ", 0 known" in verified.stderr
    assert [path.read_bytes() for path in outputs] == before


AS_ANOTHER_USER = """
import os, sys
from pipeline import logs
from pipeline.stages import index
logs.run(index.main)  # as root, which imports everything: nobody may not look into the home of root
os.chdir("../theirs")
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
logs.run(index.main)
"""


def test_what_a_user_may_not_read_is_rejected_with_a_reason(open_folder: Path) -> None:
    directory = open_folder / "guarded"
    for name in ("a/1.png", "a/2.png", "a/locked.png", "b/1.png", "b/2.png", "b/locked/3.png", "b/unsearchable/4.png"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(distinct())
    before = snapshot(directory)
    (directory / "a/locked.png").chmod(0)
    (directory / "b/locked").chmod(0)
    (directory / "b/unsearchable").chmod(0o644)
    theirs = open_folder / "theirs"
    configure(theirs, directory)
    theirs.chmod(0o777)
    is_root = os.getuid() == 0
    if is_root:
        configure(open_folder / "ours", directory)
    done = index(open_folder / "ours" if is_root else theirs, program=AS_ANOTHER_USER if is_root else "")
    (directory / "b/locked").chmod(0o755)
    (directory / "b/unsearchable").chmod(0o755)
    assert done.returncode == 0, done.stderr[-3000:]
    rejected = {row["path"]: row["reason"] for row in table(theirs / "reports/data/rejected.csv")}
    assert set(rejected) == {"a/locked.png", "b/locked", "b/unsearchable/4.png"}
    assert set(rejected.values()) == {"cannot be read: Permission denied"}
    (warning,) = json.loads((theirs / "reports/data/summary.json").read_text())["warnings"]
    assert warning.startswith("1 directories and all images in them were left out: 'b/locked' (cannot be read: ")
    assert [row["image_id"] for row in table(theirs / "data/images.csv")] == [
        "a/1.png",
        "a/2.png",
        "b/1.png",
        "b/2.png",
    ]
    assert before.keys() == snapshot(directory).keys()


# labels.csv


def rows(*lines: str, end: str = "\n", start: str = "path,label") -> bytes:
    return (end.join([start, *lines]) + end).encode()


PLAIN = ("images/a.png,cat", "images/b.png,dog")


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A data set with two images and links that lead out."""
    directory = tmp_path / "set"
    (directory / "images").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for path in (directory / "images/a.png", directory / "images/b.png", tmp_path / "outside/c.png"):
        path.write_bytes(distinct())
    (directory / "out").symlink_to(tmp_path / "outside")
    (directory / "out.png").symlink_to(tmp_path / "outside/c.png")
    (directory / "broken.png").symlink_to("nowhere")
    os.mkfifo(directory / "pipe.png")
    configure(tmp_path / "workspace", directory)
    return directory


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (rows(*PLAIN, "images/a.png,dog"), "row 4: 'images/a.png' is in row 2 already"),
        (rows("images/a.png,", "images/b.png,dog"), "row 2: label is empty"),
        (rows("images/a.png,cat,heavy", start="path,label,weight"), "row 2: weight 'heavy'"),
        (rows("images/a.png,cat,-1", start="path,label,weight"), "row 2: weight '-1'"),
        (rows("images/a.png,cat,nan", start="path,label,weight"), "row 2: weight 'nan'"),
        (rows("images/a.png"), "row 2: 1 fields; expected 2"),
        (rows(*PLAIN, f'images/a.png,"{"x" * 200_000}"'), "not a CSV file in UTF-8: field larger than field limit"),
        (b"", "column 'path' is missing"),
        (b"path,label\n", "no image found"),
        ("path,label\nimages/a.png,grün\n".encode("latin-1"), "not a CSV file in UTF-8"),
        ("path,label\nimages/a.png,cat\n".encode("utf-16"), "not a CSV file in UTF-8"),
        (RANDOM.bytes(100_000), "not a CSV file in UTF-8"),
        (encoded(RGB, "PNG"), "not a CSV file in UTF-8"),
    ],
)
def test_a_mistake_in_labels_csv_is_one_line_with_its_row(
    content: bytes, expected: str, listed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (listed / "labels.csv").write_bytes(content)
    line = refused(listed, monkeypatch)
    assert expected in line
    assert line.startswith(f"error: {listed}")


def test_a_row_of_what_is_no_image_below_the_directory_is_rejected_with_a_reason(listed: Path) -> None:
    expected = {
        "/etc/passwd": "leads out of the directory",
        "../outside/c.png": "leads out of the directory",
        "images/../../outside/c.png": "leads out of the directory",
        "out/c.png": "is a link that leads out of the directory",
        "out.png": "is a link that leads out of the directory",
        "broken.png": "is a broken link",
        "pipe.png": "is a pipe",
        "images": "is a directory",
        "images\\c.png": "is no plain path",
        "C:\\a.png": "is no plain path",
        "images/a\0.png": "is no plain path",
        "x" * 5000: "cannot be read: File name too long",
        "images/nowhere.png": "does not exist",
        "": "is no plain path",
    }
    (listed / "labels.csv").write_bytes(rows(*PLAIN, *(f"{path},cat" for path in expected)))
    workspace = listed.parent / "workspace"
    done = index(workspace)
    assert done.returncode == 0, done.stderr
    assert [row["image_id"] for row in table(workspace / "data" / "images.csv")] == ["images/a.png", "images/b.png"]
    found = {row["path"]: row["reason"] for row in table(workspace / "reports" / "data" / "rejected.csv")}
    assert found.keys() == expected.keys()
    for path, reason in expected.items():
        assert found[path].startswith(reason)


def test_too_many_such_rows_are_one_line(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(listed.parent / "workspace", listed, max_rejected_fraction=0.1)
    (listed / "labels.csv").write_bytes(rows(*PLAIN, '"new\nline.png",cat'))
    assert "1 of 3 images cannot be read, first" in (line := refused(listed, monkeypatch))
    assert "set/new\\nline.png (does not exist)" in line


def refused(listed: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line with which the stage refuses, run in this process for the sake of time."""
    from pipeline import logs
    from pipeline.stages import index as stage

    monkeypatch.chdir(listed.parent / "workspace")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(sys, "argv", ["index"])
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    with pytest.raises(SystemExit) as caught:
        logs.run(stage.main)
    line = str(caught.value.code)
    assert len(line.splitlines()) == 1
    return line


@pytest.mark.parametrize("kind", ["huge", "a link out", "a broken link", "a pipe", "a directory"])
def test_labels_csv_that_is_no_table_is_one_line(kind: str, listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = listed / "labels.csv"
    if kind == "huge":
        path.touch()
        os.truncate(path, 20_000_000_000)  # sparse
    elif kind == "a link out":
        path.symlink_to(listed.parent / "outside" / "c.png")
    elif kind == "a broken link":
        path.symlink_to("nowhere")
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert refused(listed, monkeypatch).startswith(f"error: {path}")


def test_labels_csv_as_spreadsheets_save_it_is_read(listed: Path) -> None:
    name = 'new\nline, "quoted".png'
    (listed / name).write_bytes(distinct())
    quoted = '"' + name.replace('"', '""') + '",cat'
    (listed / "labels.csv").write_bytes(b"\xef\xbb\xbf" + rows(*PLAIN, "", quoted, end="\r\n"))
    done = index(listed.parent / "workspace")
    assert done.returncode == 0, done.stderr
    images = table(listed.parent / "workspace" / "data" / "images.csv")
    assert [row["image_id"] for row in images] == ["images/a.png", "images/b.png", name]


# through DVC


def test_every_good_image_reaches_the_features_through_dvc(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    carry(repository)
    folder = make(repository / "data" / "mine")
    yaml = YAML()
    params = yaml.load(repository / "params.yaml")
    params["dataset"].update({"fetch": [], "path": "data/mine", "max_rejected_fraction": 1.0})
    params["backbone"].update({"name": "timm/test_resnet", "weights": "random"})
    params["features"].update({"views": 1, "image_size": 32})
    params["evaluation"]["views"] = ["identity"]
    params["fine_tune"]["run"] = []
    yaml.dump(params, repository / "params.yaml")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("DVC", "GIT", "PYTHON"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(repository),
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(tmp_path / "site"),
    }

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run("git", "init", "--quiet")
    run("dvc", "add", "--quiet", "data/mine")
    before = snapshot(folder.root)
    run("dvc", "repro", "extract")
    assert snapshot(folder.root) == before
    images = table(repository / "data" / "images.csv")
    assert {row["image_id"] for row in images} == {f"odd/{name}" for name in folder.good} | {
        f"plain/{number}.png" for number in range(3)
    }
    rejected = table(repository / "reports" / "data" / "rejected.csv")
    assert {row["path"] for row in rejected} == {f"odd/{name}" for name in folder.bad}
    features = hdf5.read_features(repository / "data" / "features.h5")
    assert list(features.sha256) == [row["sha256"] for row in images]
    assert np.isfinite(np.asarray(features.values[:])).all()
