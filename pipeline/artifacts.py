"""Saved runs: a model that loads alone (safetensors and JSON), and what it said of the images.

models/<strategy>/seed_<s>.safetensors, .json   `head.*`, and `base.*` unless the base is as published
reports/runs/<strategy>/seed_<s>/               logits.safetensors (validation and test), run.json
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import backbones, heads
from pipeline.backbones import Normalize
from pipeline.files import replacing, write_json
from pipeline.images import Preprocessing
from pipeline.params import Augmentation, BackboneChoice, HeadOptions

MODELS = Path("models")
RUNS = Path("reports/runs")
SCHEMA = 1


@dataclass(frozen=True)
class Cost:
    """Nominal cost of a run from nothing.

    `train_flops`: of the passes of training images, forward and backward, that it takes;
    `base_passes`: how many training images went through the base, or its frozen part, from pixels.
    """

    trainable_params: int
    train_flops: int
    base_passes: int


@dataclass(frozen=True)
class Card:
    """What a saved model has to know about itself, beside its tensors."""

    strategy: str
    seed: int
    class_names: list[str]
    backbone: BackboneChoice
    image_size: int | None
    preprocessing: Preprocessing
    augmentation: Augmentation
    evaluation_views: int
    freeze_until: str
    head: HeadOptions
    feature_dim: int
    weights_sha256: str
    cost: Cost


@dataclass(frozen=True)
class Run:
    """What one strategy said with one seed: logits (n, n_classes) float32 of rows of labels.csv."""

    strategy: str
    seed: int
    val_rows: np.ndarray
    val_logits: np.ndarray
    test_rows: np.ndarray
    test_logits: np.ndarray
    cost: Cost
    chosen: dict[str, Any]
    curve: list[dict[str, Any]]


def save_model(directory: Path, card: Card, head: nn.Module, base: nn.Module | None) -> None:
    """Write seed_<s>.safetensors and, last, seed_<s>.json, which holds its digest."""
    parts = {"head": head} if base is None else {"head": head, "base": base}
    tensors = {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }
    path = directory / f"seed_{card.seed}.safetensors"
    with replacing(path) as temporary:
        save_file(tensors, temporary)
    description = {key: getattr(card, key) for key in card.__dataclass_fields__}
    for key in ("backbone", "augmentation", "head"):
        description[key] = description[key].model_dump(mode="json")
    for key in ("preprocessing", "cost"):
        description[key] = asdict(description[key])
    saved = {"schema": SCHEMA, **description, "sha256": _sha256(path)}
    write_json(path.with_suffix(".json"), saved)


def read_card(path: Path) -> Card:
    """Read seed_<s>.json and check the tensors beside it; ValueError if they do not belong together."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such run; expected e.g. models/full_retrain/seed_0")
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path}: not a run saved by this version")
    if saved.pop("sha256") != _sha256(path.with_suffix(".safetensors")):
        raise ValueError(f"{path}: {path.stem}.safetensors beside it is damaged, or of another run")
    for key, kind in (("backbone", BackboneChoice), ("augmentation", Augmentation), ("head", HeadOptions)):
        saved[key] = kind.model_validate_json(json.dumps(saved[key]))
    geometry = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["preprocessing"].items()}
    saved["preprocessing"] = Preprocessing(**geometry)
    saved["cost"] = Cost(**saved["cost"])
    return Card(**saved)


def load_head(path: Path, card: Card) -> nn.Sequential:
    """The head of the model saved at `path` (.safetensors)."""
    head = heads.build(card.feature_dim, len(card.class_names), card.head)
    head.load_state_dict(_part(load_file(path), "head"))
    return head.eval()


def load_network(path: Path) -> tuple[nn.Sequential, Card]:
    """The whole network of the run `path` (.json), uint8 images to logits, in evaluation mode.

    A head alone stands on the published base, which is loaded as it was then; ValueError if the
    weights are others now.
    """
    card = read_card(path)
    tensors = path.with_suffix(".safetensors")
    base_state = _part(load_file(tensors), "base")
    choice = card.backbone
    if base_state:
        choice = choice.model_copy(update={"weights": "random"})
    backbone = backbones.load(choice, card.image_size)
    if base_state:
        backbone.module.load_state_dict(base_state)
    elif backbone.weights_sha256 != card.weights_sha256:
        raise ValueError(f"{path}: made with other weights of {choice.name} than {choice.weights} now")
    head = load_head(tensors, card)
    return nn.Sequential(Normalize(card.preprocessing), backbone.module, head).eval(), card


def save_run(directory: Path, run: Run) -> None:
    """Write logits.safetensors and run.json below <strategy>/seed_<s>/."""
    folder = directory / run.strategy / f"seed_{run.seed}"
    arrays = {
        name: np.ascontiguousarray(getattr(run, name))
        for name in ("val_rows", "val_logits", "test_rows", "test_logits")
    }
    with replacing(folder / "logits.safetensors") as temporary:
        save_arrays(arrays, temporary)
    described = {
        "strategy": run.strategy,
        "seed": run.seed,
        "cost": asdict(run.cost),
        "chosen": run.chosen,
        "curve": run.curve,
    }
    write_json(folder / "run.json", described)


def read_run(folder: Path) -> Run:
    """Read what save_run wrote."""
    described = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    described["cost"] = Cost(**described["cost"])
    return Run(**described, **load_arrays(folder / "logits.safetensors"))


def _part(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    start = f"{part}."
    return {name.removeprefix(start): v for name, v in tensors.items() if name.startswith(start)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
