"""report: one page with the results, the evidence for them, the data, and how they were made.

Reads   reports/, data/, params.yaml, dvc.lock, .dvc/plots/, and the image files
Writes  reports/report.html     self-contained: it opens from the file system and loads nothing from a network

The page shows the outputs that dvc.lock lists, and no others: one that is missing or differs is an error. Image files
and weights, which are no outputs, may be missing: then their pictures are, too.
"""

import base64
import csv
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import vl_convert
from markupsafe import Markup, escape

from pipeline import logs
from pipeline.comparison import tables
from pipeline.dataset import manifest
from pipeline.features import hdf5
from pipeline.features.hdf5 import Provenance
from pipeline.files import write_text
from pipeline.network import backbones
from pipeline.network.preprocessing import LARGEST_SHARE
from pipeline.params import HEAD_ALL_SEEDS, HEAD_ONLY, PARAMS, load_params
from pipeline.report import charts, evidence, gallery, pictures, provenance, templates
from pipeline.report.evidence import Figure
from pipeline.report.pictures import Album
from pipeline.training.runs import RUNS, read_run

Json = dict[str, Any]
REPORTS = Path("reports")
PAGE = REPORTS / "report.html"
NAMES = ("details", "cost", "curves", "reliability", "splits")  # of the JSON files in reports/ that the page shows


def write() -> None:
    """Write the page."""
    text = render(assemble())
    write_text(PAGE, text)
    logs.log.info("%s (%s): open it in a browser", PAGE, evidence.scaled(len(text.encode()), "B"))


def assemble() -> Json:
    """Everything that the template shows; ValueError for an output that is missing or not the one in dvc.lock."""
    stages = provenance.read_lock()
    suspects = ("label_suspects.csv", "label_suspects.json")
    files = [f"reports/{name}" for name in ("confusion", "data", *suspects, *(f"{n}.json" for n in NAMES))]
    provenance.check(stages, [manifest.IMAGES.as_posix(), manifest.LABELS.as_posix(), *files])
    params, labels, features = load_params(), manifest.read_labels(), hdf5.read_features()
    if features.sha256 != labels.sha256:
        raise ValueError(f"{hdf5.FEATURES}: of other images than {manifest.LABELS}; run: dvc repro")
    details, cost, curves, reliability, splits = (_json(f"{name}.json") for name in NAMES)
    summary, near = _json("data/summary.json"), _csv("data/near_duplicates.csv")
    strategies, best = details["strategies"], details["recommendation"]["strategy"]
    names = [name for name in strategies if name != HEAD_ALL_SEEDS]
    seeds = strategies[best]["seeds"]
    runs = [RUNS / best] if best == HEAD_ONLY else [RUNS / best / f"seed_{seed}" for seed in seeds]
    provenance.check(stages, [path.as_posix() for path in runs])
    images = manifest.read_images()
    album = Album(Path(params.dataset.path), images)
    tested = gallery.average([read_run(best, seed).test for seed in seeds], labels)
    errors, correct = gallery.examples(tested, labels, album)
    cut_away = features.provenance.backbone.preprocessing.cut_away(images.width, images.height).mean()
    class_rows, timings = evidence.class_rows(strategies, names), provenance.timings()
    return {
        "advice": _advice(stages),
        "params": params,
        "params_text": PARAMS.read_text(encoding="utf-8"),
        "n_classes": len(labels.class_names),
        "names": names,
        "best": best,
        "details": details,
        "table_of": evidence.table(details),
        "recipes": evidence.recipes(strategies),
        "timings": timings,
        "minutes": evidence.minutes(timings, strategies),
        "figures": [
            evidence.against_cost(cost, names),
            evidence.learning(curves, names),
            evidence.penalty(strategies),
            evidence.reliability(reliability, names),
        ],
        "confusions": [
            evidence.confusion(name, _json(f"confusion/{name}.json"), len(labels.class_names)) for name in names
        ],
        "per_class": evidence.per_class(class_rows, names),
        "class_rows": class_rows,
        "errors": errors,
        "correct": correct,
        "n_tested": len(tested.rows),
        "maps": gallery.maps(features, labels, tested),
        "network": _network(features.provenance, album, [example.image_id for example in errors] + labels.image_id[:1]),
        "summary": summary,
        "splits": splits,
        "class_counts": gallery.class_counts(summary["classes"]),
        "rejected": _csv("data/rejected.csv"),
        "poor": [
            (what, summary["n_poor"][what], [shown for (shown,) in gallery.groups([[path] for path in paths], album)])
            for what, paths in summary["poor"].items()
        ],
        "exact": gallery.groups(summary["exact_duplicates"], album),
        "conflicts": gallery.groups(summary["conflicts"], album),
        "near": gallery.groups([[pair["a"], pair["b"]] for pair in near], album),
        "correlations": [pair["correlation"] for pair in near],
        "suspects": gallery.suspects(_csv("label_suspects.csv"), album),
        "caution": _json("label_suspects.json")["caution"],
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "stages": stages,
        "backbone": features.provenance.backbone,
        "cut_away": cut_away if cut_away > LARGEST_SHARE else 0,
    }


