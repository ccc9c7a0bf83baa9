"""Saved networks: each loads on its own, from any directory.

models/<strategy>/seed_<s>.safetensors     tensors `head.*`, `base.*` unless the base is as published, and `novelty.*`
models/<strategy>/seed_<s>.json            the card: what else is needed to build the network
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save
from torch import nn

from pipeline.files import replacing, write_json
from pipeline.logs import one_line
from pipeline.network import backbones, cuts
from pipeline.network.plans import BackbonePlan
from pipeline.network.weights import WEIGHTS
from pipeline.params import Augmentation, HeadOptions, Positive, Record
from pipeline.training import heads, novelty
from pipeline.training.novelty import Novelty
from pipeline.training.runs import MODELS, Cost

PUBLISHED = ("bundled", "default", "random")  # weights that are no file of the user


class Card(Record):
    """What a saved network has to know, beside its tensors; `sha256` (hex) is of the file that holds them.

    `backbone` is the pretrained network from which the run started. `temperature`: fitted on validation, see
    calibration.temperature; its probabilities are softmax(log_probability / temperature).
    """

    strategy: str
    seed: int
    class_names: tuple[str, ...]
    backbone: BackbonePlan
    augmentation: Augmentation
    evaluation_views: tuple[str, ...]
    freeze_until: str
    head: HeadOptions
    cost: Cost
    temperature: Positive
    sha256: str = ""


def save_model(card: Card, head: nn.Module, base: nn.Module | None, known: Novelty | None = None) -> None:
    """Write the tensors and, last, the card, which holds their digest; no base if it is as published.

    `known`: where the images lie that the network was trained on.
    """
    tensors = {f"head.{name}": value for name, value in head.state_dict().items()}
    if base is not None:
        tensors |= {f"base.{name}": value for name, value in base.state_dict().items()}
    if known is not None:
        tensors |= {f"{novelty.PREFIX}.{name}": value for name, value in vars(known).items()}
    path = MODELS / card.strategy / f"seed_{card.seed}.safetensors"
    with replacing(path) as temporary:
        temporary.write_bytes(save({name: value.cpu().contiguous() for name, value in tensors.items()}))
    write_json(path.with_suffix(".json"), card.model_copy(update={"sha256": _sha256(path)}).model_dump(mode="json"))


def read_card(path: Path) -> Card:
    """Read seed_<s>.json and check the tensors beside it; ValueError if they do not belong together."""
    if not path.is_file():
        there = ", ".join(str(card.with_suffix("")) for card in sorted(MODELS.glob("*/seed_*.json"))[:6])
        raise FileNotFoundError(f"{path}: no such run; " + (f"there are {there}" if there else f"{MODELS}/ has none"))
    try:
        card = Card.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a run saved by this version ({one_line(error)})") from None
    if not path.with_suffix(".safetensors").is_file():
        raise FileNotFoundError(f"{path.with_suffix('.safetensors')}: not found; it holds the weights of {path.name}")
    if card.sha256 != _sha256(path.with_suffix(".safetensors")):
        raise ValueError(f"{path}: {path.stem}.safetensors beside it is damaged, or of another run")
    return card


def load_head(path: Path, card: Card, dense: nn.Module) -> nn.Sequential:
    """The head of the run `path` (.json), in evaluation mode; `dense` as in heads.build."""
    head = heads.build(card.backbone.feature_shape, len(card.class_names), card.head, dense)
    head.load_state_dict(_part(path, "head"))
    return head.eval()


def load_network(path: Path) -> tuple[nn.Sequential, Card]:
    """The whole network of the run `path` (.json), from uint8 images to logits, in evaluation mode, and its card.

    A head alone stands on the published base, which is loaded again; ValueError if its weights are others now.
    """
    card = read_card(path)
    plan, state = card.backbone, _part(path, "base")
    if state:
        backbone = backbones.load(plan.choice.model_copy(update={"weights": "random"}), plan.image_size)
    else:
        directory = _weights_directory(path, plan.choice.weights)
        backbone = backbones.load_planned(plan, str(path), directory=directory)
    backbone = replace(backbone, preprocessing=plan.preprocessing)
    base, dense = cuts.split(backbone, plan.cut)
    if state:
        base.load_state_dict(state)
    prefix, _ = cuts.prefix_and_suffix(backbone, plan.cut, cuts.pools(plan))  # around the same tensors
    return nn.Sequential(prefix.module, load_head(path, card, dense)).eval(), card


def _weights_directory(path: Path, name: str) -> Path:
    """The nearest data/weights/ above the run `path`, or that of this directory, which holds the file `name`."""
    if name in PUBLISHED:
        return WEIGHTS
    places = [*(parent / WEIGHTS for parent in path.resolve().parents), WEIGHTS.absolute()]
    if found := next((place for place in places if (place / name).is_file()), None):
        return found
    searched = " and ".join(dict.fromkeys(str(place) for place in places if place.is_dir())) or f"no {WEIGHTS} above it"
    files = [Path(f"{place / name}.dvc") for place in places]
    pull = next((f"; DVC tracks it, run: dvc pull {file}" for file in files if file.is_file()), "")
    raise ValueError(
        f"{path}: a head that stands on the weights file {name}; looked for it in {searched}{pull}; copy it to "
        f"{WEIGHTS} of the repository that holds the run"
    )


def load_novelty(path: Path) -> Novelty | None:
    """Where the training images of the run `path` (.json) lie; None if its file does not say."""
    tensors = _part(path, novelty.PREFIX)
    return Novelty(**tensors) if tensors else None


def _part(path: Path, part: str) -> dict[str, torch.Tensor]:
    tensors = load_file(path.with_suffix(".safetensors"))
    return {name.removeprefix(f"{part}."): v for name, v in tensors.items() if name.startswith(f"{part}.")}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
