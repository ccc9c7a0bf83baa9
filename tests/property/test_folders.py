"""Random folders: each file is used, left out or rejected, classes are as planted, and no mistake is a traceback."""

import csv
import io
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.ingest import indexing, inventory, listing
from pipeline.ingest.inventory import Inventory
from pipeline.params import Dataset
from pipeline.stages import index

OPTIONS = {
    "fetch": (),
    "path": "set",
    "max_rejected_fraction": 1.0,
    "on_conflict": "error",
    "near_duplicates": "report",
    "near_duplicate_correlation": 0.997,
    "exclude": (),
    "columns": {},
    "similar_classes": "error",
    "min_class_size": 1,
    "small_classes": "error",
    "jpeg_decoding": "fast",
}
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "GIF": ".gif", "BMP": ".bmp", "WEBP": ".webp", "TIFF": ".tif", "PPM": ".ppm"}
CLASSES = ("cat", "dog 2", "a,b", "caf\u00e9", "日本", "line\nbreak", "-rf", "[x]*", 'q"uote', "1.0", "NA", "train")
STEMS = (
    "x",
    "IMG 1",
    "a.b",
    "n,m",
    "é",
    "e\u0301",
    "=1+1",
    "new\nline",
    "tab\t",
    " blank ",
    "100%",
    "[1]",
    "😀",
    "l" * 200,
)
SYSTEM = (
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "lost+found",
    ".Trash-1000",
    "__MACOSX",
    ".ipynb_checkpoints",
    "@Recycle",
)
SIDECARS = (".xml", ".json", ".txt", ".png:Zone.Identifier", ".csv", ".md5", ".mp4", "", ".npz")
LAYOUT = (
    "train",
    "test",
    "val",
    "images",
    "labels",
    "masks",
    "a",
    "b",
    "A",
    "fold 1",
    "fold 2",
    "training_set",
    ".x",
    *SYSTEM,
)


