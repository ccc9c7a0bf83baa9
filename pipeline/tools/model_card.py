"""model-card: README.md of a saved network in Hugging Face's format, from what the network and its repository know.

Figures are those of the repository in which the network lies, and only if its dvc.lock and reports are of this network.
What is not known is said to be unknown. Names that users wrote (classes, directories) are shown as plain text.
"""

import contextlib
import html
import json
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.dataset import manifest
from pipeline.dataset.decoding import sha256
from pipeline.dataset.manifest import Images, Labels, Split
from pipeline.dataset.units import FEW_UNITS, unit_of
from pipeline.files import write_text
from pipeline.logs import one_line
from pipeline.params import HEAD_ALL_SEEDS, HEAD_ONLY
from pipeline.report import provenance
from pipeline.tools import inference
from pipeline.training import saved_networks
from pipeline.training.runs import MODELS, RUNS
from pipeline.training.saved_networks import Card

README = "README.md"
DATA = (manifest.LABELS, manifest.SPLITS)  # from which the figures of details.json are
OUTPUTS = ("data", "models", "reports")  # directories of a repository whose files DVC lists
PACKAGES = {"data/raw/elpv": "elpv-dataset"}  # data sets of packages that state a licence
METRICS = {  # name, type on the hub, whether it is a share
    "accuracy": ("accuracy", "accuracy", True),
    "balanced_accuracy": ("balanced accuracy", "balanced_accuracy", True),
    "macro_f1": ("macro F1", "f1", True),
    "auroc": ("AUROC", "roc_auc", True),
    "nll": ("NLL (nats)", "nll", False),
    "brier": ("Brier score", "brier_score", False),
}
Json = dict[str, Any]


@dataclass(frozen=True)
class Known:
    """What the repository knows of the network: its part of details.json, of which `own` is its run, and the data.

    `splitting`: the parameters of the split; `n_leaks`: how often images that belong together are in several splits;
    `licence` of the data.
    """

    strategy: Json
    own: Json
    n_leaks: int
    name: str
    licence: str | None
    licence_files: list[str]
    images: Images
    labels: Labels
    split: Split
    splitting: Json
    n_rejected: int


def show(run: str, directory: Path) -> None:
    """Write README.md into `directory`; ValueError if there is one, or DVC keeps its outputs there."""
    refuse_outputs(directory)
    path = inference.path_of(run)
    card = saved_networks.read_card(path)
    readme = directory / README
    if readme.exists():
        raise ValueError(f"{readme}: is there already; remove it, or name another directory")
    write_text(readme, as_markdown(path, card))
    print(f"{readme}: the model card")


def write_beside(run: Path, card: Card, exported: Path, verified: str, code: str) -> None:
    """Write README.md beside an exported file, or <its name>.md if README.md is not of this file, or say why not.

    `verified`: how well the file agrees with predict; `code`: how to use it.
    """
    readme, beside = exported.parent / README, exported.with_suffix(".md")
    own = f"SHA-256 of {plain(exported.name)}: "  # in a card that an export of the same file wrote
    there = [path for path in (readme, beside) if path.exists()]
    written = [path for path in there if own in path.read_text(encoding="utf-8", errors="replace")]
    written += [path for path in (readme, beside) if path not in there]
    if not written:
        way_out = "for a model card of this file, export it into another directory"
        print(f"{readme} and {beside.name}: are there already and stay as they are; {way_out}")
        return
    write_text(written[0], as_markdown(run, card, exported, verified, code))
    other = f"; {README} there is not of this file" if written[0] != readme and readme in there else ""
    print(f"{written[0]}: the model card{other}")


def refuse_outputs(directory: Path) -> None:
    """ValueError if `directory` belongs to what DVC, or git, lists of a repository's results."""
    place = directory.resolve()
    for root in place.parents:
        if (root / "dvc.yaml").exists() and place.relative_to(root).parts[0] in OUTPUTS:
            raise ValueError(
                f"{directory}: holds what the stages write; expected a directory outside {', '.join(OUTPUTS)}"
            )


