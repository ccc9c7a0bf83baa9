"""The page: its numbers are those of comparison.json, names are never markup, and what is missing is said."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import logs
from pipeline.features.hdf5 import Features
from pipeline.files import write_json, write_text
from pipeline.report.page import charts, evidence, gallery, page, pictures, provenance
from tests import study

REPOSITORY = Path(__file__).parents[2]


class Page(HTMLParser):
    """Elements with their attributes, the cells of the main table, and the JSON that stands in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: dict[tuple[str, str], tuple[Any, str]] = {}
        self.data: dict[str, Any] = {}
        self.words: list[str] = []
        self._cell: dict[str, str | None] | None = None
        self._json: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if "data-metric" in found:
            self._cell = found
        self._json = found["id"] if tag == "script" and found.get("type") == "application/json" else None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            key = str(self._cell["data-strategy"]), str(self._cell["data-metric"])
            self.cells[key] = json.loads(str(self._cell["data-value"])), data.strip()
            self._cell = None
        if self._json:
            self.data[self._json] = json.loads(data)
            self._json = None
        self.words.append(data)

    def texts(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    study.make(root)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, entered."""
    copy = tmp_path / "study"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture(autouse=True)
def _no_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The charts' library takes seconds to bundle and is no matter here."""
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda _: "/* vega */")


def page() -> Page:
    report.main()
    return Page(report.PAGE.read_text(encoding="utf-8"))


def test_numbers_equal_those_of_the_comparison(root: Path):
    comparison = json.loads((root / "reports/comparison.json").read_text())
    cells = page().cells
    for strategy, summary in comparison.items():
        expected = summary["test"] | {"seeds": summary["seeds"]}
        gain = summary.get("vs_baseline")
        expected |= {name: gain[name] for name in ("accuracy_gain", "p_value")} if gain else {}
        del expected["accuracy_low"], expected["accuracy_high"]
        found = {metric: value for (name, metric), (value, _) in cells.items() if name == strategy}
        assert found == expected
    accuracy, text = cells["partial_freeze", "accuracy"]
    assert text.split()[0].replace("\u2009%", "") == f"{100 * accuracy:.1f}"


def test_what_the_user_names_is_text_and_never_markup(root: Path):
    found = page()
    scripts = [attributes for tag, attributes in found.elements if tag == "script"]
    assert [script.get("id") for script in scripts] == ["specs", "themes", None, None]
    assert not [attributes for _, attributes in found.elements if any(name.startswith("on") for name in attributes)]
    sources = {attributes.get("src", "") for tag, attributes in found.elements if tag == "img"}
    assert all(str(source).startswith("data:image/") for source in sources)
    for name in study.HOSTILE:
        assert " ".join(name.split()) in found.texts()
        assert any(_in(name.replace("\u2028", " "), spec) for spec in found.data["specs"])


def _in(name: str, value: Any) -> bool:
    if isinstance(value, dict):
        return any(_in(name, inner) for inner in value.values())
    return any(_in(name, inner) for inner in value) if isinstance(value, list) else value == name


def test_no_request_can_leave_and_no_other_script_can_run(root: Path):
    text = page_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert re.search(r"script-src( 'sha256-[A-Za-z0-9+/=]+'){2};", policy)
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", text)


def page_text() -> str:
    report.main()
    return report.PAGE.read_text(encoding="utf-8")


def test_every_part_is_there(root: Path):
    text = page().texts()
    for words in (
        "Recommendation:",
        "The most confident errors",
        "Accuracy against cost",
        "Learning curves",
        "The head's penalty",
        "By error",
        "input: 64",
        "filters of 3",
        "1 min 15 s",
        "Labels to look at",
        "Leaks between the parts",
        "truncated",
        "Duplicates whose labels differ",
        "data/images.csv",
        "Subset by subset",
    ):
        assert words in text, words
    assert "run: dvc repro" not in text


