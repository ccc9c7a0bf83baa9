"""A name and a choice of weights -> Backbone: a pretrained network without its classification layer.

Names are torchvision/<name> or timm/<name>. The weights decide the preprocessing.
"""

import difflib
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.logs import is_out_of_memory, one_line
from pipeline.network.plans import BackbonePlan
from pipeline.network.preprocessing import Preprocessing
from pipeline.network.weights import WEIGHTS, bundled_state, load_state, read_state
from pipeline.params import BackboneChoice

AUXILIARY = ("AuxLogits", "aux1", "aux2")  # classifiers of Inception and GoogLeNet that serve training only


@dataclass(frozen=True)
class Backbone:
    """`module`: float32 (n, 3, crop, crop) -> (n, feature_dim), in evaluation mode, nothing trainable.

    `weights_sha256` digests the names and bytes of all its tensors; `feature_dim` is measured, not looked up. `licence`
    of the weights, where the library states it.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    weights_sha256: str
    feature_dim: int
    licence: str | None


def load(choice: BackboneChoice, image_size: int | None) -> Backbone:
    """Build the network and load its weights; ValueError in one line if name, weights or size do not fit."""
    library, _, name = choice.name.partition("/")
    build = _build_torchvision if library == "torchvision" else _build_timm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(choice.seed)
        network, geometry, dropped, licence = build(name, choice.weights == "default", image_size)
    if choice.weights not in ("default", "random"):
        state = network.state_dict()
        is_file = choice.weights != "bundled"
        state = read_state(choice.weights, state) if is_file else bundled_state(choice.name, state)
        load_state(network, state, dropped, f"{WEIGHTS / choice.weights}" if is_file else "bundled")
    _remove(network, dropped)
    network.eval().requires_grad_(False)
    if image_size is not None:
        resize = tuple(round(side * image_size / geometry.crop) for side in geometry.resize)
        geometry = geometry.model_copy(update={"resize": resize, "crop": image_size})
    width = _measure_width(choice.name, network, geometry.crop)
    is_published = choice.weights in ("default", "bundled")
    return Backbone(choice.name, network, geometry, state_sha256(network), width, licence if is_published else None)


def load_planned(plan: BackbonePlan, source: str) -> Backbone:
    """Load the backbone of `plan` again; ValueError, naming `source`, if its weights have changed."""
    backbone = load(plan.choice, plan.image_size)
    if backbone.weights_sha256 != plan.weights_sha256:
        raise ValueError(
            f"{source}: made with other weights of {plan.choice.name} than `weights: {plan.choice.weights}` gives now; "
            "run: dvc repro"
        )
    return backbone


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, trainable or not; buffers are not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def state_sha256(module: nn.Module) -> str:
    """SHA-256 (hex) of the names, types, shapes and bytes of a module's parameters and buffers."""
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


Built = tuple[nn.Module, Preprocessing, list[str], str | None]  # … the paths of the layers to remove, and the licence


def _build_torchvision(name: str, pretrained: bool, _size: int | None) -> Built:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    published = torchvision.models.get_model_weights(name)["DEFAULT"]
    # torchvision sets these itself when it loads the published weights of the two networks
    special = {"transform_input": True, "aux_logits": True, "init_weights": False}
    options = special if name in ("inception_v3", "googlenet") and not pretrained else {}
    try:
        network = torchvision.models.get_model(name, weights=published if pretrained else None, **options)
    except (OSError, RuntimeError) as error:  # RuntimeError: the file has another digest
        if is_out_of_memory(error):
            raise
        raise _unreachable(f"torchvision/{name}", error) from None
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
    return network, geometry, [last, *(path for path in AUXILIARY if hasattr(network, path))], None


def _build_timm(name: str, pretrained: bool, size: int | None) -> Built:
    import timm
    from timm.data.config import resolve_data_config

    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError:  # timm has the network, but not these weights
        raise _unknown("timm", name, timm.list_pretrained()) from None
    options: dict[str, Any] = {"img_size": size} if size and published and published.fixed_input_size else {}
    try:
        network = timm.create_model(name, pretrained=pretrained, **options)
    # The hub's client raises errors of several libraries (httpx, huggingface_hub, OSError)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if not pretrained or isinstance(error, AssertionError | TypeError):
            raise ValueError(f"params.yaml: backbone.name: timm/{name} cannot be built ({one_line(error)})") from None
        raise _unreachable(f"timm/{name}", error) from None
    config = resolve_data_config({}, model=network)
    if config["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"timm/{name}: its weights need crop mode {config['crop_mode']!r}, which is not supported")
    side = int(config["input_size"][1] / config["crop_pct"])
    geometry = Preprocessing(
        resize=(side, side) if config["crop_mode"] == "squash" else (side,),
        crop=config["input_size"][1],
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
    classifier = (published.classifier if published else None) or ()
    dropped: list[str] = [classifier] if isinstance(classifier, str) else list(classifier)
    return network, geometry, dropped, published.license if published else None


def _unknown(library: str, name: str, known: list[str]) -> ValueError:
    near = ", ".join(f"{library}/{other}" for other in difflib.get_close_matches(name, known, n=3) or known[:3])
    return ValueError(f"params.yaml: backbone.name: {library}/{name} is not in {library}; nearest: {near}")


def _unreachable(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"params.yaml: backbone.weights: default: the published weights of {name} could not be loaded "
        f"({one_line(error)}); without a network, put a weights file into {WEIGHTS}/ and name it"
    )


def _remove(network: nn.Module, paths: list[str]) -> None:
    """Remove the classification layer, and auxiliary classifiers where there are any."""
    if hasattr(network, "reset_classifier"):  # timm knows which other layers belong to the classifier
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
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"params.yaml: features.image_size: {name} takes no images of {size} px ({one_line(error)})"
        ) from None
    if len(shape) != 2:
        raise ValueError(f"params.yaml: backbone.name: {name} gives features of shape {tuple(shape[1:])}, not a vector")
    return shape[1]
