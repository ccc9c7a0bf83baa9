"""Evaluate saved networks on new labelled images: does the model hold on other data than those it was trained with?

Reads   a data set as `index` does (a directory per class, or labels.csv), and of the repository that holds a run, where
        they are there: data/labels.csv, data/splits/, reports/runs/
Writes  evaluation.json, evaluation.md, evaluation.html     into a directory that the user names
"""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from scipy import special, stats

from pipeline import logs
from pipeline.comparison import influence, intervals, metrics, outcomes, paired
from pipeline.comparison.intervals import Interval
from pipeline.comparison.outcomes import Outcomes
from pipeline.comparison.paired import Study
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Images, Labels, Split
from pipeline.dataset.units import unit_of
from pipeline.files import write_json, write_text
from pipeline.ingest import listing
from pipeline.ingest.directory import IMAGE_EXTENSIONS, TABLE, printable, shorten
from pipeline.ingest.listing import Listing
from pipeline.report import evaluation, provenance
from pipeline.report.pictures import Album
from pipeline.tools import inference
from pipeline.training import calibration
from pipeline.training.novelty import Novelty
from pipeline.training.runs import RUNS, Predictions, read_run
from pipeline.training.saved_networks import Card, read_card

EVALUATIONS = Path("reports/evaluations")
FAR = 0.99  # the share of the validation images that are nearer than what counts as far
SHOWN = 100  # mistakes, and files that cannot be read, in evaluation.json
PAIRED = ("accuracy", "nll")  # metrics that are defined whichever classes occur
Json = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A saved network, as it was named, of the repository `root`. `known`: where its training images lie, if known."""

    name: str
    root: Path
    card: Card
    known: Novelty | None


@dataclass(frozen=True)
class Data:
    """New images with labels by the classes of the models, and their units; `about`: what was found, for reports."""

    labels: Labels
    unit: np.ndarray
    about: Json


def show(
    runs: Sequence[str],
    place: Path,
    output: Path | None,
    exclude: Sequence[str],
    columns: Mapping[str, str],
    workers: int | None,
) -> None:
    """Evaluate one or two runs on the images of `place`, write the reports, and print the answer in words.

    ValueError at the end if an image cannot be read, as `predict` does it: the reports are of the others.

    `place`: a directory, or a table in it that is read in place of its labels.csv.

    `output`: by default a directory below reports/evaluations/ with the names of the runs and of the data.
    """
    cards = [read_card(inference.path_of(run)) for run in runs]
    if len(cards) > 1 and {*cards[0].class_names} != {*cards[1].class_names}:
        raise ValueError(f"{runs[0]} and {runs[1]} have different classes; expected two models of the same classes")
    directory, table = (place.parent, place.name) if place.suffix.lower() == ".csv" else (place, TABLE)
    listed = list_images(directory, table, exclude, columns, cards[0], runs[0])
    models, answers = zip(*(_answer(run, directory, listed, workers) for run in runs), strict=True)
    data, kept = gather(directory, listed, answers[0], cards[0])
    described: list[Json] = []
    predictions: list[Predictions] = []
    for model, found in zip(models, answers, strict=True):
        order = [model.card.class_names.index(name) for name in cards[0].class_names]
        values = np.stack([found[i].log_probability for i in kept])[:, order]
        predictions.append(Predictions(np.arange(len(kept)), values))
        distance = np.array([found[i].distance for i in kept])
        described.append(describe(model, data, predictions[-1], distance))
    assembled: Json = {"data": data.about, "models": described, "paired": None}
    if len(models) > 1:
        assembled["paired"] = compare(predictions, data)
    assembled["summary"] = evaluation.summary(assembled)
    written = output or EVALUATIONS / default_name(runs, place)
    album = Album(directory, Images(data.labels.image_id, data.labels.sha256, [], []))
    write_json(written / "evaluation.json", assembled)
    write_text(written / "evaluation.md", evaluation.as_markdown(assembled))
    write_text(written / "evaluation.html", evaluation.as_page(assembled, album))
    print(*assembled["summary"], sep="\n")
    logs.log.info("%s: evaluation.html, evaluation.md, evaluation.json", written)
    if n := data.about["n_unreadable"]:
        path, reason = data.about["unreadable"][0]
        way_out = "the figures are of the others; repair or remove them, or leave them out (--exclude)"
        raise ValueError(f"{n:,} image{'s' * (n != 1)} cannot be read, first {path} ({reason}); {way_out}")


def default_name(runs: Sequence[str], place: Path) -> str:
    """A name of a directory: strategy and seed of each run, then the data, without signs that a path cannot have.

    It ends with a digest of where the data lie: `march/test` and `april/test` are two.
    """
    parts = ["-".join(inference.path_of(run).with_suffix("").parts[-2:]) for run in runs]
    where = place.resolve()
    words = ["_against_".join(parts), f"{where.stem or 'data'}-{hashlib.sha256(os.fsencode(where)).hexdigest()[:6]}"]
    return "_on_".join("".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in word) for word in words)


def list_images(
    directory: Path, table: str, exclude: Sequence[str], columns: Mapping[str, str], card: Card, run: str
) -> Listing:
    """List a data set as `index` does; ValueError for classes that the model does not know."""
    if table != TABLE and not (directory / table).is_file():
        raise FileNotFoundError(f"{printable(str(directory / table))}: no such file; expected a table or a directory")
    if not directory.is_dir():
        expected = "expected one with a sub-directory per class, or a labels.csv"
        raise FileNotFoundError(f"{printable(str(directory))} is not a directory; {expected}")
    try:
        listed = listing.find_images(directory, exclude, columns, "keep", table)
    except ValueError as error:
        raise ValueError(_as_options(str(error))) from None
    listed = replace(listed, warnings=[*map(_as_options, listed.warnings)])
    if unknown := sorted({*listed.images["label"]} - {*card.class_names}):
        known, layout = shorten(card.class_names, 20), f"; {listed.layout}" if listed.layout else ""
        problem = f"classes that {run} does not know: {shorten(unknown, 20)}; it knows {known}"
        raise ValueError(printable(f"{directory}: {problem}; rename or remove them (--exclude){layout}"))
    return listed


def _as_options(text: str) -> str:
    """A message of `index` that speaks of the options of this command in place of params.yaml."""
    text = text.replace("params.yaml: ", "").replace("dataset.exclude", "--exclude")
    return text.replace("dataset.columns.", "--column ").replace("dataset.columns", "--column")


def _answer(run: str, directory: Path, listed: Listing, workers: int | None) -> tuple[Model, list[inference.Answer]]:
    path, paths = inference.path_of(run), [directory / name for name in listed.images["path"]]
    network = inference.open_network(path, len(paths), has_distances=True)
    answers = logs.progress(inference.run(network, paths, workers), len(paths), "images", "evaluate")
    return Model(run, inference.repository_of(path), network.card, network.novelty), [*answers]


def gather(directory: Path, listed: Listing, answers: Sequence[inference.Answer], card: Card) -> tuple[Data, list[int]]:
    """The images that can be used, and their positions in the listing; ValueError if there are none.

    As `index` does it: files that are no images are left out, and images with the same bytes but different labels too.
    """
    table = listed.images.assign(sha256=[one.sha256 for one in answers], problem=[one.error for one in answers])
    failed, readable = table[table["problem"] != ""], table[table["problem"] == ""]
    is_image = [listed.is_table or os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS for path in failed["path"]]
    unread = failed.loc[is_image, ["path", "problem"]].to_numpy().tolist()
    unreadable = [[printable(path), problem] for path, problem in [*listed.rejected, *unread]]
    is_disputed = readable.groupby("sha256")["label"].transform("nunique") > 1
    kept = readable[~is_disputed] if len(readable) else readable
    if kept.empty:
        first = f", first {unreadable[0][0]} ({unreadable[0][1]})" if unreadable else ""
        raise ValueError(f"{printable(str(directory))}: no image can be used; {len(unreadable)} cannot be read{first}")
    columns = {"path": "image_id", "split": "given_split"}
    made = manifest.make_labels(kept.rename(columns=columns).assign(near_duplicate_group="").reset_index(drop=True))
    index = np.array([card.class_names.index(name) for name in made.class_names])
    labels = replace(made, label=index[made.label], class_names=list(card.class_names))
    unit, counts = unit_of(labels), np.bincount(labels.label, minlength=len(card.class_names))
    about = {
        "directory": str(directory),
        "n_images": len(unit),
        "n_units": len(np.unique(unit)),
        "has_weights": bool(np.ptp(labels.weight)),
        "classes": {name: int(n) for name, n in zip(card.class_names, counts, strict=True)},
        "n_unreadable": len(unreadable),
        "unreadable": unreadable[:SHOWN],
        "n_other_files": len(failed) - len(unread),
        "n_conflicts": int(is_disputed.sum()),
        "warnings": listed.warnings,
    }
    return Data(labels, unit, about), kept.index.tolist()


def describe(model: Model, data: Data, predictions: Predictions, distance: np.ndarray) -> Json:
    """Everything about one model: metrics, calibration, classes, mistakes, its own test, and distances."""
    card, labels = model.card, data.labels
    n_classes = len(labels.class_names)
    raw, scaled = both(predictions, labels.label, card.temperature)
    known = trained_with(model)
    own = None if known is None else own_test(model, known[0])
    seen = [""] * len(labels.sha256) if known is None else splits_of(*known, labels.sha256)
    is_new = np.array([split not in ("train", "val") for split in seen])
    is_other = is_new & (np.array(seen) != "test")  # than those of its own test, with which they are compared
    found = {
        "model": model.name,
        "strategy": card.strategy,
        "seed": card.seed,
        "backbone": card.backbone.choice.name,
        "temperature": card.temperature,
        "metrics": measure(raw, scaled, data),
        "classes": by_class(raw, data),
        "confusion": metrics.confusion(raw.predicted, labels.label, n_classes).tolist(),
        "reliability": {
            name: metrics.reliability(one.probability, labels.label, labels.weight)
            for name, one in (("raw", raw), ("scaled", scaled))
        },
        "mistakes": mistakes(scaled, labels),
        "seen": {**Counter(split for split in seen if split)},
        "is_known": known is not None,
        "relabelled": [] if known is None else relabelled(known[0], seen, labels),
        "without_seen": None,
        "own_test": own,
        "differences": {},
        "distance": None if model.known is None else far_away(model.known, distance, data.unit),
    }
    if 0 < is_new.sum() < len(is_new):
        judged = measure(raw[is_new], scaled[is_new], data)
        found["without_seen"] = {"n": int(is_new.sum()), "metrics": judged}
    if own is not None and is_other.any():
        judged = found["metrics"] if is_other.all() else measure(raw[is_other], scaled[is_other], data)
        pairs = {name: (judged[name], own["metrics"][name]) for name in judged if own["metrics"].get(name)}
        # Recall is not averaged over the same classes where some are absent
        left_out = () if len(np.unique(labels.label[is_other])) == n_classes else ("balanced_accuracy",)
        found["differences"] = {
            name: unpaired(*pair)
            for name, pair in pairs.items()
            if pair[0] and not name.startswith("ece") and name not in left_out
        }
    return found


def both(predictions: Predictions, label: np.ndarray, temperature: float) -> tuple[Outcomes, Outcomes]:
    """Outcomes of the predictions as they are, and at the temperature."""
    probability = calibration.scaled(predictions.log_probability, temperature)
    scaled = replace(predictions, log_probability=np.log(np.maximum(probability, np.finfo(float).tiny)))
    return outcomes.of_predictions(predictions, label), outcomes.of_predictions(scaled, label)


def measure(raw: Outcomes, scaled: Outcomes, data: Data) -> Json:
    """Every metric with its interval; those of probabilities also at the temperature, as <name>_scaled."""
    labels, n_classes = data.labels, len(data.labels.class_names)
    arrays = labels.label, labels.weight, data.unit
    found = intervals.metric_intervals([raw], *arrays, n_classes)
    after = intervals.metric_intervals([scaled], *arrays, n_classes)
    found |= {f"{name}_scaled": after[name] for name in ("nll", "brier", "ece")}
    if len(np.unique(labels.label[raw.rows])) < n_classes:  # a class that is absent would count as 0
        found.pop("macro_f1")
    return {name: value and asdict(value) for name, value in found.items()}


def by_class(raw: Outcomes, data: Data) -> list[Json]:
    """Support of each class, recall and precision with their intervals, and F1; None where there is no image."""
    labels, found = data.labels, []
    figures = metrics.per_class(raw.predicted, labels.label, labels.weight, len(labels.class_names))
    for k, name in enumerate(labels.class_names):
        row: Json = {"class": name, "support": int(figures["support"][k]), "f1": float(figures["f1"][k])}
        for figure, chosen in (("recall", labels.label == k), ("precision", raw.predicted == k)):
            is_right = (labels.label == raw.predicted)[chosen]
            share = influence.mean(is_right, labels.weight[chosen]) if chosen.any() else None
            estimate = share and intervals.interval([share], [raw.rows[chosen]], data.unit)
            row[figure] = estimate and asdict(estimate)
        found.append(row)
    return found


def mistakes(scaled: Outcomes, labels: Labels) -> list[Json]:
    """The wrong predictions with the largest probability, the worst first."""
    probability = scaled.probability
    confidence, is_right = metrics.top_label(probability, labels.label)
    order = [i for i in np.argsort(-confidence, kind="stable").tolist() if not is_right[i]]
    return [
        {
            "image_id": labels.image_id[i],
            "label": labels.class_names[labels.label[i]],
            "predicted": labels.class_names[scaled.predicted[i]],
            "probability": float(confidence[i]),
            "probability_of_label": float(probability[i, labels.label[i]]),
        }
        for i in order[:SHOWN]
    ]


def trained_with(model: Model) -> tuple[Labels, Split] | None:
    """Labels and split of the repository that holds the model; None where they are not there, or others by now.

    A stage that only prepares data may have run since. dvc.lock says which ones the model was trained with.
    """
    card, root = model.card, model.root
    try:
        labels = manifest.read_labels(root / manifest.LABELS)
        split = manifest.read_split(card.seed, labels.image_id, root / manifest.SPLITS)
        if (root / provenance.LOCK).exists():
            with contextlib.chdir(root):
                inference.check_data(provenance.read_lock(), card)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logs.log.warning("%s: not compared with the data of the model (%s)", root, logs.one_line(error))
        return None
    return labels, split


def own_test(model: Model, labels: Labels) -> Json | None:
    """Metrics of the model on its own test images, of the repository that holds it; None where they are not there."""
    card, root = model.card, model.root
    try:
        run = read_run(card.strategy, card.seed, root / RUNS)
        val, tested = run.val.rows, run.test.rows
        temperature = calibration.temperature(run.val.log_probability, labels.label[val], labels.weight[val])
        is_same = run.cost == card.cost and tuple(labels.class_names) == card.class_names
        if not is_same or not np.isclose(temperature, card.temperature, rtol=1e-4):
            return None  # of another run than this model
        data = Data(labels, unit_of(labels), {})
        return {
            "n_images": len(tested),
            "n_units": len(np.unique(data.unit[tested])),
            "metrics": measure(*both(run.test, labels.label, card.temperature), data),
            "has_weights": bool(np.ptp(labels.weight[tested])),
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        if "not there" not in str(error):
            logs.log.warning("%s: its reports cannot be read (%s)", root, logs.one_line(error))
        return None


def splits_of(labels: Labels, split: Split, sha256: Sequence[str]) -> list[str]:
    """The split of the model in which an image with the same bytes is; empty where there is none.

    Of images that are there twice, the split that the model saw most of: train before val before test.
    """
    known: dict[str, str] = {}
    for name in reversed(manifest.SPLIT_NAMES):
        known |= {labels.sha256[row]: name for row in split.rows(name)}
    return [known.get(name, "") for name in sha256]


def relabelled(known: Labels, seen: Sequence[str], labels: Labels) -> list[Json]:
    """The new images that the model's repository has with another label; `seen`: their splits there."""
    theirs: dict[str, dict[str, str]] = {}  # by SHA-256, an image for each label
    for name, image_id, label in zip(known.sha256, known.image_id, known.label.tolist(), strict=True):
        theirs.setdefault(name, {}).setdefault(known.class_names[label], image_id)
    own = [labels.class_names[label] for label in labels.label.tolist()]
    found = []
    for i, name in enumerate(labels.sha256):
        if name in theirs and own[i] not in theirs[name]:
            label, image_id = next(iter(theirs[name].items()))
            new = {"image_id": labels.image_id[i], "label": own[i], "split": seen[i]}
            found.append(new | {"image_of_model": image_id, "label_of_model": label})
    return found


