"""Cut points: find them by tracing, describe them, and split a network at them.

A cut point is a node of the traced graph (torch.fx; Reed et al. 2022, "torch.fx: practical program capture and
transformation for deep learning in Python") behind which one value is alive, so that suffix(prefix(x)) is the network.

    python -m pipeline.cuts NAME [--all] [--json]     where NAME can be cut, and what it costs
"""

import argparse
import difflib
import inspect
import json
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from pydantic import ValidationError
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.fx.node import Argument, map_arg
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import NodePathTracer

from pipeline import backbones, engine, logs, manifest
from pipeline.backbones import Backbone
from pipeline.params import PARAMS, STORE_DTYPES, BackboneChoice, load_params

NONE, ALL = "none", "all"  # the boundaries before the first layer and behind the last, for which nothing is traced
N_TIMED = 16  # batches that measure how fast the network runs
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
    """What becomes of the features at the end of the base: none (nothing), avg (over pixels or tokens), flatten."""

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


@lru_cache(maxsize=1)
def find(backbone: Backbone) -> dict[str, fx.Node]:
    """Cut points from input to output, as nodes of one traced graph; ValueError if the network cannot be traced.

    Their names are module paths, with the operation where a module's own forward computes: layer3.0.add.
    """
    network = backbone.module
    tracer = NodePathTracer(
        autowrap_functions=tuple(get_notrace_functions()),
        leaf_modules=[*get_notrace_modules(), *_mode_readers(network)],
    )
    was_training = network.training
    try:
        graph = tracer.trace(network.eval())
        _drop_optional_inputs(graph)
        two, three = (_Meter(backbone, graph, n).values for n in (2, 3))
        _fold_numbers(graph, two, three)
    # Tracing runs the network's own forward on stand-ins, which can raise anything
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{backbone.name} cannot be traced, so it can be frozen only whole or not at all ({reason})"
        ) from None
    finally:
        network.train(was_training)
    return {
        tracer.node_to_qualname[node]: node
        for node in _cut_nodes(network, graph)
        if isinstance(two[node], torch.Tensor) and (len(two[node]), len(three[node])) == (2, 3)  # a row an image
    }


def resolve(backbone: Backbone, where: str | int) -> str:
    """The name of a cut point, or none or all; ValueError names what would do.

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
        depths = {name: _weight_layers(backbone.module, before) for name, before in _tensors_before(backbone).items()}
        inside = [name for name in found if depths[name] == where]
        near = ", ".join(map(str, sorted(sorted(set(depths.values()), key=lambda n: abs(n - where))[:3])))
        problem = f"no cut point of {backbone.name} has exactly {where} convolution and linear layers before it"
    else:
        # A module that is called again is layer1_1; layer10 is another one
        within = re.compile(rf"{re.escape(where)}(\.|(_\d+)?$)")
        inside = [name for name in found if within.match(name)]
        paths = {name.rsplit(".", depth)[0]: None for name in found for depth in (0, 1, 2)}
        near = ", ".join(difflib.get_close_matches(where, paths, n=3, cutoff=0.3)) or "none"
        problem = f"{where!r} holds no cut point of {backbone.name}"
    if not inside:
        ends = f"{next(iter(found))}, …, {next(reversed(found))}"
        raise ValueError(f"{problem}; nearest: {near}; cut points: {ends} (python -m pipeline.cuts {backbone.name})")
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
    pieces = _divide(backbone.module, [find(backbone)[name] for name in cuts]) if cuts else [backbone.module]
    n_none, n_all = boundaries.count(NONE), boundaries.count(ALL)
    return [*(nn.Identity() for _ in range(n_none)), *pieces, *(nn.Identity() for _ in range(n_all))]


def describe(backbone: Backbone, value_bytes: int) -> list[CutPoint]:
    """Every cut point from input to output, with what lies before it; `value_bytes` of a stored number."""
    found, before = find(backbone), _tensors_before(backbone)
    if not found:
        return []
    meter = _Meter(backbone, next(iter(found.values())).graph)
    tensors = {id(parameter): parameter.numel() for parameter in backbone.module.parameters()}
    described = []
    for name, node in found.items():
        shape = tuple(meter.values[node].shape[1:])
        described.append(
            CutPoint(
                name=name,
                shape=shape,
                params_before=sum(tensors.get(key, 0) for key in before[name]),
                weight_layers_before=_weight_layers(backbone.module, before[name]),
                flops_before=meter.flops[node],
                bytes_per_image=value_bytes * torch.Size(shape).numel(),
            )
        )
    return described


def block(network: nn.Module, cut: str) -> str:
    """The block that a cut point lies in: the outermost module on its path that is no mere container."""
    path, module = [], network
    for part in cut.split("."):
        children = dict(module.named_children())
        if part not in children or (path and type(module) not in CONTAINERS):
            break
        path.append(part)
        module = children[part]
    return ".".join(path) or cut


def main() -> None:
    """Print the cut points of a network."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.cuts", description="Where a network can be cut, and what it costs."
    )
    parser.add_argument("name", metavar="NAME", help="torchvision/<name> or timm/<name>")
    parser.add_argument("--all", action="store_true", help="every cut point, not only the last of each block")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    arguments = parser.parse_args()
    try:
        choice = BackboneChoice(name=arguments.name, weights="random", seed=0)
    except ValidationError:
        raise ValueError(f"{arguments.name}: expected torchvision/<name> or timm/<name>") from None
    params = load_params() if PARAMS.is_file() else None
    size = params.features.image_size if params and params.backbone.name == choice.name else None
    backbone = backbones.load(choice, size)
    points = describe(backbone, np.dtype(STORE_DTYPES[params.features.store_dtype if params else "fp32"]).itemsize)
    if not points:
        raise ValueError(f"{choice.name} has no cut point: it can be frozen only whole or not at all")
    if not arguments.all:
        points = list({block(backbone.module, point.name): point for point in points}.values())
    if arguments.json:
        print(json.dumps([asdict(point) for point in points], indent=2))
        return
    n_images = len(manifest.read_images().image_id) if manifest.IMAGES.is_file() else 0
    print(_as_table(backbone, points, n_images))


