"""defaults: recipes are compared on the same images, on validation unless the test images are asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import common, defaults, studies
from pipeline.dataset.manifest import Labels
from pipeline.params import load_params
from pipeline.training.runs import Run
from tests import factories

LABEL = np.arange(40) % 2


def trained(seed: int, certainty: float) -> Run:
    """A run that gives the image's own class this probability, on ten images of validation and ten of test."""
    logits = np.log(np.where(np.eye(2)[LABEL] > 0, certainty, 1 - certainty))
    val, test = (
        factories.predictions(rows, logits[rows]) for rows in (np.arange(10) + seed % 2 * 10, np.arange(20, 30))
    )
    return factories.run("tuned", seed, val, test, LABEL)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The parameters of each study that would run; the recipe `whole` is surer of the right classes."""
    documents: list[dict[str, Any]] = []
    labels = factories.labels(40)

    def run(found: dict[str, Any]) -> tuple[Labels, dict[str, list[Run]]]:
        documents.append(found)
        certainty = 0.9 if found["features"]["resize"] == "squash" else 0.6
        return labels, {"feature_extraction": [trained(seed, certainty) for seed in found["split"]["seeds"]]}

    monkeypatch.setattr(studies, "run", run)
    return documents


@pytest.mark.parametrize(("options", "split", "seeds"), [([], "validation", [100, 101]), (["--test"], "test", [0, 1])])
def test_recipes_are_compared_pair_by_pair(
    options: list[str], split: str, seeds: list[int], asked: list[dict[str, Any]]
):
    given = ["elpv", "--recipe", "now", "--recipe", "whole", "--strategy", "full_retrain", *options]
    printed = CliRunner().invoke(defaults.compare, given, catch_exceptions=False).output
    assert f"{split} NLL (nats)" in printed
    assert "| elpv | feature_extraction | now | 2 | 100.0 | 0.511 |  |" in printed
    assert "| elpv | feature_extraction | whole | 2 | 100.0 | 0.105 | -0.405 (-0." in printed
    assert [one["split"]["seeds"] for one in asked] == [one["fine_tune"]["seeds"] for one in asked] == [seeds] * 2
    assert [one["fine_tune"]["run"] for one in asked] == [["full_retrain"]] * 2
    assert [one["features"]["resize"] for one in asked] == ["pad", "squash"]


def test_an_unknown_name_is_one_line(asked: list[dict[str, Any]]):
    with pytest.raises(ValueError, match=r"recipes: found \['best'\], expected some of before, now, whole"):
        CliRunner().invoke(defaults.compare, ["elpv", "--recipe", "best"], catch_exceptions=False)
    assert not asked


@pytest.mark.slow
def test_every_choice_is_valid(tmp_path: Path):
    choices = common.read(defaults.CHOICES)
    for data in choices["data"].values():
        for recipe in choices["recipes"].values():
            (tmp_path / "params.yaml").write_text(json.dumps(common.document(common.merged(data, recipe))))
            load_params(tmp_path / "params.yaml")
