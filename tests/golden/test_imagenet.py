"""The bundled weights recognise two known photographs, and view 0 is torchvision's evaluation transform."""

from pathlib import Path

import pytest
import sklearn.datasets
import timm
import torch
from torchvision.models import ResNet18_Weights, ResNet50_Weights

from pipeline.dataset.decoding import decode, sha256
from pipeline.features.views import make_views
from pipeline.network import backbones
from pipeline.network.preprocessing import Normalize, Preprocessing
from pipeline.network.weights import bundled_state
from pipeline.params import BackboneChoice
from tests.factories import FLIPS

PHOTOGRAPHS = Path(sklearn.datasets.__file__).parent / "images"


def pixels_of(photograph: str, preprocessing: Preprocessing) -> torch.Tensor:
    content = (PHOTOGRAPHS / photograph).read_bytes()
    return torch.from_numpy(make_views(content, sha256(content), [0], preprocessing, FLIPS))


@pytest.fixture(scope="module")
def backbone() -> backbones.Backbone:
    return backbones.load(BackboneChoice.of("timm/tf_efficientnet_lite0", "bundled", 0), None)


@pytest.fixture(scope="module")
def whole_network() -> torch.nn.Module:
    network = timm.create_model("tf_efficientnet_lite0")
    state = bundled_state("timm/tf_efficientnet_lite0", network.state_dict())
    network.load_state_dict(state, strict=True)
    return network.eval()


@pytest.mark.parametrize(
    ("photograph", "class_index", "probability"),
    [("china.jpg", 698, 0.30), ("flower.jpg", 985, 0.32)],
    ids=["a palace in China", "a daisy"],
)
def test_the_bundled_weights_recognise(
    photograph: str, class_index: int, probability: float, backbone: backbones.Backbone, whole_network: torch.nn.Module
):
    inputs = Normalize(backbone.preprocessing)(pixels_of(photograph, backbone.preprocessing))
    with torch.no_grad():
        found = whole_network(inputs)[0].softmax(0)
        features = backbone.module(inputs)
        assert torch.allclose(whole_network.get_submodule("classifier")(features)[0].softmax(0), found, atol=1e-6)
    assert int(found.argmax()) == class_index
    assert float(found.max()) == pytest.approx(probability, abs=0.02)


@pytest.mark.parametrize("weights", [ResNet18_Weights.DEFAULT, ResNet50_Weights.DEFAULT], ids=["resnet18", "resnet50"])
@pytest.mark.parametrize("photograph", ["china.jpg", "flower.jpg"])
def test_view_0_normalised_is_what_torchvision_does(photograph: str, weights: ResNet18_Weights | ResNet50_Weights):
    theirs = weights.transforms()
    preprocessing = Preprocessing(
        geometry="crop",
        jpeg_decoding="exact",
        resize=tuple(theirs.resize_size),
        crop=theirs.crop_size[0],
        interpolation=theirs.interpolation.value,
        mean=tuple(theirs.mean),
        std=tuple(theirs.std),
    )
    found = Normalize(preprocessing)(pixels_of(photograph, preprocessing))[0]
    assert torch.allclose(found, theirs(decode((PHOTOGRAPHS / photograph).read_bytes())), atol=1e-5)
