"""Probes of frozen features: linear heads and nearest neighbours, every image predicted by a head fitted without it.

A linear head is a ridge regression on the one-hot labels, as in few-shot evaluations (Dosovitskiy et al. 2021, "An
image is worth 16x16 words", section 4.1): all regularization strengths share one Gram matrix. Units never straddle
folds. The strength of a fold is chosen by the hits on the other folds (cross-fitting, as in comparison/outcomes.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from pipeline.comparison import influence, intervals, paired
from pipeline.comparison.intervals import Interval
from pipeline.comparison.outcomes import of_classes
from pipeline.comparison.paired import Difference, Study


@dataclass(frozen=True)
class Sample:
    """The images that are probed: label (n,) from 0 to n_classes - 1, weight (n,) above 0, unit (n,) from 0 on."""

    label: np.ndarray
    weight: np.ndarray
    unit: np.ndarray
    n_classes: int

    def interval(self, hits: np.ndarray) -> Interval:
        """The weighted mean of hits (n,), 0 to 1 each, and its 95 % interval over units."""
        found = intervals.interval([influence.mean(hits, self.weight)], [np.arange(len(self.label))], self.unit)
        assert found is not None  # as there is a value
        return found

    def difference(self, predicted: np.ndarray, other: np.ndarray) -> Difference:
        """The accuracy of predicted classes (n,) minus that of others, by image, with its interval over units."""
        return paired.compare([of_classes(predicted)], [of_classes(other)], Study(self.label, self.weight, self.unit))


def assign_folds(sample: Sample, n_folds: int) -> np.ndarray:
    """The fold (n,) int64 of each image: units stay whole, and those of a class are spread evenly over the folds."""
    n_units = int(sample.unit.max()) + 1
    counts = np.zeros((n_units, sample.n_classes), np.int64)
    np.add.at(counts, (sample.unit, sample.label), 1)
    order = np.random.default_rng(0).permutation(n_units)
    order = order[np.argsort(counts.argmax(1)[order], kind="stable")]
    fold = np.empty(n_units, np.int64)
    fold[order] = np.arange(n_units) % min(n_folds, n_units)
    return fold[sample.unit]


def outside(fold: np.ndarray) -> list[np.ndarray]:
    """For each fold, the positions of the images of the other folds."""
    return [np.flatnonzero(fold != k) for k in range(fold.max() + 1)]


def standardize(x: np.ndarray) -> np.ndarray:
    """Features (n, d) as float32, shifted and scaled by their mean and deviation, with a floor as in training/heads."""
    x = x.astype(np.float64)
    deviation = x.std(axis=0)
    scaled = (x - x.mean(axis=0)) / np.maximum(deviation, np.median(deviation) or deviation.max() or 1.0)
    return scaled.astype(np.float32)


def predict_linear(
    x: np.ndarray, sample: Sample, fold: np.ndarray, training: Sequence[np.ndarray], strengths: Sequence[float]
) -> np.ndarray:
    """Predicted classes (n_strengths, n) of features (n, d); the images of fold k by heads fitted on training[k]."""
    predicted, one_hot = np.zeros((len(strengths), len(x)), np.int64), np.eye(sample.n_classes, dtype=x.dtype)
    for k, rows in enumerate(training):
        is_held_out = fold == k
        label = sample.label[rows]
        fits = fit_ridge(x[rows], one_hot[label], sample.weight[rows], strengths)
        absent = np.bincount(label, minlength=sample.n_classes) == 0
        for s, (weights, offset) in enumerate(fits):
            scores = x[is_held_out] @ weights + offset
            scores[:, absent] = -np.inf
            predicted[s, is_held_out] = scores.argmax(1)
    return predicted


def fit_ridge(
    x: np.ndarray, target: np.ndarray, weight: np.ndarray, strengths: Sequence[float]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each strength the weights W (d, k) and offset b (k,) that minimise, with weights w_i that sum to 1,

        sum_i w_i |target_i - W' x_i - b|^2 + strength * s * |W|^2

    of x (n, d) and target (n, k); s is the mean variance of a feature. Of the two equal solutions, (X'X + e)^-1 X'y
    and X'(XX' + e)^-1 y, the one with the smaller matrix is computed.
    """
    share = (weight / weight.sum()).astype(x.dtype)
    centre, middle, root = share @ x, share @ target, np.sqrt(share)[:, None]
    x, y = root * (x - centre), root * (target - middle)
    is_dual = len(x) < x.shape[1]
    gram, right = (x @ x.T, y) if is_dual else (x.T @ x, x.T @ y)
    scale, found = float(np.trace(gram)) / x.shape[1] or 1.0, []
    for strength in strengths:
        penalty = (strength * scale * np.eye(len(gram))).astype(x.dtype)
        solved = cho_solve(cho_factor(gram + penalty, overwrite_a=True, check_finite=False), right, check_finite=False)
        weights = x.T @ solved if is_dual else solved
        found.append((weights, middle - centre @ weights))
    return found


def choose(hits: np.ndarray, fold: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Which of the strengths (n,) each image is judged with, by hits (n_strengths, n) on the other folds' images.

    Of equal ones the first.
    """
    by_fold = np.stack([(hits * weight) @ (fold != k) for k in range(fold.max() + 1)])
    return by_fold.round(9).argmax(1)[fold]


def linear(x: np.ndarray, sample: Sample, fold: np.ndarray, strengths: Sequence[float]) -> np.ndarray:
    """The class (n,) that linear heads on features (n, d) predict for each image, cross-fitted."""
    predicted = predict_linear(x, sample, fold, outside(fold), strengths)
    return predicted[choose(predicted == sample.label, fold, sample.weight), np.arange(len(x))]


def nearest(x: np.ndarray, sample: Sample, fold: np.ndarray, k: int) -> np.ndarray:
    """The class (n,) that most of the k nearest images of other folds have, by weight; of equal ones the first."""
    predicted = np.zeros(len(x), np.int64)
    for number, rows in enumerate(outside(fold)):
        held_out = np.flatnonzero(fold == number)
        distance = (x[rows] ** 2).sum(1) - 2 * x[held_out] @ x[rows].T  # without what is the same for all
        near = rows[np.argpartition(distance, min(k, len(rows)) - 1, axis=1)[:, :k]]
        votes = np.zeros((len(held_out), sample.n_classes))
        np.add.at(votes, (np.arange(len(held_out))[:, None], sample.label[near]), sample.weight[near])
        predicted[held_out] = votes.argmax(1)
    return predicted
