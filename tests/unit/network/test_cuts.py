"""cuts: the pieces of a network are the network, and the description of a cut point can be counted by hand."""

import re
from collections.abc import Callable
from functools import cache
from math import prod
from typing import cast

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from pipeline.network import backbones, cuts, tracing
from pipeline.network.backbones import Backbone, count_parameters
from pipeline.network.cuts import CutPoint
from pipeline.network.flops import flops_per_image
from pipeline.network.preprocessing import Normalize
from pipeline.params import BackboneChoice
from tests.factories import PREPROCESSING

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
RESNET, VIT = "torchvision/resnet18", "timm/vit_tiny_patch16_224"


@cache
def backbone(name: str) -> Backbone:
    return backbones.load(BackboneChoice.of(name, "random", 0), SIZES[name])


def wrap(module: nn.Module, size: int = 8, name: str = "timm/toy") -> Backbone:
    """A network for images of `size` pixels as a backbone."""
    geometry = PREPROCESSING.model_copy(update={"resize": (size,), "crop": size})
    return Backbone(name, module.eval(), geometry, "", 0, None)


def images(of: Backbone, n: int = 2) -> torch.Tensor:
    size = of.preprocessing.crop
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@cache
def early_middle_late(name: str) -> dict[str, list[nn.Module]]:
    """Three cuts, each with its prefix and suffix."""
    names = list(tracing.find(backbone(name)))
    return {cut: cuts.split(backbone(name), cut) for cut in (names[0], names[len(names) // 2], names[-2])}


def tensors(*modules: nn.Module) -> list[int]:
    return [id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())]


def is_one_line(error: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize("name", SIZES)
def test_suffix_of_prefix_is_the_network_bit_for_bit(name: str) -> None:
    x = images(backbone(name))
    with torch.inference_mode():
        whole = backbone(name).module(x)
        for cut, (prefix, suffix) in early_middle_late(name).items():
            assert torch.equal(suffix.eval()(prefix.eval()(x)), whole), cut


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_every_tensor_is_on_one_side_of_a_cut_under_the_name_that_it_has(name: str) -> None:
    network = backbone(name).module
    for cut, (prefix, suffix) in early_middle_late(name).items():
        assert sorted(tensors(prefix, suffix)) == sorted(tensors(network)), cut
        assert prefix.state_dict().keys() | suffix.state_dict().keys() == network.state_dict().keys(), cut
        assert not prefix.state_dict().keys() & suffix.state_dict().keys(), cut


# boundaries


def test_none_freezes_nothing_and_all_freezes_everything() -> None:
    x = images(backbone(RESNET))
    for boundary, empty in (("none", 0), ("all", 1)):
        assert cuts.resolve(backbone(RESNET), boundary) == boundary
        parts = cuts.split(backbone(RESNET), boundary)
        assert not list(parts[empty].parameters())
        assert torch.equal(parts[empty](x), x)
        assert parts[1 - empty] is backbone(RESNET).module


@pytest.mark.parametrize(
    ("name", "path", "cut", "first_behind"),
    [
        (RESNET, "layer2", "layer2.1.relu_1", "layer3."),
        (RESNET, "layer1.0", "layer1.0.relu_1", "layer1.1."),
        ("torchvision/mobilenet_v2", "features.1", "features.1.conv.2", "features.2."),
        ("timm/tf_efficientnet_lite0", "blocks.5", "blocks.5.3.add", "blocks.6."),
        (VIT, "blocks.1", "blocks.1.add_1", "blocks.2."),
    ],
)
def test_module_path_stands_for_the_last_cut_in_the_module(name: str, path: str, cut: str, first_behind: str) -> None:
    assert cuts.resolve(backbone(name), path) == cut
    _, behind = cuts.split(backbone(name), cut)
    assert next(iter(behind.state_dict())).startswith(first_behind)


class Again(nn.Module):
    """Calls `a` twice: its cut points are `a` and `a_1`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.a(self.b(self.a(x))))


def test_exact_cut_point_wins_over_the_module_path() -> None:
    toy = wrap(Again())
    assert list(tracing.find(toy)) == ["a", "b", "a_1", "c"]
    assert [cuts.resolve(toy, cut) for cut in tracing.find(toy)] == ["a", "b", "a_1", "c"]


class VGG(nn.Module):
    """VGG in small: torchvision's layers for `config` (channels, M pools), then two dense layers of `width` inputs."""

    def __init__(self, config: list[int | str], width: int) -> None:
        super().__init__()
        self.features = make_layers(config)  # pyright: ignore[reportArgumentType]
        self.classifier = nn.Sequential(nn.Linear(width, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


@pytest.fixture
def vgg() -> Backbone:
    return wrap(VGG([4, "M", 6, 6, "M"], 6 * 2 * 2))


@pytest.mark.parametrize(
    ("n_layers", "cut"),
    [(1, "features.2"), (2, "features.4"), (3, "flatten"), (4, "classifier.2"), (5, "classifier.3")],
)
def test_number_stands_for_the_last_cut_with_so_many_layers_before_it(vgg: Backbone, n_layers: int, cut: str) -> None:
    assert cuts.resolve(vgg, n_layers) == cut
    prefix, _ = cuts.split(vgg, cut)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in prefix.modules()) == n_layers


def test_first_8_layers_of_vgg16_end_behind_the_first_convolution_of_its_fourth_block() -> None:
    narrow = [width if isinstance(width, str) else width // 64 for width in cfgs["D"]]
    toy = wrap(VGG(narrow, 8), size=32)
    assert cuts.resolve(toy, 8) == "features.18"  # features.17 is the eighth convolution, 18 its ReLU, 19 the ninth
    assert cuts.resolve(toy, 7) == "features.16"  # the third pooling


@pytest.mark.parametrize(("wrong", "nearest"), [(2, "1, 3, 5"), (19, "15, 18, 20"), (100, "15, 18, 20")])
def test_wrong_number_is_answered_with_the_nearest(wrong: int, nearest: str) -> None:
    problem = rf"no cut point of {RESNET} has exactly {wrong} convolution and linear layers .*; nearest: {nearest};"
    with pytest.raises(ValueError, match=problem) as caught:
        cuts.resolve(backbone(RESNET), wrong)
    assert is_one_line(caught)


@pytest.mark.parametrize(
    ("wrong", "right"), [("layer5", "layer4"), ("layr2", "layer2"), ("layer3.0.ad", "layer3.0.add"), ("layer", "layer")]
)
def test_wrong_path_is_answered_with_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=rf"'{wrong}' holds no cut point of {RESNET}; nearest: .*{right}") as caught:
        cuts.resolve(backbone(RESNET), wrong)
    assert is_one_line(caught)
    assert f"python -m pipeline cuts {RESNET}" in str(caught.value)


class Untraceable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_network_that_cannot_be_traced_is_named() -> None:
    toy = wrap(Untraceable(), name="timm/untraceable")
    with pytest.raises(ValueError, match=r"timm/untraceable cannot be traced, .* \(.+\)") as caught:
        cuts.resolve(toy, "anything")
    assert is_one_line(caught)
    assert cuts.resolve(toy, "all") == "all"
    assert cuts.split(toy, "none")[1] is toy.module


# pieces


@pytest.mark.parametrize(
    ("name", "first", "second"), [(RESNET, "layer1", "layer3.0.add"), (VIT, "blocks.0", "blocks.4"), (RESNET, 1, 18)]
)
def test_three_pieces_are_the_network_bit_for_bit(name: str, first: str | int, second: str | int) -> None:
    whole = backbone(name)
    pieces = cuts.split(whole, cuts.resolve(whole, first), cuts.resolve(whole, second))
    assert len(pieces) == 3
    assert sorted(tensors(*pieces)) == sorted(tensors(whole.module))
    assert all(list(piece.parameters()) for piece in pieces)
    with torch.inference_mode():
        x = images(whole)
        assert torch.equal(nn.Sequential(*pieces).eval()(x), whole.module(x))


@pytest.mark.parametrize("boundaries", [("none", "layer2.1.relu_1"), ("layer2.1.relu_1", "all"), ("none", "all")])
def test_pieces_before_none_and_behind_all_are_empty(boundaries: tuple[str, str]) -> None:
    whole = backbone(RESNET)
    pieces = cuts.split(whole, *boundaries)
    assert [bool(tensors(piece)) for piece in pieces] == [boundaries[0] != "none", True, boundaries[1] != "all"]
    with torch.inference_mode():
        x = images(whole)
        assert torch.equal(nn.Sequential(*pieces).eval()(x), whole.module(x))


@pytest.mark.parametrize("boundary", ["none", "layer2.1.relu_1", "all"])
def test_piece_between_equal_boundaries_is_the_identity(boundary: str) -> None:
    whole = backbone(RESNET)
    before, between, behind = cuts.split(whole, boundary, boundary)
    x = torch.randn(2, 3)
    assert torch.equal(between(x), x)
    assert tensors(between) == []
    assert sorted(tensors(before, behind)) == sorted(tensors(whole.module))


@pytest.mark.parametrize(
    ("first", "second"), [("layer3.0.add", "layer1.0.add"), ("all", "layer1.0.add"), ("layer1.0.add", "none")]
)
def test_boundaries_in_the_wrong_order_are_refused(first: str, second: str) -> None:
    with pytest.raises(ValueError, match=rf"{first} lies behind {second}"):
        cuts.split(backbone(RESNET), first, second)


class Sums(nn.Module):
    """Two layers whose sum makes a cut after the first impossible; then a third, and shared weights."""

    def __init__(self, *, is_shared: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))
        if is_shared:
            self.third = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.third(self.second(y) + y)


def test_no_cut_where_two_values_are_alive() -> None:
    assert list(tracing.find(wrap(Sums(is_shared=False)))) == ["first", "add", "third"]


def test_no_cut_between_two_uses_of_the_same_weights() -> None:
    assert list(tracing.find(wrap(Sums(is_shared=True)))) == ["first_1"]  # behind the last use


class Transposed(nn.Module):
    """Images stand in the second place for a while, where no row of a store is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).transpose(0, 1).relu().transpose(0, 1))


def test_no_cut_where_a_row_is_no_image() -> None:
    assert list(tracing.find(wrap(Transposed()))) == ["first", "transpose_1", "last"]


def test_finding_cuts_leaves_the_mode_of_the_network_alone() -> None:
    for is_training in (True, False):
        toy = wrap(Sums(is_shared=False))
        toy.module.train(is_training)
        tracing.find(toy)
        assert all(part.training is is_training for part in toy.module.modules())


# numbers that the size of the images fixes


class Remembers(nn.Module):
    """Reads one of the lengths of its input at the start and uses it at the end, as transformers do."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.first, self.second, self.axis = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[self.axis]
        x = self.second(self.first(x))
        return x.reshape(length, 5, 64) if self.axis == 0 else x.reshape(-1, 5, length, 8)


def test_size_of_the_images_is_no_value_that_stays_alive() -> None:
    toy = wrap(Remembers(axis=2))
    assert list(tracing.find(toy)) == ["first", "second", "reshape"]
    prefix, suffix = cuts.split(toy, "first")
    for n in (1, 5):
        assert torch.equal(suffix(prefix(images(toy, n))), toy.module(images(toy, n)))


def test_number_of_images_is_a_value_that_stays_alive() -> None:
    assert list(tracing.find(wrap(Remembers(axis=0)))) == ["reshape"]


def torchvision_vit(n_layers: int = 3, *, has_head: bool = True) -> Backbone:
    """torchvision's ViT in small."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torchvision.models.VisionTransformer(
            image_size=16, patch_size=8, num_layers=n_layers, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5
        )
        nn.init.normal_(network.heads.get_submodule("head").weight)  # pyright: ignore[reportArgumentType]
    if not has_head:
        network.heads = nn.Sequential()
    return wrap(network, size=16)


VITS: dict[str, tuple[Callable[[], Backbone], list[str]]] = {
    "timm": (lambda: backbone(VIT), [f"blocks.{i}" for i in range(12)]),
    "torchvision": (torchvision_vit, [f"encoder.layers.encoder_layer_{i}" for i in range(3)]),
}


@pytest.mark.parametrize("library", VITS)
def test_transformer_has_a_cut_behind_every_block_and_its_pieces_take_any_number_of_images(library: str) -> None:
    load, blocks = VITS[library]
    whole = load()
    resolved = [cuts.resolve(whole, block) for block in blocks]
    assert len(set(resolved)) == len(blocks)
    for cut in (resolved[0], resolved[-2]):
        pieces = nn.Sequential(*cuts.split(whole, cut)).eval()
        with torch.inference_mode():
            for n in (1, 2, 5):
                x = images(whole, n)
                assert torch.equal(pieces(x), whole.module(x)), (cut, n)
                assert len(pieces[0](x)) == n


def test_encoder_with_nearly_all_layers_is_no_block_but_holds_some() -> None:
    whole = torchvision_vit(8)
    found = [cuts.block(whole.module, name) for name in tracing.find(whole)]
    layers = [f"encoder.layers.encoder_layer_{i}" for i in range(8)]
    assert [name for name in dict.fromkeys(found) if "layers" in name] == layers
    assert cuts.block(backbone(RESNET).module, "layer3.0.add") == "layer3.0"


# modes


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.last = nn.Conv2d(3, 8, 1), nn.Dropout(0.5), nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.dropout(self.dropout(self.first(x)), 0.0, self.training))


def timm_with_drop_path() -> Backbone:
    return wrap(timm.create_model("test_resnet", drop_path_rate=0.5, zero_init_last=False), size=32)


@pytest.mark.parametrize(
    ("load", "cut"),
    [
        (lambda: backbone("torchvision/efficientnet_b0"), "features.3"),
        (lambda: wrap(Dropouts()), "first"),
        (timm_with_drop_path, "layer1"),
    ],
    ids=["torchvision stochastic depth", "dropout", "timm drop path"],
)
def test_suffix_still_switches_its_randomness_with_the_mode(load: Callable[[], Backbone], cut: str) -> None:
    whole = load()
    x = images(whole, 8)
    prefix, suffix = cuts.split(whole, cuts.resolve(whole, cut))
    with torch.no_grad():
        boundary = prefix.eval()(x)
        suffix.train()
        for part in suffix.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        assert not torch.equal(suffix(boundary), suffix(boundary))
        suffix.eval()
        assert torch.equal(suffix(boundary), suffix(boundary))
        assert torch.equal(suffix(boundary), whole.module.eval()(x))


def test_prefix_switches_its_mode_too() -> None:
    prefix, suffix = cuts.split(wrap(Dropouts()), "dropout")
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(prefix.train()(x), prefix(x))
    assert not suffix.training
    assert torch.equal(prefix.eval()(x), prefix(x))


# descriptions


def test_description_of_a_small_vgg_is_what_one_counts_by_hand(vgg: Backbone) -> None:
    expected = [
        # name, shape, parameters, layers, FLOPs before it
        ("features.0", (4, 8, 8), 112, 1, 13_824),  # 4 * (3 * 9 + 1);  2 * 27 * 4 * 8 * 8
        ("features.1", (4, 8, 8), 112, 1, 13_824),
        ("features.2", (4, 4, 4), 112, 1, 13_824),
        ("features.3", (6, 4, 4), 334, 2, 20_736),  # + 6 * (4 * 9 + 1);  + 2 * 36 * 6 * 4 * 4
        ("features.4", (6, 4, 4), 334, 2, 20_736),
        ("features.5", (6, 4, 4), 664, 3, 31_104),  # + 6 * (6 * 9 + 1);  + 2 * 54 * 6 * 4 * 4
        ("features.6", (6, 4, 4), 664, 3, 31_104),
        ("features.7", (6, 2, 2), 664, 3, 31_104),
        ("flatten", (24,), 664, 3, 31_104),
        ("classifier.0", (5,), 789, 4, 31_344),  # + 5 * (24 + 1);  + 2 * 24 * 5
        ("classifier.1", (5,), 789, 4, 31_344),
        ("classifier.2", (5,), 789, 4, 31_344),
        ("classifier.3", (7,), 831, 5, 31_414),  # + 7 * (5 + 1);  + 2 * 5 * 7
    ]
    for value_bytes in (2, 4):
        assert cuts.describe(vgg, value_bytes) == [
            CutPoint(name, shape, parameters, layers, flops, value_bytes * prod(shape))
            for name, shape, parameters, layers, flops in expected
        ]


def test_description_of_resnet18_is_what_is_known_of_it() -> None:
    whole = backbones.load(BackboneChoice.of(RESNET, "random", 0), 224)
    points = cuts.describe(whole, 4)
    first, last = points[0], points[-1]
    expected = CutPoint("conv1", (64, 112, 112), 64 * 3 * 49, 1, 2 * 64 * 3 * 49 * 112 * 112, 4 * 64 * 112 * 112)
    assert first == expected
    assert last.shape == (512,)
    assert last.params_before == sum(parameter.numel() for parameter in whole.module.parameters()) == 11_176_512
    assert last.weight_layers_before == 20
    assert last.flops_before == flops_per_image(whole.module, torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize("name", SIZES)
def test_descriptions_grow_with_depth_and_agree_with_the_pieces(name: str) -> None:
    points = cuts.describe(backbone(name), 4)
    assert [point.name for point in points] == list(tracing.find(backbone(name)))
    for key in ("params_before", "weight_layers_before", "flops_before"):
        values = [getattr(point, key) for point in points]
        assert values == sorted(values), key
        assert values[0] < values[-1], key
    with torch.inference_mode():
        for cut, (prefix, _) in early_middle_late(name).items():
            (point,) = (point for point in points if point.name == cut)
            assert point.shape == prefix.eval()(images(backbone(name), 1)).shape[1:]
            assert point.params_before == sum(parameter.numel() for parameter in prefix.parameters())


# pooling


@pytest.mark.parametrize(
    ("shape", "pixels"),
    [((4, 3, 3), (1, 2)), ((3, 3, 4), (0, 1)), ((5, 4), (0,))],
    ids=["maps", "channels last", "tokens"],
)
def test_pooling_is_over_the_pixels_wherever_they_stand(shape: tuple[int, ...], pixels: tuple[int, ...]) -> None:
    x = torch.randn(2, *shape)
    torch.testing.assert_close(cuts.Pool("avg", 0)(x), x.mean([axis + 1 for axis in pixels]))
    assert torch.equal(cuts.Pool("flatten", 0)(x), x.reshape(2, -1))
    assert cuts.Pool("none", 0)(x) is x


def test_class_token_and_registers_are_not_averaged() -> None:
    x = torch.randn(2, 3 + 4, 5)
    cls, avg, both = (cuts.Pool(kind, 3)(x) for kind in ("cls", "avg", "cls+avg"))
    torch.testing.assert_close(avg, x[:, 3:].mean(1))
    assert torch.equal(cls, x[:, 0])
    assert torch.equal(both, torch.cat([cls, avg], 1))


# several cuts


DENSENET, SWIN = "torchvision/densenet121", "timm/swin_tiny_patch4_window7_224"
EVERY_BLOCK: dict[str, tuple[Callable[[], Backbone], str, list[str]]] = {  # how to pool, and the blocks
    RESNET: (
        *(lambda: backbone(RESNET), "avg"),
        ["maxpool", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0"],
    ),
    "efficientnet": (
        *(lambda: backbone("timm/tf_efficientnet_lite0"), "avg"),
        ["bn1", *(f"blocks.{stage}.{i}" for stage, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(n))],
    ),
    DENSENET: (
        *(lambda: backbone(DENSENET), "avg"),
        [f"features.{name}" for name in ("pool0", "denseblock1", "transition1", "denseblock2", "transition2")]
        + [f"features.{name}" for name in ("denseblock3", "transition3", "denseblock4")],
    ),
    "vgg": (
        *(lambda: wrap(VGG([4, "M", 6, 6, "M"], 6 * 2 * 2)), "avg"),
        ["features.2", "features.4", "features.7", "classifier.2"],
    ),
    VIT: (lambda: backbone(VIT), "cls+avg", ["norm_pre", *(f"blocks.{i}" for i in range(12))]),
    "vit of torchvision": (
        *(lambda: torchvision_vit(8, has_head=False), "avg"),
        ["encoder.dropout", *(f"encoder.layers.encoder_layer_{i}" for i in range(8))],
    ),
    SWIN: (lambda: load(SWIN, 64), "avg", ["patch_embed", *(f"layers.{i}" for i in range(4))]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == SWIN else name for name in EVERY_BLOCK]
)
def test_every_block_is_the_end_of_each_block_without_those_that_all_repeats(name: str) -> None:
    make, pool, blocks = EVERY_BLOCK[name]
    whole = make()
    found = cuts.resolve_cuts(whole, "every_block", pool)
    assert [*found] == [*(cuts.resolve(whole, block) for block in blocks), "all"]
    layout = cuts.lay_out(whole, found, pool)
    assert [tap.cut for tap in layout] == found
    x, features = images(whole), []
    *pieces, _ = cuts.split(whole, *found)
    for tap, piece in zip(layout, pieces, strict=True):
        x = piece(x)
        features.append(cuts.Pool(tap.pool, tap.prefix_tokens)(x))
        assert features[-1].shape == (2, tap.width)
    # Pooled, no two are the same, and no vector is one that the network itself has flattened
    assert not any(a.shape == b.shape and torch.allclose(a, b) for i, a in enumerate(features) for b in features[:i])
    assert max(tap.width for tap in layout) < 5000


def test_several_cuts_are_taken_in_the_order_of_depth_however_they_are_named() -> None:
    whole = backbone(RESNET)
    for given in (("all", "layer2", 1), (1, "all", "layer2.1.relu_1"), ("layer2", 1, "all")):
        assert cuts.resolve_cuts(whole, given, "avg") == ["maxpool", "layer2.1.relu_1", "all"]
    assert cuts.resolve_cuts(whole, "layer2", "none") == ["layer2.1.relu_1"]


@pytest.mark.parametrize(
    ("where", "pool", "expected"),
    [
        (("layer2", "layer2.1"), "avg", rf"layer2 and layer2\.1 are the same cut point of {RESNET}, layer2\.1\.relu_1"),
        (("layer2", "layer9"), "avg", "'layer9' holds no cut point"),
        ("every_block", "cls", r"every_block: `pool: cls` makes vectors of no block .* expected another, such as avg"),
    ],
)
def test_cuts_that_are_not_several_are_one_line(where: tuple[str, ...], pool: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{expected}") as caught:
        cuts.resolve_cuts(backbone(RESNET), where, pool)
    assert is_one_line(caught)


@pytest.mark.parametrize("where", [("first", "all"), "every_block"])
def test_several_cuts_of_a_network_that_cannot_be_traced_are_one_line(where: tuple[str, ...] | str) -> None:
    with pytest.raises(
        ValueError, match=r"^timm/untraceable cannot be traced, so it can be frozen only whole"
    ) as caught:
        cuts.resolve_cuts(wrap(Untraceable(), name="timm/untraceable"), where, "avg")
    assert is_one_line(caught)


def test_layout_pools_maps_and_tokens_and_leaves_vectors_as_they_are() -> None:
    resnet, vit = backbone(RESNET), backbone(VIT)
    of_maps = cuts.lay_out(resnet, ["maxpool", "layer4.1.relu_1", "flatten", "all"], "avg")
    assert [(tap.pool, tap.width) for tap in of_maps] == [("avg", 64), ("avg", 512), ("none", 512), ("none", 512)]
    of_values = cuts.lay_out(resnet, ["layer4.1.relu_1", "all"], "flatten")
    assert [(tap.pool, tap.width) for tap in of_values] == [("flatten", 512 * 2 * 2), ("none", 512)]
    names = ["patch_embed.norm", "blocks.3.add_1", "norm.layer_norm", "all"]
    of_tokens = cuts.lay_out(vit, names, "avg")
    assert [(tap.prefix_tokens, tap.width) for tap in of_tokens] == [(0, 192), (1, 192), (1, 192), (0, 192)]
    of_both = cuts.lay_out(vit, names[1:], "cls+avg")
    assert [(tap.pool, tap.width) for tap in of_both] == [("cls+avg", 384), ("cls+avg", 384), ("none", 192)]


@pytest.mark.parametrize(
    ("name", "cut", "pool", "expected"),
    [
        (
            RESNET,
            "layer2.1.relu_1",
            "none",
            "gives features of 128x8x8, not a vector; expected avg, flatten, or a list",
        ),
        (
            RESNET,
            "layer2.1.relu_1",
            "cls",
            "gives features of 128x8x8 without a class token, not a vector; expected avg",
        ),
        (VIT, "patch_embed.norm", "cls", "gives features of 16x192 without a class token, not a vector; expected avg"),
        (
            VIT,
            "blocks.3.add_1",
            "none",
            "gives features of 17x192, not a vector; expected avg, flatten, cls, cls+avg, or",
        ),
    ],
)
def test_tap_that_gives_no_vector_is_one_line_that_names_it_and_the_ways_out(
    name: str, cut: str, pool: str, expected: str
) -> None:
    with pytest.raises(ValueError, match="features") as caught:
        cuts.lay_out(backbone(name), [cut, "all"], pool)
    several = "but features.cut has several cuts, and"
    assert str(caught.value).startswith(f"params.yaml: features.pool: {pool}, {several} {cut} {expected}")
    assert is_one_line(caught)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where", "pool", "boundaries"),
    [
        (RESNET, ("layer1", "layer3", "all"), "avg", ["none", "conv1", "layer1", "layer2", "layer3", "layer4", "all"]),
        (RESNET, ("layer1", "layer3"), "flatten", ["none", "maxpool", "layer2", "layer3.0", "layer3"]),
        (RESNET, ("flatten", "layer2"), "avg", ["layer4", "avgpool", "flatten"]),
        (
            VIT,
            ("patch_embed", "blocks.2", "norm"),
            "avg",
            ["none", "patch_embed", "norm_pre", "blocks.2", "blocks.7", "norm"],
        ),
        (VIT, ("blocks.2", "blocks.7", "all"), "cls+avg", ["none", "blocks.0", "blocks.4", "norm", "all"]),
    ],
)
def test_suffix_of_prefix_gives_the_features_of_every_cut_at_any_boundary(
    name: str, where: tuple[str, ...], pool: str, boundaries: list[str]
) -> None:
    whole = backbone(name)
    layout = cuts.lay_out(whole, cuts.resolve_cuts(whole, where, pool), pool)
    pools = {tap.cut: cuts.Pool(tap.pool, tap.prefix_tokens) for tap in layout}
    pixels = torch.randint(256, (3, *[whole.preprocessing.crop] * 2, 3), dtype=torch.uint8)
    with torch.inference_mode():
        x = Normalize(whole.preprocessing)(pixels)
        expected = torch.cat([pools[cut](cuts.split(whole, cut)[0](x)) for cut in pools], 1)
        for boundary in boundaries:
            resolved = cuts.resolve(whole, boundary)
            prefix, suffix = cuts.prefix_and_suffix(whole, resolved, pools)
            row = prefix.module(pixels)
            torch.testing.assert_close(suffix(row), expected, rtol=1e-4, atol=1e-5)  # a row has no memory format
            n_before = sum(cuts._depths(whole)[tap.cut] <= cuts._depths(whole)[resolved] for tap in layout)
            is_end = n_before == len(layout)
            assert row.ndim == 2 or n_before == 0
            assert [*prefix.taps] == [tap.cut for tap in layout[: n_before - is_end]]
            before, between = (count_parameters(part) for part in (prefix.module, suffix))
            base = cuts.split(whole, layout[-1].cut)[0]
            assert (before, before + between) == (
                count_parameters(cuts.split(whole, resolved)[0]) if boundary != "none" else 0,
                count_parameters(base),
            )


@pytest.mark.parametrize("boundary", ["none", "features.0", "features.2", "classifier.0", "all"])
def test_layers_that_work_in_place_leave_the_features_before_them_alone(boundary: str) -> None:
    network = VGG([4, "M", 6, 6, "M"], 6 * 2 * 2)
    network.classifier[1] = nn.ReLU(inplace=True)  # as in torchvision; those of `features` are
    whole = wrap(network)
    layout = cuts.lay_out(whole, ["features.0", "features.3", "classifier.0", "all"], "flatten")
    pools = {tap.cut: cuts.Pool(tap.pool, tap.prefix_tokens) for tap in layout}
    pixels = torch.randint(256, (3, 8, 8, 3), dtype=torch.uint8)
    with torch.inference_mode():
        x = Normalize(whole.preprocessing)(pixels)
        expected = torch.cat([pools[cut](cuts.split(whole, cut)[0](x.clone())) for cut in pools], 1)
        prefix, suffix = cuts.prefix_and_suffix(whole, boundary, pools)
        torch.testing.assert_close(suffix(prefix.module(pixels)), expected)
    assert (expected[:, : layout[0].width] < 0).any()


def test_nothing_can_be_frozen_behind_the_last_of_several_cuts() -> None:
    pools = {"maxpool": cuts.Pool("avg", 0), "layer2.1.relu_1": cuts.Pool("avg", 0)}
    with pytest.raises(ValueError, match=r"^layer3\.0\.add lies behind layer2\.1\.relu_1, where the backbone ends$"):
        cuts.prefix_and_suffix(backbone(RESNET), "layer3.0.add", pools)


@cache
def load(name: str, size: int) -> Backbone:
    return backbones.load(BackboneChoice.of(name, "random", 0), size)


def shape_at(whole: Backbone, cut: str) -> tuple[str, tuple[int, ...]]:
    """The name of the cut point, and the shape of one image's features there."""
    name = cuts.resolve(whole, cut)
    return name, tuple(cuts.split(whole, name)[0](images(whole, 1)).shape[1:])


CLS, NO_CLS = ["none", "avg", "flatten", "cls", "cls+avg"], ["none", "avg", "flatten"]
VIT_DINOV3 = "timm/vit_small_patch16_dinov3"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "cut", "n_prefix", "poolings"),
    [
        (VIT, 64, "norm", 1, CLS),
        (VIT, 64, "patch_embed", 0, NO_CLS),  # before the class token
        (VIT, 64, "patch_embed.flatten", 0, ["none", "flatten"]),  # 192 channels of 16 tokens
        ("timm/deit_tiny_distilled_patch16_224", 32, "blocks.3", 2, CLS),  # and a token for distillation
        (VIT_DINOV3, 64, "norm", 5, CLS),  # and four registers
        (VIT_DINOV3, 64, "getitem_7", 0, NO_CLS),  # cut off again, for the average
        ("timm/vit_small_patch14_reg4_dinov2", 28, "norm", 5, CLS),
        ("timm/test_vit2", 160, "norm", 1, NO_CLS),  # one register, no class token
        ("timm/test_vit3", 160, "attn_pool.add", 0, NO_CLS),  # one token, pooled by attention
        ("timm/convit_tiny", 64, "blocks.9", 0, NO_CLS),  # the class token comes after ten blocks
        ("timm/convit_tiny", 64, "blocks.10", 1, CLS),
        ("timm/swin_tiny_patch4_window7_224", 64, "layers.2", 0, NO_CLS),  # maps, channels last
        ("timm/swin_tiny_patch4_window7_224", 64, "layers.1.downsample.reshape", 0, ["none", "flatten"]),
        (RESNET, 64, "layer3", 0, NO_CLS),
        (RESNET, 64, "flatten", 0, ["none"]),
    ],
)
def test_what_can_be_pooled_is_found_by_the_tokens_that_the_network_adds(
    name: str, size: int, cut: str, n_prefix: int, poolings: list[str]
) -> None:
    whole = load(name, size)
    point, shape = shape_at(whole, cut)
    for pool in CLS:
        if pool in poolings:
            assert cuts.count_prefix_tokens(whole, point, shape, pool) == n_prefix
            assert cuts.Pool(pool, n_prefix)(torch.zeros(2, *shape)).ndim == (2 if pool != "none" else 1 + len(shape))
            continue
        with pytest.raises(ValueError, match=rf"^params\.yaml: features\.pool: {re.escape(pool)}, but ") as error:
            cuts.count_prefix_tokens(whole, point, shape, pool)
        assert f"; expected {', '.join(poolings)}" in str(error.value)
        assert is_one_line(error)


def test_tokens_of_torchvision_are_counted_too() -> None:
    whole = torchvision_vit()
    point, shape = shape_at(whole, "encoder.ln")
    assert shape == (5, 8)
    assert cuts.count_prefix_tokens(whole, point, shape, "cls+avg") == 1


@pytest.mark.parametrize(("name", "size", "own"), [(VIT, 64, "token"), (VIT_DINOV3, 64, "avg")])
def test_pooled_tokens_are_those_of_timm(name: str, size: int, own: str) -> None:
    whole = load(name, size)
    point, shape = shape_at(whole, "norm")
    tokens = cuts.split(whole, point)[0](images(whole))
    pool = cast(Callable[..., torch.Tensor], whole.module.pool)
    for kind, theirs in (("cls", "token"), ("avg", "avg")):
        found = cuts.Pool(kind, cuts.count_prefix_tokens(whole, point, shape, kind))(tokens)
        torch.testing.assert_close(found, pool(tokens, pool_type=theirs))
        assert torch.allclose(found, whole.module(images(whole))) == (theirs == own), "what `cut: all` gives"


@pytest.mark.parametrize(
    ("name", "pool", "instead"),
    [
        (VIT, "cls+avg", ", or an earlier cut, such as norm.layer_norm"),
        (VIT_DINOV3, "cls", ", or an earlier cut, such as norm.layer_norm"),
        ("timm/test_vit2", "avg", ", or an earlier cut, such as norm"),
        ("timm/test_vit2", "cls", ""),
        (RESNET, "avg", ", or an earlier cut, such as layer4.1.relu_1"),
        (RESNET, "cls", ""),
    ],
)
def test_vectors_are_not_pooled_and_the_error_names_the_last_cut_that_would_do(
    name: str, pool: str, instead: str
) -> None:
    whole = load(name, 160 if name.endswith("vit2") else 64)
    with pytest.raises(ValueError, match="features") as error:
        cuts.count_prefix_tokens(whole, "all", (whole.feature_dim,), pool)
    expected = f"params.yaml: features.pool: {pool}, but features.cut gives vectors; expected none{instead}"
    assert str(error.value) == expected
    if instead:
        point, shape = shape_at(whole, instead.rpartition(" ")[2])
        cuts.count_prefix_tokens(whole, point, shape, pool)
