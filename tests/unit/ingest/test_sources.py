"""The data sets that `fetch` makes."""

import hashlib
import inspect
import io
import pickle
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets as torchvision_datasets

from pipeline.ingest import sources
from pipeline.ingest.listing import find_images

STRATA = {f"{probability}-{kind}" for probability in ("0.00", "0.33", "0.67", "1.00") for kind in ("mono", "poly")}


@pytest.fixture(scope="module")
def elpv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("raw") / "elpv"
    assert sources.elpv(directory) == 2624
    return directory


def test_elpv_is_an_image_directory_with_the_published_counts(elpv: Path):
    found = find_images(elpv).images
    assert Counter(found["label"]) == {"functional": 1508, "defective": 1116}
    assert len(list((elpv / "images").iterdir())) == 2624
    assert set(found["stratum"]) == STRATA
    assert Counter(found["subset"]) == {"poly": 1550, "mono": 1074}


def test_the_weights_of_elpv_are_its_defect_probabilities_and_one_where_there_is_no_defect(elpv: Path):
    table = pd.read_csv(elpv / "labels.csv")
    assert list(table.columns) == ["path", "label", "weight", "stratum", "subset"]
    weight_of = {"0.00": 1.0, "0.33": 1 / 3, "0.67": 2 / 3, "1.00": 1.0}
    expected = table["stratum"].str.split("-").str[0].map(weight_of)
    assert (table["weight"] - expected).abs().max() < 1e-9
    assert ((table["label"] == "functional") == table["stratum"].str.startswith("0.00")).all()
    assert (table["stratum"].str.split("-").str[1] == table["subset"]).all()


def test_making_elpv_again_gives_the_same_bytes(elpv: Path):
    def digests() -> dict[str, str]:
        files = [path for path in elpv.rglob("*") if path.is_file()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = digests()
    assert len(before) == 2625
    sources.elpv(elpv)
    assert digests() == before


# names


def test_an_unknown_name_is_one_line_with_the_nearest(tmp_path: Path):
    for name, near in (("cifar10", "CIFAR10, CIFAR100"), ("flowers", "Flowers102"), ("oxfordpet", "OxfordIIITPet")):
        with pytest.raises(ValueError, match=f"dataset.fetch: '{name}' is unknown; nearest: {near}$"):
            sources.make(name, tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"'\.\./up' is unknown; expected one of elpv, digits, CIFAR10, ") as error:
        sources.make("../up", tmp_path, tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_every_name_is_a_data_set_of_torchvision_that_takes_what_it_is_given():
    for name, splits in sources.TORCHVISION.items():
        parameters = inspect.signature(getattr(torchvision_datasets, name)).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for options in splits.values():
            assert takes_any or set(options) <= set(parameters), name
        assert set(splits) <= {"train", "val", "test"} or set(splits) == {""}
        assert takes_any or ("download" in parameters) == (name not in ("FER2013",)), name


def test_no_network_is_one_line_that_says_where_files_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise URLError("[Errno -2] Name or service not known")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fail)
    for name in ("CIFAR10", "EuroSAT", "OxfordIIITPet", "Flowers102"):
        with pytest.raises(
            ValueError, match=f"^{name}: torchvision cannot make it .* expected a network, or its "
        ) as e:
            sources.make(name, tmp_path / "out", tmp_path / "downloads")
        assert f"downloads/{name}/" in str(e.value)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"expected its files in .*downloads/StanfordCars/"):
        sources.make("StanfordCars", tmp_path / "out", tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "unused"), [("digits", "torchvision"), ("elpv", "torchvision"), ("elpv", "sklearn")])
def test_a_data_set_needs_only_its_own_package(name: str, unused: str, tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from pipeline.ingest import sources\n"
        "imported = {'torch', 'torchvision', 'sklearn', 'elpv_dataset'} & set(sys.modules)\n"
        f"assert not imported, imported\nsys.modules[{unused!r}] = None\n"
        f"sources.make({name!r}, Path({str(tmp_path)!r}), Path('nowhere'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
    assert (tmp_path / "labels.csv").exists()


# digits


def test_digits_are_scikit_learns_in_full_contrast(tmp_path: Path):
    assert sources.make("digits", tmp_path, tmp_path) == 1797
    found = find_images(tmp_path).images
    digits: Any = load_digits()
    assert set(found["split"]) == {""}
    for path, label in zip(found["path"], found["label"], strict=True):
        number = int(Path(path).stem)
        assert label == str(digits.target[number])
        with Image.open(tmp_path / path) as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), np.round(digits.images[number] * 255 / 16))


