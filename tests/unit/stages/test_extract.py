"""The stage extract: features of training and evaluation views, of a network of seconds."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset.manifest import read_images
from pipeline.features import extraction, hdf5, pixel_store
from pipeline.features.hdf5 import Row
from pipeline.features.views import AUGMENTED
from pipeline.stages import extract, index, plan, split, train_head
from pipeline.training.runs import read_run
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
    document = json.loads(Path("params.yaml").read_text())
    for key, value in changes.items():
        document[key] = {**document[key], **value} if isinstance(value, dict) else value
    document["runtime"]["workers"] = 0
    factories.write_params(document)


def run(**changes: Any) -> hdf5.Features:
    configure(**changes)
    extract.main()
    return hdf5.read_features()


def test_the_store_lies_where_params_yaml_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(runtime={"store": "of/all"})
    assert [*Path("of/all").glob("*/*.h5")]
    before = hdf5.FEATURES.read_bytes()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))  # as in a queued experiment
    run(runtime={"store": str(tmp_path / "of/all")})
    assert not Path("main").exists()
    run(runtime={"store": "of/all"})
    assert [*Path("main/of/all").glob("*/*.h5")]
    assert not Path("data/.feature_store").exists()
    assert hdf5.FEATURES.read_bytes() == before


def test_a_store_that_is_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"params\.yaml: runtime\.store: params\.yaml is a file, expected a directory"):
        run(runtime={"store": "params.yaml"})


@pytest.mark.slow
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


@pytest.mark.slow
def test_features_have_the_same_bytes_where_only_the_key_changes(
    computed: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(features={"views": 2}, augmentation={"noise_std": 4.0})
    before = hdf5.FEATURES.read_bytes()
    n_rows = len(computed)
    for module, name, value in (
        (extraction, "digest_of_code", lambda: "other code"),
        (pixel_store, "DECODERS", ("jpg",)),
        (extraction, "LIBRARIES", ("torch",)),
    ):
        computed.clear()
        monkeypatch.setattr(module, name, value)
        hdf5.FEATURES.unlink()
        extract.main()
        assert len(computed) == n_rows, "a key of its own"
        assert hdf5.FEATURES.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("augmentation", [{"noise_std": 4.0}, {"crop_area": [0.3, 0.8]}])
def test_another_cut_and_another_network_open_no_image_file(augmentation: dict[str, Any]) -> None:
    features: dict[str, Any] = {"views": 2}
    expected = run(features=features, augmentation=augmentation).values.copy()
    names = read_images().image_id
    for name in names:
        Path("data/mine", name).unlink()
    first_cut = {"cut": "act1", "pool": "avg"}
    configure(features=features | first_cut)
    plan.main()
    assert run().values.shape != expected.shape
    configure(features=features | {"cut": "all", "pool": "none"}, backbone={"seed": 1})
    plan.main()
    assert not np.array_equal(run().values, expected)
    configure(runtime={"pixel_cache": "off"}, backbone={"seed": 2})
    plan.main()
    with pytest.raises(ValueError, match="No such file"):
        run()


def make_wide_images(directory: Path) -> None:
    """Ten times as wide as high; two classes that differ at the left end only."""
    random = np.random.default_rng(0)
    for number in range(40):
        is_red = number % 2
        pixels = random.integers(90, 110, (20, 200, 3), np.uint8)
        pixels[:, :20] = random.integers(0, 50, (20, 20, 3)) + ((200, 40, 40) if is_red else (40, 40, 200))
        path = directory / ("red" if is_red else "blue") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(("resize", "is_learnt"), [("crop", False), ("squash", True), ("pad", True)])
def test_a_head_learns_from_the_ends_of_wide_images_where_views_show_them_and_the_crop_is_reported(
    resize: str, is_learnt: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "pipeline")
    monkeypatch.setattr("sys.argv", ["a stage"])
    make_wide_images(Path("data/wide"))
    configure(
        dataset={"path": "data/wide", "max_rejected_fraction": 0.0},
        split={"seeds": [0], "test_fraction": 0.3, "val_fraction": 0.2},
        features={"resize": resize},
        fine_tune={"run": [], "seeds": [0]},
    )
    for stage in (index, split, plan, extract, train_head):
        stage.main()
    test, classes = read_run("feature_extraction", 0).test, np.arange(40) % 2
    names = [path.name for path in sorted(Path("data/wide").glob("*/*"))]
    label = np.array([classes[int(name.removesuffix(".png"))] for name in names])[test.rows]
    accuracy = (test.log_probability.argmax(1) == label).mean()
    assert accuracy == 1 if is_learnt else accuracy < 0.9
    warnings = [message for message in caplog.messages if "features.resize" in message]
    assert len(warnings) == (not is_learnt)
    if not is_learnt:
        found = "crop cuts away 91 % of an image's area on average, at most 91 %"
        assert warnings == [f"features.resize: {found}; squash and pad show the network whole images"]
