"""report: one page that shows what was found, why, on which data, and how it was made.

Reads   reports/, data/, params.yaml, dvc.lock, and the image files
Writes  reports/report.html     self-contained: it opens from the file system and asks no network for anything

What is not there is said where it would stand.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from safetensors import SafetensorError

from pipeline import logs
from pipeline.comparison import tables
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Images, Labels
from pipeline.features import hdf5
from pipeline.features.hdf5 import Features
from pipeline.files import write_text
from pipeline.params import HEAD_ALL_SEEDS, HEAD_ONLY, PARAMS, Params, load_params
from pipeline.report.evidence import Figure
from pipeline.report.gallery import Verdicts
from pipeline.report.page import charts, evidence, gallery, pictures, provenance
from pipeline.report.pictures import Album

T = TypeVar("T")
Json = dict[str, Any]
REPORTS = Path("reports")
PAGE = REPORTS / "report.html"
HERE = Path(__file__).parent  # where the template, the style and the script lie
MISSING = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    AttributeError,
    SafetensorError,
)  # what reading something absent or odd can raise


@dataclass(frozen=True)
class Inputs:
    """What the page is made of; None where there is none."""

    params: Params
    comparison: Json
    details: Json
    curves: list[Json]
    labels: Labels | None
    files: Images | None
    features: Features | None


def write() -> None:
    """Write the page."""
    text = render(assemble(read()))
    write_text(PAGE, text)
    logs.log.info("%s (%s): open it in a browser", PAGE, evidence.size(len(text.encode())))


def read() -> Inputs:
    """Read what the pipeline wrote; ValueError if there is no comparison."""
    path = REPORTS / "comparison.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; the page shows what dvc repro has made, so run that first")
    return Inputs(
        params=load_params(),
        comparison=json.loads(path.read_text(encoding="utf-8")),
        details=_attempt(lambda: _json("details.json"), {}),
        curves=_attempt(lambda: _json("curves.json"), []),
        labels=_attempt(manifest.read_labels, None),
        files=_attempt(manifest.read_images, None),
        features=_attempt(hdf5.read_features, None),
    )


def assemble(inputs: Inputs) -> Json:
    """Everything that the template shows."""
    comparison, details, labels = inputs.comparison, inputs.details, inputs.labels
    names = evidence.strategies(comparison)
    album = Album(Path(inputs.params.dataset.path), inputs.files) if inputs.files else None
    best = choose(details, comparison)
    verdicts = _attempt(lambda: judge(best, details), None)
    errors = None
    if verdicts and labels and album:
        errors = _attempt(lambda: gallery.mistakes(verdicts, labels, album), None)
    return {
        "params": inputs.params,
        "params_text": _attempt(lambda: PARAMS.read_text(encoding="utf-8"), ""),
        "n_images": len(labels.image_id) if labels else None,
        "n_classes": len(labels.class_names) if labels else len(details.get("class_names") or []) or None,
        "names": names,
        "colours": {name: i for i, name in enumerate(names)},
        "best": best,
        "baseline": details.get("baseline") or inputs.params.compare.baseline,
        "seeds": details.get("common_seeds") or [],
        "n_test": evidence.n_test(details, best),
        "recommendation": details.get("recommendation"),
        "summary": comparison[best],
        "gain": evidence.gain(comparison[best].get("vs_baseline")),
        "table": evidence.table(comparison, details),
        "tested": _attempt(lambda: tables.tested(details), ""),
        "every_metric": _attempt(lambda: evidence.every_metric(details, names), []),
        "costs": evidence.costs(comparison),
        "timings": provenance.timings(),
        "against_cost": _drawn("Accuracy against cost", lambda: evidence.against_cost(comparison)),
        "learning": _drawn("Learning curves", lambda: evidence.learning(details, inputs.curves, names)),
        "penalty": _drawn("The head's penalty", lambda: evidence.penalty(details)),
        "confusions": _attempt(lambda: evidence.confusions(details, names), []),
        "reliability": _drawn("Reliability", lambda: evidence.reliabilities(details, names)),
        "calibration": _attempt(lambda: evidence.calibration(details, names), []),
        "per_class": _drawn("Class by class", lambda: evidence.per_class(details, names)),
        "class_rows": _attempt(lambda: evidence.class_rows(details, names), []),
        "subsets": _attempt(lambda: evidence.breakdown(details, names, "subsets"), []),
        "groups": _attempt(lambda: evidence.breakdown(details, names, "groups"), []),
        "n_groups": _attempt(lambda: details["strategies"][best]["test"]["n_groups"], 0),
        "errors": errors,
        "n_judged": len(verdicts.rows) if verdicts else 0,
        "maps": _maps(inputs.features, labels, verdicts),
        "network": _network(inputs, album, errors),
        "data": _data(album),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "digests": provenance.digests(),
        "made": inputs.features.provenance if inputs.features else None,
    }


def choose(details: Json, comparison: Json) -> str:
    """The strategy that the page dwells on: the recommended one, else the head."""
    named = (details.get("recommendation") or {}).get("strategy")
    return named if named in comparison else HEAD_ONLY if HEAD_ONLY in comparison else next(iter(comparison))


def judge(name: str, details: Json) -> Verdicts:
    """What the runs of a strategy say of the test images."""
    return gallery.judge([artifacts.read_run(name, seed) for seed in details["strategies"][name]["seeds"]])


def _maps(features: Features | None, labels: Labels | None, verdicts: Verdicts | None) -> list[Figure]:
    if features is None or labels is None or features.sha256 != labels.sha256:
        return [Figure("Map of the features", "There are no features of these images; run: dvc repro.")]
    try:
        return gallery.maps(features, labels, verdicts)
    except MISSING as error:
        return [Figure("Map of the features", f"It cannot be drawn: {error}.")]


def _network(inputs: Inputs, album: Album | None, errors: dict[str, list[gallery.Example]] | None) -> Json:
    """Filters and feature maps, and why where there are none."""
    found: Json = {"filters": None, "blocks": [], "image_id": None, "missing": []}
    if inputs.features is None:
        return found | {"missing": ["There is no data/features.h5; run: dvc repro."]}
    try:
        backbone = pictures.load_backbone(inputs.features)
    except MISSING as error:
        return found | {"missing": [f"The network cannot be loaded: {error}"]}
    try:
        found["filters"] = pictures.first_filters(backbone)
    except MISSING as error:
        found["missing"].append(f"No filters: {error}.")
    candidates = [example.image_id for example in (errors or {}).get("errors", [])]
    candidates += inputs.labels.image_id[:1] if inputs.labels else []
    opened = ((name, album.open(name)) for name in candidates) if album else iter(())
    name, image = next(((name, image) for name, image in opened if image), ("", None))
    if image is None:
        found["missing"].append("No feature maps: the image files are gone, or are others than were indexed.")
        return found
    try:
        pixels = pictures.network_input(backbone, image, inputs.params.augmentation)
        last = inputs.features.provenance["computation"]["cut"]
        found |= {"blocks": pictures.feature_maps(backbone, pixels, last), "image_id": name}
    except MISSING as error:
        found["missing"].append(f"No feature maps: {error}.")
    return found


def _data(album: Album | None) -> Json:
    """The data section, from what `index` and `label_suspects` wrote."""
    summary = gallery.read_object(REPORTS / "data" / "summary.json")
    album = album or Album(Path(), Images([], [], [], []))
    return {
        "summary": summary,
        "splits": gallery.read_object(REPORTS / "splits.json"),
        "class_counts": gallery.class_counts(summary),
        "rejected": gallery.rejected(REPORTS / "data" / "rejected.csv"),
        "exact": gallery.groups(summary.get("exact_duplicates") or [], album),
        "conflicts": gallery.groups(summary.get("conflicts") or [], album),
        "near": gallery.near_duplicates(summary.get("near_duplicates") or [], album),
        "suspects": gallery.suspects(REPORTS / "label_suspects.csv", album),
    }


def render(page: Json) -> str:
    """Fill the template; scripts are named by their digests, so that no other can run."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "label": evidence.label,
        "size": evidence.size,
        "scaled": evidence.scaled,
        "shown": evidence.shown,
        "duration": duration,
        "paragraphs": paragraphs,
    }
    scripts = [
        vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"),
        (HERE / "report.js").read_text(encoding="utf-8"),
    ]
    specs: list[Json] = []

    def place(figure: Figure) -> int:
        """Number a chart, which the script finds by it."""
        specs.append(figure.spec or {})
        return len(specs) - 1

    return environment.get_template("report.html.jinja").render(
        **page,
        place=place,
        specs=specs,
        themes={"light": charts.theme(charts.LIGHT), "dark": charts.theme(charts.DARK)},
        palettes={"light": charts.LIGHT, "dark": charts.DARK},
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        digests_of_scripts=[_csp_digest(script) for script in scripts],
        all_seeds=HEAD_ALL_SEEDS,
    )


def paragraphs(text: str) -> Markup:
    """Paragraphs with **emphasis**, and nothing else of Markdown."""
    parts = [re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(part))) for part in text.split("\n\n")]
    return Markup("".join(f"<p>{part}</p>" for part in parts))


def duration(seconds: float) -> str:
    """Seconds as text."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _csp_digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(name: str) -> Any:  # noqa: ANN401
    return json.loads((REPORTS / name).read_text(encoding="utf-8"))


def _drawn(title: str, make: Callable[[], Figure]) -> Figure:
    try:
        return make()
    except MISSING:
        return Figure(title, "The reports are damaged, or of another version; run: dvc repro.")


def _attempt(make: Callable[[], T], otherwise: T) -> T:
    try:
        return make()
    except MISSING:
        return otherwise
