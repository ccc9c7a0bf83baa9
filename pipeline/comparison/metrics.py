"""Metrics of predictions: fractions, never percent, weighted by the images' weights.

Everywhere label (n,) int and weight (n,) above 0.
"""

from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from pipeline.comparison import influence
from pipeline.comparison.outcomes import Outcomes

N_BINS = 15  # of confidence


def score(outcomes: Outcomes, label: np.ndarray, weight: np.ndarray, n_classes: int) -> dict[str, float | None]:
    """Metrics of one run, as scikit-learn defines them.

    `balanced_accuracy` is the mean recall of the classes that occur. `auroc` of more than two classes is the macro
    average of one class against the rest, and None where a class does not occur. `brier` of two classes is the squared
    error of the second, of more classes the sum over classes. `nll` is in nats. `top5_accuracy` exists above 10
    classes. Of cross-fitted outcomes there are no `brier`, `ece` and `top5_accuracy`.
    """
    smooth = influence.linearise(outcomes, label, weight, np.arange(len(label)), n_classes)
    found = {name: metric and metric.value for name, metric in smooth.items()}
    if outcomes.probability.shape[1]:
        found["ece"] = expected_calibration_error(outcomes.probability, label, weight)
    return found


def per_class(predicted: np.ndarray, label: np.ndarray, weight: np.ndarray, n_classes: int) -> dict[str, np.ndarray]:
    """`precision`, `recall`, `f1` (n_classes,), 0 where undefined, and `support`, the number of images."""
    classes = np.arange(n_classes)
    options: dict[str, Any] = {"labels": classes, "sample_weight": weight, "zero_division": 0.0}
    figures = precision_recall_fscore_support(label, predicted, **options)
    precision, recall, f1, _ = map(np.asarray, figures)
    support = np.bincount(label, minlength=len(classes))
    return {"precision": precision, "recall": recall, "f1": f1, "support": support}


def confusion(predicted: np.ndarray, label: np.ndarray, n_classes: int) -> np.ndarray:
    """Numbers of images (n_classes, n_classes): rows are the actual class, columns the predicted one."""
    return confusion_matrix(label, predicted, labels=np.arange(n_classes))


def reliability(probability: np.ndarray, label: np.ndarray, weight: np.ndarray) -> list[dict[str, float | None]]:
    """Mean confidence and accuracy of the top label in 15 equal-width bins, and each bin's share of the weight.

    Confidence and accuracy of an empty bin are None. Over the others, sum(weight * |accuracy - confidence|) is the ECE.
    """
    confidence, is_correct = top_label(probability, label)
    total, *sums = [np.bincount(bin_of(confidence), weight * value, N_BINS) for value in (1.0, confidence, is_correct)]
    return [
        {
            "confidence": float(sums[0][k] / total[k]) if total[k] > 0 else None,
            "accuracy": float(sums[1][k] / total[k]) if total[k] > 0 else None,
            "weight": float(total[k] / total.sum()),
        }
        for k in range(N_BINS)
    ]


def expected_calibration_error(probability: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float:
    """ECE of the top label over 15 equal-width bins (Guo et al. 2017, "On calibration of modern neural networks")."""
    confidence, is_correct = top_label(probability, label)
    gap = np.bincount(bin_of(confidence), weight * (is_correct - confidence), N_BINS)
    return float(np.abs(gap).sum() / weight.sum())


def top_label(probability: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the predicted class (n,), and whether the prediction is correct."""
    return probability.max(axis=1), probability.argmax(axis=1) == label


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """Index of the equal-width bin, of 15; a confidence on a border belongs to the lower bin."""
    return np.clip(np.ceil(confidence * N_BINS).astype(int) - 1, 0, N_BINS - 1)
