"""What features say, and the words for it: of good and bad features, and of images that are too few."""

from typing import Any

import numpy as np
import pytest

from pipeline.advice import findings, words
from pipeline.advice.probes import Sample
from pipeline.params import AdviseOptions

OPTIONS = AdviseOptions(
    images=5000,
    folds=5,
    regularization_strengths=(3.0, 0.3),
    neighbours=5,
    draws=2,
    large_images=5000,
    large_class=100,
    similar_errors_avoided=0.5,
)
NETWORK = {"name": "timm/x", "weights": "default", "parameters": 1000, "features": 6}


def sample_of(label: np.ndarray, unit: np.ndarray | None = None) -> Sample:
    classes, index = np.unique(label, return_inverse=True)
    return Sample(index, np.ones(len(label)), np.arange(len(label)) if unit is None else unit, len(classes))


def features(sample: Sample, strength: float, seed: int, width: int = 6) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(len(sample.label), width))
    return noise + strength * np.eye(sample.n_classes, max(width, sample.n_classes))[sample.label][:, :width]


def find(sample: Sample, *strengths: float, random: float | None = 0.0, n_train: int = 200) -> dict[str, Any]:
    blocks = {f"block {i}": features(sample, strength, i) for i, strength in enumerate(strengths)}
    other = None if random is None else features(sample, random, 99)
    found = findings.find(blocks, [[*blocks][-1]], other, sample, n_train, OPTIONS)
    return found | {"network": NETWORK, "remarks": [], "left_out": 0}


def told(found: dict[str, Any]) -> str:
    return "\n".join(words.paragraphs(found, OPTIONS))


TWO = sample_of(np.arange(300) % 2)


def test_a_last_block_that_knows_more_adds():
    found = find(TWO, 0.5, 4.0)
    assert found["last_minus_before"]["low"] > 0
    assert found["blocks"][0]["linear"]["high"] < found["blocks"][1]["linear"]["low"]
    text = told(found)
    assert "The last block adds to the one before it" in text
    assert "similar to the pretraining data" in text
    assert "the textbook proposes a linear head on the last features" in text


def test_an_early_block_that_knows_more_is_named():
    text = told(find(TWO, 4.0, 0.5))
    assert "is there after block 0, number 1 of 2" in text
    assert "takes away from" in text
    assert "`features.cut: every_block` uses them" in text


def test_where_random_weights_make_no_error_that_is_said():
    text = told(find(TWO, 4.0, 40.0, random=40.0))
    assert "with random weights makes no error, so these images need no pretraining" in text
    assert "there is no comparison" not in text


def test_features_that_know_nothing_are_not_called_good():
    text = told(find(TWO, 0.0, 0.0))
    assert "not shown to be better than random ones" in text
    assert "different from the pretraining data" in text


def test_thresholds_decide_what_is_large():
    assert "are a large data set" in told(find(TWO, 1.0, 1.0, n_train=10_000))
    assert "are a small data set" in told(find(TWO, 1.0, 1.0, n_train=4_999))


def test_the_share_of_errors_avoided_is_that_of_the_counts():
    sample = sample_of(np.zeros(100, int))
    ours, theirs = np.zeros(100, int), np.zeros(100, int)
    ours[:10], theirs[:40] = 1, 1
    found = findings.errors_avoided(ours, theirs, sample)
    assert found is not None
    assert found["value"] == 0.75
    assert 0.55 < found["low"] < 0.75 < found["high"] < 0.95
    assert findings.errors_avoided(ours, np.zeros(100, int), sample) is None


@pytest.mark.parametrize("label", [np.arange(20) // 2, np.zeros(20, int), np.arange(3), np.zeros(0, int)])
def test_too_few_images_are_one_sentence(label: np.ndarray):
    sample = sample_of(label)
    found = find(sample, 1.0)
    if sample.n_classes * 2 <= len(label) and sample.n_classes > 1:
        assert "head" in found  # two of each class can be told
    else:
        assert "advice needs at least two classes" in told(found)
        assert "blocks" not in found


def test_one_unit_is_too_few_and_a_class_of_one_image_is_a_note():
    grouped = sample_of(np.arange(40) % 2, np.zeros(40, int))
    assert "advice needs" in told(find(grouped, 1.0))
    lone = sample_of(np.array([0] * 30 + [1] * 30 + [2]))
    text = told(find(lone, 1.0, 1.0))
    assert "1 of 3 classes have one independent image: no head can be judged on them" in text


def test_many_classes_of_few_images():
    found = find(sample_of(np.arange(900) % 300), 3.0, 3.0)
    assert found["classes"] == 300
    assert "%" in told(found)


def test_the_same_images_give_the_same_findings_and_grouping_widens_the_interval():
    assert find(TWO, 1.0, 1.0) == find(TWO, 1.0, 1.0)
    pairs = np.arange(300) // 10 * 2 + np.arange(300) % 2
    label = np.arange(300) % 2
    single, grouped = (
        find(sample_of(label, unit), 1.0)["head"] for unit in (np.arange(300), np.unique(pairs, return_inverse=True)[1])
    )
    assert single != grouped


def test_random_weights_have_nothing_to_compare_with():
    found = find(TWO, 1.0, random=None) | {"network": NETWORK | {"weights": "random"}}
    assert "is not known: the network has random weights" in told(found)