def as_markdown(run: Path, card: Card, exported: Path | None = None, verified: str = "", code: str = "") -> str:
    """The model card; of the file `exported`, if there is one."""
    found, is_head = find(run, card), card.strategy == HEAD_ONLY
    known, reason = (None, found) if isinstance(found, str) else (found, "")
    title = f"{card.backbone.choice.name.partition('/')[2]}-{card.strategy}-seed-{card.seed}"
    recipe = known.own["network"].get("recipe", {}) if known else {}
    head = card.head.model_dump(exclude=set() if is_head else {"class_weights"})
    settings = {**recipe, **{f"head, {key}": value for key, value in head.items()}}
    return render(
        "model_card.md.jinja",
        **(_of_known(known, card) if known else {}),
        card=card,
        known=known,
        reason=reason,
        is_head=is_head,
        title=title,
        front_matter=_front_matter(title, card, known, is_onnx=exported is not None),
        source=_source(card, known),
        settings={key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()},
        is_from_scratch=_is_from_scratch(known),
        path=MODELS / card.strategy / run.stem,
        exported=exported,
        digest=sha256(exported.read_bytes()) if exported else "",  # by which write_beside knows the file again
        verified=verified,
        code=code,
    )


def render(template: str, **values: Any) -> str:  # noqa: ANN401
    """The text of a template of this directory; a value that it lacks is an error."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"plain": plain, "count": "{:,}".format, "number": _number, "figure": _figure}
    return environment.get_template(template).render(values)


def find(run: Path, card: Card) -> Known | str:
    """What the repository of the run knows; the reason why not, if its files are not there, or of another network."""
    root, strategy, name = inference.repository_of(run), card.strategy, f"seed_{card.seed}"
    if run.absolute() != root / MODELS / strategy / f"{name}.json":
        return f"the network does not lie in {MODELS / strategy} of a repository"
    outputs = [MODELS / strategy / f"{name}.json", MODELS / strategy / f"{name}.safetensors", RUNS / strategy / name]
    outputs = [MODELS / strategy, RUNS / strategy] if strategy == HEAD_ONLY else outputs
    try:
        with contextlib.chdir(root):
            stages = provenance.read_lock()
            reports = ["reports/data", "reports/details.json", "reports/splits.json"]
            provenance.check(stages, [*map(str, (*outputs, manifest.IMAGES, *DATA)), *reports])
            inference.check_data(stages, card)
            provenance.check_inputs(stages, "reports/details.json", map(str, DATA))
            details, splits, summary = (
                json.loads(Path(f"reports/{name}.json").read_text(encoding="utf-8"))
                for name in ("details", "splits", "data/summary")
            )
            labels, directory = manifest.read_labels(), str(stages["index"].params["params.yaml"]["dataset.path"])
            listed = sorted(path.name for path in Path(directory).glob("*"))
            return Known(
                *_own_part(details, card),
                n_leaks=splits["n_leaks"],
                name=Path(directory).name,
                licence=_package_licence(directory),
                licence_files=[file for file in listed if re.match("licen[cs]e", file, re.I)],
                images=manifest.read_images(),
                labels=labels,
                split=manifest.read_split(card.seed, labels.image_id),
                splitting=stages["split"].params["params.yaml"]["split"],
                n_rejected=summary["n_rejected"],
            )
    except (OSError, ValueError, LookupError, TypeError) as error:
        return one_line(error)


def _own_part(details: Json, card: Card) -> tuple[Json, Json]:
    """The strategy and the run in details.json; ValueError unless class names, cost and temperature are the card's."""
    for name in (card.strategy, HEAD_ALL_SEEDS) if card.strategy == HEAD_ONLY else (card.strategy,):
        strategy = details["strategies"].get(name)
        if strategy is None or card.seed not in strategy["seeds"]:
            continue
        number = strategy["seeds"].index(card.seed)
        own = {**strategy["runs"][number], "temperature": strategy["test"]["temperature"][number]}
        found = details["class_names"], own["cost"]
        is_same = found == ([*card.class_names], card.cost.model_dump())
        if is_same and np.isclose(own["temperature"], card.temperature, rtol=1e-4):
            return strategy, own
        raise ValueError("reports/details.json: of another training of this strategy; run: dvc repro")
    raise ValueError(f"reports/details.json: has no figures of {card.strategy} with seed {card.seed}")


def _package_licence(directory: str) -> str | None:
    try:
        return metadata.metadata(PACKAGES[directory])["License-Expression"]
    except (LookupError, metadata.PackageNotFoundError):
        return None


