"""Cross-fitting, folds and votes: what must hold, and the edge cases."""

import numpy as np
import pytest

from pipeline.comparison import influence
from pipeline.comparison.outcomes import Outcomes, by_unit, cross_fitted, folds, of_predictions, unit_labels
from pipeline.training.runs import Candidates, Predictions
from tests.factories import outcomes_of


def candidates(loss: np.ndarray, predicted: np.ndarray | None = None) -> Candidates:
    """Candidates with these losses (c, n); by default candidate k predicts class k for every image."""
    rows = np.arange(len(loss))[:, None] + np.zeros(loss.shape, int) if predicted is None else predicted
    return Candidates([f"epoch {k}" for k in range(len(loss))], rows, -loss, np.zeros((len(loss), 0), np.float32))


def judged(loss: np.ndarray, unit: np.ndarray, weight: np.ndarray | None = None) -> Outcomes:
    rows = np.arange(loss.shape[1])
    return cross_fitted(rows, candidates(loss), np.ones(len(rows)) if weight is None else weight, unit)


@pytest.mark.parametrize(("n_units", "n_folds"), [(1, 1), (2, 2), (4, 4), (5, 5), (13, 5)])
def test_units_stay_whole_and_folds_have_nearly_as_many(n_units: int, n_folds: int):
    unit = np.random.default_rng(0).permutation(np.repeat(7 * np.arange(n_units), 3))
    found = folds(unit)
    sizes = [len(np.unique(unit[found == k])) for k in range(n_folds)]
    assert (sum(sizes), found.max() + 1) == (n_units, n_folds)
    assert max(sizes) - min(sizes) <= 1


def test_folds_are_the_same_for_all_strategies_of_a_seed():
    unit, random = np.arange(20) // 2, np.random.default_rng(0)
    first, second = (judged(random.random((n, 20)), unit) for n in (3, 7))
    np.testing.assert_array_equal(first.fold, second.fold)


def test_each_fold_is_judged_by_the_candidate_that_the_others_choose():
    unit, loss = np.arange(10), np.zeros((2, 10))
    fold = folds(unit)
    loss[1] = np.where(fold == 2, 10.0, -0.1)  # best but for fold 2, which outweighs the others
    found = judged(loss, unit)
    np.testing.assert_array_equal(found.predicted, np.where(fold == 2, 1, 0))
    np.testing.assert_array_equal(found.true_log_probability, -loss[found.predicted, np.arange(10)])
    light = np.where(fold == 2, 0.001, 1.0)
    assert judged(loss, unit, light).predicted.all()


def test_a_single_unit_chooses_for_itself_and_what_diverged_is_never_chosen():
    assert judged(np.array([[1.0, 1.0], [0.5, 0.5]]), np.zeros(2, int)).predicted.tolist() == [1, 1]
    loss = np.ones((3, 10))
    loss[0, 3] = np.nan
    loss[1, 4] = np.inf
    assert (judged(loss, np.arange(10)).predicted == 2).all()


def test_one_candidate_is_judged_as_it_is():
    random = np.random.default_rng(0)
    log_probability = np.log(random.dirichlet([1, 1], 12))
    label = np.arange(12) % 2
    plain = outcomes_of(log_probability, label)
    one = Candidates(
        ["0.1"], plain.predicted[None], plain.true_log_probability[None], log_probability[None, :, 1].astype(np.float32)
    )
    found = cross_fitted(np.arange(12), one, np.ones(12), np.arange(12))
    np.testing.assert_array_equal(found.predicted, plain.predicted)
    np.testing.assert_array_equal(found.true_log_probability, plain.true_log_probability)


