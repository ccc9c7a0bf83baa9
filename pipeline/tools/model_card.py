"""model-card: README.md of a saved network in Hugging Face's format, from what the network and its repository know.

Figures are those of the repository in which the network lies, and only if its dvc.lock and reports are of this network.
What is not known is said to be unknown. Names that users wrote (classes, directories) are shown as plain text.
"""

import contextlib
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset import manifest
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
    known = find(run, card)
    title = f"{card.backbone.choice.name.partition('/')[2]}-{card.strategy}-seed-{card.seed}"
    sections = [
        f"---\n{_front_matter(title, card, known, is_onnx=exported is not None)}\n---",
        f"# {plain(title)}",
        _about(card, known),
        *("## Data", _data(known)),
        *("## Training", _training(card, known)),
        *("## Results on the test images", _results(card, known)),
        *("## Calibration", _calibration(card, known)),
        *("## Limits", _limits(card, known)),
        *("## Licences", _licences(card, known)),
        *("## Use", _use(run, card, exported, verified, code)),
    ]
    return "\n\n".join(sections) + "\n"


def find(run: Path, card: Card) -> Known | str:
    """What the repository of the run knows; the reason why not, if its files are not there, or of another network."""
    path = run.absolute()
    root, (strategy, seed) = path.parents[min(2, len(path.parents) - 1)], (card.strategy, card.seed)
    if path != root / MODELS / strategy / f"seed_{seed}.json":
        return f"the network does not lie in {MODELS / strategy} of a repository"
    per_seed = [f"{MODELS}/{strategy}/seed_{seed}.json", f"{MODELS}/{strategy}/seed_{seed}.safetensors"]
    per_seed += [f"{RUNS}/{strategy}/seed_{seed}"]
    outputs = [f"{MODELS}/{strategy}", f"{RUNS}/{strategy}"] if strategy == HEAD_ONLY else per_seed
    try:
        with contextlib.chdir(root):
            stages = provenance.read_lock()
            reports = ["reports/data", "reports/details.json", "reports/splits.json"]
            tables = [str(manifest.IMAGES), str(manifest.LABELS), str(manifest.SPLITS)]
            provenance.check(stages, [*outputs, *reports, *tables])
            used = manifest.SPLITS if strategy == HEAD_ONLY else manifest.SPLITS / f"seed_{seed}.csv"
            provenance.check_inputs(stages, outputs[0], [str(manifest.LABELS), str(used)])
            provenance.check_inputs(stages, "reports/details.json", [str(manifest.LABELS), str(manifest.SPLITS)])
            details, splits, summary = (
                json.loads(Path(f"reports/{name}.json").read_text(encoding="utf-8"))
                for name in ("details", "splits", "data/summary")
            )
            labels, images = manifest.read_labels(), manifest.read_images()
            split = manifest.read_split(seed, labels.image_id)
            found, own = _own_part(details, card)
            directory = str(stages["index"].params["params.yaml"]["dataset.path"])
            files = sorted(path.name for path in Path(directory).glob("*") if re.match("licen[cs]e", path.name, re.I))
            splitting = stages["split"].params["params.yaml"]["split"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        return one_line(error)
    n_leaks = splits["n_leaks"]
    name, licence = Path(directory).name, _package_licence(directory)
    rejected = summary["n_rejected"]
    return Known(found, own, n_leaks, name, licence, files, images, labels, split, splitting, rejected)


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


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _figure(one: Json, is_share: bool) -> str:
    """A value with its 95 % interval."""
    if one["value"] is None:
        return "-"
    scale, digits = (100, 1) if is_share else (1, 3)
    value, low, high = (
        None if one[key] is None else f"{scale * one[key]:.{digits}f}" for key in ("value", "low", "high")
    )
    return f"{value}{' %' if is_share else ''}" + (f" ({low} to {high})" if low and high else " (no interval)")


def _front_matter(title: str, card: Card, known: Known | str, *, is_onnx: bool) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    library = card.backbone.choice.name.partition("/")[0]
    tags = ["image-classification", library, card.strategy, *(["onnx"] if is_onnx else [])]
    fields: Json = {"library_name": "onnx" if is_onnx else "freeze-depth", "pipeline_tag": "image-classification"}
    if isinstance(known, Known):
        figures, split = known.own["test"], f"test, seed {card.seed}"
        shown = {key: hub for key, (_, hub, _) in METRICS.items() if figures.get(key) is not None}
        fields["eval_results"] = [
            EvalResult("image-classification", "imagefolder", known.name, hub, figures[key], dataset_split=split)
            for key, hub in shown.items()
        ]
        fields |= {"model_name": title, "metrics": [*shown.values()]}
        fields |= {"datasets": [known.name]} if re.fullmatch(r"[\w.-]+", known.name, re.ASCII) else {}
    of = {
        "weights": None if _is_from_scratch(known) else card.backbone.licence,
        "data": known.licence if isinstance(known, Known) else None,
    }
    absent = {"weights": "random" if _is_from_scratch(known) else "unknown", "data": "unknown"}
    name = "-".join(f"{what}-{licence or absent[what]}" for what, licence in of.items())
    # The hub wants one word; what the licence of the network itself is, its publisher decides
    fields |= {"license": "other", "license_name": re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")}
    return ModelCardData(tags=tags, **fields).to_yaml()


def _is_from_scratch(known: Known | str) -> bool | None:
    """Whether training started from random weights; None if it is not known."""
    return None if isinstance(known, str) else known.own["network"].get("recipe", {}).get("init") == "random"


def _about(card: Card, known: Known | str) -> str:
    plan = card.backbone
    weights = {"bundled": "the bundled weights", "default": "the published weights", "random": "random weights"}
    source = weights.get(plan.choice.weights, f"the weights {plain(Path(plan.choice.weights).name)}")
    if _is_from_scratch(known):
        source = weights["random"]
    elif _is_from_scratch(known) is None and card.strategy != HEAD_ONLY:
        source += ", unless its recipe, which is not known, says random weights"
    return (
        f"Classifies an image as one of {len(card.class_names)} classes: "
        f"{', '.join(map(plain, card.class_names))}. The network is {plain(plan.choice.name)}, which started from "
        f"{source}, with a new head ({card.head.kind}) on {_number(plan.feature_shape)} features."
    )


def _number(shape: Sequence[int]) -> str:
    return " x ".join(f"{side:,}" for side in shape)


def _data(known: Known | str) -> str:
    if isinstance(known, str):
        return f"Not known: {plain(known)}."
    names, label, parts = (
        manifest.SPLIT_NAMES,
        known.labels.label,
        {n: known.split.rows(n) for n in manifest.SPLIT_NAMES},
    )
    kept = [name for name in names if len(parts[name]) or name != "unused"]
    units = unit_of(known.labels)
    counts = [np.bincount(label[parts[name]], minlength=len(known.labels.class_names)) for name in kept]
    rows = [(plain(name), *(f"{count[k]:,}" for count in counts)) for k, name in enumerate(known.labels.class_names)]
    rows.append(("all", *(f"{len(parts[name]):,}" for name in kept)))
    rows.append(("units", *(f"{len(np.unique(units[parts[name]])):,}" for name in kept)))
    titles = {"train": "train", "val": "validation", "test": "test", "unused": "unused"}
    options = ", ".join(
        f"{key} {plain(value)}" for key, value in known.splitting.items() if key not in ("seeds", "method")
    )
    weighted = "" if len(np.unique(known.labels.weight)) == 1 else " Images have weights, which all figures use."
    return (
        f"The directory {plain(known.name)}, {len(label):,} images. A unit is a set of images that belong together "
        f"(a group, or identical files) and are never separated; else it is one image.{weighted}\n\n"
        + _table(("class", *(f"{titles[name]} images" for name in kept)), rows)
        + f"\n\nSplit: method {plain(known.splitting['method'])}, seed {known.split.seed} ({options})."
    )


def _training(card: Card, known: Known | str) -> str:
    is_head = card.strategy == HEAD_ONLY
    head = card.head.model_dump(exclude={"class_weights"} if not is_head else set())
    text = f"Strategy {plain(card.strategy)}, seed {card.seed}, freeze boundary {plain(card.freeze_until)}: "
    text += (
        "only the head is trained, on frozen features." if is_head else "the layers behind it and the head are trained."
    )
    text += f" Trained parameters: {card.cost.trainable_params:,}; training {card.cost.train_flops / 1e12:,.1f} TFLOPs."
    if isinstance(known, Known):
        text += f" Chosen on validation: {_chosen(known.own['chosen'])}."
        recipe = known.own["network"].get("recipe", {})
    else:
        text += f" The recipe is not known: {plain(known)}."
        recipe = {}
    described = {**recipe, **{f"head, {key}": value for key, value in head.items()}}
    rows = [
        (plain(key), plain(value if isinstance(value, str) else json.dumps(value))) for key, value in described.items()
    ]
    return f"{text}\n\n{_table(('parameter', 'value'), rows)}"


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


def _results(card: Card, known: Known | str) -> str:
    if isinstance(known, str):
        return f"Left out: {plain(known)}."
    test, seeds = known.strategy["test"], known.strategy["seeds"]
    figures = [(name, _figure(test["metrics"][key], share)) for key, (name, _, share) in METRICS.items()]
    columns, several = ["metric", "value (95 % interval)"], len(seeds) > 1
    if several:
        columns.append(f"this network (seed {card.seed})")
        own = known.own["test"]
        figures = [
            (*row, "-" if own[key] is None else _share(own[key]) if share else f"{own[key]:.3f}")
            for row, (key, (_, _, share)) in zip(figures, METRICS.items(), strict=True)
        ]
    about = f"{test['n_distinct_units']:,} test units; intervals are over them, and hold for the trained networks."
    what = "The folds' test images, pooled" if known.splitting["method"] == "folds" else "Means over the seeds"
    about += f" {what} ({', '.join(map(str, seeds))})." if several else ""
    classes = [
        (plain(one["class"]), f"{one['support']:,}", *(_share(one[key]) for key in ("precision", "recall", "f1")))
        for one in test["classes"]
    ]
    support = "test images" + (", all seeds" if several else "")
    per_class = _table(("class", support, "precision", "recall", "F1"), classes)
    return f"{about}\n\n{_table(columns, figures)}\n\nBy class:\n\n{per_class}"


def _calibration(card: Card, known: Known | str) -> str:
    text = f"Probabilities are given at the temperature {card.temperature:.4g}, which was fitted on validation"
    text += " (Guo et al. 2017): the mean log-probabilities over the views are divided by it."
    if isinstance(known, str):
        return f"{text} The calibration error is left out: {plain(known)}."
    own = known.own["test"]
    before, after = _share(own["ece"]), _share(own["ece_scaled"])
    return f"{text} Expected calibration error on test (15 bins): {before} before, {after} after."


def _limits(card: Card, known: Known | str) -> str:
    p, points = card.backbone.preprocessing, []
    points.append("It answers with one of its classes whatever the image shows.")
    if isinstance(known, Known):
        n_train = len(known.split.rows("train"))
        points.append(f"It was trained on {n_train:,} images, with one split and one seed ({card.seed}).")
        points.append(
            f"Only test images of {plain(known.name)} were predicted; what is different there was not tested."
        )
        cut = float(np.mean(p.cut_away(known.images.width, known.images.height)))
        if cut:
            points.append(f"It sees the middle of an image: on average {_share(cut)} of the area is cut away.")
        if known.n_rejected:
            points.append(f"Files of the data that could not be read, and are in no figure: {known.n_rejected:,}.")
        if known.n_leaks:
            points.append(
                f"{known.n_leaks:,} sets of images that belong together lie in several splits: figures may be too good."
            )
        test = known.strategy["test"]
        if (n_units := test["n_distinct_units"]) < FEW_UNITS:
            points.append(f"There are only {n_units:,} test units, so that the intervals are rough.")
        if clean := test["without_twins"]:
            figures = clean["metrics"].get("accuracy")
            without = f": without them, accuracy is {_figure(figures, True)}" if figures else ""
            points.append(
                f"{clean['n_twins']:,} test images are near-duplicates of others in train or validation{without}."
            )
    else:
        points.append(f"How many images it was trained on, and how well it does, is not known: {plain(known)}.")
        if p.geometry == "crop":
            points.append("It sees the middle of an image; what lies at the border is cut away.")
    return "\n".join(f"- {point}" for point in points)


def _licences(card: Card, known: Known | str) -> str:
    licence = card.backbone.licence
    weights = plain(licence) if licence else "not known"
    if card.backbone.is_non_commercial:
        weights += " (excludes commercial use)"
    if _is_from_scratch(known):
        weights = "none; training started from random weights"
    data = "not known"
    if isinstance(known, Known):
        data = plain(known.licence) if known.licence else data
        data += f"; see {', '.join(map(plain, known.licence_files))} of the data" if known.licence_files else ""
    return (
        f"- Pretrained weights: {weights}.\n- Data: {data}.\n\nThe licence of this network is not stated here: whoever "
        "publishes it chooses one that both allow."
    )


def _use(run: Path, card: Card, exported: Path | None, verified: str, code: str) -> str:
    parts = []
    if exported is not None:
        digest = hashlib.sha256(exported.read_bytes()).hexdigest()
        parts += [
            f"{plain(exported.name)} needs numpy, Pillow and onnxruntime:",
            f"```python\n{code}```",
            "Its metadata hold the classes, how an image becomes the input, and the card of the network.",
            f"Checked when it was exported: {plain(verified)}.",
            f"SHA-256 of {plain(exported.name)}: `{digest}`",  # by which write_beside knows it again
        ]
    parts += [
        "In a checkout of the repository that trained it:",
        f"```sh\npython -m pipeline predict {MODELS}/{card.strategy}/seed_{card.seed} photo.jpg\n```",
        f"SHA-256 of {run.stem}.safetensors: `{card.sha256}`",
    ]
    return "\n\n".join(parts)
