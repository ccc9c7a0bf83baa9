"""Metrics against scikit-learn's."""

from typing import Any

import numpy as np
import pytest
from scipy.special import softmax
from sklearn import metrics as sklearn

from pipeline.metrics import score


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_every_metric_that_scikit_learn_has_is_scikit_learns(n_classes: int, is_weighted: bool):
    random = np.random.default_rng(n_classes)
    logits = 2 * random.normal(size=(300, n_classes))
    label = np.where(random.random(300) < 0.5, logits.argmax(axis=1), random.integers(0, n_classes, 300))
    weight = random.uniform(0.1, 3, 300) if is_weighted else np.ones(300)
    probability, predicted = softmax(logits, axis=1), logits.argmax(axis=1)
    positive = probability[:, 1] if n_classes == 2 else probability
    weights: dict[str, Any] = {"sample_weight": weight if is_weighted else None}
    found = score(logits, label, weight)
    found.pop("ece")
    assert found == pytest.approx(
        {
            "accuracy": sklearn.accuracy_score(label, predicted, **weights),
            "balanced_accuracy": sklearn.balanced_accuracy_score(label, predicted, **weights),
            "macro_f1": sklearn.f1_score(label, predicted, average="macro", **weights),
            "auroc": sklearn.roc_auc_score(label, positive, multi_class="ovr", average="macro", **weights),
            "nll": sklearn.log_loss(label, probability, **weights),
            "brier": sklearn.brier_score_loss(label, positive, **weights),
        },
        abs=1e-9,
    )
