"""label_suspects: labels that are probably wrong, the most suspicious first.

Reads   data/features.h5, data/labels.csv
Writes  reports/label_suspects.csv, and .json: how good the heads are, and a caution where they are poor

No other stage reads the list, so the labels of test images are used too. The method is confident learning (Northcutt,
Jiang & Chuang 2021, JAIR 70). Each image is predicted by a linear head that was fitted without it. The threshold of a
class is the weighted mean of the probabilities that images with its label have for it. An image is confidently of a
class whose threshold it reaches; if there are several, of the most probable one. The share of wrong labels c is
estimated as the share of the confident images with label c that are confidently of another class. So many images with
label c are suspects, the least confident first ("prune by class"), except those whose most probable class is c.

Heads that know little call many right labels wrong. A caution says so where they avoid less than half of the errors
that are made by naming the largest class always.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from pipeline import logs
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Labels
from pipeline.dataset.units import count_units, make_units
from pipeline.features import hdf5
from pipeline.features.hdf5 import Features
from pipeline.files import digest, write_json
from pipeline.network.device import choose_device
from pipeline.params import HeadOptions, SuspectOptions, load_params
from pipeline.training import heads
from pipeline.training.heads import Examples, Selection

REPORT = Path("reports/label_suspects.csv")
LEAST_AVOIDED = 0.5  # share of the errors of naming the largest class always; below it the heads are called poor


@dataclass(frozen=True)
class Suspects:
    """The suspects, the least confident first, and how good the heads are on images that they were fitted without.

    `rows` (n,) int64: their images; `probability` (n, n_classes) float32: what these heads predict for them.
    `accuracy`, and `largest_class`, the share of the largest class, are weighted by image; both 0 without heads.
    """

    rows: np.ndarray
    probability: np.ndarray
    accuracy: float = 0.0
    largest_class: float = 0.0

    @property
    def caution(self) -> str | None:
        """What to keep in mind where the heads are poor; None where they are good, or there are none."""
        if 1 - self.accuracy <= (1 - LEAST_AVOIDED) * (1 - self.largest_class) or not self.largest_class:
            return None
        return (
            f"the heads that find suspects are right for {100 * self.accuracy:.1f} % of the images, and naming the "
            f"largest class always for {100 * self.largest_class:.1f} %: many suspects may be labelled correctly"
        )


def main() -> None:
    """Write the list, and name the classes that are too small."""
    params = load_params()
    options, features, labels = params.label_suspects, hdf5.read_features(), manifest.read_labels()
    if features.sha256 != labels.sha256:
        raise ValueError(f"{hdf5.FEATURES}: other images than in {manifest.LABELS}; run: dvc repro")
    units = make_units(labels)
    n_units = count_units(labels, units)
    small = [name for index, name in enumerate(labels.class_names) if n_units[index] < options.folds]
    if small:
        reason = (
            f"fewer images than label_suspects.folds ({options.folds}); images that must stay together count as one"
        )
        logs.log.warning("left out: %s: %s", ", ".join(small), reason)
    torch.set_num_threads(params.threads)
    found = find(features, labels, units, options, choose_device(params.runtime.device))
    write(found, labels)
    quality = {"accuracy": found.accuracy, "largest_class": found.largest_class, "caution": found.caution}
    write_json(REPORT.with_suffix(".json"), quality)
    if found.caution:
        logs.log.warning("caution: %s", found.caution)
    logs.log.info("%d of %d labels are suspects: %s", len(found.rows), len(labels.image_id), REPORT)


def write(found: Suspects, labels: Labels) -> None:
    """Write reports/label_suspects.csv."""
    n, label, suggested = np.arange(len(found.rows)), labels.label[found.rows], found.probability.argmax(1)
    probability = found.probability.astype(np.float64).round(6)
    frame = pd.DataFrame(
        {
            "rank": n + 1,
            "image_id": [labels.image_id[row] for row in found.rows],
            "label": [labels.class_names[index] for index in label],
            "suggested": [labels.class_names[index] for index in suggested],
            "self_confidence": probability[n, label],
            "suggested_confidence": probability[n, suggested],
            "weight": labels.weight[found.rows],
        }
    )
    manifest.write_csv(REPORT, frame)


def find(
    features: Features, labels: Labels, units: list[list[int]], options: SuspectOptions, device: torch.device
) -> Suspects:
    """Find suspects in the classes that `assign_folds` keeps."""
    fold = assign_folds(labels, units, options)
    rows = np.flatnonzero(fold >= 0)
    label, weight = labels.label[rows], labels.weight[rows]
    if len(set(label.tolist())) < 2:
        return Suspects(rows[:0], np.zeros((0, len(labels.class_names)), np.float32))
    probability = predict_out_of_fold(features, labels, fold, options, device)
    accuracy = np.average(probability.argmax(1) == label, weights=weight)
    largest_class, found = np.bincount(label, weight).max() / weight.sum(), rank(probability, label, weight)
    return Suspects(rows[found], probability[found], round(float(accuracy), 6), round(float(largest_class), 6))


def assign_folds(labels: Labels, units: list[list[int]], options: SuspectOptions) -> np.ndarray:
    """The fold of each image (n,) int64; -1 for a class whose images are in fewer units than there are folds.

    Folds are stratified: each unit of a class, the largest first, goes to the fold with fewest images of the class.
    The order of the images does not matter.
    """
    n_units = count_units(labels, units)
    strata = defaultdict(list)
    for unit in units:
        kept = [row for row in unit if n_units[labels.label[row].item()] >= options.folds]
        if kept:
            counts = Counter(labels.label[kept].tolist())
            name = min(labels.image_id[row] for row in kept)
            order = -len(kept), digest([options.seed, name])
            strata[max(sorted(counts), key=counts.__getitem__)].append((order, kept))
    fold, n_in_all = np.full(len(labels.image_id), -1), np.zeros(options.folds, np.int64)
    for index in sorted(strata):
        n_in_class = np.zeros(options.folds, np.int64)
        for _, kept in sorted(strata[index]):
            smallest = np.lexsort((n_in_all, n_in_class))[0]
            fold[kept] = smallest
            n_in_class[smallest] += len(kept)
            n_in_all[smallest] += len(kept)
    return fold


def predict_out_of_fold(
    features: Features, labels: Labels, fold: np.ndarray, options: SuspectOptions, device: torch.device
) -> np.ndarray:
    """Probabilities (n, n_classes) float32 of the n images that have a fold; 0 for a class that none of them has.

    The fold after the predicted one selects the regularization strength, the heads are fitted on the others. Heads are
    fitted on all training views, and select and predict with the evaluation views; feature maps are flattened.
    """
    # Not read yet
    training, evaluation = (array.reshape(*array.shape[:2], -1) for array in (features.values, features.evaluation))
    rows = np.flatnonzero(fold >= 0)
    classes, label = np.unique(labels.label[rows], return_inverse=True)
    fold, weight, head_options = fold[rows], labels.weight[rows], _linear(options)
    probability, paths = np.zeros((len(rows), len(labels.class_names)), np.float32), []
    for held_out in range(options.folds):
        is_held_out, is_val = fold == held_out, fold == (held_out + 1) % options.folds
        train, val = (
            Examples(Selection(vectors, rows[chosen]), label[chosen], weight[chosen])
            for vectors, chosen in ((training, ~is_held_out & ~is_val), (evaluation, is_val))
        )
        torch.manual_seed(options.seed)
        head = heads.build(training.shape[2:], len(classes), head_options, nn.Identity()).to(device)
        fitted = heads.fit(head, train, val, head_options)
        predicted = heads.predict(fitted.head, Selection(evaluation, rows[is_held_out]))
        probability[np.ix_(is_held_out, classes)] = np.exp(predicted)
        paths.append(fitted.path)
    heads.warn(paths, "label_suspects")
    return probability


def rank(probability: np.ndarray, label: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Which of n images are suspects, the least confident first, int64.

    By the probabilities (n, n_classes) of heads that were fitted without the image.
    """
    n_images, n_classes = probability.shape
    given, likely = probability[np.arange(n_images), label].astype(np.float64), probability.argmax(1)
    total, count = np.bincount(label, weight, n_classes), np.bincount(label, minlength=n_classes)
    threshold = np.full(n_classes, np.inf)  # stays so for a class without images
    np.divide(np.bincount(label, weight * given, n_classes), total, out=threshold, where=total > 0)
    confident = np.where(probability >= threshold, probability, -1)
    is_confident, confident_class = confident.max(1) >= 0, confident.argmax(1)
    n_confident = np.bincount(label[is_confident], minlength=n_classes)
    n_of_others = np.bincount(label[is_confident & (confident_class != label)], minlength=n_classes)
    n_wrong = np.round(count * n_of_others / np.maximum(n_confident, 1))

    order = np.lexsort((given, label))  # class by class, the least confident first
    place = np.arange(n_images) - (np.cumsum(count) - count)[label[order]]
    rows = order[(place < n_wrong[label[order]]) & (likely[order] != label[order])]
    return rows[np.argsort(given[rows], kind="stable")]


def _linear(options: SuspectOptions) -> HeadOptions:
    return HeadOptions(
        kind="linear",
        hidden=(),
        dropout=0.0,
        standardize=True,
        penalty="l2",
        l1_ratio=0.0,
        class_weights="none",  # not needed: every class has its own threshold
        regularization_strengths=options.regularization_strengths,
        max_iterations=options.max_iterations,
        learning_rate=1.0,  # a linear head uses neither this nor the next two
        epochs=1,
        batch_size=1,
    )


if __name__ == "__main__":
    logs.run(main, memory=("features.views", "features.image_size"))