def test_making_digits_again_gives_the_same_bytes(tmp_path: Path):
    for name in ("one", "two"):
        sources.make("digits", tmp_path / name, tmp_path)
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert one == two


# torchvision, with its own classes on files that look as it expects them


def jpeg(number: int, suffix: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 9 * number, np.uint8)).save(stream, suffix)
    return stream.getvalue()


def put(path: Path, content: bytes | str) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(content)
    return content


def eurosat(root: Path) -> set[tuple[str, str, bytes]]:
    base = root / "eurosat" / "2750"
    return {
        (name, "", put(base / name / f"{name}_{number}.jpg", jpeg(10 * i + number)))
        for i, name in enumerate(("Forest", "SeaLake"))
        for number in (1, 2, 10)
    }


def dtd(root: Path) -> set[tuple[str, str, bytes]]:
    base, expected = root / "dtd" / "dtd", set()
    for i, part in enumerate(("train", "val", "test")):
        lines = []
        for j, name in enumerate(("banded", "zigzagged")):
            expected.add((name, part, put(base / "images" / name / f"{name}_{i}.jpg", jpeg(2 * i + j))))
            lines.append(f"{name}/{name}_{i}.jpg\n")
        put(base / "labels" / f"{part}1.txt", "".join(lines))
    return expected


def oxford_pets(root: Path) -> set[tuple[str, str, bytes]]:
    base, expected = root / "oxford-iiit-pet", set()
    for i, (file, part) in enumerate((("trainval", "train"), ("test", "test"))):
        lines = []
        for j, name in enumerate(("Abyssinian", "american_bulldog")):
            content = put(base / "images" / f"{name}_{i}.jpg", jpeg(2 * i + j))
            expected.add((name.replace("_", " ").title(), part, content))
            lines.append(f"{name}_{i} {j + 1} {j + 1} 1\n")
        put(base / "annotations" / f"{file}.txt", "".join(lines))
    return expected


def gtsrb(root: Path) -> set[tuple[str, str, bytes]]:
    base = root / "gtsrb"
    training, test = base / "GTSRB" / "Training", base / "GTSRB" / "Final_Test" / "Images"
    expected = {(f"{i:02}", "train", put(training / f"{i:05}" / "1.ppm", jpeg(i, "PPM"))) for i in range(2)}
    put(base / "GT-final_test.csv", "Filename;Width;ClassId\n00000.ppm;8;1\n")
    return expected | {("01", "test", put(test / "00000.ppm", jpeg(9, "PPM")))}


def caltech101(root: Path) -> set[tuple[str, str, bytes]]:
    base = root / "caltech101" / "101_ObjectCategories"
    put(base / "BACKGROUND_Google" / "image_0001.jpg", jpeg(1))
    return {(name, "", put(base / name / "image_0001.jpg", jpeg(i))) for i, name in enumerate(("ant", "sea_horse"))}


def imagenette(root: Path) -> set[tuple[str, str, bytes]]:
    ids = {"n01440764": "tench", "n03425413": "gas pump"}
    return {
        (name, part, put(root / "imagenette2" / part / wnid / f"{wnid}_{i}{j}.JPEG", jpeg(2 * i + j)))
        for i, part in enumerate(("train", "val"))
        for j, (wnid, name) in enumerate(ids.items())
    }


