"""Logits and labels -> metrics. Fractions, never percent; weighted by the images' weights."""

from typing import Any

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import brier_score_loss, f1_score, recall_score, roc_auc_score


def score(logits: np.ndarray, label: np.ndarray, weight: np.ndarray) -> dict[str, float | None]:
    """Metrics of logits (n, n_classes) against label (n,) with weight (n,).

    `balanced_accuracy` is the mean recall of the classes that occur. `auroc` of more than two classes is the macro
    average of one against the rest, None where a class does not occur. `brier` is scikit-learn's (for two classes
    the squared error of the second, for more the sum over classes). `nll` is in nats.
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
    return {
        "accuracy": float(np.average(predicted == label, weights=weight)),
        "balanced_accuracy": float(recall_score(label, predicted, labels=occurring, **macro, **no_warning)),
        "macro_f1": float(f1_score(label, predicted, labels=classes, **macro, **no_warning)),
        "auroc": auroc,
        "nll": float(np.average(-log_probability[np.arange(len(label)), label], weights=weight)),
        "brier": float(brier_score_loss(label, positive, sample_weight=weight, labels=classes)),
        "ece": expected_calibration_error(probability, label, weight),
    }


def expected_calibration_error(probability: np.ndarray, label: np.ndarray, weight: np.ndarray, bins: int = 15) -> float:
    """ECE of the top label over equal-width bins (Guo et al. 2017, "On calibration of modern neural networks").

    A confidence on a border falls into the lower bin.
    """
    confidence, is_right = probability.max(axis=1), probability.argmax(axis=1) == label
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(bin_of, weight * (is_right - confidence), bins)
    return float(np.abs(gap).sum() / weight.sum())
