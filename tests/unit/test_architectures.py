"""Every family of networks that the README names loads, and gives features of the width that it says."""

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import backbones, engine
from pipeline.params import BackboneChoice

pytestmark = pytest.mark.architectures

SMALL = [
    "torchvision/alexnet",
    "torchvision/resnet18",
    "torchvision/densenet121",
    "torchvision/mobilenet_v2",
    "torchvision/mobilenet_v3_small",
    "torchvision/mobilenet_v3_large",
    "torchvision/googlenet",
    "torchvision/efficientnet_b0",
    "timm/tf_efficientnet_lite0",
    "timm/mobilenetv3_small_100",
]
LARGE = [
    "torchvision/vgg16",
    "torchvision/vgg19",
    "torchvision/resnet34",
    "torchvision/resnet50",
    "torchvision/resnet101",
    "torchvision/resnet152",
    "torchvision/inception_v3",
    "torchvision/convnext_tiny",
    "timm/legacy_xception",
]
CPU = torch.device("cpu")
SIZE = 64  # px, for what does not depend on it


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other on a busy machine
    yield
    torch.set_num_threads(threads)
    gc.collect()


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_network_gives_features_of_its_width_at_its_own_size(name: str) -> None:
    backbone = backbones.load(BackboneChoice(name=name, weights="random", seed=0), None)
    size = backbone.preprocessing.crop
    assert 200 <= size <= 300
    with torch.inference_mode():
        features = backbone.module(torch.zeros(1, 3, size, size))
    assert features.shape == (1, backbone.feature_dim)
    assert features.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_openvino_gives_what_torch_gives(name: str) -> None:
    backbone = backbones.load(BackboneChoice(name=name, weights="random", seed=0), SIZE)
    network = nn.Sequential(backbones.Normalize(backbone.preprocessing), backbone.module)
    pixels = torch.randint(0, 256, (2, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (fast,) = engine.run(network, [pixels], "openvino", "fp32", CPU)
    (plain,) = engine.run(network, [pixels], "torch", "fp32", CPU)
    assert np.abs(plain).max() > 0
    assert np.abs(fast - plain).max() <= 1e-4 * np.abs(plain).max()
