"""Metrics against scikit-learn's."""

from typing import Any

import numpy as np
import pytest
from scipy.special import softmax
from sklearn import metrics as sklearn

from pipeline.comparison.metrics import confusion, per_class, score
from pipeline.training.calibration import temperature
from tests.factories import outcomes_of


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("n_classes", [2, 4, 12])
def test_every_metric_that_scikit_learn_has_is_scikit_learns(n_classes: int, is_weighted: bool):
    random = np.random.default_rng(n_classes)
    logits = 2 * random.normal(size=(300, n_classes))
    label = np.where(random.random(300) < 0.5, logits.argmax(axis=1), random.integers(0, n_classes, 300))
    weight = random.uniform(0.1, 3, 300) if is_weighted else np.ones(300)
    probability, predicted = softmax(logits, axis=1), logits.argmax(axis=1)
    positive = probability[:, 1] if n_classes == 2 else probability
    weights: dict[str, Any] = {"sample_weight": weight if is_weighted else None}
    found = score(outcomes_of(logits, label), label, weight, n_classes)
    found.pop("ece")
    top5 = (
        {} if n_classes <= 10 else {"top5_accuracy": sklearn.top_k_accuracy_score(label, probability, k=5, **weights)}
    )
    assert found == pytest.approx(
        {
            "accuracy": sklearn.accuracy_score(label, predicted, **weights),
            "balanced_accuracy": sklearn.balanced_accuracy_score(label, predicted, **weights),
            "macro_f1": sklearn.f1_score(label, predicted, average="macro", **weights),
            "auroc": sklearn.roc_auc_score(label, positive, multi_class="ovr", average="macro", **weights),
            "nll": sklearn.log_loss(label, probability, **weights),
            "brier": sklearn.brier_score_loss(label, positive, **weights),
            **top5,
        },
        abs=1e-9,
    )


@pytest.mark.parametrize("is_weighted", [False, True])
def test_classes_and_confusion_are_scikit_learns(is_weighted: bool):
    random = np.random.default_rng(0)
    logits, label = random.normal(size=(200, 5)), random.integers(0, 4, 200)  # the last class does not occur
    weight = random.uniform(0.1, 3, 200) if is_weighted else np.ones(200)
    predicted, names = logits.argmax(axis=1), ["a", "b", "c", "d", "e"]
    options: dict[str, Any] = {"labels": range(5), "target_names": names, "output_dict": True, "zero_division": 0.0}
    report: Any = sklearn.classification_report(label, predicted, sample_weight=weight, **options)
    found = per_class(predicted, label, weight, 5)
    for k, name in enumerate(names):
        expected = {"precision": report[name]["precision"], "recall": report[name]["recall"]}
        expected |= {"f1": report[name]["f1-score"], "support": np.sum(label == names.index(name))}
        assert {figure: values[k] for figure, values in found.items()} == pytest.approx(expected)
    expected = sklearn.confusion_matrix([*label, 4], [*predicted, 4])
    expected[4, 4] -= 1
    np.testing.assert_array_equal(confusion(predicted, label, 5), expected)


@pytest.mark.parametrize(("weight_of_wrong", "share"), [(1.0, 0.8), (2.0, 2 / 3), (4.0, 1 / 2)])
def test_temperature_makes_confidence_what_accuracy_is(weight_of_wrong: float, share: float):
    # Two classes, every logit 3 apart, 80 of 100 right: sigmoid(3 / T) is to be the weighted accuracy
    logits, label = np.tile([3.0, 0.0], (100, 1)), np.repeat([0, 1], [80, 20])
    found = temperature(logits, label, np.where(label == 1, weight_of_wrong, 1.0))
    expected = 20.0 if share == 1 / 2 else 3 / np.log(share / (1 - share))
    assert found == pytest.approx(expected, rel=1e-4)


def test_temperature_undoes_a_scale():
    random = np.random.default_rng(1)
    logits = 2 * random.normal(size=(20_000, 6))
    label = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from the softmax
    assert temperature(3 * logits.astype(np.float32), label, np.ones(20_000)) == pytest.approx(3, rel=0.03)
