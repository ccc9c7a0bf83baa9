"""Cut points, at which a network can be frozen: name them, describe them, and split a network at them.

Features can be taken at several of them in one pass, pooled and concatenated (Evci et al. 2022, "Head2Toe: utilizing
intermediate representations for better transfer learning", arXiv 2201.03529).
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import get_args

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from pipeline.network.backbones import Backbone
from pipeline.network.plans import BackbonePlan, Tap
from pipeline.network.preprocessing import Normalize
from pipeline.network.tracing import Meter, divide, find, tensors_read
from pipeline.params import EVERY_BLOCK, Pooling

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
        # Not of flattened pixels: OpenVINO 2026.4 gives wrong results for that with a standardised head behind it
        return x.mean((1, 2) if is_channels_last else (2, 3))


class Taps(nn.Module):
    """Successive pieces of a network; what comes out of each is pooled to vectors, which are concatenated."""

    def __init__(self, pieces: Sequence[nn.Module], pools: Sequence[Pool]) -> None:
        super().__init__()
        self.pieces, self.pools = nn.ModuleList(pieces), nn.ModuleList(pools)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, *shape) -> (n, d); d is the sum of the widths."""
        found = []
        for piece, pool in zip(self.pieces, self.pools, strict=True):
            x = piece(x)
            found.append(pool(x).clone())  # the next piece may change x in place
        return torch.cat(found, 1)


