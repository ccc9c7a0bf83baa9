"""A name and a choice of weights -> Backbone: a pretrained network without its classification layer.

Names are torchvision/<name> or timm/<name>. The weights decide the preprocessing.
"""

import difflib
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from pipeline.logs import one_line, raise_if_of_machine
from pipeline.network.plans import BackbonePlan
from pipeline.network.preprocessing import Preprocessing
from pipeline.network.weights import WEIGHTS, State, bundled_state, load_own
from pipeline.params import BackboneChoice, Geometry, JpegDecoding

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

    def with_inputs(self, geometry: Geometry, jpeg_decoding: JpegDecoding) -> "Backbone":
        """The same network, for which images are decoded and become squares as given (see Preprocessing)."""
        changes = {"geometry": geometry, "jpeg_decoding": jpeg_decoding}
        return replace(self, preprocessing=self.preprocessing.model_copy(update=changes))


def load(
    choice: BackboneChoice, image_size: int | None, drop_path: float | None = None, directory: Path = WEIGHTS
) -> Backbone:
    """Build the network and load its weights; ValueError in one line if name, weights or size do not fit.

    `drop_path`: the rate of stochastic depth in the last block, of training (Huang et al. 2016, "Deep networks with
    stochastic depth"); None: as the library builds the network. `directory`: where a file of weights lies.
    """
    library, _, name = choice.name.partition("/")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(choice.seed)
        if library == "torchvision":
            built = _build_torchvision(name, choice.weights, image_size)
        else:
            built = _build_timm(name, choice.weights, image_size, drop_path)
    network, geometry = built.network, built.preprocessing
    if library == "torchvision" and drop_path is not None:
        _set_drop_path(choice.name, network, drop_path)
    if choice.weights == "bundled":
        network.load_state_dict(bundled_state(choice.name, network.state_dict()))
    _remove(network, built.dropped)
    if _is_file(choice.weights):
        load_own(network, choice, built.convert, built.dropped, directory)
    network.eval().requires_grad_(False)
    if image_size is not None:
        resize = tuple(round(side * image_size / geometry.crop) for side in geometry.resize)
        geometry = geometry.model_copy(update={"resize": resize, "crop": image_size})
    given = choice.model_dump(include={"mean", "std", "interpolation"}, exclude_none=True)
    geometry = geometry.model_copy(update=given)
    width = _measure_width(choice.name, network, geometry.crop)
    licence = built.licence if choice.weights in ("default", "bundled") else None
    return Backbone(choice.name, network, geometry, state_sha256(network), width, licence)


def load_planned(
    plan: BackbonePlan, source: str, drop_path: float | None = None, directory: Path = WEIGHTS
) -> Backbone:
    """Load the backbone of `plan` again; ValueError, naming `source`, if its weights have changed."""
    given = plan.preprocessing
    backbone = load(plan.choice, plan.image_size, drop_path, directory).with_inputs(given.geometry, given.jpeg_decoding)
    if backbone.weights_sha256 != plan.weights_sha256:
        raise ValueError(
            f"{source}: made with other weights of {plan.choice.name} than `weights: {plan.choice.weights}` gives now; "
            "run: dvc repro"
        )
    return backbone


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, trainable or not; buffers are not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def has_drop_path(network: nn.Module) -> bool:
    """Whether a layer of the network drops residual branches in training."""
    rates = {"DropPath": "drop_prob", "StochasticDepth": "p"}  # of timm and torchvision
    return any(getattr(module, rates.get(type(module).__name__, ""), None) for module in network.modules())


def state_sha256(module: nn.Module) -> str:
    """SHA-256 (hex) of the names, types, shapes and bytes of a module's parameters and buffers."""
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


@dataclass(frozen=True)
class Built:
    """A network with its classification layers, whose paths are `dropped`; `licence` of its published weights.

    `convert` is the library's own conversion of a checkpoint to this network.
    """

    network: nn.Module
    preprocessing: Preprocessing
    dropped: list[str]
    licence: str | None
    convert: Callable[[State], State]


def _is_file(weights: str) -> bool:
    return weights not in ("bundled", "default", "random")


