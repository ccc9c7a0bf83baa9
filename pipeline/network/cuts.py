"""Cut points, at which a network can be frozen: name them, describe them, and split a network at them."""

import difflib
import re
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import get_args

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from pipeline.network.backbones import Backbone
from pipeline.network.preprocessing import Normalize
from pipeline.network.tracing import Meter, divide, find, tensors_read
from pipeline.params import Pooling

NONE, ALL = "none", "all"  # the boundaries before the first layer and behind the last, for which nothing is traced
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
PREFIX_TOKENS = re.compile(r"(cls|class|dist|distillation|reg|register)_tokens?\d*")  # names of parameters


@dataclass(frozen=True)
class CutPoint:
    """What lies before a cut point, and what caching there takes.

    `shape` of one image's activation; `weight_layers_before`: convolution and linear layers; `flops_before`: for one
    image, two per multiply-add; `bytes_per_image`: of one view in the store.
    """

    name: str
    shape: tuple[int, ...]
    params_before: int
    weight_layers_before: int
    flops_before: int
    bytes_per_image: int


class Pool(nn.Module):
    """Pooling of the features at the end of the base: none, avg, flatten, cls or cls+avg (see params.yaml).

    Of tokens, the first `prefix_tokens` are a class token and registers; avg leaves them out.
    """

    def __init__(self, kind: str, prefix_tokens: int) -> None:
        super().__init__()
        self.kind, self.prefix_tokens = kind, prefix_tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, *shape) -> (n, *shape) or, pooled, (n, d); `count_prefix_tokens` checks the shape.

        Views are square, so that the two equal sides of a map are its pixels, behind the channels or before them.
        """
        if self.kind == "none":
            return x
        if self.kind == "flatten":
            return x.flatten(1)
        if self.kind == "cls":
            return x[:, 0]
        if x.ndim == 3:
            mean = x[:, self.prefix_tokens :].mean(1)
            return torch.cat((x[:, 0], mean), 1) if self.kind == "cls+avg" else mean
        is_channels_last = x.shape[1] == x.shape[2] != x.shape[3]
        return x.flatten(1, -2).mean(1) if is_channels_last else x.flatten(2).mean(2)


@dataclass(frozen=True)
class Prefix:
    """The frozen part of `backbone`: `module` maps uint8 images (n, crop, crop, 3) to the activations at `boundary`.

    `pool` is the kind of pooling at its end.
    """

    module: nn.Sequential
    backbone: Backbone
    boundary: str
    pool: str


def resolve(backbone: Backbone, where: str | int) -> str:
    """The name of a cut point, or none or all; ValueError lists the nearest names or numbers.

    `where`: none, all, a cut point, a module path (the last cut point inside that module), or a whole number N (the
    last cut point with exactly N convolution and linear layers before it).
    """
    if where in (NONE, ALL):
        return str(where)
    found = find(backbone)
    if not found:
        raise ValueError(f"{backbone.name} has no cut point: it can be frozen only whole or not at all")
    if where in found:
        return str(where)
    if isinstance(where, int):
        depths = {name: _count_layers(backbone.module, read) for name, read in _tensors_before(backbone).items()}
        inside = [name for name in found if depths[name] == where]
        near = ", ".join(map(str, sorted(sorted(set(depths.values()), key=lambda n: abs(n - where))[:3])))
    else:
        # A module that is called again is layer1_1; layer10 is another one
        within = re.compile(rf"{re.escape(where)}(\.|(_\d+)?$)")
        inside = [name for name in found if within.match(name)]
        paths = {name.rsplit(".", depth)[0]: None for name in found for depth in (0, 1, 2)}
        near = ", ".join(difflib.get_close_matches(where, paths, n=3, cutoff=0.3))
    if not inside:
        raise ValueError(
            (
                f"no cut point of {backbone.name} has exactly {where} convolution and linear layers before it"
                if isinstance(where, int)
                else f"{where!r} holds no cut point of {backbone.name}"
            )
            + f"; nearest: {near or 'none'}; cut points: {next(iter(found))}, …, {next(reversed(found))} "
            f"(python -m pipeline cuts {backbone.name})"
        )
    return inside[-1]


def split(backbone: Backbone, *boundaries: str) -> list[nn.Module]:
    """The network in pieces, one more than boundaries, which are names as `resolve` gives them, in order of depth.

    The pieces share the network's modules, whose names they keep; a piece between equal boundaries is the identity.
    Raises ValueError if the order is wrong.
    """
    cuts = [name for name in boundaries if name not in (NONE, ALL)]
    found = list(find(backbone)) if cuts else []
    depth = {NONE: -1, **{name: i for i, name in enumerate(found)}, ALL: len(found)}
    for first, second in pairwise(boundaries):
        if depth[first] > depth[second]:
            raise ValueError(f"{first} lies behind {second}, where the backbone ends")
    pieces = divide(backbone.module, [find(backbone)[name] for name in cuts]) if cuts else [backbone.module]
    n_none, n_all = boundaries.count(NONE), boundaries.count(ALL)
    return [*(nn.Identity() for _ in range(n_none)), *pieces, *(nn.Identity() for _ in range(n_all))]


def prefix_and_suffix(backbone: Backbone, boundary: str, cut: str, pool: Pool) -> tuple[Prefix, nn.Sequential]:
    """The prefix before the freeze boundary, and the suffix between it and the end of the base.

    The base ends at `cut` with the pooling `pool`, which is part of the prefix if the boundary is there too, else of
    the suffix. Raises ValueError if the boundary lies behind the cut.
    """
    before, between, _ = split(backbone, boundary, cut)
    pools = (pool, Pool(NONE, 0)) if boundary == cut else (Pool(NONE, 0), pool)
    module = nn.Sequential(Normalize(backbone.preprocessing), before, pools[0])
    return Prefix(module, backbone, boundary, pools[0].kind), nn.Sequential(between, pools[1])


def count_prefix_tokens(backbone: Backbone, cut: str, shape: tuple[int, ...], pool: str) -> int:
    """How many tokens stand before those of the patches in features of `shape` at `cut`; 0 if they are no tokens.

    Raises ValueError if the pooling `pool` does not go with such features.
    """
    poolings, n = _poolings(backbone.module, set() if cut == ALL else _tensors_before(backbone)[cut], shape)
    if pool in poolings:
        return n
    earlier = _cut_for(pool, backbone)
    raise ValueError(
        f"params.yaml: features.pool: {pool}, but features.cut gives "
        + ("vectors" if len(shape) == 1 else f"features of {'x'.join(map(str, shape))}")
        + (" without a class token" if pool.startswith("cls") and len(shape) > 1 else "")
        + f"; expected {', '.join(poolings)}"
        + (f", or an earlier cut, such as {earlier}" if earlier else "")
    )


def _cut_for(pool: str, backbone: Backbone) -> str:
    """The last cut point in a module whose features can be pooled so; empty if there is none."""
    try:
        points, before = describe(backbone, 1), _tensors_before(backbone)
    except ValueError:  # it cannot be traced
        return ""
    children = dict(backbone.module.named_children())
    for point in reversed(points):
        is_pooled = len(point.shape) == 1 or sorted(point.shape)[-2] == 1  # by the network itself
        poolings, _ = _poolings(backbone.module, before[point.name], point.shape)
        if pool in poolings and point.name.split(".")[0] in children and not is_pooled:
            return point.name
    return ""


def _poolings(network: nn.Module, read: set[int], shape: tuple[int, ...]) -> tuple[list[str], int]:
    """The poolings that go with features of `shape`, and how many tokens stand before those of the patches.

    Class tokens and registers are parameters, put before the tokens of the patches where the network reads them. It
    may cut some off again; views are square, so the number of patches, a square, tells which are left.
    """
    named = [(name.rpartition(".")[2], value) for name, value in network.named_parameters() if id(value) in read]
    tokens = [(name, value.numel() // value.shape[-1]) for name, value in named if PREFIX_TOKENS.fullmatch(name)]
    sums = {0}
    for _, n in tokens:
        sums |= {n + other for other in sums}
    possible = [n for n in sums if len(shape) == 2 and n < shape[0] and isqrt(shape[0] - n) ** 2 == shape[0] - n]
    n_before = max(possible, default=0)
    is_map = len(shape) == 3 and shape[1] in (shape[0], shape[2])
    has_class_token = n_before > 0 and any(name.startswith("cl") for name, _ in tokens)
    allowed = {"none": True, "avg": is_map or bool(possible), "flatten": len(shape) > 1}
    return [kind for kind in get_args(Pooling) if allowed.get(kind, has_class_token)], n_before


def describe(backbone: Backbone, value_bytes: int) -> list[CutPoint]:
    """Every cut point from input to output, with what lies before it; `value_bytes` of a stored number."""
    found, before = find(backbone), _tensors_before(backbone)
    if not found:
        return []
    meter = Meter(backbone, next(iter(found.values())).graph)
    sizes = {id(parameter): parameter.numel() for parameter in backbone.module.parameters()}
    return [
        CutPoint(
            name=name,
            shape=tuple(meter.values[node].shape[1:]),
            params_before=sum(sizes.get(key, 0) for key in before[name]),
            weight_layers_before=_count_layers(backbone.module, before[name]),
            flops_before=meter.flops[node],
            bytes_per_image=value_bytes * meter.values[node][0].numel(),
        )
        for name, node in found.items()
    ]


def block(network: nn.Module, cut: str) -> str:
    """The block that a cut point lies in: the outermost module on its path that is not just a container."""
    path, module = [], network
    for part in cut.split("."):
        children = dict(module.named_children())
        if part not in children or (path and type(module) not in CONTAINERS):
            break
        path.append(part)
        module = children[part]
    return ".".join(path) or cut


def _tensors_before(backbone: Backbone) -> dict[str, set[int]]:
    """Identities of the parameters and buffers that are read up to each cut point."""
    found, read, before = find(backbone), set(), {}
    names = {node: name for name, node in found.items()}
    for node in next(iter(found.values())).graph.nodes if found else ():
        read |= tensors_read(backbone.module, node)
        if node in names:
            before[names[node]] = set(read)
    return before


def _count_layers(network: nn.Module, tensors: set[int]) -> int:
    layers = (module for module in network.modules() if isinstance(module, (nn.Linear, _ConvNd)))
    return sum(id(layer.weight) in tensors for layer in layers)