def _as_table(backbone: Backbone, points: list[CutPoint], n_images: int) -> str:
    """One line a cut point; for a dataset, with what caching one view of it takes."""
    n_params = sum(parameter.numel() for parameter in backbone.module.parameters())
    example = torch.zeros(1, 3, *[backbone.preprocessing.crop] * 2)
    flops = backbones.flops_per_image(backbone.module, example)
    header = ["cut point", "shape", "parameters", "FLOPs", "layers", "kB/image"]
    rows = [
        [
            point.name,
            "x".join(map(str, point.shape)),
            f"{point.params_before / n_params:.1%}" if n_params else "",
            f"{point.flops_before / flops:.1%}" if flops else "",
            f"{point.weight_layers_before}",
            f"{point.bytes_per_image / 1e3:,.1f}",
        ]
        for point in points
    ]
    title = f"{backbone.name}: share of parameters and of FLOPs, and weight layers, before each cut point"
    if n_images:
        rate = _images_per_second(backbone)
        header += ["GB", "minutes"]
        for row, point in zip(rows, points, strict=True):
            minutes = n_images / rate / 60 * point.flops_before / flops
            row += [f"{n_images * point.bytes_per_image / 1e9:.3f}", f"{minutes:.1f}"]
        title += f"; GB and minutes to cache one view of {n_images:,} images, decoding not counted"
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for name, shape, *numbers in [header, *rows]:
        cells = [name.ljust(widths[0]), shape.ljust(widths[1])]
        cells += [number.rjust(width) for number, width in zip(numbers, widths[2:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join([title, "", *lines])


def _images_per_second(backbone: Backbone) -> float:
    """Rate of the whole network in fp32 on this machine, measured on a few batches."""
    device = engine.choose_device("auto")
    network = nn.Sequential(backbones.Normalize(backbone.preprocessing), backbone.module)
    batch = torch.zeros(engine.BATCH[device.type], *[backbone.preprocessing.crop] * 2, 3, dtype=torch.uint8)
    runner = engine.prepare("auto", network, batch, "fp32", device)
    deque(runner.run([batch] * 2), maxlen=0)  # the first batches are slower
    start = time.perf_counter()
    deque(runner.run([batch] * N_TIMED), maxlen=0)
    return len(batch) * N_TIMED / (time.perf_counter() - start)


class _Meter(fx.Interpreter):
    """Runs a graph on `n` black images; keeps each node's value, tensors as stand-ins without data, and the FLOPs."""

    def __init__(self, backbone: Backbone, graph: fx.Graph, n: int = 1) -> None:
        super().__init__(backbone.module, graph=graph)
        self.values: dict[fx.Node, Any] = {}
        self.flops: dict[fx.Node, int] = {}
        self._counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), self._counter:
            self.run(torch.zeros(n, 3, *[backbone.preprocessing.crop] * 2))

    def run_node(self, n: fx.Node) -> object:
        """Run one node and note what it gives."""
        value = super().run_node(n)
        is_tensor = isinstance(value, torch.Tensor) and value.ndim > 0
        self.values[n] = value.to("meta") if is_tensor else value if _is_number(value) else None
        self.flops[n] = self._counter.get_total_flops()
        return value


def _mode_readers(network: nn.Module) -> list[type[nn.Module]]:
    """Types of leaf modules that read `self.training`: traced through, the mode would be baked in."""
    leaves = {type(module) for module in network.modules() if not any(module.children())}
    return [leaf for leaf in leaves if "self.training" in inspect.getsource(leaf.forward)]


def _drop_optional_inputs(graph: fx.Graph) -> None:
    """Put their defaults in place of arguments of `forward` that nobody passes (attn_mask=None)."""
    _, *optional = [node for node in graph.nodes if node.op == "placeholder"]
    for node in optional:
        _replace(graph, node, node.args[0] if node.args else None)


def _fold_numbers(graph: fx.Graph, two: dict[fx.Node, Any], three: dict[fx.Node, Any]) -> None:
    """Put constants in place of numbers that the input size fixes, which would stay alive to the end.

    They are the same in a batch of `two` and of `three` images.
    """
    for node in list(graph.nodes):
        value = two[node]
        is_fixed = _is_number(value) and type(value) is type(three[node]) and value == three[node]
        if is_fixed and node.op in ("call_function", "call_method"):
            _replace(graph, node, cast(Argument, tuple(value) if isinstance(value, tuple) else value))


def _is_number(value: object) -> bool:
    if isinstance(value, tuple) and value:
        return all(map(_is_number, value))
    return isinstance(value, bool | int | float)


def _replace(graph: fx.Graph, node: fx.Node, value: Argument) -> None:
    def replaced(argument: Argument) -> Argument:
        return value if argument is node else argument

    for user in list(node.users):
        user.args, user.kwargs = map_arg(user.args, replaced), map_arg(user.kwargs, replaced)
    graph.erase_node(node)


def _cut_nodes(network: nn.Module, graph: fx.Graph) -> list[fx.Node]:
    """Nodes behind which one value is alive, and that part the parameters in two."""
    nodes = [node for node in graph.nodes if node.op != "get_attr"]  # get_attr is fetched wherever it is read
    position = {node: i for i, node in enumerate(nodes)}
    last_use = [max((position[user] for user in node.users), default=-1) for node in nodes]
    owned = [_tensors_read(network, node) for node in nodes]
    behind = [set() for _ in nodes]  # tensors read after node i
    for i in reversed(range(len(nodes) - 1)):
        behind[i] = behind[i + 1] | owned[i + 1]
    cuts, alive, before = [], set(), set()
    for i, node in enumerate(nodes[:-1]):
        alive = {j for j in alive | {i} if last_use[j] > i}
        before |= owned[i]
        if alive == {i} and node.op != "placeholder" and not before & behind[i]:
            cuts.append(node)
    return cuts


def _tensors_read(network: nn.Module, node: fx.Node) -> set[int]:
    """Identities of the parameters and buffers that a node reads, also through get_attr."""
    read = set()
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            path, _, name = str(source.target).rpartition(".")
            read.add(id(getattr(network.get_submodule(path), name)))
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        read |= {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return read


def _tensors_before(backbone: Backbone) -> dict[str, set[int]]:
    """Identities of the parameters and buffers that are read up to each cut point."""
    found, read, before = find(backbone), set(), {}
    names = {node: name for name, node in found.items()}
    for node in next(iter(found.values())).graph.nodes if found else ():
        read |= _tensors_read(backbone.module, node)
        if node in names:
            before[names[node]] = set(read)
    return before


def _weight_layers(network: nn.Module, tensors: set[int]) -> int:
    layers = (module for module in network.modules() if isinstance(module, (nn.Linear, _ConvNd)))
    return sum(id(layer.weight) in tensors for layer in layers)


def _divide(network: nn.Module, cuts: list[fx.Node]) -> list[nn.Module]:
    """The pieces between the nodes `cuts`, which stand in order."""
    return [fx.GraphModule(network, graph) for graph in _pieces(cuts)]


def _pieces(cuts: list[fx.Node]) -> Iterator[fx.Graph]:
    graph, copies, waiting = fx.Graph(), {}, list(cuts)

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # a get_attr, which moves to where it is read
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in cuts[0].graph.nodes:
        if node.op == "get_attr":
            continue
        copies[node] = graph.node_copy(node, copied)
        while waiting and node is waiting[0]:
            graph.output(copies[node])
            yield graph
            waiting.pop(0)
            graph = fx.Graph()
            copies = {node: graph.placeholder("boundary")}
    yield graph


if __name__ == "__main__":
    logs.run(main)