def _build_torchvision(name: str, weights: str, size: int | None) -> Built:
    import torchvision
    from torchvision.models.vision_transformer import interpolate_embeddings

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    published = torchvision.models.get_model_weights(name)["DEFAULT"]
    preset, is_pretrained, is_vit = published.transforms(), weights == "default", name.startswith("vit_")
    side = preset.crop_size[0]
    # torchvision sets these itself when it loads the published weights of the two networks
    special = {"transform_input": True, "aux_logits": True, "init_weights": False}
    options = special if name in ("inception_v3", "googlenet") and not is_pretrained else {}

    def convert(state: State) -> State:
        return interpolate_embeddings(side, network.patch_size, OrderedDict(state)) if is_vit else state

    if is_vit:  # built for one size, to which torchvision fits no published weights by itself
        side = size or side
        options = {"image_size": side}
    try:
        network: Any = torchvision.models.get_model(
            name, weights=published if is_pretrained and not is_vit else None, **options
        )
        if is_pretrained and is_vit:
            network.load_state_dict(convert(published.get_state_dict(check_hash=True)))
    except AssertionError as error:
        raise _wrong_size(f"torchvision/{name}", side, error) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: the file has another digest
        raise_if_of_machine(error)
        raise _unreachable(f"torchvision/{name}", error) from None
    n_classes = len(published.meta["categories"])
    *_, last = (
        path
        for path, module in network.named_modules()
        if n_classes in (getattr(module, "out_features", 0), getattr(module, "out_channels", 0))
        and not path.startswith(AUXILIARY)
    )
    geometry = Preprocessing(
        geometry="crop",
        jpeg_decoding="exact",
        resize=tuple(preset.resize_size),
        crop=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
    dropped = [last, *(path for path in AUXILIARY if hasattr(network, path))]
    return Built(network, geometry, dropped, published.meta.get("license"), convert)


def _build_timm(name: str, weights: str, size: int | None, drop_path: float | None) -> Built:
    import timm
    from timm.data.config import resolve_data_config
    from timm.models import _builder

    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError:  # timm has the network, but not these weights
        raise _unknown("timm", name, timm.list_pretrained()) from None
    options: dict[str, Any] = {"img_size": size} if size and published and published.fixed_input_size else {}
    if drop_path:  # without a rate, a network has no layers for it, and many take no such argument
        options["drop_path_rate"] = drop_path
    # timm hands a network's conversion of checkpoints to the function that loads published weights, and to no other
    replaced = patch.object(_builder, "load_pretrained") if _is_file(weights) else nullcontext()
    try:
        with replaced as loading:
            network = timm.create_model(name, pretrained=weights == "default" or _is_file(weights), **options)
    # The hub's client raises errors of several libraries (httpx, huggingface_hub, OSError)
    except Exception as error:
        raise_if_of_machine(error)
        if "drop_path_rate" in str(error):
            raise ValueError(f"timm/{name} has no stochastic depth") from None
        if weights != "default" or isinstance(error, AssertionError | TypeError):
            raise ValueError(f"params.yaml: backbone.name: timm/{name} cannot be built ({one_line(error)})") from None
        raise _unreachable(f"timm/{name}", error) from None
    filter_fn = loading.call_args.kwargs["filter_fn"] if loading and loading.call_args else None

    def convert(state: State) -> State:
        if filter_fn is None:
            return state
        try:
            return filter_fn(dict(state), network)
        except TypeError:  # as in timm: some take the tensors alone
            return filter_fn(state)

    config = resolve_data_config({}, model=network)
    if config["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"timm/{name}: its weights need crop mode {config['crop_mode']!r}, which is not supported")
    side = int(config["input_size"][1] / config["crop_pct"])
    geometry = Preprocessing(
        geometry="crop",
        jpeg_decoding="exact",
        resize=(side, side) if config["crop_mode"] == "squash" else (side,),
        crop=config["input_size"][1],
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
    classifier = (published.classifier if published else None) or ()
    dropped: list[str] = [classifier] if isinstance(classifier, str) else list(classifier)
    return Built(network, geometry, dropped, published.license if published else None, convert)


def _unknown(library: str, name: str, known: list[str]) -> ValueError:
    near = ", ".join(f"{library}/{other}" for other in difflib.get_close_matches(name, known, n=3) or known[:3])
    return ValueError(f"params.yaml: backbone.name: {library}/{name} is not in {library}; nearest: {near}")


def _unreachable(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"params.yaml: backbone.weights: default: the published weights of {name} could not be loaded "
        f"({one_line(error)}); without a network, put a weights file into {WEIGHTS}/ and name it"
    )


def _wrong_size(name: str, size: int, error: Exception) -> ValueError:
    return ValueError(f"params.yaml: features.image_size: {name} takes no images of {size} px ({one_line(error)})")


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


def _set_drop_path(name: str, network: nn.Module, rate: float) -> None:
    """Scale the rates that torchvision gives its layers, so that the last block has `rate`."""
    layers = [module for module in network.modules() if type(module).__name__ == "StochasticDepth"]
    largest = max((float(layer.p) for layer in layers), default=0.0)  # pyright: ignore[reportArgumentType]
    if not largest and rate:
        raise ValueError(f"{name} has no stochastic depth")
    for layer in layers:
        layer.p *= rate / largest  # pyright: ignore[reportOperatorIssue]


def _measure_width(name: str, network: nn.Module, size: int) -> int:
    try:
        with torch.no_grad():
            shape = network(torch.zeros(1, 3, size, size)).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        raise_if_of_machine(error)
        raise _wrong_size(name, size, error) from None
    if len(shape) != 2:
        raise ValueError(f"params.yaml: backbone.name: {name} gives features of shape {tuple(shape[1:])}, not a vector")
    return shape[1]
