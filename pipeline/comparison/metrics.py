"""Logits and labels -> metrics. Fractions, never percent; weighted by the images' weights.

Everywhere logits (n, n_classes), label (n,) int, weight (n,).
"""

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import (
    brier_score_loss,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    recall_score,
    roc_auc_score,
)

N_BINS = 15  # of confidence
TOP_5_ABOVE = 10  # classes: with fewer, being among five says little
TEMPERATURES = (0.05, 20.0)


def score(logits: np.ndarray, label: np.ndarray, weight: np.ndarray) -> dict[str, float | None]:
    """Metrics of one run.

    `balanced_accuracy` is the mean recall of the classes that occur. `auroc` of more than two classes is the macro
    average of one against the rest, None where a class does not occur. `brier` is scikit-learn's (for two classes
    the squared error of the second, for more the sum over classes). `nll` is in nats. `top5_accuracy` is there above
    10 classes.
    """
    classes = np.arange(logits.shape[1])
    log_probability = log_softmax(logits.astype(np.float64), axis=1)
    probability = np.exp(log_probability)
    positive = probability[:, 1] if len(classes) == 2 else probability
    predicted = logits.argmax(axis=1)
    occurring = np.unique(label)
    macro: dict[str, Any] = {"average": "macro", "sample_weight": weight}
    no_warning: dict[str, Any] = {"zero_division": 0.0}
    auroc = None
    if len(occurring) == len(classes):
        auroc = float(roc_auc_score(label, positive, multi_class="ovr", **macro))
    found = {
        "accuracy": float(np.average(predicted == label, weights=weight)),
        "balanced_accuracy": float(recall_score(label, predicted, labels=occurring, **macro, **no_warning)),
        "macro_f1": float(f1_score(label, predicted, labels=classes, **macro, **no_warning)),
        "auroc": auroc,
        "nll": float(np.average(-log_probability[np.arange(len(label)), label], weights=weight)),
        "brier": float(brier_score_loss(label, positive, sample_weight=weight, labels=classes)),
        "ece": expected_calibration_error(probability, label, weight),
    }
    if len(classes) > TOP_5_ABOVE:
        found["top5_accuracy"] = float(np.average(is_among_top(logits, label, 5), weights=weight))
    return found


def is_among_top(logits: np.ndarray, label: np.ndarray, k: int) -> np.ndarray:
    """Whether each label (n,) is among the k largest logits; of equal ones the lower class goes first, as in argmax."""
    own = np.take_along_axis(logits, label[:, None], axis=1)
    is_before = np.arange(logits.shape[1]) < label[:, None]
    return ((logits > own) | ((logits == own) & is_before)).sum(axis=1) < k


def per_class(logits: np.ndarray, label: np.ndarray, weight: np.ndarray) -> list[dict[str, float]]:
    """Precision, recall and F1 of each class (0 where undefined), and its support, the number of its images."""
    classes = np.arange(logits.shape[1])
    options: dict[str, Any] = {"labels": classes, "sample_weight": weight, "zero_division": 0.0}
    precision, recall, f1, _ = precision_recall_fscore_support(label, logits.argmax(axis=1), **options)
    support = np.bincount(label, minlength=len(classes)).tolist()
    columns = (np.asarray(precision).tolist(), np.asarray(recall).tolist(), np.asarray(f1).tolist(), support)
    return [dict(zip(("precision", "recall", "f1", "support"), row, strict=True)) for row in zip(*columns, strict=True)]


def confusion(logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Numbers of images (n_classes, n_classes): rows are the actual class, columns the predicted one."""
    return confusion_matrix(label, logits.argmax(axis=1), labels=np.arange(logits.shape[1]))


def reliability(logits: np.ndarray, label: np.ndarray, weight: np.ndarray) -> list[dict[str, float | None]]:
    """Mean confidence and accuracy of the top label in 15 equal-width bins, and the share of the weight there.

    Confidence and accuracy of an empty bin are None. Over the others, sum(weight * |accuracy - confidence|) is the ECE.
    """
    probability = np.exp(log_softmax(logits.astype(np.float64), axis=1))
    confidence, is_right = top_label(probability, label)
    total, *sums = [np.bincount(bin_of(confidence), weight * value, N_BINS) for value in (1.0, confidence, is_right)]
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
    confidence, is_right = top_label(probability, label)
    gap = np.bincount(bin_of(confidence), weight * (is_right - confidence), N_BINS)
    return float(np.abs(gap).sum() / weight.sum())


def top_label(probability: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of the top label (n,), and whether it is right."""
    return probability.max(axis=1), probability.argmax(axis=1) == label


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """Which of 15 equal-width bins; a confidence on a border is in the lower one."""
    return np.clip(np.ceil(confidence * N_BINS).astype(int) - 1, 0, N_BINS - 1)


def temperature(logits: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float:
    """The T between 0.05 and 20 for which logits / T have the least NLL; to be fitted on validation (Guo et al. 2017).

    1 where all are right: the sharper the better then, and that is not to be believed.
    """
    if (logits.argmax(axis=1) == label)[weight > 0].all():
        return 1.0
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    share = weight / weight.sum()
    true_logit = float(share @ np.take_along_axis(shifted, label[:, None], axis=1)[:, 0])

    def nll(log_temperature: float) -> float:
        sharpness = np.exp(-log_temperature)
        return float(share @ np.log(np.exp(sharpness * shifted).sum(axis=1))) - sharpness * true_logit

    found = minimize_scalar(nll, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))
