"""The learning curve: subsets of whole units, and intervals that cover a known truth."""

from itertools import pairwise

import numpy as np
import pytest

from pipeline.advice import curve, probes
from pipeline.advice.curve import Curve
from pipeline.advice.probes import Sample
from tests.unit.advice.test_probes import made

SIZES = np.array([25.0, 50.0, 100.0, 200.0, 400.0])


def simulated(seed: int, a: float, b: float, c: float, per_unit: int = 1) -> tuple[Curve, Sample]:
    """Errors of 500 images, each easy or hard at all sizes, of a known law."""
    random, n = np.random.default_rng(seed), 500
    unit = np.arange(n) // per_unit
    hardness = random.random(unit.max() + 1)[unit]
    wrong = (hardness < (a * SIZES**-b + c)[:, None]).astype(float)
    return Curve(SIZES, wrong, np.zeros(len(SIZES))), Sample(np.arange(n) % 2, np.ones(n), unit, 2)


def test_sizes_double_and_the_smallest_has_an_image_per_class():
    assert curve.subset_sizes(1000, 2) == [31, 62, 125, 250, 500, 1000]
    assert curve.subset_sizes(1000, 200) == [250, 500, 1000]
    assert curve.subset_sizes(7, 2) == []


@pytest.mark.parametrize("per_unit", [1, 5])
def test_intervals_cover_what_more_images_bring(per_unit: int):
    a, b, c = 1.0, 0.5, 0.05
    truth, covered, widths = 1 - (a * 800.0**-b + c), [], []
    for seed in range(40):
        found = curve.fit(*simulated(seed, a, b, c, per_unit)).accuracy(800)
        covered.append(found.low <= truth <= found.high)
        widths.append(found.high - found.low)
        assert found.low <= found.value <= found.high <= 1
    assert np.mean(covered) >= 0.9
    assert np.mean(widths) < (0.09 if per_unit == 1 else 0.2)


def test_units_widen_the_interval():
    single, grouped = (curve.fit(*simulated(0, 1.0, 0.5, 0.05, n)).accuracy(800) for n in (1, 10))
    assert grouped.high - grouped.low > 1.5 * (single.high - single.low)


def test_a_flat_curve_promises_nothing_and_a_steep_one_does():
    flat, steep = (curve.fit(*simulated(1, *law)) for law in ((0.0, 0.5, 0.3), (2.0, 0.6, 0.0)))
    assert flat.accuracy(1600).value - flat.accuracy(400).value < 0.02
    assert steep.accuracy(1600).low > steep.accuracy(400).value - 0.01
    assert steep.accuracy(1600).value - steep.accuracy(400).value > 0.02


def test_no_error_at_all_is_no_certainty():
    sample = Sample(np.arange(40) % 2, np.ones(40), np.arange(40), 2)
    found = curve.fit(Curve(np.array([8.0, 16.0, 32.0]), np.zeros((3, 40)), np.zeros(3)), sample).accuracy(64)
    assert found.low < 1
    assert found.high == pytest.approx(1, abs=0.01)


def test_subsets_are_nested_whole_units_of_the_training_part(monkeypatch: pytest.MonkeyPatch):
    x, plain = made(200)
    sample = Sample(plain.label, plain.weight, np.arange(200) // 4, 3)
    fold, seen = probes.assign_folds(sample, 5), []
    predict = curve.predict_linear

    def noted(
        x: np.ndarray, sample: Sample, fold: np.ndarray, training: list[np.ndarray], strengths: tuple
    ) -> np.ndarray:
        seen.append(training)
        return predict(x, sample, fold, training, strengths)

    monkeypatch.setattr(curve, "predict_linear", noted)
    found = curve.measure(x, sample, fold, (1.0, 0.1), 2)
    assert found is not None
    assert found.wrong.shape == (len(found.sizes), 200)
    for training in seen:
        for k, rows in enumerate(training):
            assert (fold[rows] != k).all()
            assert all(np.isin(np.flatnonzero(sample.unit == number), rows).all() for number in sample.unit[rows])
    by_draw = seen[0:-1:2]  # of the first draw, from the smallest on
    assert all({*small[0]} < {*large[0]} for small, large in pairwise(by_draw))


def test_too_few_images_have_no_curve():
    x, sample = made(12)
    assert curve.measure(x, sample, probes.assign_folds(sample, 3), (1.0,), 2) is None