def without(*paths: str) -> Callable[[], None]:
    def spoil() -> None:
        for path in paths:
            shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()

    return spoil


def other_network() -> None:
    document = Path("params.yaml").read_text().replace("timm/test_resnet", "timm/resnet18")
    Path("params.yaml").write_text(document)
    made = json.loads(json.dumps(report.read().features.provenance))  # pyright: ignore[reportOptionalMemberAccess]
    made["backbone"]["weights"] = "gone.safetensors"
    _rewrite_features(made, (16,))


def _rewrite_features(made: dict[str, Any], shape: tuple[int, ...]) -> None:
    inputs = report.read()
    assert inputs.labels
    values = np.random.default_rng(0).normal(size=(study.N, 1, *shape)).astype(np.float32)
    report.hdf5.write_features(report.hdf5.FEATURES, values.shape, values.dtype, [values], inputs.labels.sha256, made)


def maps_as_features() -> None:
    inputs = report.read()
    assert inputs.features
    _rewrite_features(inputs.features.provenance, (4, 3, 3))


def old_details() -> None:
    write_json(Path("reports/details.json"), {"feature_extraction": {"runs": []}})


def head_only() -> None:
    comparison = json.loads(Path("reports/comparison.json").read_text())
    del comparison["partial_freeze"]
    write_json(Path("reports/comparison.json"), comparison)
    details = json.loads(Path("reports/details.json").read_text())
    del details["strategies"]["partial_freeze"]
    details["recommendation"]["strategy"] = "feature_extraction"
    write_json(Path("reports/details.json"), details)
    curves = json.loads(Path("reports/curves.json").read_text())
    write_json(Path("reports/curves.json"), [row for row in curves if row["strategy"] != "partial_freeze"])


def no_penalties() -> None:
    details = json.loads(Path("reports/details.json").read_text())
    for strategy in details["strategies"].values():
        for run in strategy["runs"]:
            run["chosen"] = {"epoch": 0}
    write_json(Path("reports/details.json"), details)


def other_version() -> None:
    write_json(Path("reports/curves.json"), [{"run": "partial_freeze-0", "epoch": 0, "val_loss": 0.4}])
    details = json.loads(Path("reports/details.json").read_text())
    for strategy in details["strategies"].values():
        strategy["test"] = {"classes": [{}], "confusion": 1, "reliability": 2, "subsets": [1], "temperature": 3}
        strategy["runs"] = [1]
    write_json(Path("reports/details.json"), details)


def garbage() -> None:
    for name in ("details.json", "curves.json", "data/summary.json", "splits.json", "timings/extract.json"):
        write_text(Path("reports") / name, "[1, {")
    write_text(Path("dvc.lock"), "a: [")
    write_text(Path("reports/label_suspects.csv"), "other\n1\n")


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (head_only, "No strategy was fine-tuned"),
        (no_penalties, "do not say what each strength"),
        (without("reports/details.json"), "reports/details.json holds none"),
        (old_details, "There is no confusion matrix"),
        (without("reports/runs"), "The predictions or the labels are not there"),
        (without("data/features.h5"), "There is no data/features.h5"),
        (maps_as_features, "Maps are averaged over their pixels"),
        (other_network, "The network cannot be loaded"),
        (without("data/mine"), "the image files are gone"),
        (without("data/images.csv", "data/labels.csv"), "There are no features of these images"),
        (without("reports/timings", "dvc.lock"), "No stage has left its times"),
        (without("reports/data", "reports/label_suspects.csv", "reports/splits.json"), "no reports/data/summary.json"),
        (other_version, "The reports are damaged, or of another version"),
        (garbage, "reports/details.json holds none"),
    ],
)
def test_what_is_missing_is_said(root: Path, spoil: Callable[[], None], word: str):
    spoil()
    assert word in page().texts()


