"""Cut points: find them by tracing, and split a network at one into a prefix and a suffix.

A cut point is a node of the traced graph (torch.fx; Reed et al. 2022, "torch.fx: practical program
capture and transformation for deep learning in Python") behind which exactly one value is still
alive, so that suffix(prefix(x)) is the network.
"""

import difflib
import inspect
from dataclasses import dataclass

from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.fx.node import Argument, map_arg
from torchvision.models.feature_extraction import NodePathTracer


@dataclass(frozen=True)
class _Trace:
    graph: fx.Graph
    names: dict[fx.Node, str]  # compute nodes, named after the module they lie in: layer3.0.add


def split(network: nn.Module, name: str, freeze_until: str) -> tuple[nn.Module, nn.Module]:
    """Prefix and suffix of `network` (called `name` in errors), which share its modules.

    `freeze_until`: none (the prefix is empty), all (the suffix is empty), a cut point, or a module
    path, which stands for the last cut point inside that module. ValueError names the nearest ones.
    """
    if freeze_until == "none":
        return nn.Identity(), network
    if freeze_until == "all":
        return network, nn.Identity()
    trace = _trace(network, name)
    found = {trace.names[node]: node for node in _cut_nodes(network, trace.graph)}
    inside = [cut for cut in found if cut == freeze_until or cut.startswith((f"{freeze_until}.", f"{freeze_until}_"))]
    if not inside:
        paths = {cut.rsplit(".", depth)[0] for cut in found for depth in range(3)} | found.keys()
        near = difflib.get_close_matches(freeze_until, sorted(paths), n=3, cutoff=0.3)
        ends = f"{next(iter(found))}, …, {list(found)[-1]}" if found else "none at all"
        raise ValueError(
            f"freeze_until: {freeze_until!r} holds no cut point of {name}; nearest: "
            f"{', '.join(near) or 'none'}; cut points: {ends}"
        )
    return _divide(network, trace.graph, found[inside[-1]])


def find(network: nn.Module, name: str) -> list[str]:
    """Names of all cut points, from the input to the output."""
    trace = _trace(network, name)
    return [trace.names[node] for node in _cut_nodes(network, trace.graph)]


def _trace(network: nn.Module, name: str) -> _Trace:
    tracer = NodePathTracer(
        autowrap_functions=tuple(get_notrace_functions()),
        leaf_modules=[*get_notrace_modules(), *_mode_readers(network)],
    )
    was_training = network.training
    try:
        graph = tracer.trace(network.eval())
    # Tracing runs the network's own forward on stand-ins, which can raise anything
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} cannot be traced, so it cannot be cut ({reason}); expected `freeze_until` none "
            "or all, or another network"
        ) from None
    finally:
        network.train(was_training)
    _drop_optional_inputs(graph)
    return _Trace(graph, {node: path for node, path in tracer.node_to_qualname.items() if path})


def _drop_optional_inputs(graph: fx.Graph) -> None:
    """Put their defaults in place of arguments of `forward` that nobody passes (attn_mask=None)."""
    _, *optional = [node for node in graph.nodes if node.op == "placeholder"]
    for node in optional:
        default = node.args[0] if node.args else None

        def replaced(argument: Argument, node: fx.Node = node, default: Argument = default) -> Argument:
            return default if argument is node else argument

        for user in list(node.users):
            user.args = map_arg(user.args, replaced)
            user.kwargs = map_arg(user.kwargs, replaced)
        graph.erase_node(node)


def _mode_readers(network: nn.Module) -> list[type[nn.Module]]:
    """Types of leaf modules that read `self.training`: traced through, the mode would be baked in."""
    childless = {type(module) for module in network.modules() if not any(module.children())}
    return [kind for kind in childless if "self.training" in inspect.getsource(kind.forward)]


def _cut_nodes(network: nn.Module, graph: fx.Graph) -> list[fx.Node]:
    """Nodes behind which one value is alive and which part the parameters cleanly in two."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    position = {node: i for i, node in enumerate(nodes)}
    source = next(node for node in graph.nodes if node.op == "placeholder")
    last_use = {
        node: max((position.get(user, len(nodes)) for user in node.users), default=-1) for node in [source, *nodes]
    }
    owners = [_parameters_read(network, node) for node in nodes]
    seen_later = [set() for _ in range(len(nodes) + 1)]
    for i in reversed(range(len(nodes))):
        seen_later[i] = seen_later[i + 1] | owners[i]
    cuts, alive, seen = [], {source}, set()
    for i, node in enumerate(nodes):
        alive = {value for value in alive | {node} if last_use[value] > i}
        seen |= owners[i]
        if alive == {node} and not seen & seen_later[i + 1]:
            cuts.append(node)
    return cuts


def _parameters_read(network: nn.Module, node: fx.Node) -> set[int]:
    """Identities of the parameters and buffers that a node reads, also through get_attr."""
    read = {id(_attribute(network, str(source.target))) for source in node.all_input_nodes if source.op == "get_attr"}
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        read |= {id(value) for value in (*module.parameters(), *module.buffers())}
    return read


def _attribute(network: nn.Module, path: str) -> object:
    parent, _, name = path.rpartition(".")
    return getattr(network.get_submodule(parent), name)


def _divide(network: nn.Module, graph: fx.Graph, cut: fx.Node) -> tuple[nn.Module, nn.Module]:
    before, after = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    attributes: dict[fx.Node, fx.Node] = {}
    target, is_behind = before, False

    def copied(node: fx.Node) -> fx.Node:
        if node.op == "get_attr":  # fetched on whichever side reads it
            if node not in attributes:
                attributes[node] = target.node_copy(node)
            return attributes[node]
        return copies[node]

    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        copies[node] = target.node_copy(node, copied)
        if node is cut and not is_behind:
            before.output(copies[node])
            attributes.clear()
            target, is_behind = after, True
            copies = {node: after.placeholder("boundary")}
    return fx.GraphModule(network, before), fx.GraphModule(network, after)
