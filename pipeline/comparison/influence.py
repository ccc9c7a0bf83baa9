"""Every metric that is a smooth function of the images' weights, and the influence of each image on it.

Log-probabilities (n, n_classes), label (n,) int, weight (n,) above 0. The influence of an image is its weight times the
derivative of the metric with respect to that weight (infinitesimal jackknife: Jaeckel 1972, Bell Laboratories
memorandum 72-1215-11; Efron 1982, "The jackknife, the bootstrap and other resampling plans"). The sum of the squared
influences is the variance of the metric.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

TOP_5_ABOVE = 10  # classes: with fewer, the top-5 accuracy says little


@dataclass(frozen=True)
class Influence:
    """A metric between 0 and `top`: its value, and the influence and the share of each image (n,).

    `influence` contains the correction n / (n - 1) for estimating the mean, or the mean of a class. `share` is the
    fraction of the metric that an image contributes: shares sum to 1 (to less where a class is absent).
    """

    value: float
    influence: np.ndarray
    share: np.ndarray
    top: float = 1.0


def linearise(log_probability: np.ndarray, label: np.ndarray, weight: np.ndarray) -> dict[str, Influence | None]:
    """All metrics of metrics.score but `ece`; None where a metric is undefined. Also takes logits."""
    n_classes = log_probability.shape[1]
    predicted = log_probability.argmax(axis=1)
    normalized = log_softmax(log_probability.astype(np.float64), axis=1)
    true_log_probability = np.take_along_axis(normalized, label[:, None], axis=1)[:, 0]
    probability = np.exp(normalized, out=normalized)
    squared_error = (probability**2).sum(axis=1) - 2 * np.exp(true_log_probability) + 1
    found = {
        "accuracy": mean(predicted == label, weight),
        "balanced_accuracy": _balanced_accuracy(predicted, label, weight, n_classes),
        "macro_f1": _macro_f1(predicted, label, weight, n_classes),
        "auroc": _auroc(probability, label, weight),
        "nll": mean(-true_log_probability, weight, np.inf),
        "brier": mean(squared_error / 2, weight) if n_classes == 2 else mean(squared_error, weight, 2.0),
    }
    if n_classes > TOP_5_ABOVE:
        found["top5_accuracy"] = mean(is_among_top(log_probability, label, 5), weight)
    return found


def is_among_top(score: np.ndarray, label: np.ndarray, k: int) -> np.ndarray:
    """Whether each label (n,) has one of the k largest scores (n, n_classes); ties go to the lower class."""
    own = np.take_along_axis(score, label[:, None], axis=1)
    is_before = np.arange(score.shape[1]) < label[:, None]
    return ((score > own) | ((score == own) & is_before)).sum(axis=1) < k


def mean(value: np.ndarray, weight: np.ndarray, top: float = 1.0, bottom: float = 0.0) -> Influence:
    """The weighted mean of value (n,), each between `bottom` and `top`."""
    share = weight / weight.sum()
    average = float(share @ value)
    correction = np.sqrt(len(value) / max(len(value) - 1, 1))
    return Influence(min(max(average, bottom), top), correction * share * (value - average), share, top)


def placements(score: np.ndarray, is_positive: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
    """AUROC, and the placement (n,) of each image: the share of the other class's weight that it ranks correctly.

    Ties count half. The placements of the positives average to the AUROC, and so do those of the negatives (DeLong et
    al. 1988, "Comparing the areas under two or more correlated receiver operating characteristic curves").
    """
    distinct, at = np.unique(score, return_inverse=True)
    positive = np.bincount(at, weight * is_positive, len(distinct))
    negative = np.bincount(at, weight * ~is_positive, len(distinct))
    negative_below = (np.cumsum(negative) - negative / 2) / negative.sum()
    positive_above = 1 - (np.cumsum(positive) - positive / 2) / positive.sum()
    area = float(positive @ negative_below / positive.sum())
    return area, np.where(is_positive, negative_below[at], positive_above[at])


def _auroc(probability: np.ndarray, label: np.ndarray, weight: np.ndarray) -> Influence | None:
    """One class against the rest, macro average."""
    n, n_classes = probability.shape
    size = np.bincount(label, minlength=n_classes)
    if (size == 0).any() or n_classes < 2:
        return None
    columns = [1] if n_classes == 2 else list(range(n_classes))
    value, influence, shares = 0.0, np.zeros(n), np.zeros(n)
    for column in columns:
        is_positive = label == column
        area, placement = placements(probability[:, column], is_positive, weight)
        n_own = np.where(is_positive, size[column], n - size[column])
        positive = weight @ is_positive
        share = weight / np.where(is_positive, positive, weight.sum() - positive)
        value += area / len(columns)
        influence += _correction(n_own) * share * (placement - area) / len(columns)
        shares += share / 2 / len(columns)  # a pair belongs to both of its images
    return Influence(min(max(value, 0.0), 1.0), influence, shares)


def _balanced_accuracy(predicted: np.ndarray, label: np.ndarray, weight: np.ndarray, n_classes: int) -> Influence:
    is_correct, size = predicted == label, np.bincount(label, minlength=n_classes)
    actual = np.bincount(label, weight, n_classes)
    recall = _ratio(np.bincount(label, weight * is_correct, n_classes), actual)
    share = weight / actual[label] / np.count_nonzero(size)
    value = min(float(recall.sum() / np.count_nonzero(size)), 1.0)
    # A class with a single image says nothing of its variance: the image is compared with all classes (collapsed
    # strata, Cochran 1977, "Sampling techniques")
    centre = np.where(size == 1, value, recall)
    return Influence(value, _correction(size)[label] * share * (is_correct - centre[label]), share)


def _macro_f1(predicted: np.ndarray, label: np.ndarray, weight: np.ndarray, n_classes: int) -> Influence:
    is_correct, size = predicted == label, np.bincount(label, minlength=n_classes)
    actual = np.bincount(label, weight, n_classes)
    either = actual + np.bincount(predicted, weight, n_classes)
    f1 = _ratio(2 * np.bincount(label, weight * is_correct, n_classes), either)
    share = weight / actual[label] / n_classes
    value = min(float(f1.mean()), 1.0)
    moved = (2 * is_correct - f1[label]) / either[label] - f1[predicted] / either[predicted]
    alone = np.where(size[label] == 1, share * (is_correct - value), 0.0)
    return Influence(value, _correction(size)[label] * weight * moved / n_classes + alone, share)


def _correction(size: np.ndarray) -> np.ndarray:
    return np.sqrt(size / np.maximum(size - 1, 1))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)
