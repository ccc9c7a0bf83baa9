"""The page: its numbers are those of details.json, names are never markup, and damaged outputs are refused."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from pipeline.dataset import manifest
from pipeline.features import hdf5
from pipeline.files import write_json, write_text
from pipeline.report import page
from pipeline.stages import compare
from tests import factories
from tests.factories import HOSTILE, N_STUDY, REPOSITORY, make_study


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
    make_study(root)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change, entered."""
    copy = tmp_path / "study"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture(autouse=True)
def _no_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundling Vega takes seconds, and these tests draw nothing."""
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda _: "/* vega */")


def written() -> str:
    page.write()
    return page.PAGE.read_text(encoding="utf-8")


def test_numbers_equal_those_of_the_details(root: Path):
    cells = Page(written()).cells
    for name, strategy in json.loads((root / "reports/details.json").read_text())["strategies"].items():
        expected = {metric: figure["value"] for metric, figure in strategy["test"]["metrics"].items()}
        del expected["ece_scaled"]
        expected |= {"seeds": strategy["distinct_runs"], "n_candidates": strategy["n_candidates"]}
        if strategy["vs_baseline"]:
            expected |= {key: strategy["vs_baseline"]["test"][key] for key in ("difference", "p_value")}
        assert {metric: value for (of, metric), (value, _) in cells.items() if of == name} == expected
    accuracy, text = cells["partial_freeze", "accuracy"]
    assert text.split()[0].replace("\u2009%", "") == f"{100 * accuracy:.1f}"


def test_the_page_says_how_much_of_the_images_the_crop_cuts_away(root: Path, monkeypatch: pytest.MonkeyPatch):
    note = "cuts away 32 % of an image's area on average"  # of images of 40 x 30 px, at the weights' crop_pct of 0.95
    assert note in Page(written()).texts()
    monkeypatch.setattr(page, "LARGEST_SHARE", 0.4)
    assert note not in Page(written()).texts()


def test_what_the_user_names_is_text_and_never_markup(root: Path):
    found = Page(written())
    scripts = [attributes for tag, attributes in found.elements if tag == "script"]
    assert [script.get("id") for script in scripts] == ["specs", "themes", None, None]
    assert not [attributes for _, attributes in found.elements if any(name.startswith("on") for name in attributes)]
    sources = {attributes.get("src", "") for tag, attributes in found.elements if tag == "img"}
    assert all(str(source).startswith("data:image/") for source in sources)
    for name in HOSTILE:
        assert " ".join(name.split()) in found.texts()
        assert any(_in(name.replace("\u2028", " "), spec) for spec in found.data["specs"])


def _in(name: str, value: Any) -> bool:
    if isinstance(value, dict):
        return any(_in(name, inner) for inner in value.values())
    return any(_in(name, inner) for inner in value) if isinstance(value, list) else value == name


def test_no_request_can_leave_and_no_other_script_can_run(root: Path):
    text = written()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert re.search(r"script-src( 'sha256-[A-Za-z0-9+/=]+'){2};", policy)
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", text)


@pytest.mark.parametrize(("licence", "is_warned"), [(None, False), ("mit", False), ("cc-by-nc-4.0", True)])
def test_the_licence_of_the_weights_is_shown_and_a_note_says_if_it_is_non_commercial(
    root: Path, licence: str | None, is_warned: bool
) -> None:
    factories.study_features(manifest.read_labels(), licence=licence)
    text = Page(written()).texts()
    assert f"licence of the weights {licence or 'not stated'} " in text
    assert (f"pretrained weights ({licence}) excludes commercial use" in text) == is_warned


def test_every_section_is_there(root: Path):
    text = Page(written()).texts()
    for words in (
        "Recommendation:",
        "The most confident errors",
        "Accuracy against cost",
        "Learning curves",
        "Regularization of the head",
        "By error",
        "input: 64",
        "filters of 3",
        "1 min 15 s",
        "Labels that are probably wrong",
        "Leaks between splits",
        "truncated",
        "Identical files with different labels",
        "correlation 0.9987",
        "Images that may show nothing",
        "30 images of one colour",
        "other files, left out",
        "data/images.csv",
        "Results by subset",
        "there are 9 different validation units",
        "on 6 to 9 test images a seed",
        "validation, cross-fitted",
        "This is a result of this one run of each strategy",
        "extracting the features, which all strategies share, took 1.3 min",
        "Advice before training",
        "Accuracy by depth",
        "expected with 1, 2 and 4 times the images",
    ):
        assert words in text, words
    assert "run: dvc repro" not in text


def test_strategies_have_the_same_colours_in_every_chart(root: Path):
    found = Page(written()).data["specs"]
    domains = [encoding["scale"]["domain"] for spec in found for encoding in _colours(spec)]
    assert len(domains) == 4  # cost, curves, reliability, results by class
    assert all(domain == ["feature_extraction", "partial_freeze"] for domain in domains)


def _colours(value: Any) -> list[Any]:
    """The colour encodings of strategies in a specification."""
    if isinstance(value, list):
        return [found for inner in value for found in _colours(inner)]
    if not isinstance(value, dict):
        return []
    colour = value.get("color")
    own = [colour] if isinstance(colour, dict) and colour.get("field") == "strategy" else []
    return own + [found for key, inner in value.items() if key != "data" for found in _colours(inner)]


def without(*paths: str) -> Callable[[], None]:
    def spoil() -> None:
        for path in paths:
            shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()

    return spoil


def head_only() -> None:
    yaml = YAML()
    document = yaml.load(Path("params.yaml"))
    document["fine_tune"]["run"] = []
    document["split"]["seeds"] = [0]
    yaml.dump(document, Path("params.yaml"))
    compare.main()
    Path("reports/runs/partial_freeze/seed_0").mkdir(parents=True)  # the lock of the study lists it
    factories.study_lock()


def one_strength() -> None:
    for path in Path("reports/runs/feature_extraction").glob("*/run.json"):
        described = json.loads(path.read_text())
        described["chosen"]["val_nll"] = {"0.1": 0.6}
        write_json(path, described)
    compare.main()
    factories.study_lock()


def other_weights() -> None:
    made = hdf5.read_features().provenance
    _rewrite_features(
        (16,), made.model_copy(update={"backbone": made.backbone.model_copy(update={"weights_sha256": "0"})})
    )


def _rewrite_features(shape: tuple[int, ...], made: hdf5.Provenance) -> None:
    values = np.random.default_rng(0).normal(size=(N_STUDY, 1, *shape)).astype(np.float32)
    sha256 = hdf5.read_features().sha256
    hdf5.write_features(hdf5.FEATURES, [values], None, sha256, made)


def without_advice() -> None:
    Path("reports/advice.json").unlink()


def maps_as_features() -> None:
    _rewrite_features((4, 3, 3), hdf5.read_features().provenance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (head_only, "No strategy was fine-tuned"),
        (one_strength, "there is nothing to select"),
        (maps_as_features, "Feature maps are averaged over their pixels"),
        (other_weights, "No feature maps: data/features.h5: made with other weights"),
        (without_advice, "The answer"),
        (without("data/mine"), "No feature maps: the image files in data/mine are missing"),
        (without("reports/timings"), "reports/timings/ is empty"),
    ],
)
def test_what_is_not_an_output_may_be_missing(root: Path, change: Callable[[], None], words: str):
    change()
    assert words in Page(written()).texts()


@pytest.mark.parametrize(
    "path",
    [
        "dvc.lock",
        "data/images.csv",
        "data/labels.csv",
        "data/features.h5",
        "reports/details.json",
        "reports/curves.json",
        "reports/cost.json",
        "reports/reliability.json",
        "reports/confusion",
        "reports/data",
        "reports/splits.json",
        "reports/label_suspects.csv",
        "reports/label_suspects.json",
        "reports/runs/feature_extraction",
    ],
)
def test_an_output_that_is_missing_or_damaged_is_refused_in_one_line(root: Path, path: str):
    file = next(file for file in Path(path).rglob("*") if file.is_file()) if Path(path).is_dir() else Path(path)
    write_text(file, "[1, {")
    with pytest.raises(ValueError, match=rf"^{path}: .*; run: dvc repro( extract)?$"):
        page.write()
    without(path)()
    with pytest.raises(ValueError, match=rf"^{path}: not (found|there); .*(run: dvc repro|so run that first)"):
        page.write()


def test_an_output_of_another_version_is_refused(root: Path):
    write_text(Path("reports/advice.json"), "{}")
    with pytest.raises(ValueError, match=r"^reports/advice\.json: not the output that dvc\.lock lists"):
        page.write()
    without_advice()
    write_json(Path("reports/details.json"), {"strategies": {}})
    with pytest.raises(ValueError, match=r"^reports/details\.json: not the output that dvc\.lock lists"):
        page.write()


def test_features_of_other_images_are_refused(root: Path):
    made = hdf5.read_features().provenance
    values = np.zeros((1, 1, 16), np.float32)
    hdf5.write_features(hdf5.FEATURES, [values], None, ["0" * 64], made)
    with pytest.raises(ValueError, match=r"features\.h5: of other images than data/labels\.csv; run: dvc repro"):
        page.write()


def test_a_mistake_of_the_code_is_not_taken_for_one_of_the_user(root: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> None:
        raise KeyError("a bug")

    for name in ("pictures.feature_maps", "evidence.learning", "gallery.maps"):
        with monkeypatch.context() as patched:
            patched.setattr(f"pipeline.report.{name}", broken)
            with pytest.raises(KeyError, match="a bug"):
                page.write()


def test_files_of_the_page_travel_with_the_package_and_the_page_is_not_committed():
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    for path in (REPOSITORY / "pipeline/report").glob("page.*"):
        assert path.suffix == ".py" or f'"{path.name}"' in project
    assert f"/{page.PAGE.as_posix()}" in (REPOSITORY / ".gitignore").read_text()


def test_paragraphs_have_emphasis_and_code_and_no_html():
    found = page.paragraphs("**So.** Set `a: b` <i>\n\nTwo `x` and `y`.")
    assert (
        found
        == "<p><strong>So.</strong> Set <code>a: b</code> &lt;i&gt;</p><p>Two <code>x</code> and <code>y</code>.</p>"
    )
