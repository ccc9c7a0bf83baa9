"""Suspects against cleanlab, whose authors wrote the paper: it knows no weights, so these are equal."""

import numpy as np
import pytest
from cleanlab.filter import find_label_issues

from pipeline.stages import label_suspects


@pytest.mark.parametrize("n_classes", [2, 3, 30])
def test_the_suspects_are_cleanlabs(n_classes: int):
    random = np.random.default_rng(n_classes)
    true = np.arange(1500) % n_classes
    logits = random.normal(size=(1500, n_classes)) + 3 * np.eye(n_classes)[true]
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    label = np.where(random.random(1500) < 0.1, random.integers(0, n_classes, 1500), true)
    found = label_suspects.rank(probability, label, np.ones(1500))
    expected = find_label_issues(
        label, probability, filter_by="prune_by_class", return_indices_ranked_by="self_confidence", n_jobs=1
    )
    # It rounds the number of a class so that its confident joint keeps its sums: one more or less
    assert len(expected) > 50
    assert len(set(found) ^ set(expected)) <= n_classes
    both = set(found) & set(expected)
    assert [row for row in found if row in both] == [row for row in expected if row in both]
