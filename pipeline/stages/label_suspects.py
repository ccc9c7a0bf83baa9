"""label_suspects: labels that are probably wrong, the most suspicious first.

Reads   data/features.h5, data/labels.csv
Writes  reports/label_suspects.csv

No other stage reads the list, so the labels of test images are used too. The method is confident learning (Northcutt,
Jiang & Chuang 2021, JAIR 70). A linear head that was fitted without the image predicts it. The threshold of a class is
the weighted mean probability that images with its label have for it. An image is confidently of the class whose
threshold it reaches, of the most probable one if it reaches several. The share of confident images with label c that
are confidently of another class estimates the share of wrong labels c. So many images with label c, the least confident
first, are suspects ("prune by class"), except those that are most probably of class c all the same.
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
from pipeline.dataset.units import make_units
from pipeline.features import hdf5
from pipeline.files import digest
from pipeline.network.device import choose_device
from pipeline.params import HeadOptions, SuspectOptions, load_params
from pipeline.training import heads
from pipeline.training.heads import Examples, Selection

REPORT = Path("reports/label_suspects.csv")


@dataclass(frozen=True)
class Suspects:
    """Least confident of its label first: `rows` (n,), the most probable class, the probabilities of both."""

    rows: np.ndarray
    suggested: np.ndarray
    self_confidence: np.ndarray
    suggested_confidence: np.ndarray


def main() -> None:
    """Write the list, and name the classes that are left out."""
    params = load_params()
    options, features, labels = params.label_suspects, hdf5.read_features(), manifest.read_labels()
    if features.sha256 != labels.sha256:
        raise ValueError(f"{hdf5.FEATURES}: other images than in {manifest.LABELS}; run: dvc repro")
    units = make_units(labels)
    n_units = Counter(index for unit in units for index in {*labels.label[unit].tolist()})
    small = [name for index, name in enumerate(labels.class_names) if n_units[index] < options.folds]
    if small:
        logs.log.warning(
            "left out: %s: fewer images than label_suspects.folds (%d), where those that must stay together count "
            "as one",
            ", ".join(small),
            options.folds,
        )
    device = choose_device(params.runtime.device)
    found = find(features.values, labels, units, options, params.threads, device)
    write(found, labels)
    logs.log.info("%d of %d labels are suspects: %s", len(found.rows), len(labels.image_id), REPORT)


def write(found: Suspects, labels: Labels) -> None:
    """Write the list."""
    frame = pd.DataFrame(
        {
            "rank": range(1, len(found.rows) + 1),
            "image_id": [labels.image_id[row] for row in found.rows],
            "label": [labels.class_names[index] for index in labels.label[found.rows]],
            "suggested": [labels.class_names[index] for index in found.suggested],
            "self_confidence": found.self_confidence.round(6),
            "suggested_confidence": found.suggested_confidence.round(6),
            "weight": labels.weight[found.rows],
        }
    )
    manifest.write_csv(REPORT, frame)


def find(
    features: np.ndarray,
    labels: Labels,
    units: list[list[int]],
    options: SuspectOptions,
    threads: int,
    device: torch.device,
) -> Suspects:
    """Suspects among the images of those classes that `deal` keeps; `features` (n, n_views, *shape)."""
    fold = deal(labels, units, options)
    rows, n_classes = np.flatnonzero(fold >= 0), len(labels.class_names)
    label, weight = labels.label[rows], labels.weight[rows]
    if len(set(label.tolist())) < 2:
        return Suspects(*np.zeros((2, 0), np.int64), *np.zeros((2, 0)))
    probability = predict_out_of_fold(features, rows, label, weight, n_classes, fold[rows], options, threads, device)
    found = rank(probability, label, weight)
    return Suspects(rows[found.rows], found.suggested, found.self_confidence, found.suggested_confidence)


def deal(labels: Labels, units: list[list[int]], options: SuspectOptions) -> np.ndarray:
    """The fold of each image (n,) int64; -1 for a class whose images are in fewer units than there are folds.

    Stratified: a class's units, large ones first, go each to the fold that has fewest of its images. The order of the
    images does not matter.
    """
    n_units = Counter(index for unit in units for index in {*labels.label[unit].tolist()})
    strata = defaultdict(list)
    for unit in units:
        kept = [row for row in unit if n_units[labels.label[row].item()] >= options.folds]
        if kept:
            counts = Counter(labels.label[kept].tolist())
            name = min(labels.image_id[row] for row in kept)
            order = -len(kept), digest([options.seed, name])
            strata[max(sorted(counts), key=counts.__getitem__)].append((order, kept))
    fold, in_all = np.full(len(labels.image_id), -1), np.zeros(options.folds, np.int64)
    for index in sorted(strata):
        in_class = np.zeros(options.folds, np.int64)
        for _, kept in sorted(strata[index]):
            chosen = np.lexsort((in_all, in_class))[0]
            fold[kept] = chosen
            in_class[chosen] += len(kept)
            in_all[chosen] += len(kept)
    return fold


def predict_out_of_fold(
    features: np.ndarray,
    rows: np.ndarray,
    label: np.ndarray,
    weight: np.ndarray,
    n_classes: int,
    fold: np.ndarray,
    options: SuspectOptions,
    threads: int,
    device: torch.device,
) -> np.ndarray:
    """Probability (n, n_classes) float32 of the images `rows`, over all views; 0 of a class that none of them has.

    The fold behind the one that is predicted chooses the penalty, the others are fitted. Maps are flattened.
    """
    vectors = features.reshape(*features.shape[:2], -1)  # nothing is read yet
    classes, index = np.unique(label, return_inverse=True)
    views, how = features.shape[1], _linear(options)
    probability = np.zeros((len(rows), n_classes), np.float32)
    for held_out in range(options.folds):
        is_held_out, chooses = fold == held_out, fold == (held_out + 1) % options.folds
        train, val = (
            Examples(Selection(vectors, rows[part]), index[part], weight[part])
            for part in (~is_held_out & ~chooses, chooses)
        )
        torch.set_num_threads(threads)
        torch.manual_seed(options.seed)
        head = heads.build(vectors.shape[2:], len(classes), how, nn.Identity()).to(device)
        fitted = heads.fit(head, train, val, views, how)
        predicted = heads.predict(fitted.head, Selection(vectors, rows[is_held_out]), views)
        probability[np.ix_(is_held_out, classes)] = np.exp(predicted)
    return probability


def rank(probability: np.ndarray, label: np.ndarray, weight: np.ndarray) -> Suspects:
    """Suspects by probabilities (n, n_classes) of images that had no part in them."""
    n_images, n_classes = probability.shape
    given, likely = probability[np.arange(n_images), label].astype(np.float64), probability.argmax(1)
    total, count = np.bincount(label, weight, n_classes), np.bincount(label, minlength=n_classes)
    threshold = np.full(n_classes, np.inf)  # of a class that no image has
    np.divide(np.bincount(label, weight * given, n_classes), total, out=threshold, where=total > 0)
    confident = np.where(probability >= threshold, probability, -1)
    is_confident, of = confident.max(1) >= 0, confident.argmax(1)
    n_confident = np.bincount(label[is_confident], minlength=n_classes)
    n_of_others = np.bincount(label[is_confident & (of != label)], minlength=n_classes)
    n_wrong = np.round(count * n_of_others / np.maximum(n_confident, 1))

    order = np.lexsort((given, label))  # class by class, the least confident first
    place = np.arange(n_images) - (np.cumsum(count) - count)[label[order]]
    rows = order[(place < n_wrong[label[order]]) & (likely[order] != label[order])]
    rows = rows[np.argsort(given[rows], kind="stable")]
    return Suspects(rows, likely[rows], given[rows], probability[rows, likely[rows]].astype(np.float64))


def _linear(options: SuspectOptions) -> HeadOptions:
    return HeadOptions(
        kind="linear",
        hidden=(),
        dropout=0.0,
        standardize=True,
        penalty="l2",
        l1_ratio=0.0,
        class_weights="none",  # every class has a threshold of its own
        regularization_strengths=options.regularization_strengths,
        max_iterations=options.max_iterations,
        learning_rate=1.0,  # of this and of the next two a linear head uses none
        epochs=1,
        batch_size=1,
    )


if __name__ == "__main__":
    logs.run(main)
