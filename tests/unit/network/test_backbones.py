"""backbones: names, sizes and published weights, and one line for whatever does not fit together."""

import urllib.error

import pytest
import torch

from pipeline.network import backbones, tracing
from pipeline.network.backbones import Backbone
from pipeline.params import BackboneChoice

SMALL = "torchvision/squeezenet1_1"
SIZE = 64


def load(name: str = SMALL, weights: str = "random", seed: int = 0, size: int | None = SIZE) -> Backbone:
    return backbones.load(BackboneChoice.of(name, weights, seed), size)


def test_random_weights_are_those_of_the_seed() -> None:
    first, again, other = load(seed=0), load(seed=0), load(seed=1)
    assert first.weights_sha256 == again.weights_sha256
    assert first.weights_sha256 != other.weights_sha256


def test_loading_leaves_the_random_numbers_of_the_process_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_backbone_is_in_evaluation_mode_with_nothing_trainable() -> None:
    module = load("timm/resnet10t").module
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_width_is_measured_not_looked_up() -> None:
    assert load("timm/mobilenetv3_small_100").feature_dim == 1024  # its num_features says 576


def test_digest_sees_one_changed_number() -> None:
    module = load().module
    before = backbones.state_sha256(module)
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1
    assert backbones.state_sha256(module) != before


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("torchvision/resnet19", "torchvision/resnet18"), ("timm/tf_efficientnet_lit0", "timm/tf_efficientnet_lite0")],
)
def test_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"backbone\.name: {name} is not in .*; nearest: .*{nearest}") as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [SMALL, "timm/resnet10t"])
def test_image_size_replaces_the_size_and_keeps_the_rest_of_the_preprocessing(name: str) -> None:
    published, own = load(name, size=None).preprocessing, load(name, size=96).preprocessing
    assert own.crop == 96
    assert own.resize == tuple(round(side * 96 / published.crop) for side in published.resize)
    kept = {"interpolation", "mean", "std"}
    assert own.model_dump(include=kept) == published.model_dump(include=kept)


def test_preprocessing_that_is_given_replaces_what_the_library_states() -> None:
    given = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "interpolation": "lanczos"}
    plain = load(size=None).preprocessing
    for names in (["mean"], ["std"], ["interpolation"], [*given]):
        chosen = {name: given[name] for name in names}
        choice = BackboneChoice.of(SMALL, "random", 0).model_copy(update=chosen)
        assert backbones.load(choice, None).preprocessing == plain.model_copy(update=chosen)


@pytest.mark.parametrize(
    ("name", "weights", "licence"),
    [
        ("timm/test_resnet", "default", "apache-2.0"),
        ("timm/convnextv2_atto.fcmae", "default", "cc-by-nc-4.0"),
        ("timm/convnextv2_atto.fcmae", "random", None),
        ("timm/tf_efficientnet_lite0", "bundled", "apache-2.0"),
        ("torchvision/squeezenet1_1", "random", None),
    ],
)
def test_the_licence_is_that_of_published_weights(
    monkeypatch: pytest.MonkeyPatch, name: str, weights: str, licence: str | None
) -> None:
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)  # there is no network
    assert load(name, weights).licence == licence


def test_image_size_that_the_network_does_not_take_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"features\.image_size: .*alexnet takes no images of 16 px") as caught:
        load("torchvision/alexnet", size=16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [OSError("no route to host"), urllib.error.URLError("no\nroute to host")])
@pytest.mark.parametrize(
    ("name", "loader"), [(SMALL, "torchvision.models.get_model"), ("timm/resnet10t", "timm.create_model")]
)
def test_published_weights_without_a_network_are_one_line_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, name: str, loader: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loader, fail)
    with pytest.raises(ValueError, match=rf"the published weights of {name} could not be loaded .*no route") as caught:
        load(name, "default")
    assert "data/weights/" in str(caught.value)
    assert "\n" not in str(caught.value)


def no_memory(*_: object, **__: object) -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize(
    ("broken", "name", "weights"),
    [
        ("torch.nn.Module.__call__", SMALL, "random"),  # the width is measured
        ("torchvision.models.get_model", SMALL, "default"),
        ("timm.create_model", "timm/test_resnet", "random"),
        ("timm.create_model", "timm/test_resnet", "default"),
    ],
)
def test_too_little_memory_is_not_called_a_mistake(
    broken: str, name: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(name)
    monkeypatch.setattr(broken, no_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load(name, weights)


def test_tracing_without_memory_is_not_called_untraceable(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load()
    monkeypatch.setattr(tracing, "Meter", no_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        tracing.find(backbone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm/tf_efficientnet_lite0", SIZE),
        ("timm/test_resnet", SIZE),
        ("timm/test_vit", 96),
        ("timm/convnext_atto", SIZE),
        pytest.param("timm/swin_tiny_patch4_window7_224", 224, marks=pytest.mark.slow),  # built with stochastic depth
        ("torchvision/efficientnet_b0", SIZE),
        ("torchvision/convnext_tiny", SIZE),
        pytest.param("torchvision/swin_t", SIZE, marks=pytest.mark.slow),
    ],
)
def test_stochastic_depth_changes_neither_weights_nor_cut_points_nor_what_is_predicted(name: str, size: int) -> None:
    choice, x = BackboneChoice.of(name, "random", 0), torch.randn(2, 3, size, size)
    plain, dropping = backbones.load(choice, size), backbones.load(choice, size, 0.9)
    assert dropping.weights_sha256 == plain.weights_sha256
    assert [*tracing.find(dropping)] == [*tracing.find(plain)]
    assert torch.equal(dropping.module(x), plain.module(x))
    assert backbones.has_drop_path(dropping.module)
    assert not backbones.has_drop_path(backbones.load(choice, size, 0.0).module)
    layers = [
        module for module in dropping.module.modules() if type(module).__name__ in ("DropPath", "StochasticDepth")
    ]
    rates = [float(getattr(layer, "drop_prob", None) or getattr(layer, "p", None) or 0) for layer in layers]
    assert rates == sorted(rates), "deeper blocks are dropped more often"
    assert rates[0] < 0.5
    assert rates[-1] == pytest.approx(0.9, abs=0.1 if name.startswith("timm/") else 1e-6)  # timm's rule differs
    dropping.module.train()
    torch.manual_seed(0)
    assert not torch.equal(dropping.module(x), plain.module(x))
