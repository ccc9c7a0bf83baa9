"""The data sets that `fetch` makes."""

import hashlib
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from pipeline import datasets
from pipeline.listing import find_images

STRATA = {f"{probability}-{kind}" for probability in ("0.00", "0.33", "0.67", "1.00") for kind in ("mono", "poly")}


@pytest.fixture(scope="module")
def elpv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("raw") / "elpv"
    assert datasets.elpv(directory) == 2624
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
    datasets.elpv(elpv)
    assert digests() == before