def test_without_a_comparison_there_is_no_page(root: Path):
    (root / "reports/comparison.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"comparison\.json: not found; .* run that first"):
        report.main()


def test_many_classes_are_cut_short(root: Path):
    names = [f"class {i}" for i in range(60)]
    rows = [
        {"class": name, "f1": i / 60, "precision": 0.5, "recall": 0.5, "support": 2} for i, name in enumerate(names)
    ]
    counts = np.eye(60, dtype=int).tolist()
    details = {"class_names": names, "strategies": {"a": {"test": {"classes": rows, "confusion": counts}}}}
    bars = evidence.per_class(details, ["a"])
    assert bars.caption.startswith("The 20 hardest of 60 classes")
    assert bars.spec
    assert len(bars.spec["data"]["values"]) == 20
    (matrix,) = evidence.confusions(details, ["a"])
    assert matrix.spec is None
    counted = gallery.class_counts({"classes": {name: i + 1 for i, name in enumerate(names)}})
    assert counted is not None
    assert counted.spec
    assert len(counted.spec["layer"]) == 2


def test_map_of_many_images_is_a_sample_and_always_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "MAX_POINTS", 30)
    values = np.random.default_rng(0).normal(size=(100, 2, 8)).astype(np.float32)
    first, second = (pictures.map_features(Features(values, [], {})) for _ in range(2))
    assert len(first.rows) == 30
    assert np.array_equal(first.rows, second.rows)
    assert np.array_equal(first.xy, second.xy)


def test_thumbnail_of_a_file_that_changed_or_lies_elsewhere_is_not_shown(root: Path):
    files = report.read().files
    assert files
    album = pictures.Album(root / "data/mine", files)
    name = files.image_id[0]
    assert str(album.thumbnail(name)).startswith("data:image/webp;base64,")
    shutil.copy(root / "data/mine" / files.image_id[1], root / "data/mine" / name)
    shutil.copy(root / "data/mine" / name, root / "data/secret.png")
    changed = pictures.Album(root / "data/mine", files)
    assert changed.thumbnail(name) is None
    assert changed.thumbnail("../secret.png") is None


@pytest.mark.parametrize(("value", "text"), [(0, "0\u00a0B"), (999, "999\u00a0B"), (5.2e12, "5.2\u00a0TB")])
def test_sizes_are_written_with_their_unit(value: float, text: str):
    assert evidence.size(value) == text


def test_themes_share_their_keys_and_have_a_colour_for_each_class():
    assert charts.LIGHT.keys() == charts.DARK.keys()
    assert len(charts.LIGHT["category"]) == len(charts.DARK["category"]) == gallery.MAX_COLOURS


def test_timing_of_a_stage_is_noted_beside_the_outs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", _module("pipeline.stages.fine_tune"))
    monkeypatch.setattr("sys.argv", ["fine_tune.py", "partial_freeze", "../0"])
    logs.note_timing(1.234)
    assert [path.name for path in logs.TIMINGS.iterdir()] == ["fine_tune-partial_freeze-_0.json"]
    (timing,) = provenance.timings()
    assert timing["stage"] == "fine_tune-partial_freeze-_0"
    assert timing["wall_seconds"] == 1.23
    assert timing["peak_memory_bytes"] > 10**6
    ignored = (REPOSITORY / ".gitignore").read_text()
    assert f"/{logs.TIMINGS.as_posix()}/" in ignored
    assert f"/{report.PAGE.as_posix()}" in ignored


def test_only_stages_note_their_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", _module("pipeline.cuts"))
    logs.note_timing(1.0)
    monkeypatch.setitem(sys.modules, "__main__", _module("pipeline.stages.compare"))
    monkeypatch.setattr("sys.argv", ["compare.py", "--against", "main"])
    logs.note_timing(1.0)
    assert not logs.TIMINGS.exists()


def _module(name: str) -> Any:
    return type("Main", (), {"__spec__": type("Spec", (), {"name": name})})


def test_template_travels_with_the_package():
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    for path in (REPOSITORY / "pipeline").glob("report.*"):
        assert path.suffix == ".py" or f'"{path.name}"' in project
