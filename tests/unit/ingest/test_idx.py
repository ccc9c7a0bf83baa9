"""IDX files: what they say is read, and what contradicts itself is refused without being unpacked."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline.ingest import idx, sources
from pipeline.ingest.listing import find_images

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (6, 5, 4), np.uint8)
LABELS = np.array([3, 0, 9, 3, 3, 1], np.uint8)
IMAGES_NAME, LABELS_NAME = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx_bytes(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def pair(directory: Path, images: bytes | None = None, labels: bytes | None = None, suffix: str = "") -> Path:
    write(directory / f"{IMAGES_NAME}{suffix}", idx_bytes(PIXELS) if images is None else images)
    write(directory / f"{LABELS_NAME}{suffix}", idx_bytes(LABELS) if labels is None else labels)
    return directory


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_directory_of_idx_files_becomes_a_data_set_with_the_splits_of_their_names(suffix: str, tmp_path: Path):
    source, out = pair(tmp_path / "source", suffix=suffix), tmp_path / "out"
    write(source / f"t10k-images.idx3-ubyte{suffix}", idx_bytes(PIXELS[:2]))
    write(source / f"t10k-labels.idx1-ubyte{suffix}", idx_bytes(LABELS[:2]))
    sources.import_idx(source, out)
    table = pd.read_csv(out / "labels.csv", dtype=str)
    assert sorted(table["split"]) == ["test"] * 2 + ["train"] * 6
    assert list(table["path"]) == sorted(table["path"])
    for row in table.to_dict("records"):
        number = int(Path(row["path"]).stem)
        with Image.open(out / row["path"]) as image:
            assert np.array_equal(np.asarray(image), PIXELS[number])
        assert row["label"] == str(LABELS[number])
    assert len(find_images(out).images) == 8
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_labels_of_two_digits_sort_as_numbers(tmp_path: Path):
    pair(tmp_path / "source", labels=idx_bytes(np.array([0, 2, 10, 11, 2, 25], np.uint8)))
    sources.import_idx(tmp_path / "source", tmp_path / "out")
    assert set(pd.read_csv(tmp_path / "out/labels.csv", dtype=str)["label"]) == {"00", "02", "10", "11", "25"}


def test_an_unpacked_file_counts_and_the_packed_one_beside_it_does_not(tmp_path: Path):
    pair(pair(tmp_path), suffix=".gz")
    (found,) = idx.find_pairs(tmp_path)
    assert (found.split, found.images.name, found.labels.name) == ("train", IMAGES_NAME, LABELS_NAME)


HEADER = idx_bytes(PIXELS)[:16]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("images", "labels", "problem"),
    [
        (b"", None, "ends before its header says"),
        (HEADER[:9], None, "ends before its header says"),
        (b"PK\3\4" + HEADER, None, "begins with 504b0304; expected 00000803"),
        (idx_bytes(PIXELS.astype(">i4"), kind=12), None, "begins with 00000c03; expected 00000803"),
        (idx_bytes(LABELS), None, "begins with 00000801; expected 00000803"),
        (None, idx_bytes(PIXELS), "begins with 00000803; expected 00000801"),
        (idx_bytes(PIXELS[:0]), None, "its header says 0 x 5 x 4; expected none of them 0"),
        (idx_bytes(PIXELS[:5]), None, "6 labels; expected 5"),
        (None, idx_bytes(LABELS[:5]), "5 labels; expected 6"),
        (idx_bytes(PIXELS)[:-1], None, ""),
        (idx_bytes(PIXELS) + b"x", None, ""),
        (None, idx_bytes(LABELS)[:-1], ""),
        (None, idx_bytes(LABELS) + b"x", ""),
        (bytes([0, 0, 8, 3]) + struct.pack(">3I", 6, 2**31, 2**31), None, "expected at most 89000000 pixels"),
    ],
)
def test_a_file_that_is_not_as_its_header_says_is_refused_and_leaves_nothing(
    images: bytes | None, labels: bytes | None, problem: str, suffix: str, tmp_path: Path
):
    source = pair(tmp_path / "source", images, labels, suffix)
    with pytest.raises(ValueError, match=r"-ubyte(\.gz)?: ") as error:
        sources.import_idx(source, tmp_path / "out")
    assert problem in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    n = 100_000
    source = pair(
        tmp_path / "source",
        bytes([0, 0, 8, 3]) + struct.pack(">3I", n, 28, 28) + bytes(28 * 28 * 1000),
        idx_bytes(np.zeros(n, np.uint8)),
        ".gz",
    )
    read = gzip.GzipFile.read
    monkeypatch.setattr(
        gzip.GzipFile, "read", lambda file, size=-1: read(file, size) if 0 <= size <= 16 else pytest.fail("it was read")
    )
    with pytest.raises(ValueError, match=r"78400016 bytes, \d+ times its size: taken for a decompression bomb"):
        sources.import_idx(source, tmp_path / "out")


def test_labels_that_are_a_decompression_bomb_are_bounded_by_the_number_of_images(tmp_path: Path):
    bomb = bytes([0, 0, 8, 1]) + struct.pack(">I", 10**7) + bytes(10**7)
    source = pair(tmp_path / "source", labels=bomb, suffix=".gz")
    with pytest.raises(ValueError, match=r"10000000 labels; expected 6, one per image of train-images-idx3-ubyte\.gz"):
        sources.import_idx(source, tmp_path / "out")
    write(source / f"{LABELS_NAME}.gz", bytes([0, 0, 8, 1]) + struct.pack(">I", 6) + bytes(10**7))
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte\.gz: goes on after the 6 bytes that its header says"):
        sources.import_idx(source, tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_gzip_file_is_one_line(damage: str, tmp_path: Path):
    path = pair(tmp_path / "source", suffix=".gz") / f"{IMAGES_NAME}.gz"
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-20] if damage == "cut" else content[:40] + bytes([content[40] ^ 255]) + content[41:])
    with pytest.raises(ValueError, match=r"not a whole gzip file|ends before|goes on"):
        sources.import_idx(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_missing_or_there_twice_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere: not a directory"):
        idx.find_pairs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no IDX files; expected train-images-idx3-ubyte"):
        idx.find_pairs(tmp_path)
    pair(tmp_path)
    write(tmp_path / "other-train-images-idx3-ubyte", b"")
    write(tmp_path / "other-train-labels-idx1-ubyte", b"")
    with pytest.raises(ValueError, match=f"other-{IMAGES_NAME} and {IMAGES_NAME} are both of train"):
        idx.find_pairs(tmp_path)
    (tmp_path / "other-train-images-idx3-ubyte").unlink()
    (tmp_path / LABELS_NAME).unlink()
    with pytest.raises(ValueError, match=f"{IMAGES_NAME}: its labels are missing; expected {LABELS_NAME} or"):
        idx.find_pairs(tmp_path)


def test_a_directory_that_is_there_is_left_alone(tmp_path: Path):
    pair(tmp_path / "source")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out: is there already; expected a new directory"):
        sources.import_idx(tmp_path / "source", tmp_path / "out")
