"""What `fetch` can make: directories of images with a labels.csv, below data/raw/.

`elpv` and `digits` come from installed packages, other names from torchvision, which downloads them; MNIST-like sets
also from IDX files.
"""

import csv
import difflib
import inspect
import io
import re
import shutil
import unicodedata
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from typing import Any
from zipfile import BadZipFile

import elpv_dataset
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets as torchvision_datasets

from pipeline import logs
from pipeline.files import write_text
from pipeline.ingest import idx

TRAIN_TEST = {"train": {"split": "train"}, "test": {"split": "test"}}
TRAIN_VAL = {"train": {"split": "train"}, "val": {"split": "val"}}
TRAIN_VAL_TEST = TRAIN_VAL | {"test": {"split": "test"}}
BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
WHOLE: dict[str, dict[str, Any]] = {"": {}}
# torchvision's data sets of one class an image: what it calls their parts ("": it has none)
TORCHVISION: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"), BY_FLAG),
    **dict.fromkeys(("FER2013", "Food101", "GTSRB", "STL10", "SVHN", "StanfordCars"), TRAIN_TEST),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "PCAM", "RenderedSST2"), TRAIN_VAL_TEST),
    **dict.fromkeys(("CLEVRClassification", "ImageNet", "Imagenette"), TRAIN_VAL),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397"), WHOLE),
    "Country211": TRAIN_TEST | {"val": {"split": "valid"}},
    "EMNIST": {part: {"split": "balanced", **flag} for part, flag in BY_FLAG.items()},
    "INaturalist": {"train": {"version": "2021_train_mini"}, "val": {"version": "2021_valid"}},
    "OxfordIIITPet": TRAIN_TEST | {"train": {"split": "trainval"}},
    "Places365": {part: {"split": name, "small": True} for part, name in (("train", "train-standard"), ("val", "val"))},
}
NOT_DOWNLOADED = ("FER2013", "ImageNet", "StanfordCars")  # by torchvision
LABEL_WIDTH = {"CLEVRClassification": 2, "GTSRB": 2}  # digits, of labels without names
FAILURES = (OSError, RuntimeError, ValueError, EOFError, HTTPException, TarError, BadZipFile)


@dataclass(frozen=True)
class Item:
    """An image, as a file to copy or as pixels, number `number` of its part; `part`: train, val, test or ""."""

    image: Path | Image.Image
    label: str
    part: str
    number: int


def make(name: str, directory: Path, downloads: Path) -> int:
    """Make the data set `name` in `directory`; the number of images. What is downloaded stays below `downloads`."""
    if name == "elpv":
        return elpv(directory)
    if name == "digits":
        return export(_digits(), directory)
    if name not in TORCHVISION:
        known = ["elpv", "digits", *TORCHVISION]
        by_case = {other.casefold(): other for other in known}
        near = [by_case[other] for other in difflib.get_close_matches(name.casefold(), by_case, 3, 0.5)]
        raise ValueError(
            f"params.yaml: dataset.fetch: {name!r} is unknown; nearest: {', '.join(near)}"
            if near
            else f"params.yaml: dataset.fetch: {name!r} is unknown; expected one of {', '.join(known)}"
        )
    return export(_from_torchvision(name, downloads / name), directory)


def elpv(directory: Path) -> int:
    """Write the ELPV data set (Deitsch et al. 2019) from its package; the number of images.

    2,624 electroluminescence images of solar cells with a defect probability p. As in the
    publication: defective if p > 0, with weight p, or 1 where p = 0; stratified by probability and
    type of module.
    """
    source = Path(elpv_dataset.__file__).parent / "data"
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["path", "label", "weight", "stratum", "subset"])
    entries = sorted(line.split() for line in (source / "labels.csv").read_text().splitlines())
    for path, text, kind in entries:
        probability = float(text)
        label = "defective" if probability > 0 else "functional"
        stratum = f"{probability:.2f}-{kind}"
        writer.writerow([path, label, probability or 1.0, stratum, kind])
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, directory / path)
    write_text(directory / "labels.csv", table.getvalue())
    return len(entries)


