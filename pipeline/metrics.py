"""Logits and labels -> metrics. Fractions, never percent; weighted by the images' weights."""

import numpy as np
from scipy.special import log_softmax
from sklearn import metrics as sklearn_metrics

ECE_BINS = 15


def score(logits: np.ndarray, label: np.ndarray, weight: np.ndarray) -> dict[str, float | None]:
    """Metrics of logits (n, n_classes) against label (n,) with weight (n,).

    `auroc` of more than two classes is the macro average of one against the rest (None where a
    class does not occur), `brier` is scikit-learn's (halved for two classes: the squared error of
    the second class), `nll` is in nats.
    """
    n_classes = logits.shape[1]
    log_probability = log_softmax(logits.astype(np.float64), axis=1)
    probability = np.exp(log_probability)
    predicted = logits.argmax(axis=1)
    classes = np.arange(n_classes)
    all_occur = len(np.unique(label)) == n_classes
    recall = sklearn_metrics.recall_score(
        label, predicted, labels=np.unique(label), average="macro", sample_weight=weight
    )
    return {
        "accuracy": float(np.average(predicted == label, weights=weight)),
        "balanced_accuracy": float(recall),
        "macro_f1": float(
            sklearn_metrics.f1_score(
                label, predicted, labels=classes, average="macro", sample_weight=weight, zero_division=0.0
            )
        ),
        "auroc": _auroc(probability, label, weight) if all_occur else None,
        "nll": float(np.average(-log_probability[np.arange(len(label)), label], weights=weight)),
        "brier": float(
            sklearn_metrics.brier_score_loss(
                label, probability[:, 1] if n_classes == 2 else probability, sample_weight=weight, labels=classes
            )
        ),
        "ece": expected_calibration_error(probability, label, weight),
    }


def _auroc(probability: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float:
    one_against_rest = [
        sklearn_metrics.roc_auc_score(label == k, probability[:, k], sample_weight=weight)
        for k in (range(probability.shape[1]) if probability.shape[1] > 2 else [1])
    ]
    return float(np.mean(one_against_rest))


def expected_calibration_error(
    probability: np.ndarray, label: np.ndarray, weight: np.ndarray, bins: int = ECE_BINS
) -> float:
    """Top-label ECE over equal-width bins (Guo et al. 2017, "On calibration of modern networks").

    A confidence on a border falls into the lower bin.
    """
    confidence = probability.max(axis=1)
    is_right = probability.argmax(axis=1) == label
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(bin_of, weight * (is_right - confidence), bins)
    return float(np.abs(gap).sum() / weight.sum())
