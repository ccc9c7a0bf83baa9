"""Cut points: find them by tracing, and split a network at one into a prefix and a suffix.

A cut point is a node of the traced graph (torch.fx; Reed et al. 2022, "torch.fx: practical program capture and
transformation for deep learning in Python") behind which one value is alive, so that suffix(prefix(x)) is the network.
"""

import difflib
import inspect
import re

from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.fx.node import Argument, map_arg
from torchvision.models.feature_extraction import NodePathTracer


def find(network: nn.Module, name: str) -> dict[str, fx.Node]:
    """Cut points of `network` (called `name` in errors) from input to output, as nodes of one traced graph.

    Their names are module paths, with the operation where a module's own forward computes: layer3.0.add.
    """
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
        raise ValueError(f"{name} cannot be traced, so it can be frozen only whole or not at all ({reason})") from None
    finally:
        network.train(was_training)
    _drop_optional_inputs(graph)
    return {tracer.node_to_qualname[node]: node for node in _cut_nodes(network, graph)}


def split(network: nn.Module, name: str, freeze_until: str) -> tuple[nn.Module, nn.Module]:
    """Prefix and suffix of `network`, which share its modules; ValueError names what would do.

    `freeze_until`: none (the prefix is empty), all (the suffix is empty), a cut point, or a module path, which stands
    for the last cut point inside that module.
    """
    if freeze_until == "none":
        return nn.Identity(), network
    if freeze_until == "all":
        return network, nn.Identity()
    found = find(network, name)
    # A module called again is layer1_1; layer10 is another one
    within = re.compile(rf"{re.escape(freeze_until)}(\.|(_\d+)?$)")
    inside = [cut for cut in found if within.match(cut)]
    if not inside:
        paths = {cut.rsplit(".", depth)[0]: None for cut in found for depth in (0, 1, 2)}
        near = ", ".join(difflib.get_close_matches(freeze_until, paths, n=3, cutoff=0.3)) or "none"
        ends = f"{next(iter(found))}, …, {next(reversed(found))}" if found else "none"
        raise ValueError(f"{freeze_until!r} holds no cut point of {name}; nearest: {near}; cut points: {ends}")
    return _divide(network, found[inside[-1]])


def _mode_readers(network: nn.Module) -> list[type[nn.Module]]:
    """Types of leaf modules that read `self.training`: traced through, the mode would be baked in."""
    leaves = {type(module) for module in network.modules() if not any(module.children())}
    return [leaf for leaf in leaves if "self.training" in inspect.getsource(leaf.forward)]


def _drop_optional_inputs(graph: fx.Graph) -> None:
    """Put their defaults in place of arguments of `forward` that nobody passes (attn_mask=None)."""
    _, *optional = [node for node in graph.nodes if node.op == "placeholder"]
    for node in optional:

        def replaced(argument: Argument, node: fx.Node = node) -> Argument:
            return (node.args[0] if node.args else None) if argument is node else argument

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


def _divide(network: nn.Module, cut: fx.Node) -> tuple[nn.Module, nn.Module]:
    prefix, suffix = fx.Graph(), fx.Graph()
    target, copies = prefix, {}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # a get_attr, which moves to where it is read
            copies[node] = target.node_copy(node)
        return copies[node]

    for node in cut.graph.nodes:
        if node.op == "get_attr":
            continue
        copies[node] = target.node_copy(node, copied)
        if node is cut:
            prefix.output(copies[node])
            target, copies = suffix, {node: suffix.placeholder("boundary")}
    return fx.GraphModule(network, prefix), fx.GraphModule(network, suffix)
