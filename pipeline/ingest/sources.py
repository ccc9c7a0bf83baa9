"""Make data sets: directories of images with a labels.csv, from packages, from torchvision or from IDX files.

`elpv` and `digits` come from installed packages. All other names are data sets of torchvision, which downloads them.
"""

import difflib
import errno
import inspect
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from PIL import Image

from pipeline import logs
from pipeline.files import write_text
from pipeline.ingest import idx

TRAIN_TEST = {"train": {"split": "train"}, "test": {"split": "test"}}
TRAIN_VAL = {"train": {"split": "train"}, "val": {"split": "val"}}
TRAIN_VAL_TEST = TRAIN_VAL | {"test": {"split": "test"}}
BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
WHOLE: dict[str, dict[str, Any]] = {"": {}}
# torchvision's data sets with one class per image: the arguments of each split ("": there is only one)
TORCHVISION: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"), BY_FLAG),
    **dict.fromkeys(("FER2013", "Food101", "GTSRB", "STL10", "SVHN", "StanfordCars"), TRAIN_TEST),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "PCAM", "RenderedSST2"), TRAIN_VAL_TEST),
    **dict.fromkeys(("CLEVRClassification", "ImageNet", "Imagenette"), TRAIN_VAL),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397"), WHOLE),
    "Country211": TRAIN_TEST | {"val": {"split": "valid"}},
    "EMNIST": {split: {"split": "balanced", **flag} for split, flag in BY_FLAG.items()},
    "INaturalist": {"train": {"version": "2021_train_mini"}, "val": {"version": "2021_valid"}},
    "OxfordIIITPet": TRAIN_TEST | {"train": {"split": "trainval"}},
    "Places365": {key: {"split": name, "small": True} for key, name in (("train", "train-standard"), ("val", "val"))},
}
NOT_DOWNLOADED = ("FER2013", "ImageNet", "StanfordCars")  # by torchvision
LABEL_WIDTH = {"CLEVRClassification": 2, "GTSRB": 2}  # digits, of labels without names
OF_THIS_MACHINE = (errno.EACCES, errno.EDQUOT, errno.EMFILE, errno.ENOSPC, errno.EROFS)  # no fault of the data set
FAILURES = (OSError, RuntimeError, ValueError, EOFError, HTTPException, TarError, BadZipFile)


class Item(NamedTuple):
    """An image (a file to copy, or pixels), its label and its split: train, val, test or ""."""

    image: Path | Image.Image
    label: str
    split: str


def make(name: str, directory: Path, downloads: Path) -> int:
    """Make the data set `name` in `directory`; returns the number of images. Downloads stay below `downloads`."""
    if name == "elpv":
        return elpv(directory)
    if name == "digits":
        return export(_digits(), directory)
    if name not in TORCHVISION:
        known = ["elpv", "digits", *TORCHVISION]
        by_case = {other.casefold(): other for other in known}
        near = [by_case[other] for other in difflib.get_close_matches(name.casefold(), by_case, 3, 0.5)]
        advice = f"nearest: {', '.join(near)}" if near else f"expected one of {', '.join(known)}"
        raise ValueError(f"params.yaml: dataset.fetch: {name!r} is unknown; {advice}")
    return export(_from_torchvision(name, downloads / name), directory)


def elpv(directory: Path) -> int:
    """Write the ELPV data set (Deitsch et al. 2019) from its package; returns the number of images.

    2,624 electroluminescence images of solar cells with a defect probability p. As in the
    publication: defective if p > 0, with weight p, or 1 where p = 0; stratified by probability and
    type of module.
    """
    import elpv_dataset

    source = Path(elpv_dataset.__file__).parent / "data"
    rows = []
    for path, text, kind in sorted(line.split() for line in (source / "labels.csv").read_text().splitlines()):
        probability = float(text)
        label = "defective" if probability > 0 else "functional"
        rows.append([path, label, probability or 1.0, f"{probability:.2f}-{kind}", kind])
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, directory / path)
    return _write_labels(directory, pd.DataFrame(rows, columns=["path", "label", "weight", "stratum", "subset"]))


def _digits() -> Iterator[Item]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 px in 17 grey levels."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    for image, label in zip(digits.images, digits.target, strict=True):
        yield Item(Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)), str(label), "")


def import_idx(source: Path, directory: Path) -> None:
    """Make a data set of the IDX files in `source`; `directory` is new, and whole or absent."""
    if directory.exists():
        raise FileExistsError(f"{directory}: is there already; expected a new directory")
    with _making(directory) as partial:
        n = export(_from_idx(source), partial)
    logs.log.info("%s: %d images; next: dvc add %s, and dataset.path: %s", directory, n, directory, directory)


