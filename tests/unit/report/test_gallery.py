"""Sections that show images."""

import numpy as np

from pipeline.report import gallery
from tests import factories


def test_many_classes_are_cut_short():
    counted = gallery.class_counts({f"class {i}": i + 1 for i in range(60)})
    assert "Of 60 classes" in counted.caption
    assert counted.spec
    assert len(counted.spec["layer"]) == 2


def test_probabilities_are_averaged_over_the_runs_that_tested_an_image():
    first = factories.predictions([4, 2], np.log([[0.5, 0.5], [0.9, 0.1]]))
    second = factories.predictions([2, 7], np.log([[0.3, 0.7], [0.2, 0.8]]))
    found = gallery.average([first, second], factories.labels(8))
    assert found.rows.tolist() == [2, 4, 7]
    assert np.allclose(found.probability, [[0.6, 0.4], [0.5, 0.5], [0.2, 0.8]])