def plain(text: object) -> str:
    """A user's text on one line of Markdown, as it is: neither HTML nor Markdown in it has an effect."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", escaped)


def _number(value: float | None, is_share: bool = True) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if is_share else f"{value:.3f}"


def _figure(one: Json, is_share: bool) -> str:
    """A value with its 95 % interval."""
    if one["value"] is None:
        return "-"
    low, high = (_number(one[key], is_share).removesuffix(" %") for key in ("low", "high"))
    interval = "no interval" if None in (one["low"], one["high"]) else f"{low} to {high}"
    return f"{_number(one['value'], is_share)} ({interval})"


def _front_matter(title: str, card: Card, known: Known | None, *, is_onnx: bool) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    library = card.backbone.choice.name.partition("/")[0]
    tags = ["image-classification", library, card.strategy, *(["onnx"] if is_onnx else [])]
    fields: Json = {"library_name": "onnx" if is_onnx else "freeze-depth", "pipeline_tag": "image-classification"}
    if known:
        figures, split = known.own["test"], f"test, seed {card.seed}"
        shown = {key: hub for key, (_, hub, _) in METRICS.items() if figures.get(key) is not None}
        fields["eval_results"] = [
            EvalResult("image-classification", "imagefolder", known.name, hub, figures[key], dataset_split=split)
            for key, hub in shown.items()
        ]
        fields |= {"model_name": title, "metrics": [*shown.values()]}
        fields |= {"datasets": [known.name]} if re.fullmatch(r"[\w.-]+", known.name, re.ASCII) else {}
    weights = "random" if _is_from_scratch(known) else card.backbone.licence or "unknown"
    name = f"weights-{weights}-data-{(known and known.licence) or 'unknown'}"
    # The hub wants one word; what the licence of the network itself is, its publisher decides
    fields |= {"license": "other", "license_name": re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")}
    return ModelCardData(tags=tags, **fields).to_yaml()


def _is_from_scratch(known: Known | None) -> bool:
    """Whether training is known to have started from random weights."""
    return known is not None and known.own["network"].get("recipe", {}).get("init") == "random"


def _source(card: Card, known: Known | None) -> str:
    """What training started from."""
    plan = card.backbone
    weights = {"bundled": "the bundled weights", "default": "the published weights", "random": "random weights"}
    if _is_from_scratch(known):
        return weights["random"]
    source = weights.get(plan.choice.weights, f"the weights {plain(Path(plan.choice.weights).name)}")
    may_be_random = known is None and card.strategy != HEAD_ONLY
    return source + ", unless its recipe, which is not known, says random weights" * may_be_random


def _of_known(known: Known, card: Card) -> Json:
    """What the template needs beside the fields of `known`."""
    labels, units, seeds = known.labels, unit_of(known.labels), known.strategy["seeds"]
    rows = {name: known.split.rows(name) for name in manifest.SPLIT_NAMES}
    rows = {name: own for name, own in rows.items() if len(own) or name != "unused"}
    counts = [
        [*np.bincount(labels.label[own], minlength=len(labels.class_names)), len(own), len(np.unique(units[own]))]
        for own in rows.values()
    ]
    counted = zip([*map(plain, labels.class_names), "all", "units"], *counts, strict=True)
    what = "The folds' test images, pooled" if known.splitting["method"] == "folds" else "Means over the seeds"
    options = (f"{key} {plain(value)}" for key, value in known.splitting.items() if key not in ("seeds", "method"))
    return {
        "splits": ["validation" if name == "val" else name for name in rows],
        "images_by_split": [[name, *map("{:,}".format, row)] for name, *row in counted],
        "has_weights": len(np.unique(labels.weight)) > 1,
        "options": ", ".join(options),
        "chosen": _chosen(known.own["chosen"]),
        "test": known.strategy["test"],
        "metrics": METRICS,
        "several": f" {what} ({', '.join(map(str, seeds))})." if len(seeds) > 1 else "",
        "cut_away": float(np.mean(card.backbone.preprocessing.cut_away(known.images.width, known.images.height))),
        "few_units": FEW_UNITS,
    }


def _chosen(chosen: Json) -> str:
    """What validation selected, in words."""
    parts = []
    if (epoch := chosen.get("epoch")) is not None:
        parts.append(f"epoch {epoch}" + ("" if epoch else " (the network before training)"))
    if (strength := chosen.get("strength")) is not None:
        end = f" (the {chosen['at_end']} that was tried)" if chosen.get("at_end") else ""
        parts.append(f"regularization strength {strength:g}{end}")
    if rates := chosen.get("learning_rates"):
        parts.append("learning rates {:g} (base) and {:g} (head)".format(*rates))
    return ", ".join(parts)