def _from_idx(source: Path) -> Iterator[Item]:
    read = [(pair, *idx.read(pair)) for pair in idx.find_pairs(source)]
    width = len(str(max(int(labels.max()) for *_, labels in read)))
    for pair, images, labels in read:
        pictures = logs.progress(images, len(images), "images", pair.images.name)
        for pixels, label in zip(pictures, labels, strict=True):
            yield Item(Image.fromarray(pixels), f"{label:0{width}}", pair.split)


def _from_torchvision(name: str, root: Path) -> Iterator[Item]:
    """Every image: its file where torchvision has one for it, else its pixels."""
    if not root.exists():
        with _making(root) as partial:  # torchvision takes any directory that exists for complete
            for split in TORCHVISION[name]:
                _load(name, split, partial, download=True)
    for split in TORCHVISION[name]:
        dataset = _load(name, split, root, download=False)
        classes = _class_names(dataset)
        samples = logs.progress(_samples(name, dataset), len(dataset), "images", f"{name} {split}".strip())
        for image, label in samples:
            yield Item(image, classes[label] if classes else f"{label:0{LABEL_WIDTH.get(name, 1)}}", split)


def _samples(name: str, dataset: Any) -> Iterator[tuple[Path | Image.Image, int]]:  # noqa: ANN401
    """Each image, or its file, with its label. Two data sets keep their files in private attributes."""
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


@contextmanager
def _making(directory: Path) -> Iterator[Path]:
    """Yield a new directory beside `directory`; it becomes `directory` only if the block raises nothing."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load(name: str, split: str, root: Path, *, download: bool) -> Any:  # noqa: ANN401
    """torchvision's data set; it gives the path of an image in place of the image, where it can."""
    from torchvision import datasets

    make_dataset = getattr(datasets, name)
    options = dict(TORCHVISION[name][split])
    if "loader" in inspect.signature(make_dataset).parameters:
        options["loader"] = Path
    if name not in NOT_DOWNLOADED:
        options["download"] = download
    try:
        return make_dataset(root, **options)
    except FAILURES as error:
        if logs.is_out_of_memory(error) or getattr(error, "errno", None) in OF_THIS_MACHINE:
            raise
        why = " ".join(str(error).split()) or type(error).__name__
        expected = f"its files in {root.with_name(name)}/ as torchvision.datasets.{name} wants them"
        network = "" if name in NOT_DOWNLOADED else "a network, or "
        raise ValueError(f"{name}: torchvision cannot make it ({why}); expected {network}{expected}") from None


def _class_names(dataset: Any) -> list[str]:  # noqa: ANN401
    """Names by label, [] if it has none. Of synonyms the first; with the label's number if that is not unique."""
    names = next((list(getattr(dataset, key)) for key in ("classes", "categories") if hasattr(dataset, key)), [])
    first = [str(name[0] if isinstance(name, tuple) else name) for name in names]
    counts = Counter(first)
    return [name if counts[name] == 1 else f"{name} ({number})" for number, name in enumerate(first)]


def export(items: Iterable[Item], directory: Path) -> int:
    """Write images and labels.csv; returns the number of images. A file's name is its number: safe on every system."""
    rows: list[tuple[str, str, str]] = []
    n_images = Counter[str]()  # of each split, so far
    for image, label, split in items:
        suffix = image.suffix.lower() if isinstance(image, Path) else ".png"
        name = f"{n_images[split]:06}{suffix if re.fullmatch('[.][a-z0-9]{1,5}', suffix) else ''}"
        path = "/".join(filter(None, (split, safe_name(label), name)))
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image, Path):
            shutil.copyfile(image, directory / path)
        else:
            image.save(directory / path)
        rows.append((path, label, split))
        n_images[split] += 1
    table = pd.DataFrame(sorted(rows), columns=["path", "label", "split"])
    return _write_labels(directory, table if any(table["split"]) else table.drop(columns="split"))


def _write_labels(directory: Path, table: pd.DataFrame) -> int:
    write_text(directory / "labels.csv", table.to_csv(index=False, lineterminator="\n"))
    return len(table)


def safe_name(label: str) -> str:
    """A name for a directory that every system allows; several labels may get the same one."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return re.sub("[^A-Za-z0-9-]+", "_", plain).strip("_-")[:60] or "class"