def unpaired(ours: Json, theirs: Json) -> Json:
    """The difference of a metric on other images, from its intervals, with its own and a p-value.

    The interval is that of Zou & Donner 2008, "Construction of confidence limits about effect measures: a general
    approach", which keeps the asymmetry of both; the p-value is that of a normal with its reach towards zero.
    """
    difference = ours["value"] - theirs["value"]
    below = float(np.hypot(ours["value"] - ours["low"], theirs["high"] - theirs["value"]))
    above = float(np.hypot(ours["high"] - ours["value"], theirs["value"] - theirs["low"]))
    reach = below if difference > 0 else above
    z = abs(difference) / reach * float(special.ndtri((1 + intervals.CONFIDENCE) / 2)) if reach else np.inf
    p_value = float(2 * special.ndtr(-z)) if difference else 1.0
    return asdict(Interval(difference, difference - below, difference + above)) | {"p_value": p_value}


def compare(predictions: Sequence[Predictions], data: Data) -> Json:
    """The second model minus the first on the same images: for each metric the paired difference, interval and test."""
    labels = data.labels
    first, second = (outcomes.of_predictions(one, labels.label) for one in predictions)
    studies = {metric: Study(labels.label, labels.weight, data.unit, metric=metric) for metric in PAIRED}
    return {metric: asdict(paired.compare([second], [first], study)) for metric, study in studies.items()}


