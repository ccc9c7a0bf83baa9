"""Saved runs: a model that loads alone, and what it said of the images.

models/<strategy>/seed_<s>.safetensors, .json     tensors `head.*`, and `base.*` unless the base is as published
reports/runs/<strategy>/seed_<s>/                 logits.safetensors (validation and test), run.json
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as arrays_as_bytes
from safetensors.torch import load_file
from safetensors.torch import save as tensors_as_bytes
from torch import nn

from pipeline import backbones, cuts, heads
from pipeline.files import replacing, write_json
from pipeline.images import Preprocessing
from pipeline.params import Augmentation, BackboneChoice, HeadOptions, Record

MODELS = Path("models")
RUNS = Path("reports/runs")


class Cost(Record):
    """Nominal cost of a run from nothing.

    `base_passes`: how many training images went through the base, or its frozen part, from pixels; `train_flops`: of
    these passes and of the training itself, forward and backward; `cached_bytes`: of the cached features and boundary
    activations that it reads, for choosing and testing, too. Other costs of choosing on validation are not counted.
    """

    trainable_params: int
    train_flops: int
    base_passes: int
    cached_bytes: int


class Card(Record):
    """What a saved model has to know, beside its tensors; `sha256` (hex) is of the file that holds them."""

    strategy: str
    seed: int
    class_names: tuple[str, ...]
    backbone: BackboneChoice
    image_size: int | None
    preprocessing: Preprocessing
    augmentation: Augmentation
    evaluation_views: int
    cut: str
    pool: str
    freeze_until: str
    head: HeadOptions
    feature_shape: tuple[int, ...]
    weights_sha256: str
    cost: Cost
    sha256: str = ""


@dataclass(frozen=True)
class Run:
    """What one strategy said with one seed: log-probabilities (n, n_classes) float32 of rows of labels.csv.

    `chosen`: on validation. `network`: its parameters in all, the freeze boundary, and the largest error of storing
    features, relative to the largest value of an image.
    """

    strategy: str
    seed: int
    cost: Cost
    chosen: dict[str, Any]
    network: dict[str, Any]
    curve: list[dict[str, Any]]
    val_rows: np.ndarray
    val_logits: np.ndarray
    test_rows: np.ndarray
    test_logits: np.ndarray


def save_model(card: Card, head: nn.Module, base: nn.Module | None) -> None:
    """Write the tensors and, last, the card, which holds their digest; no base if it is as published."""
    tensors = {f"head.{name}": value for name, value in head.state_dict().items()}
    if base is not None:
        tensors |= {f"base.{name}": value for name, value in base.state_dict().items()}
    path = MODELS / card.strategy / f"seed_{card.seed}.safetensors"
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(tensors_as_bytes(tensors))
    write_json(path.with_suffix(".json"), card.model_copy(update={"sha256": _sha256(path)}).model_dump(mode="json"))


def read_card(path: Path) -> Card:
    """Read seed_<s>.json and check the tensors beside it; ValueError if they do not belong together."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such run; expected e.g. {MODELS / 'full_retrain' / 'seed_0'}")
    try:
        card = Card.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        raise ValueError(f"{path}: not a run saved by this version") from None
    if card.sha256 != _sha256(path.with_suffix(".safetensors")):
        raise ValueError(f"{path}: {path.stem}.safetensors beside it is damaged, or of another run")
    return card


def load_head(path: Path, card: Card, dense: nn.Module) -> nn.Sequential:
    """The head of the run `path` (.json), in evaluation mode; `dense` as in heads.build."""
    head = heads.build(card.feature_shape, len(card.class_names), card.head, dense)
    head.load_state_dict(_part(path, "head"))
    return head.eval()


def load_network(path: Path) -> tuple[nn.Sequential, Card]:
    """The whole network of the run `path` (.json), uint8 images to logits, in evaluation mode, and its card.

    A head alone stands on the published base, which is loaded as it was then; ValueError if its weights are others.
    """
    card = read_card(path)
    state = _part(path, "base")
    choice = card.backbone.model_copy(update={"weights": "random"}) if state else card.backbone
    backbone = backbones.load(choice, card.image_size)
    base, dense = cuts.split(backbone, card.cut)
    if state:
        base.load_state_dict(state)
    elif backbone.weights_sha256 != card.weights_sha256:
        raise ValueError(f"{path}: made with other weights of {choice.name} than `weights: {choice.weights}` gives now")
    pixels_to_features = nn.Sequential(backbones.Normalize(card.preprocessing), base, cuts.Pool(card.pool))
    return nn.Sequential(pixels_to_features, load_head(path, card, dense)).eval(), card


def save_run(run: Run) -> None:
    """Write logits.safetensors and run.json."""
    folder = RUNS / run.strategy / f"seed_{run.seed}"
    arrays = {name: value for name, value in vars(run).items() if isinstance(value, np.ndarray)}
    with replacing(folder / "logits.safetensors") as temporary:
        temporary.write_bytes(arrays_as_bytes(arrays))
    rest = {name: value for name, value in vars(run).items() if name not in arrays}
    write_json(folder / "run.json", rest | {"cost": run.cost.model_dump()})


def read_run(strategy: str, seed: int) -> Run:
    """Read what save_run wrote."""
    folder = RUNS / strategy / f"seed_{seed}"
    described = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    described["cost"] = Cost(**described["cost"])
    return Run(**described | load_arrays(folder / "logits.safetensors"))


def _part(path: Path, part: str) -> dict[str, torch.Tensor]:
    tensors = load_file(path.with_suffix(".safetensors"))
    return {name.removeprefix(f"{part}."): v for name, v in tensors.items() if name.startswith(f"{part}.")}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