@pytest.mark.parametrize(
    ("name", "make_files"),
    [
        ("EuroSAT", eurosat),
        ("DTD", dtd),
        ("OxfordIIITPet", oxford_pets),
        ("GTSRB", gtsrb),
        ("Caltech101", caltech101),
        ("Imagenette", imagenette),
    ],
)
def test_the_files_of_a_torchvision_data_set_are_copied_byte_for_byte_with_their_official_splits(
    name: str, make_files: Callable[[Path], set[tuple[str, str, bytes]]], tmp_path: Path
):
    expected = make_files(tmp_path / "downloads" / name)
    n = sources.make(name, tmp_path / "out", tmp_path / "downloads")
    found = find_images(tmp_path / "out").images
    assert n == len(found) == len(expected)
    rows = found.to_dict("records")
    assert {(row["label"], row["split"], (tmp_path / "out" / row["path"]).read_bytes()) for row in rows} == expected
    for row in rows:
        assert re.fullmatch(r"[A-Za-z0-9_./-]+", row["path"])


def test_arrays_of_a_torchvision_data_set_become_png_files(tmp_path: Path):
    raw, random = tmp_path / "downloads" / "FashionMNIST" / "FashionMNIST" / "raw", np.random.default_rng(0)
    pixels = {}
    for prefix, part, n in (("train", "train", 5), ("t10k", "test", 3)):
        images, labels = random.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8)
        put(raw / f"{prefix}-images-idx3-ubyte", b"\0\0\x08\3" + struct.pack(">3I", n, 28, 28) + images.tobytes())
        put(raw / f"{prefix}-labels-idx1-ubyte", b"\0\0\x08\1" + struct.pack(">I", n) + labels.tobytes())
        pixels |= {(part, number): image for number, image in enumerate(images)}
    assert sources.make("FashionMNIST", tmp_path / "out", tmp_path / "downloads") == 8
    found = find_images(tmp_path / "out").images
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
    for row in found.to_dict("records"):
        number = int(Path(row["path"]).stem)
        assert row["label"] == names[number]
        with Image.open(tmp_path / "out" / row["path"]) as image:
            assert np.array_equal(np.asarray(image), pixels[row["split"], number])
    assert "test/T-shirt_top/000000.png" in set(found["path"])


def test_cifar_is_read_by_torchvision_which_knows_the_digests_of_its_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, kind = tmp_path / "downloads" / "CIFAR10" / "cifar-10-batches-py", torchvision_datasets.CIFAR10
    random, lists = np.random.default_rng(0), {}
    for name in ("train", "test"):
        batch = {"data": random.integers(0, 256, (2, 3072), np.uint8), "labels": [1, 0]}
        lists[name] = [[name, hashlib.md5(put(base / name, pickle.dumps(batch))).hexdigest()]]
    meta = put(base / "batches.meta", pickle.dumps({"label_names": ["airplane", "automobile"]}))
    monkeypatch.setattr(kind, "train_list", lists["train"])
    monkeypatch.setattr(kind, "test_list", lists["test"])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": hashlib.md5(meta).hexdigest()})
    assert sources.make("CIFAR10", tmp_path / "out", tmp_path / "downloads") == 4
    found = find_images(tmp_path / "out").images
    assert list(found["path"]) == [
        f"{part}/{name}/00000{number}.png"
        for part in ("test", "train")
        for name, number in (("airplane", 1), ("automobile", 0))
    ]
    put(base / "test", pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]}))
    with pytest.raises(ValueError, match=r"CIFAR10: torchvision cannot make it .*corrupted"):
        sources.make("CIFAR10", tmp_path / "again", tmp_path / "downloads")


def test_an_interrupted_download_is_not_taken_for_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unpack_half(self: Any) -> None:
        put(Path(self._base_folder) / "2750" / "Forest" / "1.jpg", jpeg(1))
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision_datasets.EuroSAT, "download", unpack_half)
    with pytest.raises(KeyboardInterrupt):
        sources.make("EuroSAT", tmp_path / "out", tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


@pytest.mark.parametrize(
    ("label", "name"),
    [("T-shirt/top", "T-shirt_top"), ("crème brûlée", "creme_brulee"), ("../..", "class"), ("鳥", "class")],
)
def test_names_of_directories_are_safe_everywhere(label: str, name: str):
    assert sources.safe_name(label) == name


def test_synonyms_give_a_name_each():
    dataset = SimpleNamespace(classes=[("crane", "bird"), ("tench",), ("crane",)])
    assert sources._class_names(dataset) == ["crane (0)", "tench", "crane (2)"]
