"""Cut points, at which a network can be frozen: name them, describe them, and split a network at them."""

import difflib
import re
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from pipeline.network.backbones import Backbone
from pipeline.network.preprocessing import Normalize
from pipeline.network.tracing import Meter, divide, find, tensors_read

NONE, ALL = "none", "all"  # the boundaries before the first layer and behind the last, for which nothing is traced
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


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
    """Pooling of the features at the end of the base: none, avg (over pixels or tokens), or flatten."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, *shape) -> (n, *shape) or, pooled, (n, d).

        Crops are square, so that the two equal sides of a map are its pixels, behind the channels or before them.
        """
        if self.kind == "none":
            return x
        if x.ndim == 2:
            raise ValueError(f"params.yaml: features.pool: {self.kind}, but features.cut gives vectors; expected none")
        if self.kind == "flatten":
            return x.flatten(1)
        is_channels_last = x.ndim == 3 or (x.shape[1] == x.shape[2] != x.shape[3])
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


def prefix_and_suffix(backbone: Backbone, boundary: str, cut: str, pool: str) -> tuple[Prefix, nn.Sequential]:
    """The prefix before the freeze boundary, and the suffix between it and the end of the base.

    The base ends at `cut` with the pooling `pool`, which is part of the prefix if the boundary is there too, else of
    the suffix. Raises ValueError if the boundary lies behind the cut.
    """
    before, between, _ = split(backbone, boundary, cut)
    pools = (pool, "none") if boundary == cut else ("none", pool)
    module = nn.Sequential(Normalize(backbone.preprocessing), before, Pool(pools[0]))
    return Prefix(module, backbone, boundary, pools[0]), nn.Sequential(between, Pool(pools[1]))


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