def test_cross_fitting_removes_the_bias_of_the_best_of_many():
    n, n_studies, accuracy = 295, 300, 0.855
    random, naive, fair = np.random.default_rng(0), np.zeros(n_studies), np.zeros(n_studies)
    for study in range(n_studies):
        margin = 1.058 + np.sqrt(0.85) * random.normal(size=n) + np.sqrt(0.15) * random.normal(size=(9, n))
        loss, predicted = np.log1p(np.exp(-2 * margin)), (margin < 0).astype(int)
        naive[study] = np.mean(predicted[loss.mean(axis=1).argmin()] == 0) - accuracy
        found = cross_fitted(np.arange(n), candidates(loss, predicted), np.ones(n), np.arange(n))
        fair[study] = np.mean(found.predicted == 0) - accuracy
    error = 3.3 * 0.021 / np.sqrt(n_studies)  # 99.9 %
    assert abs(fair.mean()) < error
    assert naive.mean() > 0.008 + error / 4


def test_auroc_is_within_folds_and_averaged_by_weight():
    label, fold = np.array([0, 1, 0, 1, 1, 0, 1]), np.array([0, 0, 0, 1, 1, 1, 1])
    score, weight = np.array([0.1, 0.2, 0.3, 5.1, 5.3, 5.2, 5.0]), np.array([1, 1, 2, 1, 1, 1, 1.0])
    outcomes = Outcomes(np.arange(7), label, np.zeros(7), score[:, None], fold, np.zeros((7, 0)))
    found = influence.linearise(outcomes, label, weight, np.arange(7), 2)["auroc"]
    assert found is not None
    assert found.value == pytest.approx((4 * (1 / 3) + 4 * (1 / 3)) / 8)
    # The only positive of fold 0 has an influence all the same: around the mean over folds
    assert found.share.sum() == pytest.approx(1)
    # A fold with one class is left out
    outcomes = Outcomes(np.arange(7), label, np.zeros(7), score[:, None], np.append(fold[:-1], 2), np.zeros((7, 0)))
    rest = influence.linearise(outcomes, label, weight, np.arange(7), 2)["auroc"]
    assert rest is not None
    assert rest.value == pytest.approx((4 * (1 / 3) + 3 * 0.5) / 7)
    assert (rest.share[-1], rest.influence[-1]) == (0, 0)
    alone = Outcomes(np.arange(7), label, np.zeros(7), score[:, None], np.arange(7), np.zeros((7, 0)))
    assert influence.linearise(alone, label, weight, np.arange(7), 2)["auroc"] is None


def test_folds_with_one_image_of_a_class_do_not_make_the_auroc_certain():
    fold, label = np.repeat(np.arange(5), 4), np.tile([1, 0, 0, 0], 5)
    score = np.random.default_rng(0).normal(size=20) + label
    outcomes = Outcomes(np.arange(20), label, np.zeros(20), score[:, None], fold, np.zeros((20, 0)))
    found = influence.linearise(outcomes, label, np.ones(20), np.arange(20), 2)["auroc"]
    assert found is not None
    assert (found.influence[label == 1] ** 2).sum() > 1e-3


def test_the_images_of_a_unit_have_one_vote():
    label, unit = np.array([0, 0, 0, 1, 1, 0]), np.array([4, 4, 4, 1, 2, 2])
    probability = np.array([[0.4, 0.6], [0.45, 0.55], [0.95, 0.05], [0.2, 0.8], [0.5, 0.5], [0.5, 0.5]])
    found = by_unit(outcomes_of(np.log(probability), label), label, unit)
    assert unit_labels(label, unit).tolist() == [0, 1, -1, 0, 0]  # numbers 0 and 3 are of no unit
    assert found.rows.tolist() == [1, 4]  # unit 2 has two labels
    assert found.predicted.tolist() == [1, 0]
    np.testing.assert_allclose(found.probability, [[0.2, 0.8], [0.6, 0.4]])
    np.testing.assert_allclose(np.exp(found.true_log_probability), [0.8, 0.6])
    certain = of_predictions(Predictions(np.arange(2), np.array([[1e4, 0.0], [1e4, 0.0]])), np.array([1, 1]))
    assert np.isfinite(by_unit(certain, np.array([1, 1]), np.zeros(2, int)).true_log_probability).all()


def test_units_with_several_labels_leave_nobody():
    found = by_unit(outcomes_of(np.zeros((4, 2)), np.arange(4) % 2), np.arange(4) % 2, np.arange(4) // 2)
    assert len(found.rows) == 0
