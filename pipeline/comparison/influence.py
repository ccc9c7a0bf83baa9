"""Every metric that is a smooth function of the images' weights, and the influence of each image on it.

label (n,) int, weight (n,) above 0 and unit (n,) are those of the outcomes' images. The influence of an image is its
weight times the derivative of the metric with respect to that weight (infinitesimal jackknife: Jaeckel 1972, Bell
Laboratories memorandum 72-1215-11; Efron 1982, "The jackknife, the bootstrap and other resampling plans"). Summed over
units and squared, influences add up to the variance of the metric.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.comparison.outcomes import Outcomes

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll")  # of which one may decide: compare.metric
TOP_5_ABOVE = 10  # classes: with fewer, the top-5 accuracy says little


@dataclass(frozen=True)
class Influence:
    """A metric between 0 and `top`: its value, and the influence and the share of each image (n,).

    `share` is the fraction of the metric that an image contributes: shares sum to 1 (to less where a class is absent).
    `extra_variance` is that of pseudo-units, which keep a class with few units, or with none that is wrong, from
    looking certain.
    """

    value: float
    influence: np.ndarray
    share: np.ndarray
    top: float = 1.0
    extra_variance: float = 0.0


def linearise(
    outcomes: Outcomes, label: np.ndarray, weight: np.ndarray, unit: np.ndarray, n_classes: int
) -> dict[str, Influence | None]:
    """All metrics of metrics.score but `ece`, as far as the outcomes allow; None where a metric is undefined."""
    found = {name: of(name, outcomes, label, weight, unit, n_classes) for name in METRICS}
    probability = outcomes.probability
    if probability.shape[1]:
        squared_error = (probability**2).sum(axis=1) - 2 * np.exp(outcomes.true_log_probability) + 1
        found["brier"] = mean(squared_error / 2, weight) if n_classes == 2 else mean(squared_error, weight, 2.0)
        if n_classes > TOP_5_ABOVE:
            found["top5_accuracy"] = mean(is_among_top(probability, label, 5), weight)
    return found


def of(
    metric: str, outcomes: Outcomes, label: np.ndarray, weight: np.ndarray, unit: np.ndarray, n_classes: int
) -> Influence | None:
    """One of METRICS; None where it is undefined."""
    predicted = outcomes.predicted
    match metric:
        case "accuracy":
            return mean(predicted == label, weight)
        case "nll":
            return mean(-outcomes.true_log_probability, weight, np.inf)
        case "auroc":
            return _auroc(outcomes.scores, label, weight, outcomes.fold, n_classes)
    by_class = {"balanced_accuracy": _balanced_accuracy, "macro_f1": _macro_f1}[metric]
    return by_class(predicted, label, weight, _unit_weight(label, weight, unit, n_classes))


def is_among_top(score: np.ndarray, label: np.ndarray, k: int) -> np.ndarray:
    """Whether each label (n,) has one of the k largest scores (n, n_classes); ties go to the lower class."""
    own = np.take_along_axis(score, label[:, None], axis=1)
    is_before = np.arange(score.shape[1]) < label[:, None]
    return ((score > own) | ((score == own) & is_before)).sum(axis=1) < k


def mean(value: np.ndarray, weight: np.ndarray, top: float = 1.0) -> Influence:
    """The weighted mean of value (n,), each between 0 and `top`."""
    share = weight / weight.sum()
    average = float(share @ value)
    return Influence(min(max(average, 0.0), top), share * (value - average), share, top)


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


def _auroc(
    scores: np.ndarray, label: np.ndarray, weight: np.ndarray, fold: np.ndarray, n_classes: int
) -> Influence | None:
    """One class against the rest, macro average, within the folds that hold all classes; None where no fold does."""
    inside = [np.flatnonzero(fold == k) for k in np.unique(fold)]
    inside = [own for own in inside if len(np.unique(label[own])) == n_classes]
    if not scores.shape[1] or not inside:
        return None
    total = sum(float(weight[own].sum()) for own in inside)
    value, influence, shares = 0.0, np.zeros(len(label)), np.zeros(len(label))
    for column, score in enumerate(scores.T, n_classes - scores.shape[1]):
        is_positive, area, placement, share = label == column, 0.0, np.zeros(len(label)), np.zeros(len(label))
        for own in inside:
            part = float(weight[own].sum()) / total / scores.shape[1]
            of_fold, placement[own] = placements(score[own], is_positive[own], weight[own])
            area += part * of_fold
            totals = np.bincount(is_positive[own], weight[own])  # of the negatives and of the positives
            share[own] = part * weight[own] / totals[is_positive[own].astype(int)]
        n_own = np.where(is_positive, is_positive.sum(), (~is_positive).sum())
        # Not around the area of the fold, in which a class may have one image
        around = placement - area * scores.shape[1]
        influence += np.sqrt(n_own / np.maximum(n_own - 1, 1)) * share * around
        shares += share / 2  # a pair belongs to both of its images
        value += area
    return Influence(min(max(value, 0.0), 1.0), influence, shares)


def _balanced_accuracy(predicted: np.ndarray, label: np.ndarray, weight: np.ndarray, pseudo: np.ndarray) -> Influence:
    """The mean recall of the classes that occur; its variance with two pseudo-units per class, one of them correct."""
    is_correct, n_classes = predicted == label, len(pseudo)
    actual, correct = np.bincount(label, weight, n_classes), np.bincount(label, weight * is_correct, n_classes)
    k, actual_with = np.count_nonzero(actual), actual + 2 * pseudo
    value = min(float(_ratio(correct, actual).sum() / k), 1.0)
    recall_with = _ratio(correct + pseudo, actual_with)
    moved = (is_correct - recall_with[label]) * weight / actual_with[label] / k
    extra = (_ratio(pseudo, actual_with) / k) ** 2 * ((1 - recall_with) ** 2 + recall_with**2)
    return _with_pseudo(value, moved, extra, _ratio(actual_with, actual), weight / actual[label] / k, label)


def _macro_f1(predicted: np.ndarray, label: np.ndarray, weight: np.ndarray, pseudo: np.ndarray) -> Influence:
    """The mean F1 of all classes; its variance with two pseudo-units per class, one of them predicted as another."""
    is_correct, n_classes = predicted == label, len(pseudo)
    actual, correct = np.bincount(label, weight, n_classes), np.bincount(label, weight * is_correct, n_classes)
    either = actual + np.bincount(predicted, weight, n_classes)
    value = min(float(_ratio(2 * correct, either).mean()), 1.0)
    either_with = either + 3 * pseudo + (pseudo.sum() - pseudo) / max(n_classes - 1, 1)  # errors of the other classes
    f1_with = _ratio(2 * (correct + pseudo), either_with)
    gain, loss = _ratio(np.full(n_classes, 2.0), either_with), _ratio(f1_with, either_with)
    moved = (gain[label] * is_correct - loss[label] - loss[predicted]) * weight / n_classes
    wrong = np.where(np.eye(n_classes, dtype=bool), 0, loss[:, None] + loss)
    extra = (pseudo / n_classes) ** 2 * ((gain - 2 * loss) ** 2 + (wrong**2).sum(axis=1) / max(n_classes - 1, 1))
    times = _ratio(actual + 2 * pseudo, actual)
    return _with_pseudo(value, moved, extra, times, weight / actual[label] / n_classes, label)


def _with_pseudo(
    value: float, influence: np.ndarray, extra: np.ndarray, times: np.ndarray, share: np.ndarray, label: np.ndarray
) -> Influence:
    """From influences among images and pseudo-units, which have the variance `extra` by class.

    The variance of a class is made `times` larger: to that of its images alone, which would else look like more.
    """
    return Influence(value, influence * np.sqrt(times[label]), share, 1.0, float(extra @ times))


def _unit_weight(label: np.ndarray, weight: np.ndarray, unit: np.ndarray, n_classes: int) -> np.ndarray:
    """The mean weight (n_classes,) of a unit's images of each class, over the units that have any."""
    span = unit.max() + 1
    n_units = np.bincount(np.unique(label * span + unit) // span, minlength=n_classes)
    return _ratio(np.bincount(label, weight, n_classes), n_units)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)
