"""params.yaml -> frozen, validated Params. No default stands here: params.yaml shows every number."""

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

PARAMS = Path("params.yaml")
HEAD_ONLY = "feature_extraction"  # the strategy that train_head fits; the others are fine-tuned
HEAD_ALL_SEEDS = f"{HEAD_ONLY}_all_seeds"  # what it gives over all its seeds, in reports


def _distinct(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("expected each entry once")
    return values


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 < bounds[0] <= bounds[1]:
        raise ValueError("expected [low, high] with 0 < low <= high")
    return bounds


def _network(name: str) -> str:
    if not re.fullmatch(r"(torchvision|timm)/[A-Za-z0-9_.]+", name):
        raise ValueError("expected torchvision/<name> or timm/<name>")
    return name


def _boundary(where: object) -> object:
    is_number = isinstance(where, int) and not isinstance(where, bool) and where > 0
    if not is_number and not (where and isinstance(where, str)):
        raise ValueError("expected none, all, a cut point, a module path, or a number (1 or more) of layers")
    return where


Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0, lt=2**32)]
Seeds = Annotated[tuple[Natural, ...], AfterValidator(_distinct)]
Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Strengths = Annotated[tuple[NonNegative, ...], AfterValidator(_distinct), Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Half = Annotated[float, Field(ge=0, le=0.5)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "bf16"]
Boundary = Annotated[str | int, BeforeValidator(_boundary)]
HIGHER_IS_BETTER = ("test.accuracy", "test.balanced_accuracy", "test.macro_f1", "test.auroc")
LOWER_IS_BETTER = (
    *("test.nll", "test.brier", "test.ece"),
    *("cost.trainable_params", "cost.train_flops", "cost.base_passes", "cost.cached_bytes"),
)
GUARDED = HIGHER_IS_BETTER + LOWER_IS_BETTER  # what compare.guard may name, after a strategy
STORE_DTYPES = {"fp32": "float32", "fp16": "float16"}  # as numpy calls them


class Record(BaseModel):
    """A frozen record that JSON can say; strict, and nothing unknown, NaN or infinite in it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Dataset(Record):
    """Where the images are."""

    fetch: Annotated[tuple[Name, ...], AfterValidator(_distinct)]
    path: Text
    max_rejected_fraction: Share
    on_conflict: Literal["error", "drop"]
    near_duplicates: Literal["report", "group"]
    near_duplicate_bits: Annotated[int, Field(ge=0, le=10)]


class Splitting(Record):
    """Sizes are shares of all images."""

    method: Literal["stratified", "hash", "given"]
    seeds: Annotated[Seeds, Field(min_length=1)]
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    allow_leakage: bool


class BackboneChoice(Record):
    """Which network, and which weights."""

    name: Annotated[str, AfterValidator(_network)]
    weights: Text
    seed: Natural


class FeatureOptions(Record):
    """How images become features."""

    views: Count
    image_size: Annotated[int, Field(ge=8, le=4096)] | None
    cut: Boundary
    pool: Literal["none", "avg", "flatten"]
    engine: Literal["auto", "openvino", "torch"]
    precision: Precision
    store_dtype: Literal["fp32", "fp16"]
    threads: Count

    @model_validator(mode="after")
    def _base_is_not_empty(self) -> Self:
        if self.cut == "none":
            raise ValueError("cut: found none, expected all, a cut point, a module path, or a number of layers")
        return self


class Augmentation(Record):
    """How view k > 0 of an image differs from view 0."""

    seed: Natural
    flips: Literal["none", "horizontal", "vertical", "both"]
    right_angles: bool
    rotation_degrees: Annotated[float, Field(ge=0, le=180)]
    shift_fraction: Half
    scale: Range
    crop_area: Annotated[tuple[Share, Share], AfterValidator(_ordered)]
    crop_aspect: Range
    brightness: Share
    contrast: Share
    saturation: Share
    hue: Half
    noise_std: NonNegative


class Evaluation(Record):
    """How a run predicts."""

    views: Count


class HeadOptions(Record):
    """The dense head and how it is fitted."""

    kind: Literal["linear", "mlp", "pretrained"]
    hidden: tuple[Count, ...]
    dropout: BelowOne
    standardize: bool
    penalty: Literal["l2", "l1", "elastic"]
    l1_ratio: Share
    class_weights: Literal["none", "balanced"]
    strengths: Strengths
    max_iterations: Count
    learning_rate: Positive
    epochs: Count
    batch_size: Count
    threads: Count

    @model_validator(mode="after")
    def _kind_fits(self) -> Self:
        if (self.kind == "mlp") != bool(self.hidden) or (self.kind == "linear" and self.dropout):
            raise ValueError(
                f"found kind {self.kind}, hidden {list(self.hidden)}, dropout {self.dropout}; "
                "`kind: linear` goes with `hidden: []` and `dropout: 0.0`, mlp with at least one width, pretrained "
                "with `hidden: []`"
            )
        if self.kind == "pretrained" and self.standardize:
            raise ValueError(
                "standardize: found true, expected false with `kind: pretrained`: pretrained layers want what they "
                "were trained on"
            )
        return self


class SuspectOptions(Record):
    """How labels that are probably wrong are looked for."""

    folds: Annotated[int, Field(ge=3, le=100)]
    seed: Natural
    strengths: Strengths
    max_iterations: Count
    threads: Count


class Strategy(Record):
    """One way to train the network."""

    init: Literal["cached_head", "random"]
    freeze_until: Boundary
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
    class_weights: Literal["none", "balanced"]
    precision: Precision
    threads: Count

    @model_validator(mode="after")
    def _combination_makes_sense(self) -> Self:
        if self.init == "random" and (self.freeze_until != "none" or self.batchnorm != "train"):
            raise ValueError(
                f"found `freeze_until: {self.freeze_until}` and `batchnorm: {self.batchnorm}`; "
                "`init: random` needs `freeze_until: none` and `batchnorm: train`"
            )
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs: found {self.warmup_epochs}, expected at most epochs ({self.epochs})")
        return self


class FineTune(Record):
    """The strategies, and which of them run."""

    run: Annotated[tuple[Name, ...], AfterValidator(_distinct)]
    seeds: Seeds
    strategies: dict[Name, Strategy]


class Compare(Record):
    """How strategies are compared, and what a pull request must not make worse."""

    baseline: Name
    practical_margin: BelowOne
    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    guard: dict[str, NonNegative]


class Runtime(Record):
    """What changes no result (but for the device)."""

    device: Literal["auto", "cpu", "cuda"]
    workers: Natural
    store_max_gb: Positive


class Params(Record):
    """The whole of params.yaml."""

    dataset: Dataset
    split: Splitting
    backbone: BackboneChoice
    features: FeatureOptions
    augmentation: Augmentation
    evaluation: Evaluation
    head: HeadOptions
    label_suspects: SuspectOptions
    fine_tune: FineTune
    compare: Compare
    runtime: Runtime

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        strategies, run = self.fine_tune.strategies, self.fine_tune.run
        unknown = [name for name in run if name not in strategies]
        unsplit = [seed for seed in self.fine_tune.seeds if seed not in self.split.seeds]
        guardable = {f"{name}.{metric}" for name in (HEAD_ONLY, HEAD_ALL_SEEDS, *strategies) for metric in GUARDED}
        unguarded = [name for name in self.compare.guard if name not in guardable]
        share = self.split.test_fraction + self.split.val_fraction
        for is_wrong, problem in (
            (share >= 1, f"split: test_fraction + val_fraction: found {share:g}, expected less than 1"),
            (
                self.evaluation.views > self.features.views,
                f"evaluation.views: found {self.evaluation.views}, expected at most {self.features.views} "
                "(features.views)",
            ),
            (
                self.head.kind == "pretrained" and (self.features.cut == "all" or self.features.pool != "none"),
                f"features: found `cut: {self.features.cut}` and `pool: {self.features.pool}`; `head.kind: pretrained` "
                "needs a cut before the network's own dense layers (python -m pipeline.cuts NAME) and `pool: none`",
            ),
            (
                {HEAD_ONLY, HEAD_ALL_SEEDS} & strategies.keys(),
                f"fine_tune.strategies: the names {HEAD_ONLY} and {HEAD_ALL_SEEDS} are taken by the head alone",
            ),
            (unknown, f"fine_tune.run: found {unknown}, expected some of {', '.join(strategies)}"),
            (unsplit, f"fine_tune.seeds: found {unsplit}, expected some of split.seeds"),
            (run and not self.fine_tune.seeds, "fine_tune.seeds: found [], expected a seed, or `run: []`"),
            (
                self.compare.baseline not in (HEAD_ONLY, *run),
                f"compare.baseline: found {self.compare.baseline}, expected {HEAD_ONLY} or an entry of fine_tune.run",
            ),
            (
                unguarded,
                f"compare.guard: found {unguarded}, expected names such as {HEAD_ONLY}.test.accuracy: a strategy of "
                f"fine_tune.strategies, {HEAD_ONLY} or {HEAD_ALL_SEEDS}, then one of {', '.join(GUARDED)}",
            ),
        ):
            if is_wrong:
                raise ValueError(problem)
        return self


def load_params(path: Path = PARAMS) -> Params:
    """Read and validate `path`; ValueError with one line per mistake.

    Parsed as DVC parses it (ruamel.yaml, YAML 1.2: 1e-5 is a number, on and off are words), and validated from
    JSON, where a list is a valid tuple but "3" is no valid integer.
    """
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        return Params.model_validate_json(json.dumps(document))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found; run from the top of the repository") from None
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {_mistake(dict(mistake))}" for mistake in error.errors())) from None
    except (YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a YAML mapping: {' '.join(str(error).split())}") from None


SAID = {  # of pydantic's words those that a user of YAML would not know
    "too_short": "expected at least one entry",
    "string_too_short": "expected a word",
    "string_pattern_mismatch": "expected letters, digits and _ only",
    "tuple_type": "expected a list, e.g. [0, 1]",
    "model_type": "expected a section with keys",
    "dict_type": "expected a section with keys",
}


def _mistake(mistake: dict) -> str:
    key = "".join(f"{part}: " for part in [".".join(map(str, mistake["loc"]))] if part)
    if mistake["type"] == "missing":
        return f"{key}is missing"
    if mistake["type"] == "extra_forbidden":
        records = [record for record in Record.__subclasses__() if record.__module__ == __name__]
        known = {field for record in records for field in record.model_fields}
        near = difflib.get_close_matches(str(mistake["loc"][-1]), known, n=1)
        return f"{key}unknown key; expected {'only those of the params.yaml in git' if not near else near[0]}"
    found = "" if isinstance(mistake["input"], dict) else f"found {json.dumps(mistake['input'])}; "
    said = mistake["msg"].removeprefix("Value error, ").replace("Input should", "expected it to")
    return f"{key}{found}{SAID.get(mistake['type'], said)}"
