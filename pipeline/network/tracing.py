"""Trace a network (torch.fx), find the nodes at which it can be cut in two, and divide it at them.

A cut point is a node of the traced graph behind which one value is alive, so that suffix(prefix(x)) is the network
(torch.fx; Reed et al. 2022, "torch.fx: practical program capture and transformation for deep learning in Python").
"""

import inspect
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.node import Argument, map_arg

from pipeline.logs import one_line, raise_if_of_machine
from pipeline.network.backbones import Backbone
from pipeline.network.flops import counting_flops


@lru_cache(maxsize=1)
def find(backbone: Backbone) -> dict[str, fx.Node]:
    """Cut points from input to output, as nodes of one traced graph; ValueError if the network cannot be traced.

    Their names are module paths, with the operation where a module's own forward computes: layer3.0.add.
    """
    from torchvision.models.feature_extraction import NodePathTracer

    network = backbone.module
    functions, leaves = _untraced(backbone.name)
    tracer = NodePathTracer(autowrap_functions=functions, leaf_modules=[*leaves, *_mode_readers(network)])
    was_training = network.training
    try:
        graph = tracer.trace(network.eval())
        _drop_optional_inputs(graph)
        two, three = (Meter(backbone, graph, n).values for n in (2, 3))
        _fold_numbers(graph, two, three)
    # Tracing calls the network's forward with proxies instead of tensors, which can raise errors of any type
    except Exception as error:
        raise_if_of_machine(error)
        raise ValueError(
            f"{backbone.name} cannot be traced, so it can be frozen only whole or not at all ({one_line(error)})"
        ) from None
    finally:
        network.train(was_training)
    return {
        tracer.node_to_qualname[node]: node
        for node in _cut_nodes(network, graph)
        if isinstance(two[node], torch.Tensor) and (len(two[node]), len(three[node])) == (2, 3)  # one row per image
    }


def divide(network: nn.Module, cuts: list[fx.Node]) -> list[nn.Module]:
    """The pieces between the nodes `cuts`, which stand in order."""
    return [fx.GraphModule(network, graph) for graph in _pieces(cuts)]


def tensors_read(network: nn.Module, node: fx.Node) -> set[int]:
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


class Meter(fx.Interpreter):
    """Run a graph on `n` black images; `values` of the nodes (tensors without data), and `flops` up to each node."""

    def __init__(self, backbone: Backbone, graph: fx.Graph, n: int = 1) -> None:
        super().__init__(backbone.module, graph=graph)
        self.values: dict[fx.Node, Any] = {}
        self.flops: dict[fx.Node, int] = {}
        with torch.no_grad(), counting_flops() as self._counter:
            self.run(torch.zeros(n, 3, *[backbone.preprocessing.crop] * 2))

    def run_node(self, n: fx.Node) -> object:
        """Run one node and record its value and the FLOPs so far."""
        value = super().run_node(n)
        is_tensor = isinstance(value, torch.Tensor) and value.ndim > 0
        self.values[n] = value.to("meta") if is_tensor else value if _is_number(value) else None
        self.flops[n] = self._counter.get_total_flops()
        return value


def _untraced(name: str) -> tuple[tuple[Any, ...], list[type[nn.Module]]]:
    """Functions and modules of timm that torch.fx cannot trace."""
    if not name.startswith("timm/"):
        return (), []
    from timm.models._features_fx import get_notrace_functions, get_notrace_modules

    return tuple(get_notrace_functions()), get_notrace_modules()


def _mode_readers(network: nn.Module) -> list[type[nn.Module]]:
    """Types of leaf modules that read `self.training`; if they were traced, their mode would become a constant."""
    leaves = {type(module) for module in network.modules() if not any(module.children())}
    return [leaf for leaf in leaves if "self.training" in inspect.getsource(leaf.forward)]


def _drop_optional_inputs(graph: fx.Graph) -> None:
    """Replace optional arguments of `forward` (attn_mask=None) by their defaults."""
    _, *optional = [node for node in graph.nodes if node.op == "placeholder"]
    for node in optional:
        _replace(graph, node, node.args[0] if node.args else None)


def _fold_numbers(graph: fx.Graph, two: dict[fx.Node, Any], three: dict[fx.Node, Any]) -> None:
    """Replace numbers that depend on the image size alone by constants; as nodes they would stay alive to the end.

    They are the numbers that have the same value in a batch of `two` and of `three` images.
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
    """Nodes behind which one value is alive, and before and behind which different parameters are used."""
    nodes = [node for node in graph.nodes if node.op != "get_attr"]  # a get_attr node moves to where it is read
    position = {node: i for i, node in enumerate(nodes)}
    last_use = [max((position[user] for user in node.users), default=-1) for node in nodes]
    owned = [tensors_read(network, node) for node in nodes]
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


def _pieces(cuts: list[fx.Node]) -> Iterator[fx.Graph]:
    graph, copies, waiting = fx.Graph(), {}, list(cuts)

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # a get_attr node
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
