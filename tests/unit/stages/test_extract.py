"""The stage extract: features of training and evaluation views, of a network of seconds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from pipeline.features import extraction, hdf5
from pipeline.features.hdf5 import Row
from pipeline.features.views import AUGMENTED
from pipeline.stages import extract, plan
from tests import factories
from tests.factories import N_STUDY

FOUR = ["identity", "flip_horizontal", "flip_vertical", "rotate_180"]


@pytest.fixture(autouse=True)
def _study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    factories.study_params(Path("params.yaml"))
    configure(fine_tune={"run": []}, compare={"baseline": "feature_extraction"}, threads=1)
    factories.study_dataset(Path("data/mine"))
    plan.main()


def configure(**changes: Any) -> None:
    yaml = YAML()
    document = yaml.load(Path("params.yaml"))
    for key, value in changes.items():
        document[key] = {**document[key], **value} if isinstance(value, dict) else value
    document["runtime"]["workers"] = 0
    yaml.dump(document, Path("params.yaml"))


def run(**changes: Any) -> hdf5.Features:
    configure(**changes)
    extract.main()
    return hdf5.read_features()


def test_the_four_flips_are_computed_and_stored_once_for_training_and_evaluation(computed: list[Row]) -> None:
    found = run(features={"views": 8}, augmentation={"flips": "both"}, evaluation={"views": FOUR})
    assert {view for _, view in computed} == {0, 1, 2, 3}
    assert len(computed) == 4 * N_STUDY
    assert found.values.shape[:2] == (N_STUDY, 8)
    assert np.array_equal(found.values[:, :4], found.evaluation)
    assert np.array_equal(found.values[:, 4:], found.evaluation)
    assert found.provenance.training_views == (0, 1, 2, 3) * 2
    assert found.provenance.evaluation_views == tuple(FOUR)
    computed.clear()
    run(features={"views": 4}, augmentation={"flips": "horizontal"}, evaluation={"views": FOUR[2:]})
    run(augmentation={"flips": "none", "seed": 9}, evaluation={"views": FOUR[::-1]})
    assert computed == []


def test_the_augmentation_changes_no_evaluation_feature(computed: list[Row]) -> None:
    plain = run(features={"views": 3}, evaluation={"views": ["transpose", "identity"]})
    plain_values, plain_evaluation = np.array(plain.values), np.array(plain.evaluation)
    computed.clear()
    other = run(augmentation={"crop_area": [0.3, 1.0], "noise_std": 4.0, "brightness": 0.4, "right_angles": True})
    assert {view for _, view in computed} == {AUGMENTED + 1, AUGMENTED + 2}
    assert other.evaluation.tobytes() == plain_evaluation.tobytes()
    assert np.array_equal(other.values[:, 0], plain_values[:, 0])
    assert not np.isclose(other.values[:, 1:], plain_values[:, 1:]).all()


def test_features_have_the_same_bytes_where_only_the_key_changes(
    computed: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(features={"views": 2}, augmentation={"noise_std": 4.0})
    before = hdf5.FEATURES.read_bytes()
    n_rows = len(computed)
    for name, value in {"digest_of_code": lambda: "other code", "DECODERS": ("jpg",), "LIBRARIES": ("torch",)}.items():
        computed.clear()
        monkeypatch.setattr(extraction, name, value)
        hdf5.FEATURES.unlink()
        extract.main()
        assert len(computed) == n_rows, "a key of its own"
        assert hdf5.FEATURES.read_bytes() == before
