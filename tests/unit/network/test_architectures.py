"""Networks of every family load, give features of the width that they say, and can be cut."""

import gc
import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.features import engine
from pipeline.features.engine import Runner
from pipeline.network import backbones, cuts, tracing
from pipeline.network.backbones import Backbone
from pipeline.network.preprocessing import Normalize
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
SIZES = {  # px; None where the network wants its own
    "torchvision/vgg11": 32,
    "timm/vgg11_bn": 32,
    "torchvision/alexnet": 64,
    "torchvision/resnet18": 32,
    "timm/resnetv2_50": 32,
    "torchvision/resnext50_32x4d": 32,
    "torchvision/wide_resnet50_2": 32,
    "timm/seresnet50": 32,
    "timm/skresnet18": 32,
    "timm/res2net50_26w_4s": 32,
    "timm/resnest14d": 32,
    "torchvision/densenet121": 32,
    "torchvision/inception_v3": 75,
    "torchvision/googlenet": 32,
    "timm/legacy_xception": 64,
    "timm/mobilenetv1_100": 32,
    "torchvision/mobilenet_v2": 32,
    "torchvision/mobilenet_v3_small": 32,
    "timm/mobilenetv4_conv_small": 32,
    "torchvision/efficientnet_b0": 32,
    "timm/tf_efficientnet_lite0": 32,
    "timm/tf_efficientnetv2_b0": 32,
    "torchvision/regnet_x_400mf": 32,
    "torchvision/regnet_y_400mf": 32,
    "timm/convnext_atto": 32,
    "timm/convnextv2_atto": 32,
    "torchvision/squeezenet1_1": 32,
    "torchvision/shufflenet_v2_x0_5": 32,
    "torchvision/mnasnet0_5": 32,
    "timm/ghostnet_100": 32,
    "timm/repvgg_a0": 32,
    "timm/dla34": 32,
    "timm/dpn68": 32,
    "timm/cspresnet50": 32,
    "timm/hrnet_w18_small": 32,
    "timm/vovnet39a": 64,
    "timm/dm_nfnet_f0": 32,
    "timm/nasnetalarge": 64,
    "torchvision/swin_t": 64,
    "torchvision/vit_b_32": None,
    "timm/vit_tiny_patch16_224": 32,
    "timm/deit_tiny_patch16_224": 32,
    "timm/vit_small_patch14_dinov2": 28,
    "timm/maxvit_rmlp_pico_rw_256": 64,
    "timm/mixer_s32_224": None,
    "timm/poolformer_s12": 32,
    "timm/edgenext_xx_small": 64,
    "timm/mobilevit_xxs": 64,
    "timm/crossvit_tiny_240": None,
    "timm/hiera_tiny_224": None,
}
UNCUT = {  # which have no cut point in their middle: where one might look for it, and what the error says
    "timm/crossvit_tiny_240": ("blocks.0", "holds no cut point"),  # two branches from the images to the end
    "timm/nasnetalarge": ("cell_5", "holds no cut point"),  # a cell reads the two before it
    "timm/hiera_tiny_224": ("blocks.5", "cannot be traced"),  # its forward asks whether an argument is None
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    yield
    tracing.find.cache_clear()
    gc.collect()


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_network_gives_features_of_its_width_at_its_own_size(name: str) -> None:
    backbone = backbones.load(BackboneChoice.of(name, "random", 0), None)
    size = backbone.preprocessing.crop
    assert 200 <= size <= 300
    with torch.inference_mode():
        features = backbone.module(torch.zeros(1, 3, size, size))
    assert features.shape == (1, backbone.feature_dim)
    assert features.isfinite().all()


@pytest.fixture(scope="module")
def small(request: pytest.FixtureRequest) -> Backbone:
    """Each network with small images, made once for all tests of it."""
    return backbones.load(BackboneChoice.of(request.param, "random", 0), SIZES[request.param])


def prepared(kind: str, backbone: Backbone) -> tuple[Runner, torch.Tensor]:
    """The network from pixels on, and two random images for it."""
    network = nn.Sequential(Normalize(backbone.preprocessing), backbone.module)
    shape = (2, *[backbone.preprocessing.crop] * 2, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return engine.prepare(kind, network, pixels, "fp32", CPU), pixels


def test_network_that_openvino_cannot_convert_runs_in_torch(caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    before = root.level, root.filters.copy(), root.handlers.copy()
    backbone = backbones.load(BackboneChoice.of("timm/vovnet39a", "random", 0), 32)  # it pools 2 px in windows of 3
    runner, pixels = prepared("auto", backbone)
    assert runner.engine == "torch"
    assert (root.level, root.filters, root.handlers) == before, "what OpenVINO silences speaks again"
    assert "OpenVINO cannot convert this network, torch runs it" in caplog.text
    (output,) = runner.run([pixels])
    assert np.isfinite(output).all()


@pytest.mark.parametrize("small", SIZES, indirect=True)
def test_openvino_gives_what_torch_gives(small: Backbone) -> None:
    outputs = []
    for kind in ("openvino", "torch"):
        runner, pixels = prepared(kind, small)
        outputs.extend(runner.run([pixels]))
    given, expected = outputs
    assert np.abs(expected).max() > 0
    assert np.abs(given - expected).max() <= 1e-4 * np.abs(expected).max()


def test_at_least_45_of_50_networks_can_be_cut() -> None:
    assert len(SIZES) == 50
    assert len(SIZES.keys() - UNCUT.keys()) >= 45


@pytest.mark.parametrize("small", [name for name in SIZES if name not in UNCUT], indirect=True)
def test_network_can_be_cut_early_in_the_middle_and_late(small: Backbone) -> None:
    shape = (3, *[small.preprocessing.crop] * 2)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    every = sorted(id(tensor) for tensor in (*small.module.parameters(), *small.module.buffers()))
    names, sizes = list(tracing.find(small)), []
    with torch.inference_mode():
        whole = small.module(x)
        assert not torch.equal(whole[0], whole[1])
        for cut in (names[0], names[len(names) // 2], names[-2]):
            prefix, suffix = cuts.split(small, cut)
            assert torch.equal(suffix.eval()(prefix.eval()(x)), whole), cut
            sides = [[id(tensor) for tensor in (*side.parameters(), *side.buffers())] for side in (prefix, suffix)]
            assert sorted(sides[0] + sides[1]) == every, cut
            sizes.append(len(sides[0]))
    assert sizes[0] < sizes[1] < sizes[2], "cuts lie in three places"


@pytest.mark.parametrize("small", UNCUT, indirect=True)
def test_network_that_cannot_be_cut_there_says_why(small: Backbone) -> None:
    where, reason = UNCUT[small.name]
    with pytest.raises(ValueError, match=reason) as caught:
        cuts.resolve(small, where)
    assert small.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert cuts.resolve(small, "all") == "all"