def far_away(known: Novelty, distance: np.ndarray, unit: np.ndarray) -> Json:
    """How many of the new images are further from the training images than FAR of the validation images.

    By chance, that number of images like those of validation has a beta-binomial distribution, because the border is
    itself an order statistic of the n validation images. Units, not images, are taken as drawn by chance.
    """
    border = known.validation.numpy()
    n, m, n_units = len(border), len(distance), len(np.unique(unit))
    j = min(int(np.ceil(FAR * (n + 1))), n)  # the border is the j-th smallest
    is_far = distance > border[j - 1]
    chance = stats.betabinom(n_units, n + 1 - j, j)
    low, high = (float(end) * m / n_units for end in chance.interval(intervals.CONFIDENCE))
    share = intervals.interval([influence.mean(is_far, np.ones(m))], [np.arange(m)], unit)
    further = np.searchsorted(border, distance, "left") + np.searchsorted(border, distance, "right")
    return {
        "n_images": m,
        "n_validation": n,
        "border": float(border[j - 1]),
        "n_nearer": j,
        "n_far": int(is_far.sum()),
        "share_far": share and asdict(share),
        "expected": float(chance.mean()) * m / n_units,
        "expected_low": low,
        "expected_high": high,
        "median": float(np.median(distance)),
        "validation_median": float(np.median(border)),
        "further_than_validation": float(further.mean() / (2 * n)),
    }
