"""Outcomes: what metrics need of predictions, for the test images as predicted, for validation cross-fitted.

Validation chooses the epoch and the regularization strength. Judged on the same images, the best of many candidates
looks better than it is. Cross-fitting removes that: the validation units are divided into folds; for each fold the
candidate is chosen on the other folds and judged on this one (Varma & Simon 2006, "Bias in error estimation when using
cross-validation for model selection").
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import log_softmax

from pipeline.training.runs import Candidates, Predictions

N_FOLDS = 5


@dataclass(frozen=True)
class Outcomes:
    """Predictions for some images, with their labels known.

    `rows` (n,) int64: positions in labels.csv; `predicted` (n,): the predicted class; `true_log_probability` (n,)
    float64: of the image's label; `scores` (n, n_classes), or (n, 1) of the second of two classes: what the AUROC
    ranks, within each `fold` (n,); (n, 0) where it is not known. `probability` (n, n_classes); (n, 0) where only the
    above is known.
    """

    rows: np.ndarray
    predicted: np.ndarray
    true_log_probability: np.ndarray
    scores: np.ndarray
    fold: np.ndarray
    probability: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "Outcomes":
        """Those of some images: positions, or bool (n,)."""
        return Outcomes(*(value[chosen] for value in vars(self).values()))


def of_predictions(predictions: Predictions, label: np.ndarray) -> Outcomes:
    """Outcomes of predictions; label (n_images,) is of all images."""
    rows = predictions.rows
    log_probability = log_softmax(predictions.log_probability.astype(np.float64), axis=1)
    true = np.take_along_axis(log_probability, label[rows][:, None], axis=1)[:, 0]
    probability = np.exp(log_probability)
    return Outcomes(
        rows=rows,
        predicted=predictions.log_probability.argmax(axis=1),
        true_log_probability=true,
        scores=probability[:, 1:] if probability.shape[1] == 2 else probability,
        fold=np.zeros(len(rows), np.int64),
        probability=probability,
    )


def of_classes(predicted: np.ndarray, rows: np.ndarray | None = None, fold: np.ndarray | None = None) -> Outcomes:
    """Outcomes of which only the predicted class (n,) is known; by default for the first n images, in one fold."""
    n, unknown = len(predicted), np.zeros((len(predicted), 0))
    rows = np.arange(n) if rows is None else rows
    fold = np.zeros(n, np.int64) if fold is None else fold
    return Outcomes(rows, predicted, np.zeros(n), unknown, fold, unknown)


def cross_fitted(rows: np.ndarray, candidates: Candidates, weight: np.ndarray, unit: np.ndarray) -> Outcomes:
    """Outcomes of the validation images `rows`: each image is predicted by the candidate that the other folds choose.

    The folds' weighted NLL chooses. weight and unit (n_images,) are of all images.
    """
    fold = folds(unit[rows])
    loss = -candidates.true_log_probability.astype(np.float64) * weight[rows]
    loss[~np.isfinite(loss).all(axis=1)] = np.inf  # a candidate that diverged is never chosen
    others = [fold != k if fold.any() else fold == k for k in range(fold.max() + 1)]  # a single unit chooses for itself
    by_fold = np.stack([loss[:, other].sum(axis=1) for other in others])
    best = by_fold.argmin(axis=1)[fold]
    n, unknown = np.arange(len(rows)), np.zeros((len(rows), 0))
    has_scores = candidates.positive_log_probability.shape[1] > 0
    return Outcomes(
        rows=rows,
        predicted=candidates.predicted[best, n],
        true_log_probability=candidates.true_log_probability[best, n].astype(np.float64),
        scores=candidates.positive_log_probability[best, n][:, None] if has_scores else unknown,
        fold=fold,
        probability=unknown,
    )


def pooled(runs: Sequence[Outcomes]) -> Outcomes:
    """The test outcomes of all folds of a partition as those of one run: each image once, in the order of the rows.

    Errors of cross-validation may be pooled so: Bayle, Bayle, Janson & Mackey 2020, "Cross-validation confidence
    intervals for test error". The AUROC, which ranks what one network predicts, stays within folds.
    """
    fold = np.repeat(np.arange(len(runs)), [len(run.rows) for run in runs])
    together = Outcomes(*map(np.concatenate, zip(*(vars(run).values() for run in runs), strict=True)))
    return replace(together, fold=fold)[np.argsort(together.rows, kind="stable")]


def by_unit(outcomes: Outcomes, label: np.ndarray, unit: np.ndarray) -> Outcomes:
    """Outcomes with a vote per unit, whose probabilities are averaged over its images; `rows` are numbers of units.

    Units that unit_labels gives no label are left out. label and unit (n_images,) are of all images.
    """
    rows, index, count = np.unique(unit[outcomes.rows], return_inverse=True, return_counts=True)
    averaged = np.zeros((len(rows), outcomes.probability.shape[1]))
    np.add.at(averaged, index, outcomes.probability)
    log_probability = np.log(np.maximum(averaged / count[:, None], np.finfo(float).tiny))
    own = unit_labels(label, unit)
    votes = own[rows] >= 0
    return of_predictions(Predictions(rows[votes], log_probability[votes]), own)


def unit_labels(label: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """The label (n_units,) int64 that all images of a unit have; -1 where they have several."""
    found = np.zeros(unit.max() + 1, np.int64)
    found[unit] = label
    found[unit[found[unit] != label]] = -1
    return found


def folds(unit: np.ndarray) -> np.ndarray:
    """The fold (n,) int64 of each image: five of nearly as many units each; a fold per unit where there are fewer.

    It depends on the units alone, so that strategies with the same validation images have the same folds.
    """
    _, number = np.unique(unit, return_inverse=True)
    order = np.random.default_rng(0).permutation(number.max() + 1)
    return order[number] % min(N_FOLDS, len(order))
