"""What params.yaml means for the network: the records that `plan` writes to data/plan/, and later stages read."""

import re
from pathlib import Path
from typing import TypeVar

from pydantic import Field, ValidationError

from pipeline.files import write_json
from pipeline.logs import one_line
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import BackboneChoice, Record, Strategy

PLANS = Path("data/plan")
BACKBONE = PLANS / "backbone.json"
# cc-by-nc-*, fair-noncommercial-*, Apple's licence for research, those of SEER and SWAG (at Meta)
NON_COMMERCIAL = re.compile(r"\bnc\b|non-?commercial|apple-amlr|seer-license|/SWAG/", re.IGNORECASE)
P = TypeVar("P", "BackbonePlan", "StrategyPlan")


class Tap(Record):
    """One of several cut points whose features are pooled and concatenated; `width` of them are its own."""

    cut: str
    pool: str
    prefix_tokens: int
    width: int


class BackbonePlan(Record):
    """The frozen base: which network it is, which weights it has, and where it ends.

    `licence` is that of published weights, where the library states it: a short name or an address.
    `weights_sha256` (hex) digests all tensors of the network without its classification layer; `feature_dim` is the
    width of its last features. The base ends at the cut point `cut` with the pooling `pool`; of tokens there, the first
    `prefix_tokens` are a class token and registers, the others stand for patches of the image. `feature_shape` is what
    comes out for one image, `parameters` and `flops_per_image` (forward pass) are those of the base.

    `taps` is the layout of features of several cuts, in order of depth; the last one ends the base. It is empty with
    one cut, and then left out of the file, which has the bytes that it had before there were several.
    """

    choice: BackboneChoice
    image_size: int | None
    licence: str | None
    weights_sha256: str
    preprocessing: Preprocessing
    feature_dim: int
    cut: str
    pool: str
    prefix_tokens: int
    feature_shape: tuple[int, ...]
    parameters: int
    flops_per_image: int
    taps: tuple[Tap, ...] = Field(default=(), exclude_if=lambda taps: not taps)

    @property
    def widths(self) -> dict[str, int]:
        """How many features are of each of several cuts, in order; empty with one cut."""
        return {tap.cut: tap.width for tap in self.taps}

    @property
    def is_non_commercial(self) -> bool:
        """Whether the licence of the weights excludes commercial use."""
        return bool(self.licence and NON_COMMERCIAL.search(self.licence))


class StrategyPlan(Record):
    """One strategy: its recipe, merged with `fine_tune.defaults`, and what the freeze boundary costs.

    `boundary` is a cut point, or none; the prefix lies before it, the suffix between it and the end of the base. FLOPs
    are of one image: of a forward pass through the prefix, of a training step (forward and backward) of the suffix.
    `cached_bytes_per_image`: of one view at the boundary, 0 where nothing is cached. The head is not counted: its size
    depends on the labels.
    """

    recipe: Strategy
    boundary: str
    trained_parameters: int
    prefix_flops: int
    suffix_training_flops: int
    cached_bytes_per_image: int

    @property
    def is_cached(self) -> bool:
        """Whether training reads the activations at the boundary from the feature store."""
        return self.cached_bytes_per_image > 0


def write(plan: BackbonePlan | StrategyPlan, name: str) -> None:
    """Write data/plan/<name>.json; `name` is backbone or a strategy."""
    write_json(PLANS / f"{name}.json", plan.model_dump(mode="json"))


def read_backbone() -> BackbonePlan:
    """Read data/plan/backbone.json; ValueError if it is not what `plan` writes."""
    return _read(BACKBONE, BackbonePlan)


def read_strategy(name: str) -> StrategyPlan:
    """Read data/plan/<name>.json; ValueError if it is not what `plan` writes."""
    return _read(PLANS / f"{name}.json", StrategyPlan)


def _read(path: Path, kind: type[P]) -> P:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; run: dvc repro plan") from None
    except ValidationError as error:
        raise ValueError(
            f"{path}: damaged, or written by another version ({one_line(error)}); run: dvc repro plan"
        ) from None
