"""params.yaml -> frozen, validated Params. No default stands here: params.yaml shows every number."""

import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

PARAMS = Path("params.yaml")
HEAD_ONLY = "feature_extraction"  # the strategy that train_head fits; the others are fine-tuned

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
Precision = Literal["fp32", "bf16"]


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def _distinct(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("expected each entry once")
    return values


class Dataset(_Section):
    """Where the images are."""

    fetch: tuple[Literal["elpv"], ...]
    path: Annotated[str, Field(min_length=1)]
    max_rejected_fraction: Share

    _fetch_distinct = field_validator("fetch")(_distinct)


class Splitting(_Section):
    """Sizes are shares of all images."""

    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)]
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    val_fraction: Annotated[float, Field(gt=0, lt=1)]

    _seeds_distinct = field_validator("seeds")(_distinct)

    @model_validator(mode="after")
    def _leaves_training_images(self) -> Self:
        if self.test_fraction + self.val_fraction >= 1:
            raise ValueError("test_fraction + val_fraction leave nothing to train on: expected < 1")
        return self


class BackboneChoice(_Section):
    """Which network, and which weights."""

    name: Annotated[str, Field(pattern=r"^(torchvision|timm)/[A-Za-z0-9_.]+$")]
    weights: Annotated[str, Field(min_length=1)]
    seed: Natural


class FeatureOptions(_Section):
    """How images become features."""

    views: Count
    image_size: Annotated[int, Field(ge=8, le=4096)] | None
    engine: Literal["auto", "openvino", "torch"]
    precision: Precision


class Augmentation(_Section):
    """How view k > 0 of an image differs from view 0."""

    seed: Natural
    flips: Literal["none", "horizontal", "vertical", "both"]
    right_angles: bool
    rotation_degrees: Annotated[float, Field(ge=0, le=180)]
    shift_fraction: Annotated[float, Field(ge=0, le=0.5)]
    scale: tuple[Positive, Positive]
    crop_area: tuple[PositiveShare, PositiveShare]
    crop_aspect: tuple[Positive, Positive]
    brightness: Share
    contrast: Share
    saturation: Share
    hue: Annotated[float, Field(ge=0, le=0.5)]
    noise_std: NonNegative

    @field_validator("scale", "crop_area", "crop_aspect")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if bounds[0] > bounds[1]:
            raise ValueError("expected [low, high] with low <= high")
        return bounds


class Evaluation(_Section):
    """How a run predicts."""

    views: Count


class HeadOptions(_Section):
    """The dense head and how it is fitted."""

    kind: Literal["linear", "mlp"]
    hidden: tuple[Count, ...]
    dropout: BelowOne
    standardize: bool
    penalty: Literal["l2", "l1", "elastic"]
    l1_ratio: Share
    strengths: Annotated[tuple[NonNegative, ...], Field(min_length=1)]
    max_iterations: Count
    learning_rate: Positive
    epochs: Count
    batch_size: Count
    threads: Count

    _strengths_distinct = field_validator("strengths")(_distinct)

    @model_validator(mode="after")
    def _hidden_layers_fit_the_kind(self) -> Self:
        if (self.kind == "mlp") != bool(self.hidden):
            raise ValueError("hidden: expected [] for `kind: linear`, at least one width for mlp")
        if self.kind == "linear" and self.dropout:
            raise ValueError("dropout: expected 0.0 for `kind: linear`")
        return self


class Strategy(_Section):
    """One way to train the network; see section "one idea" of the README."""

    init: Literal["cached_head", "random"]
    freeze_until: Annotated[str, Field(min_length=1)]
    boundary_cache: Literal["on", "off"]
    batchnorm: Literal["frozen", "train"]
    views: Natural
    epochs: Count
    patience: Count
    batch_size: Count
    optimizer: Literal["adamw", "sgd"]
    momentum: BelowOne
    learning_rate_base: Positive
    learning_rate_head: Positive
    warmup_epochs: Natural
    weight_decay: NonNegative
    label_smoothing: BelowOne
    precision: Precision
    threads: Count

    @model_validator(mode="after")
    def _combination_makes_sense(self) -> Self:
        if self.init == "random" and (self.freeze_until != "none" or self.batchnorm != "train"):
            raise ValueError("`init: random` needs `freeze_until: none` and `batchnorm: train`")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs: expected at most epochs ({self.epochs})")
        return self


class FineTune(_Section):
    """The strategies, and which of them run."""

    run: tuple[Name, ...]
    seeds: tuple[Natural, ...]
    strategies: dict[Name, Strategy]

    _run_distinct = field_validator("run", "seeds")(_distinct)

    @model_validator(mode="after")
    def _run_is_defined(self) -> Self:
        if HEAD_ONLY in self.strategies:
            raise ValueError(f"strategies: the name {HEAD_ONLY} is taken by the head alone")
        for name in self.run:
            if name not in self.strategies:
                raise ValueError(f"run: {name!r} is not one of {', '.join(self.strategies)}")
        if self.run and not self.seeds:
            raise ValueError("seeds: expected at least one, or `run: []`")
        return self


class Compare(_Section):
    """How strategies are compared."""

    baseline: Name


class Runtime(_Section):
    """What changes no result (but for the device)."""

    device: Literal["auto", "cpu", "cuda"]
    workers: Natural
    store_max_gb: Positive


class Params(_Section):
    """The whole of params.yaml."""

    dataset: Dataset
    split: Splitting
    backbone: BackboneChoice
    features: FeatureOptions
    augmentation: Augmentation
    evaluation: Evaluation
    head: HeadOptions
    fine_tune: FineTune
    compare: Compare
    runtime: Runtime

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.evaluation.views > self.features.views:
            raise ValueError(
                f"evaluation.views: found {self.evaluation.views}, expected at most "
                f"features.views ({self.features.views})"
            )
        unknown = sorted(set(self.fine_tune.seeds) - set(self.split.seeds))
        if unknown:
            raise ValueError(f"fine_tune.seeds: {unknown} are not in split.seeds")
        if self.compare.baseline not in (HEAD_ONLY, *self.fine_tune.run):
            raise ValueError(
                f"compare.baseline: found {self.compare.baseline!r}, expected {HEAD_ONLY} or an entry of fine_tune.run"
            )
        return self


def load_params(path: Path = PARAMS) -> Params:
    """Read and validate `path`; ValueError with one line per mistake.

    Parsed as DVC parses it (ruamel.yaml, YAML 1.2: 1e-5 is a number, on and off are words), and
    validated from JSON, where a list is a valid tuple but "3" is no valid integer.
    """
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        return Params.model_validate_json(json.dumps(document))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found; run from the top of the repository") from None
    except ValidationError as error:
        raise ValueError("\n".join(_line(path, mistake) for mistake in error.errors())) from None
    except (YAMLError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML mapping: {' '.join(str(error).split())}") from None


def _line(path: Path, mistake: dict) -> str:
    key = ".".join(str(part) for part in mistake["loc"])
    problem = mistake["msg"].removeprefix("Value error, ").replace("Input should", "expected it to")
    if mistake["type"] == "missing":
        return f"{path}: {key}: is missing"
    if mistake["type"] == "extra_forbidden":
        return f"{path}: {key}: unknown key; expected only those of the params.yaml in git"
    found = mistake["input"]
    shown = "" if isinstance(found, dict) else f" found {json.dumps(found)};"
    return f"{path}: {key}{':' if key else ''}{shown} {problem}".replace(":  ", ": ")
