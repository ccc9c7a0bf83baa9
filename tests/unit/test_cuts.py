"""cuts: a network cut in two is the network."""

from collections.abc import Iterator
from functools import cache

import pytest
import timm
import torch
from torch import nn

from pipeline import backbones, cuts
from pipeline.params import BackboneChoice

SIZES = {
    "torchvision/resnet18": 64,
    "torchvision/densenet121": 64,
    "torchvision/mobilenet_v2": 64,
    "torchvision/squeezenet1_1": 64,
    "torchvision/shufflenet_v2_x0_5": 64,
    "torchvision/efficientnet_b0": 64,
    "timm/tf_efficientnet_lite0": 64,
    "torchvision/googlenet": 64,
    "timm/vit_tiny_patch16_224": 64,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def network(name: str) -> nn.Module:
    return backbones.load(BackboneChoice(name=name, weights="random", seed=0), SIZES[name]).module.eval()


def images(name: str, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, SIZES[name], SIZES[name], generator=torch.Generator().manual_seed(0))


@cache
def early_middle_late(name: str) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Three cuts, each with its prefix and suffix."""
    names = list(cuts.find(network(name), name))
    return {cut: cuts.split(network(name), name, cut) for cut in (names[0], names[len(names) // 2], names[-2])}


def tensors(*modules: nn.Module) -> list[int]:
    return [id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())]


@pytest.mark.parametrize("name", SIZES)
def test_suffix_of_prefix_is_the_network_bit_for_bit(name: str) -> None:
    x = images(name)
    with torch.inference_mode():
        whole = network(name)(x)
        for cut, (prefix, suffix) in early_middle_late(name).items():
            assert torch.equal(suffix.eval()(prefix.eval()(x)), whole), cut


@pytest.mark.parametrize("name", SIZES)
def test_every_tensor_is_on_one_side_of_a_cut_under_the_name_that_it_has(name: str) -> None:
    for cut, (prefix, suffix) in early_middle_late(name).items():
        assert sorted(tensors(prefix, suffix)) == sorted(tensors(network(name))), cut
        assert prefix.state_dict().keys() | suffix.state_dict().keys() == network(name).state_dict().keys(), cut
        assert not prefix.state_dict().keys() & suffix.state_dict().keys(), cut


@pytest.mark.parametrize("name", SIZES)
def test_cuts_come_in_order_of_depth(name: str) -> None:
    prefixes = [prefix for prefix, _ in early_middle_late(name).values()]
    before = [sum(parameter.numel() for parameter in prefix.parameters()) for prefix in prefixes]
    assert before == sorted(before)
    assert before[0] < before[-1]


def test_none_freezes_nothing_and_all_freezes_everything() -> None:
    name = "torchvision/resnet18"
    x = images(name)
    for freeze_until, empty in (("none", 0), ("all", 1)):
        parts = cuts.split(network(name), name, freeze_until)
        assert not list(parts[empty].parameters())
        assert torch.equal(parts[empty](x), x)
        assert parts[1 - empty] is network(name)


@pytest.mark.parametrize(
    ("name", "path", "cut", "first_behind"),
    [
        ("torchvision/resnet18", "layer2", "layer2.1.relu_1", "layer3."),
        ("torchvision/resnet18", "layer1.0", "layer1.0.relu_1", "layer1.1."),
        ("torchvision/mobilenet_v2", "features.1", "features.1.conv.2", "features.2."),
        ("timm/tf_efficientnet_lite0", "blocks.5", "blocks.5.3.add", "blocks.6."),
    ],
)
def test_module_path_freezes_the_module_to_its_end(name: str, path: str, cut: str, first_behind: str) -> None:
    _, by_path = cuts.split(network(name), name, path)
    _, by_cut = cuts.split(network(name), name, cut)
    assert by_path.state_dict().keys() == by_cut.state_dict().keys()
    assert next(iter(by_path.state_dict())).startswith(first_behind)


@pytest.mark.parametrize(
    ("wrong", "right"), [("layer5", "layer4"), ("layr2", "layer2"), ("layer3.0.ad", "layer3.0.add")]
)
def test_wrong_path_is_answered_with_the_nearest(wrong: str, right: str) -> None:
    name = "torchvision/resnet18"
    with pytest.raises(ValueError, match=rf"'{wrong}' holds no cut point of {name}; nearest: .*{right}") as caught:
        cuts.split(network(name), name, wrong)
    assert "\n" not in str(caught.value)


def test_the_beginning_of_a_name_is_not_a_module_path() -> None:
    name = "timm/test_resnet"
    with pytest.raises(ValueError, match="'layer' holds no cut point of"):
        cuts.split(timm.create_model("test_resnet"), name, "layer")


def test_network_that_cannot_be_traced_is_named() -> None:
    class Untraceable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="timm/untraceable cannot be traced") as caught:
        cuts.split(Untraceable(), "timm/untraceable", "anything")
    assert "\n" not in str(caught.value)


class Sums(nn.Module):
    """Two layers whose sum makes a cut after the first impossible; then a third, and shared weights."""

    def __init__(self, *, is_shared: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        if is_shared:
            self.third = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.third(self.second(y) + y)


def test_no_cut_where_two_values_are_alive() -> None:
    assert list(cuts.find(Sums(is_shared=False), "sums")) == ["first", "add", "third"]


def test_no_cut_between_two_uses_of_the_same_weights() -> None:
    assert list(cuts.find(Sums(is_shared=True), "sums")) == ["first_1"]  # behind the last use


def test_finding_cuts_leaves_the_mode_of_the_network_alone() -> None:
    for is_training in (True, False):
        module = Sums(is_shared=False).train(is_training)
        cuts.find(module, "sums")
        assert all(part.training is is_training for part in module.modules())


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.dropout(self.dropout(self.first(x)), 0.0, self.training))


@pytest.mark.parametrize(
    ("name", "cut"),
    [("torchvision/efficientnet_b0", "features.3"), ("dropouts", "first"), ("timm drop path", "layer1")],
)
def test_suffix_still_switches_its_randomness_with_the_mode(name: str, cut: str) -> None:
    if name == "dropouts":
        module, x = Dropouts().eval(), torch.randn(2, 4)
    elif name == "timm drop path":
        module, x = (
            timm.create_model("test_resnet", drop_path_rate=0.5, zero_init_last=False).eval(),
            torch.randn(8, 3, 32, 32),
        )
    else:
        module, x = network(name), images(name)
    prefix, suffix = cuts.split(module, name, cut)
    with torch.no_grad():
        boundary = prefix.eval()(x)
        suffix.train()
        for part in suffix.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        assert not torch.equal(suffix(boundary), suffix(boundary))
        suffix.eval()
        assert torch.equal(suffix(boundary), suffix(boundary))
        assert torch.equal(suffix(boundary), module.eval()(x))
