"""The linear head against scikit-learn's LogisticRegression.

scikit-learn minimises C * sum_i s_i NLL_i + penalty, the head sum_i w_i NLL_i / sum(w) + strength * penalty: with the
weights of the images for s, the two are the same where C = 1 / (strength * sum(w)).
"""

from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from pipeline.training import heads
from pipeline.training.heads import Examples
from tests.factories import LINEAR

L1_RATIO = {"l2": 0.0, "l1": 1.0, "elasticnet": 0.3}
RANDOM = np.random.default_rng(0)
LABEL = RANDOM.integers(0, 3, 150)
FEATURES = (RANDOM.normal(size=(150, 10)) + np.eye(3, 10)[LABEL]).astype(np.float32)
WEIGHTS = {"equal": np.ones(150), "unequal": RANDOM.uniform(0.2, 3, 150)}


def fitted_head(
    penalty: Any, strength: float, weight: np.ndarray, class_weights: Any = "none", label: np.ndarray = LABEL
) -> nn.Linear:
    options = LINEAR.model_copy(
        update={
            **{"standardize": False, "penalty": penalty, "l1_ratio": L1_RATIO["elasticnet"]},
            **{"class_weights": class_weights, "regularization_strengths": (strength,), "max_iterations": 2000},
        }
    )
    rows = Examples(FEATURES[:, None], label, weight)
    head = heads.build((10,), len({*label}), options, nn.Identity())
    return cast(nn.Linear, heads.fit(head, rows, rows, options).head[-1])


def scikit_learns(penalty: str, strength: float, weight: np.ndarray) -> LogisticRegression:
    c = 1 / (strength * weight.sum())
    solver = "lbfgs" if penalty == "l2" else "saga"
    model = LogisticRegression(
        C=c, l1_ratio=L1_RATIO[penalty], solver=solver, tol=1e-6, max_iter=10_000, random_state=0
    )
    return model.fit(FEATURES.astype(float), LABEL, sample_weight=weight)


def objective(matrix: np.ndarray, bias: np.ndarray, penalty: str, strength: float, weight: np.ndarray) -> float:
    ratio = L1_RATIO[penalty]
    nll = -log_softmax(FEATURES @ matrix.T + bias, axis=1)[np.arange(150), LABEL]
    size = ratio * np.abs(matrix).sum() + (1 - ratio) / 2 * np.square(matrix).sum()
    return float(np.average(nll, weights=weight) + strength * size)


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("strength", [1.0, 0.1, 0.003])
def test_an_l2_head_predicts_what_scikit_learns_optimum_predicts(strength: float, weight: np.ndarray):
    linear, reference = fitted_head("l2", strength, weight), scikit_learns("l2", strength, weight)
    with torch.no_grad():
        probability = linear(torch.from_numpy(FEATURES)).softmax(1).numpy()
    assert np.abs(probability - reference.predict_proba(FEATURES.astype(float))).max() < 1e-3


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("penalty", ["l2", "l1", "elasticnet"])
def test_no_objective_is_higher_than_at_scikit_learns_optimum(penalty: str, weight: np.ndarray):
    for strength in (0.1, 0.01):
        linear, reference = fitted_head(penalty, strength, weight), scikit_learns(penalty, strength, weight)
        found = linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy()
        best = objective(reference.coef_, np.asarray(reference.intercept_), penalty, strength, weight)
        assert objective(*found, penalty, strength, weight) <= best + 1e-4


def test_l1_leaves_the_features_that_scikit_learn_leaves():
    weight = WEIGHTS["unequal"]
    linear, reference = fitted_head("l1", 0.05, weight), scikit_learns("l1", 0.05, weight)
    used = linear.weight.detach().numpy() != 0
    assert 0 < used.sum() < used.size
    assert not (np.abs(reference.coef_[~used]) > 1e-3).any()
    assert not (np.abs(linear.weight.detach().numpy()[reference.coef_ == 0]) > 1e-3).any()


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_balanced_class_weights_are_scikit_learns_on_weighted_counts(weight: np.ndarray):
    rare = np.where(LABEL == 0, 0.1 * weight, weight)
    class_weight = compute_class_weight("balanced", classes=np.arange(3), y=LABEL, sample_weight=rare)
    counted = heads.loss_weight(LABEL, rare, "balanced")
    assert np.allclose(counted, rare * class_weight[LABEL])
    assert np.isclose(counted.sum(), rare.sum())
    linear, reference = fitted_head("l2", 0.1, rare, "balanced"), scikit_learns("l2", 0.1, rare * class_weight[LABEL])
    with torch.no_grad():
        probability = linear(torch.from_numpy(FEATURES)).softmax(1).numpy()
    assert np.abs(probability - reference.predict_proba(FEATURES.astype(float))).max() < 1e-3


@pytest.mark.parametrize("strength", [1.0, 0.01])
def test_a_head_of_two_classes_predicts_what_scikit_learns_optimum_predicts(strength: float):
    label, weight = (LABEL > 0).astype(np.int64), WEIGHTS["unequal"]
    linear = fitted_head("l2", strength, weight, label=label)
    # Of two classes it has one weight vector, the difference of ours, and so half the penalty
    reference = LogisticRegression(C=2 / (strength * weight.sum()), tol=1e-6, max_iter=10_000)
    reference.fit(FEATURES.astype(float), label, sample_weight=weight)
    with torch.no_grad():
        probability = linear(torch.from_numpy(FEATURES)).softmax(1).numpy()
    assert np.abs(probability - reference.predict_proba(FEATURES.astype(float))).max() < 1e-3