class Resume(nn.Module):
    """`taps` behind a boundary, from one row: the pooled features before it, then the activation of `shape` there."""

    def __init__(self, taps: Taps, width: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.taps, self.width, self.shape = taps, width, shape

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        """(n, width + prod(shape)) -> (n, width + d); the first `width` features stay as they are."""
        activation = row[:, self.width :].unflatten(1, self.shape)
        return torch.cat((row[:, : self.width], self.taps(activation)), 1)


@dataclass(frozen=True)
class Prefix:
    """The frozen part of `backbone`: `module` maps uint8 images (n, crop, crop, 3) to the activations at `boundary`.

    `pool` is the kind of pooling at its end. `taps`: cut points before it, and kinds of pooling, whose features stand
    before those of the end in one row.
    """

    module: nn.Sequential
    backbone: Backbone
    boundary: str
    pool: str
    taps: Mapping[str, str]


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


def resolve_cuts(backbone: Backbone, where: str | int | tuple[str | int, ...], pool: str) -> list[str]:
    """The names that `features.cut` stands for, in order of depth; ValueError if two of them are the same.

    every_block stands for the blocks that `pool` can make vectors of, and all.
    """
    if where == EVERY_BLOCK:
        return _every_block(backbone, pool)
    if not isinstance(where, tuple):
        return [resolve(backbone, where)]
    entries: dict[str, str | int] = {}
    for entry in where:
        if (name := resolve(backbone, entry)) in entries:
            raise ValueError(f"{entries[name]} and {entry} are the same cut point of {backbone.name}, {name}")
        entries[name] = entry
    return sorted(entries, key=_depths(backbone).__getitem__)


def _every_block(backbone: Backbone, pool: str) -> list[str]:
    """The ends of the blocks that `pool` can make vectors of, and all.

    Where no convolution or linear layer lies between the ends of two blocks (conv1, bn1, relu), the last stands for
    both; before the first layer is none. Left out is where the network flattens maps, and the ends behind which it only
    normalises and pools: `all` is what comes of them. A block of several layers before a normalisation is kept, because
    a transformer may go on with one token only.
    """
    network, before, points = backbone.module, _tensors_before(backbone), describe(backbone, 1)
    modules, kept = dict(network.named_modules()), {}
    of_maps = {0, *(point.weight_layers_before for point in points if len(point.shape) > 1)}
    for name, point in {block(network, point.name): point for point in points}.items():
        depth, is_layer = point.weight_layers_before, name not in modules or not any(modules[name].children())
        is_end = point.params_before == points[-1].params_before
        is_end |= is_layer and depth == points[-1].weight_layers_before
        poolings, _ = _poolings(network, before[point.name], point.shape)
        is_taken = depth > 0 and pool in poolings if len(point.shape) > 1 else depth not in of_maps
        if is_taken and not is_end:
            kept[depth] = point
    if not kept:
        raise ValueError(
            f"{EVERY_BLOCK}: `pool: {pool}` makes vectors of no block of {backbone.name}; expected another, "
            "such as avg, or a list of cuts"
        )
    return [*(point.name for point in kept.values()), ALL]


def lay_out(backbone: Backbone, names: Sequence[str], pool: str) -> tuple[Tap, ...]:
    """The layout of features of the cut points `names`, in order of depth; ValueError if `pool` gives no vector there.

    Vectors stay as they are, whatever `pool` is.
    """
    taps, x, before = [], _black_image(backbone), _tensors_before(backbone)
    for name, piece in zip(names, split(backbone, *names), strict=False):
        with torch.no_grad():
            x = piece(x)
        shape = tuple(x.shape[1:])
        poolings, prefix_tokens = _poolings(backbone.module, before.get(name, set()), shape)
        if len(shape) > 1 and (pool == NONE or pool not in poolings):
            raise ValueError(
                f"params.yaml: features.pool: {pool}, but features.cut has several cuts, and {name} gives features of "
                + "x".join(map(str, shape))
                + (" without a class token" if pool.startswith("cls") else "")
                + f", not a vector; expected {', '.join(poolings[1:])}, or a list without it"
            )
        at = Pool(pool, prefix_tokens) if len(shape) > 1 else Pool(NONE, 0)
        taps.append(Tap(cut=name, pool=at.kind, prefix_tokens=at.prefix_tokens, width=at(x).shape[1]))
    return tuple(taps)


def pools(plan: BackbonePlan) -> dict[str, Pool]:
    """The pooling at each cut point where `plan` takes features, in order of depth; the last one ends the base."""
    if not plan.taps:
        return {plan.cut: Pool(plan.pool, plan.prefix_tokens)}
    return {tap.cut: Pool(tap.pool, tap.prefix_tokens) for tap in plan.taps}


def split(backbone: Backbone, *boundaries: str) -> list[nn.Module]:
    """The network in pieces, one more than boundaries, which are names as `resolve` gives them, in order of depth.

    The pieces share the network's modules, whose names they keep; a piece between equal boundaries is the identity.
    Raises ValueError if the order is wrong.
    """
    depth = _depths(backbone) if {*boundaries} - {NONE, ALL} else {NONE: 0, ALL: 1}
    for first, second in pairwise(boundaries):
        if depth[first] > depth[second]:
            raise ValueError(f"{first} lies behind {second}, where the backbone ends")
    cuts = [name for name in boundaries if name not in (NONE, ALL)]
    pieces = divide(backbone.module, [find(backbone)[name] for name in cuts]) if cuts else [backbone.module]
    n_none, n_all = boundaries.count(NONE), boundaries.count(ALL)
    return [*(nn.Identity() for _ in range(n_none)), *pieces, *(nn.Identity() for _ in range(n_all))]


def _depths(backbone: Backbone) -> dict[str, int]:
    """Numbers that grow from boundary to boundary."""
    return {name: i for i, name in enumerate((NONE, *find(backbone), ALL))}


def prefix_and_suffix(backbone: Backbone, boundary: str, pools: Mapping[str, Pool]) -> tuple[Prefix, nn.Sequential]:
    """The prefix before the freeze boundary, and the suffix between it and the end of the base.

    `pools`: the poolings at the cut points where features are taken, in order of depth. The last one ends the base;
    its pooling is part of the prefix if the boundary is there too, else of the suffix. Of several, those up to the
    boundary are part of the prefix, which gives one row: their features, then the activation at the boundary, which
    the suffix takes apart. Raises ValueError if the boundary lies behind the end.
    """
    if len(pools) > 1:
        return _prefix_and_suffix_of_several(backbone, boundary, pools)
    ((cut, pool),) = pools.items()
    before, between, _ = split(backbone, boundary, cut)
    ends = (pool, Pool(NONE, 0)) if boundary == cut else (Pool(NONE, 0), pool)
    module = nn.Sequential(Normalize(backbone.preprocessing), before, ends[0])
    return Prefix(module, backbone, boundary, ends[0].kind, {}), nn.Sequential(between, ends[1])


def _prefix_and_suffix_of_several(
    backbone: Backbone, boundary: str, pools: Mapping[str, Pool]
) -> tuple[Prefix, nn.Sequential]:
    names, kinds, depth = [*pools], [*pools.values()], _depths(backbone)
    n = sum(depth[name] <= depth[boundary] for name in names)
    pieces = split(backbone, *names[:n], boundary, *names[n:], names[-1])
    normalize, before, behind = Normalize(backbone.preprocessing), pieces[:n], pieces[n + 1 : len(names) + 1]
    if n == 0:
        prefix = Prefix(nn.Sequential(normalize, pieces[0], Pool(NONE, 0)), backbone, boundary, NONE, {})
        return prefix, nn.Sequential(Taps(behind, kinds))
    if n == len(names):
        module, taps = nn.Sequential(normalize, Taps(before, kinds)), {name: pools[name].kind for name in names[:-1]}
        return Prefix(module, backbone, boundary, kinds[-1].kind, taps), nn.Sequential(nn.Identity())
    with torch.no_grad():
        x = _black_image(backbone)
        width = Taps(before, kinds[:n])(x).shape[1]
        shape = tuple(nn.Sequential(*pieces[: n + 1])(x).shape[1:])
    end, taps = Pool("flatten", 0), {name: pools[name].kind for name in names[:n]}
    module = nn.Sequential(normalize, Taps([*before, pieces[n]], [*kinds[:n], end]))
    suffix = nn.Sequential(Resume(Taps(behind, kinds[n:]), width, shape))
    return Prefix(module, backbone, boundary, end.kind, taps), suffix


def _black_image(backbone: Backbone) -> torch.Tensor:
    """One image as the network takes it: float32 (1, 3, crop, crop)."""
    return torch.zeros(1, 3, *[backbone.preprocessing.crop] * 2)


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
    """The block that a cut point lies in: the outermost module on its path that is not just a container.

    A module with more than nine tenths of all convolution and linear layers, such as an encoder, is a container, too.
    """
    path, module, everything = [], network, {*map(id, network.parameters())}
    for part in cut.split("."):
        children = dict(module.named_children())
        is_container = type(module) in CONTAINERS or (
            _count_layers(module, everything) > 0.9 * _count_layers(network, everything)
        )
        if part not in children or (path and not is_container):
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