def _advice(stages: dict[str, provenance.Stage]) -> Json | None:
    """Words and charts of reports/advice.json; None where it is not there."""
    if not (REPORTS / "advice.json").exists():
        return None
    provenance.check(stages, ["reports/advice.json"])
    found = _json("advice.json")
    figures = [] if found["cannot_tell"] else [evidence.depth(found), evidence.more_images(found)]
    return {"words": found["words"], "figures": figures}


def _network(made: Provenance, album: Album, candidates: list[str]) -> Json:
    """Filters, the feature maps of the first image that can be shown, and why where there are none."""
    found: Json = {"pictures": [], "image_id": "", "missing": ""}
    try:
        backbone = backbones.load_planned(made.backbone, str(hdf5.FEATURES))
        filters = pictures.first_filters(backbone)
        found["pictures"] = [filters] if filters else []
        opened = ((image_id, album.open(image_id)) for image_id in candidates)
        image_id, image = next(((image_id, image) for image_id, image in opened if image), ("", None))
        if image is None:
            raise ValueError(f"the image files in {album.directory} are missing, or changed since they were indexed")
        found["pictures"] += pictures.feature_maps(backbone, image, made.backbone.cut)
        return found | {"image_id": image_id}
    except ValueError as error:
        return found | {"missing": str(error)}


def render(page: Json) -> str:
    """Fill the template; its security policy names the scripts by their digests, so that no other can run."""
    template = templates.load(
        "page.html.jinja",
        label=evidence.label,
        scaled=evidence.scaled,
        shown=evidence.shown,
        duration=duration,
        paragraphs=paragraphs,
    )
    script = (templates.HERE / "page.js").read_text(encoding="utf-8")
    scripts = [vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"), script]
    specs: list[Json] = []

    def place(figure: Figure) -> int:
        """The number by which page.js finds a chart."""
        specs.append(figure.spec or {})
        return len(specs) - 1

    return template.render(
        **page,
        place=place,
        specs=specs,
        evidence=evidence,
        tables=tables,
        themes={kind: charts.theme(colours) for kind, colours in templates.PALETTES.items()},
        scripts=[Markup(script) for script in scripts],
        digests=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
    )


def paragraphs(text: str) -> Markup:
    """Paragraphs with **emphasis** and `code`, and nothing else of Markdown."""
    strong = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text)))
    parts = re.sub(r"`([^`]+)`", r"<code>\1</code>", strong).split("\n\n")
    return Markup("".join(f"<p>{part}</p>" for part in parts))


def duration(seconds: float) -> str:
    """Seconds as text."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _json(name: str) -> Any:  # noqa: ANN401
    return json.loads((REPORTS / name).read_text(encoding="utf-8"))


def _csv(name: str) -> list[dict[str, str]]:
    with (REPORTS / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
