"""Runs: what is written is what is read, and candidates are kept compactly."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.training import runs
from pipeline.training.runs import Candidates, join_candidates, make_candidates
from tests import factories


def logits(n_candidates: int, n: int, n_classes: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    rows = {f"epoch {k}": random.normal(size=(n, n_classes)) for k in range(n_candidates)}
    return {name: factories.predictions(np.arange(n), values).log_probability for name, values in rows.items()}


def is_same(left: Candidates, right: Candidates) -> bool:
    return all(np.array_equal(getattr(left, name), value) for name, value in vars(right).items())


@pytest.mark.parametrize("n_classes", [2, 3])
def test_candidates_hold_what_judging_needs(n_classes: int):
    label, of_all = np.arange(7) % n_classes, logits(4, 7, n_classes)
    made = make_candidates(of_all, label)
    assert made.names == [*of_all]
    for k, log_probability in enumerate(of_all.values()):
        assert made.predicted[k].tolist() == log_probability.argmax(1).tolist()
        assert made.true_log_probability[k].tolist() == log_probability[np.arange(7), label].tolist()
        if n_classes == 2:
            assert made.positive_log_probability[k].tolist() == log_probability[:, 1].tolist()
    assert made.positive_log_probability.shape == (4, 7 if n_classes == 2 else 0)
    types = [array.dtype for array in (made.predicted, made.true_log_probability, made.positive_log_probability)]
    assert types == [np.int32, np.float32, np.float32]


@pytest.mark.parametrize("n_classes", [2, 3])
def test_candidates_made_one_by_one_are_those_made_together(n_classes: int):
    label, of_all = np.arange(7) % n_classes, logits(4, 7, n_classes)
    parts = [make_candidates({name: values}, label) for name, values in of_all.items()]
    assert is_same(join_candidates(parts), make_candidates(of_all, label))


def test_the_nll_of_candidates_is_weighted_by_image():
    label, of_all, weight = np.arange(7) % 3, logits(2, 7, 3), np.arange(1.0, 8)
    expected = [-np.average(values[np.arange(7), label], weights=weight) for values in of_all.values()]
    assert make_candidates(of_all, label).nll(weight) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_run_is_read_as_it_was_saved(n_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    label, of_all = np.arange(7) % n_classes, logits(4, 7, n_classes)
    val = factories.predictions(np.arange(7), of_all["epoch 1"])
    run = factories.run("tuned", 3, val, val, label, candidates=make_candidates(of_all, label))
    runs.save_run(run)
    found = runs.read_run("tuned", 3)
    assert is_same(found.candidates, run.candidates)
    assert np.array_equal(found.val.log_probability, val.log_probability)
    assert (found.cost, found.chosen, found.curve, found.network) == (run.cost, run.chosen, run.curve, run.network)