def _digits() -> Iterator[Item]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 px in 17 grey levels."""
    digits: Any = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        pixels = np.round(image * 255 / 16).astype(np.uint8)
        yield Item(Image.fromarray(pixels), str(label), "", number)


def import_idx(source: Path, directory: Path) -> None:
    """Make a data set of the IDX files in `source`; `directory` appears whole or not at all."""
    if directory.exists():
        raise FileExistsError(f"{directory}: is there already; expected a new directory")
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.tmp")
    try:
        n = export(_from_idx(source), temporary)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logs.log.info("%s: %d images; next: dvc add %s, and dataset.path: %s", directory, n, directory, directory)


def _from_idx(source: Path) -> Iterator[Item]:
    read = [(pair, *idx.read(pair)) for pair in idx.find_pairs(source)]
    width = len(str(max(int(labels.max()) for _, labels, _ in read)))
    for pair, labels, images in read:
        shown = logs.progress(images, len(labels), "images", pair.images.name)
        for number, (pixels, label) in enumerate(zip(shown, labels, strict=True)):
            yield Item(Image.fromarray(pixels), f"{label:0{width}}", pair.part, number)


def _from_torchvision(name: str, root: Path) -> Iterator[Item]:
    """Every image: its file where torchvision has one for it, else its pixels."""
    if not root.exists():
        _download(name, root)
    for part in TORCHVISION[name]:
        dataset = _load(name, part, root, download=False)
        classes = _class_names(dataset)
        shown = logs.progress(_samples(name, dataset), len(dataset), "images", f"{name} {part}".strip())
        for number, (image, label) in enumerate(shown):
            text = classes[label] if classes else f"{label:0{LABEL_WIDTH.get(name, 1)}}"
            yield Item(image, text, part, number)


def _samples(name: str, dataset: Any) -> Iterator[tuple[Path | Image.Image, int]]:  # noqa: ANN401
    """Each image, or its file, with its label. Two data sets do not say their files but in private."""
    if name == "GTSRB":
        yield from ((Path(path), int(label)) for path, label in dataset._samples)
        return
    if name == "OxfordIIITPet":
        yield from zip(dataset._images, dataset._labels, strict=True)
        return
    for number in range(len(dataset)):
        image, label = dataset[number]  # a Path from those that take a `loader`
        if getattr(image, "filename", ""):  # a file that Pillow has opened, as it is
            image.close()
            image = Path(image.filename)
        yield image, int(label)


def _download(name: str, root: Path) -> None:
    """Have torchvision download every part; `root` appears only when all of it is there.

    Torchvision takes a directory for complete as soon as it exists, also where unpacking was interrupted.
    """
    partial = root.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for part in TORCHVISION[name]:
            _load(name, part, partial, download=True)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load(name: str, part: str, root: Path, *, download: bool) -> Any:  # noqa: ANN401
    """torchvision's data set; with its file where it can be asked for, in place of the image."""
    kind = getattr(torchvision_datasets, name)
    how = dict(TORCHVISION[name][part])
    if "loader" in inspect.signature(kind).parameters:
        how["loader"] = Path
    if name not in NOT_DOWNLOADED:
        how["download"] = download
    try:
        return kind(root, **how)
    except FAILURES as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{name}: torchvision cannot make it ({why}); expected {'' if name in NOT_DOWNLOADED else 'a network, or '}"
            f"its files in {root.with_name(name)}/ as torchvision.datasets.{name} wants them"
        ) from None


def _class_names(dataset: Any) -> list[str]:  # noqa: ANN401
    """Names by label, [] if it has none; of synonyms the first, with its number where that is not enough."""
    names = next((list(getattr(dataset, key)) for key in ("classes", "categories") if hasattr(dataset, key)), [])
    first = [str(name[0] if isinstance(name, tuple) else name) for name in names]
    counts = Counter(first)
    return [name if counts[name] == 1 else f"{name} ({number})" for number, name in enumerate(first)]


def export(items: Iterable[Item], directory: Path) -> int:
    """Write images and labels.csv; the number of images. Files are named by their number: safe anywhere."""
    rows = []
    for item in items:
        folder = "/".join(filter(None, (item.part, safe_name(item.label))))
        if isinstance(item.image, Path):
            suffix = item.image.suffix.lower()
            path = f"{folder}/{item.number:06}{suffix if re.fullmatch('[.][a-z0-9]{1,5}', suffix) else ''}"
        else:
            path = f"{folder}/{item.number:06}.png"
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(item.image, Path):
            shutil.copyfile(item.image, directory / path)
        else:
            item.image.save(directory / path)
        rows.append([path, item.label, item.part])
    has_parts = any(part for _, _, part in rows)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["path", "label", "split"] if has_parts else ["path", "label"])
    writer.writerows(row if has_parts else row[:2] for row in sorted(rows))
    write_text(directory / "labels.csv", table.getvalue())
    return len(rows)


def safe_name(label: str) -> str:
    """A directory's name that every system allows; not always another for another label."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return re.sub("[^A-Za-z0-9-]+", "_", plain).strip("_-")[:60] or "class"
