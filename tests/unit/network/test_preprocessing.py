"""Preprocessing: how much of the images the crop cuts away."""

import numpy as np
import pytest
from PIL import Image

from pipeline.features.views import make_views
from tests.factories import PLAIN, PREPROCESSING, encoded

IMAGENET = PREPROCESSING.model_copy(update={"resize": (256,), "crop": 224})


@pytest.mark.parametrize(
    ("changes", "size", "share"),
    [
        ({}, (300, 300), 1 - (224 / 256) ** 2),  # the default data: 23 %
        ({}, (500, 250), 1 - 224 / 256 * 224 / 512),
        ({}, (250, 500), 1 - 224 / 256 * 224 / 512),
        ({}, (400, 40), 1 - 224 / 256 * 224 / 2560),
        ({"resize": (224,)}, (7, 7), 0),
        ({"resize": (224,)}, (100, 200), 0.5),
        ({"resize": (224, 224)}, (100, 200), 0),
        ({"resize": (256, 256)}, (100, 200), 1 - (224 / 256) ** 2),
        ({"resize": (224, 448)}, (100, 200), 0.5),
        ({"geometry": "squash"}, (400, 40), 0),
        ({"geometry": "pad"}, (400, 40), 0),
    ],
)
def test_share_that_is_cut_away(changes: dict[str, object], size: tuple[int, int], share: float) -> None:
    width, height = size
    found = IMAGENET.model_copy(update=changes).cut_away([width, 224], [height, 224])
    assert found.shape == (2,)
    assert found[0] == pytest.approx(share)


def test_share_that_is_cut_away_is_what_view_0_does_not_show() -> None:
    """A ramp from the left to the right: the range of the view is the part of the width that it shows."""
    ramp = Image.fromarray(np.broadcast_to(np.linspace(0, 255, 512), (64, 512)).astype(np.uint8))
    options = IMAGENET.model_copy(update={"resize": (32,), "crop": 32})
    (pixels,) = make_views(encoded(ramp), "", [0], options, PLAIN)
    (share,) = options.cut_away([512], [64])
    assert np.ptp(pixels.astype(int)) / 255 == pytest.approx(1 - share, abs=0.02)