class Garden:
    """Plants files in `root`; each image and each sidecar has bytes of its own."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random, self.n_planted = root, Random(seed), 0
        self.images: dict[str, str] = {}  # path and class of each image that must be used

    def write(self, path: str, content: bytes) -> bool:
        """False if something lies there already."""
        target = self.root / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                file.write(content)
        except (FileExistsError, NotADirectoryError):
            return False
        return True

    def picture(self, kind: str = "PNG") -> bytes:
        self.n_planted += 1
        pixels = np.random.default_rng(self.n_planted).integers(0, 256, (*self.side(), 3), dtype=np.uint8)
        pixels[0, 0] = self.n_planted // 256 % 256, self.n_planted % 256, 255
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind, **({"quality": 95} if kind == "JPEG" else {}))
        return stream.getvalue() + (f"tail {self.n_planted}".encode() if kind in ("JPEG", "GIF") else b"")

    def side(self) -> tuple[int, int]:
        height = self.random.randint(1, 40)
        return height, self.random.randint(max(1, height // 40), min(40, height * 40))

    def name(self, extension: str) -> str:
        return f"{self.random.choice(STEMS)}{self.random.randint(0, 999)}{extension}"

    def image(self, folder: str, label: str) -> None:
        kind = self.random.choice(list(FORMATS))
        extension = self.random.choice([FORMATS[kind], FORMATS[kind].upper(), ".png", ".exe"])
        path = f"{folder}/{self.name(extension)}"
        if self.write(path, self.picture(kind)):
            self.images[path] = unicodedata.normalize("NFC", label)

    def rubbish(self, folder: str) -> None:
        """A file beside images, or something that cannot be one."""
        picture, random = self.picture(), self.random
        kind = random.randrange(9)
        if kind < 3:
            text = random.choice([b"", b"P1 caption", b"BMW", b"<a/>", bytes(90), b"Python", b"GIF of a cat"])
            self.write(f"{folder}/{self.name(random.choice(SIDECARS))}", text)
        elif kind == 3:
            self.write(f"{folder}/{random.choice(SYSTEM)}/{self.name('.png')}", picture)
        elif kind == 4:
            self.write(f"{folder}/{random.choice(['.DS_Store', 'Thumbs.db', '._a.png', 'desktop.ini'])}", picture)
        elif kind == 5:
            broken = [b"", picture[:20], picture[:-20], b"<html>", bytes(99), b"\xff\xd8\xff\xe0" + bytes(9)]
            self.write(f"{folder}/{self.name('.png')}", random.choice(broken))
        elif kind == 6 and not os.path.lexists(self.root / folder / "link.png"):
            target = random.choice(["nowhere", "link.png", "../..", "/etc/hostname", ".", "/"])
            (self.root / folder).mkdir(parents=True, exist_ok=True)
            (self.root / folder / "link.png").symlink_to(target)
        elif kind == 7 and not os.path.lexists(self.root / folder / "pipe.png"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
            os.mkfifo(self.root / folder / "pipe.png")
        else:
            self.write(f"{folder}/{self.name('.heic')}", picture[:40])

    def n_files(self) -> int:
        """All that is no directory, but for labels.csv."""
        found = [
            path
            for parent, folders, files in os.walk(self.root)
            for path in [Path(parent, name) for name in [*files, *folders]]
            if path.is_symlink() or not path.is_dir()
        ]
        return len(found) - os.path.lexists(self.root / "labels.csv")


@contextmanager
def garden(seed: int) -> Iterator[Garden]:
    root = Path(tempfile.mkdtemp())
    try:
        yield Garden(root / "set", seed)
    finally:
        shutil.rmtree(root)


def indexed(root: Path, **changes: object) -> Inventory:
    """What the stage index finds, without its files."""
    options = Dataset.model_validate(OPTIONS | changes)
    listed = listing.find_images(root, options.exclude, options.columns, options.similar_classes)
    files = [indexing.inspect_file(f"{root}/{path}") for path in listed.images["path"]]
    found = inventory.take(listed, files, options.near_duplicate_correlation, options.min_class_size)
    index.check(found, options, listed)
    return found


def used(found: Inventory) -> dict[str, str]:
    return dict(zip(found.kept["path"], found.kept["label"], strict=True))


def n_accounted(found: Inventory) -> int:
    return sum(found.summary[key] for key in ("n_images", "n_rejected", "n_skipped"))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_class_directories_with_rubbish_give_the_planted_classes(seed: int):
    with garden(seed) as plants:
        random = plants.random
        names = random.sample([name for name in CLASSES if name != "train"], 3)
        splits = random.choice([[""], [""], ["train/", "test/"], ["Train/", "valid/", "TESTING/"]])
        for split in splits:
            for name in names:
                spelled = unicodedata.normalize(random.choice(["NFC", "NFD"]), name)
                for _ in range(random.randint(2, 5)):
                    plants.image(f"{split}{spelled}{random.choice(['', '', '/deep', '/deep/er'])}", name)
                for _ in range(random.randint(0, 4)):
                    plants.rubbish(f"{split}{spelled}")
        for _ in range(random.randint(0, 2)):
            plants.write(plants.name(".txt"), b"loose")
        found = indexed(plants.root)
        assert used(found) == plants.images
        assert n_accounted(found) == plants.n_files()


def spelled(path: str, root: Path, others: Sequence[str], random: Random) -> str:
    """The path as someone may write it."""
    plain, stem = Path(path), os.path.splitext(path)[0]
    ways = [path, f"./{path}", f"{root}/{path}", f"set/{path}", path.replace("/", "//")]
    ways += [path.replace("/", "\\")] if "\\" not in path else []
    ways += [unicodedata.normalize("NFD", path), path.swapcase()]
    ways += [stem] if plain.suffix.lower() in FORMATS.values() and not stem.endswith(" ") else []
    keys = [unicodedata.normalize("NFC", other).casefold() for other in others]
    way = random.choice(ways)
    key = unicodedata.normalize("NFC", stem if way == stem else path).casefold()
    # Two files with names that differ so little are told apart by the exact path only
    is_alone = sum(other == key or os.path.splitext(other)[0] == key for other in keys) == 1
    return way if is_alone and not way.startswith(" ") else path


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_table_gives_the_planted_classes_however_it_writes_the_paths(seed: int):
    with garden(seed) as plants:
        random = plants.random
        for folder in ("a", "b", "b/c"):
            for _ in range(4):
                plants.image(folder, "")
            for _ in range(random.randint(0, 3)):
                plants.rubbish(folder)
        on_disk = sorted(str(path.relative_to(plants.root)) for path in plants.root.rglob("*") if not path.is_dir())
        listed = {path: random.choice(CLASSES[:2]) for path in plants.images if random.random() < 0.8}
        listed |= dict.fromkeys(random.sample(sorted(plants.images), 2), "cat") | {sorted(plants.images)[0]: "dog 2"}
        rows = [(spelled(path, plants.root, on_disk, random), label) for path, label in listed.items()]
        missing = [(f"no/{number}.png", "cat") for number in range(random.randint(0, 2))] + [("../set/a.png", "cat")]
        with (plants.root / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file", "kind"), *random.sample([*rows, *missing], len(rows) + len(missing))])
        found = indexed(plants.root, columns={"path": "file", "label": "kind"})
        assert used(found) == listed
        assert found.summary["n_rejected"] == len(missing)
        assert n_accounted(found) == plants.n_files() + len(missing)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_tree_is_accounted_for_or_refused_in_one_line(seed: int):
    with garden(seed) as plants:
        random = plants.random
        for top in random.sample(LAYOUT + CLASSES, random.randint(1, 4)):
            below = random.choice([[""], [""], ["", "/c"], ["/c", "/d"], ["/train", "/test"], ["/images", "/labels"]])
            for folder in below + random.sample(["/a", "/A", "/old/1", "/@eaDir", "/.x"], random.randint(0, 1)):
                for _ in range(random.randint(0 if random.random() < 0.2 else 1, 4)):
                    plants.image(f"{top}{folder}", "")
                for _ in range(random.randint(0, 2)):
                    plants.rubbish(f"{top}{folder}")
        patterns = tuple(random.sample(["masks", "*.txt", "a/*", "**/b", "nothing"], random.randint(0, 2)))
        similar = random.choice(["error", "merge", "keep"])
        try:
            found, refusal = indexed(plants.root, exclude=patterns, similar_classes=similar), ""
        except (ValueError, OSError) as error:
            found, refusal = None, str(error)
        assert len(refusal.splitlines()) == (found is None)
        if found is None:
            return
        assert n_accounted(found) == plants.n_files()
        for path, label in used(found).items():
            assert unicodedata.normalize("NFC", label).casefold() in unicodedata.normalize("NFC", path).casefold()
            assert not {*SYSTEM, ".x", "masks" if "masks" in patterns else ""} & set(path.split("/"))
