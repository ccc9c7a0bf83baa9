"""The themes, and charts that are made from DVC's templates."""

import json
from pathlib import Path

import pytest

from pipeline.report import charts, gallery
from tests.factories import REPOSITORY


def test_themes_share_their_keys_and_have_a_colour_for_each_class():
    assert charts.LIGHT.keys() == charts.DARK.keys()
    assert len(charts.LIGHT["category"]) == len(charts.DARK["category"]) == gallery.MAX_COLOURS


@pytest.mark.parametrize("path", sorted((REPOSITORY / charts.TEMPLATES).glob("*.json")), ids=lambda path: path.stem)
def test_a_template_is_filled_and_nothing_of_revisions_is_left(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    rows = [{"strategy": "rev", "actual": "<DVC_METRIC_TITLE>", "predicted": "a\u2028b"}]
    spec = charts.from_template(path.stem, rows, ["rev"])
    assert spec["data"]["values"] == [rows[0] | {"predicted": "a b"}]
    assert spec["width"] == "container"
    del spec["data"]
    text = json.dumps(spec)
    assert '"field": "rev"' not in text
    assert "<DVC" not in text
    assert "facet" not in spec
