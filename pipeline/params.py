"""Read params.yaml into frozen, validated records. There are no defaults here: params.yaml holds every number."""

import difflib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

PARAMS = Path("params.yaml")
CGROUP = Path("/sys/fs/cgroup")  # what a container may use, on Linux
HEAD_ONLY = "feature_extraction"  # the strategy that train_head fits; the others are fine-tuned
HEAD_ALL_SEEDS = f"{HEAD_ONLY}_all_seeds"  # the same over all its seeds, in reports
EVERY_BLOCK = "every_block"  # of features.cut: the end of each block, and of the base
REFERENCES = ("majority_class", "nearest_class_mean", "k_nearest_neighbours")  # classifiers that are no strategies


def _distinct(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("expected each entry once")
    return values


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 < bounds[0] <= bounds[1]:
        raise ValueError("expected [low, high] with 0 < low <= high")
    return bounds


def _channels(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) != 3 or not all(0 <= value <= 1 for value in values):
        raise ValueError("expected three numbers, of pixel values from 0 to 1")
    return values


def _not_zero(values: tuple[float, ...]) -> tuple[float, ...]:
    if not all(values):
        raise ValueError("expected three numbers above 0")
    return values


def _network(name: str) -> str:
    if not re.fullmatch(r"(torchvision|timm)/[A-Za-z0-9_.]+", name):
        raise ValueError("expected torchvision/<name> or timm/<name>")
    return name


def _directory(path: str) -> str:
    if path.startswith("~"):
        raise ValueError("expected a directory; ~ is not expanded")
    return path


def _boundary(where: object) -> object:
    is_number = isinstance(where, int) and not isinstance(where, bool) and where > 0
    if not is_number and not (where and isinstance(where, str)):
        raise ValueError("expected none, all, a cut point, a module path, or a number (1 or more) of layers")
    return where


def _views(number: object) -> object:
    if number != "every_epoch" and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
        raise ValueError("expected a whole number, 0 or more, or every_epoch")
    return number


def _listed(views: object) -> tuple[object, ...]:
    if not isinstance(views, list | tuple):
        raise ValueError("expected auto, or a list, e.g. [identity, flip_horizontal]")
    return tuple(views)


def _pair(rate: object) -> tuple[object, ...]:
    pair = tuple(rate) if isinstance(rate, list | tuple) else (rate, rate)
    if len(pair) != 2 or not {*map(type, pair)} <= {int, float}:
        raise ValueError("expected a number above 0, or [base, head]")
    return pair


def _cut(where: object) -> object:
    """A boundary, or a tuple of several."""
    if not isinstance(where, list | tuple):
        return _boundary(where)
    where = tuple(map(_boundary, where))
    if len({*where}) < max(len(where), 2) or {"none", EVERY_BLOCK} & {*where}:
        raise ValueError(f"expected two or more different cuts, none of them none or {EVERY_BLOCK}")
    return where


def count_cores() -> int:
    """How many CPU cores this process may use: those that it may run on, fewer where its container has less time."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # of cgroups v2, v1
        with suppress(OSError, ValueError):  # where there is no limit, it is "max", -1 or absent
            quota, period = map(int, " ".join((CGROUP / name).read_text() for name in names).split())
            return max(1, min(n, quota // period)) if quota > 0 else n
    return n


def _workers(number: object) -> object:
    if number == "auto":
        return count_cores()
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError("expected auto, or a whole number, 0 or more")
    return number


Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0, lt=2**32)]
Seeds = Annotated[tuple[Natural, ...], AfterValidator(_distinct)]
Channels = Annotated[tuple[float, ...], AfterValidator(_channels)]
Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Pair = Annotated[tuple[Positive, Positive], BeforeValidator(_pair)]
Strengths = Annotated[tuple[NonNegative, ...], AfterValidator(_distinct), Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Half = Annotated[float, Field(ge=0, le=0.5)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Margin = Annotated[float, Field(gt=0, lt=1)]
Precision = Literal["fp32", "tf32", "bf16"]
COLUMNS = ("path", "label", "weight", "group", "stratum", "subset", "split")  # of a labels.csv
Symmetry = Literal[
    "identity", "flip_horizontal", "flip_vertical", "rotate_180", "rotate_90", "rotate_270", "transpose", "transverse"
]  # fmt: skip
FLIPS = {  # what augmentation.flips makes of view 0
    "none": ("identity",),
    "horizontal": ("identity", "flip_horizontal"),
    "vertical": ("identity", "flip_vertical"),
    "both": ("identity", "flip_horizontal", "flip_vertical", "rotate_180"),
}
Pooling = Literal["none", "avg", "flatten", "cls", "cls+avg"]
Geometry = Literal["crop", "squash", "pad"]
JpegDecoding = Literal["fast", "exact"]
Boundary = Annotated[str | int, BeforeValidator(_boundary)]
Cut = Annotated[str | int | tuple[str | int, ...], BeforeValidator(_cut)]
STORE_DTYPES = {"fp32": "float32", "fp16": "float16"}  # the names that numpy uses


class Record(BaseModel):
    """A frozen record that can be written as JSON: strict, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Dataset(Record):
    """Where the images are, what is left out, and what to do about images and classes that may be mistakes."""

    fetch: Annotated[tuple[Name, ...], AfterValidator(_distinct)]
    path: Text
    max_rejected_fraction: Share
    on_conflict: Literal["error", "drop"]
    near_duplicates: Literal["report", "group"]
    near_duplicate_correlation: Annotated[float, Field(ge=0.9, le=1)]
    exclude: Annotated[tuple[Text, ...], AfterValidator(_distinct)]
    columns: dict[str, Text]
    similar_classes: Literal["error", "merge", "keep"]
    jpeg_decoding: JpegDecoding
    min_class_size: Count
    small_classes: Literal["error", "drop"]

    @model_validator(mode="after")
    def _columns_are_known(self) -> Self:
        if unknown := sorted(set(self.columns) - set(COLUMNS)):
            raise ValueError(
                f"columns: found {unknown}, expected {', '.join(COLUMNS)}, each with its name in labels.csv"
            )
        return self


class Splitting(Record):
    """How images are split; the fractions are of all images."""

    method: Literal["stratified", "hash", "given", "folds"]
    seeds: Annotated[Seeds, Field(min_length=1)]
    partition_seed: Natural
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    allow_leakage: bool


class BackboneChoice(Record):
    """Which network, and which weights; what is None is as the library says, or as the weights file is found."""

    name: Annotated[str, AfterValidator(_network)]
    weights: Text
    seed: Natural
    checkpoint_key: Text | None
    mean: Channels | None
    std: Annotated[Channels, AfterValidator(_not_zero)] | None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] | None

    @classmethod
    def of(cls, name: str, weights: str, seed: int) -> Self:
        """The network with the preprocessing that the library states."""
        return cls(name=name, weights=weights, seed=seed, checkpoint_key=None, mean=None, std=None, interpolation=None)


class BatchSize(Record):
    """Rows that go through a frozen network together, by the type of the device."""

    cpu: Count
    cuda: Count

    def on(self, device: str) -> int:
        """That of this type of device."""
        return {"cpu": self.cpu, "cuda": self.cuda}[device]


class FeatureOptions(Record):
    """How images become features."""

    views: Count
    image_size: Annotated[int, Field(ge=8, le=4096)] | None
    resize: Geometry
    cut: Cut
    pool: Pooling
    engine: Literal["auto", "openvino", "torch"]
    precision: Precision
    batch_size: BatchSize
    store_dtype: Literal["fp32", "fp16"]

    @property
    def has_several_cuts(self) -> bool:
        """Whether features of several cut points are concatenated."""
        return isinstance(self.cut, tuple) or self.cut == EVERY_BLOCK

    @model_validator(mode="after")
    def _base_is_not_empty(self) -> Self:
        if self.cut == "none":
            expected = f"all, a cut point, a module path, a number of layers, a list of these, or {EVERY_BLOCK}"
            raise ValueError(f"cut: found none, expected {expected}")
        return self


class Augmentation(Record):
    """How training view k > 0 of an image differs from view 0."""

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
    """How a run selects and predicts: the symmetries of view 0 over which probabilities are averaged."""

    views: Annotated[tuple[Symmetry, ...], BeforeValidator(_listed), AfterValidator(_distinct), Field(min_length=1)]


class HeadOptions(Record):
    """The dense head and how it is fitted."""

    kind: Literal["linear", "mlp", "pretrained"]
    hidden: tuple[Count, ...]
    dropout: BelowOne
    standardize: bool
    penalty: Literal["l2", "l1", "elasticnet"]
    l1_ratio: Share
    class_weights: Literal["none", "balanced"]
    regularization_strengths: Strengths
    max_iterations: Count
    learning_rate: Positive
    epochs: Count
    batch_size: Count

    @model_validator(mode="after")
    def _kind_fits(self) -> Self:
        if (self.kind == "mlp") != bool(self.hidden) or (self.kind == "linear" and self.dropout):
            found = f"found kind {self.kind}, hidden {list(self.hidden)}, dropout {self.dropout}"
            rules = "`kind: linear` goes with `hidden: []` and `dropout: 0.0`, mlp with at least one width"
            raise ValueError(f"{found}; {rules}, pretrained with `hidden: []`")
        if self.kind == "pretrained" and self.standardize:
            raise ValueError("standardize: found true, expected false, as the pretrained layers were trained")
        return self


class ReferenceOptions(Record):
    """The reference classifiers on the cached features."""

    neighbours: Annotated[tuple[Count, ...], AfterValidator(_distinct), Field(min_length=1)]


class SuspectOptions(Record):
    """How probably wrong labels are found."""

    folds: Annotated[int, Field(ge=3, le=100)]
    seed: Natural
    regularization_strengths: Strengths
    max_iterations: Count


class AdviseOptions(Record):
    """How frozen features are probed before training, and from where on a data set is called large or similar."""

    images: Annotated[int, Field(ge=10)]
    folds: Annotated[int, Field(ge=2, le=100)]
    regularization_strengths: Annotated[tuple[Positive, ...], AfterValidator(_distinct), Field(min_length=1)]
    neighbours: Count
    draws: Annotated[int, Field(ge=2)]
    large_images: Count
    large_class: Count
    similar_errors_avoided: Margin


class Strategy(Record):
    """One way to train the network."""

    init: Literal["cached_head", "random"]
    freeze_until: Boundary
    boundary_cache: Literal["on", "off"]
    batchnorm: Literal["frozen", "train"]
    views: Annotated[int | str, BeforeValidator(_views)]
    augmentation: Augmentation
    mixup: NonNegative
    dropout: BelowOne
    drop_path: BelowOne | None
    epochs: Count
    patience: Count | None
    batch_size: Count
    optimizer: Literal["adamw", "sgd"]
    momentum: BelowOne
    learning_rate_base: Positive
    learning_rate_head: Positive
    learning_rates: Annotated[tuple[Pair, ...], AfterValidator(_distinct)]
    halving_keeps: Count
    halving_epochs: Count
    halving_share: Annotated[float, Field(gt=0, le=0.5)]
    warmup_epochs: Natural
    weight_decay: NonNegative
    gradient_clipping: Positive | None
    ema: BelowOne
    ema_warm_up: Annotated[float, Field(gt=0, le=1)]
    label_smoothing: BelowOne
    class_weights: Literal["none", "balanced"]
    precision: Precision

    @model_validator(mode="after")
    def _combination_makes_sense(self) -> Self:
        if self.init == "random" and (self.freeze_until != "none" or self.batchnorm != "train"):
            found = f"found `freeze_until: {self.freeze_until}` and `batchnorm: {self.batchnorm}`"
            raise ValueError(f"{found}; `init: random` needs `freeze_until: none` and `batchnorm: train`")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs: found {self.warmup_epochs}, expected at most epochs ({self.epochs})")
        return self

    @property
    def n_views(self) -> int:
        """How many augmented views training uses, at most one per epoch; 0: view 0 only."""
        return min(self.views, self.epochs) if isinstance(self.views, int) else self.epochs

    def with_rates(self, base: float, head: float) -> Self:
        """The strategy with these learning rates and no others to choose from."""
        return self.model_copy(update={"learning_rate_base": base, "learning_rate_head": head, "learning_rates": ()})


class FineTune(Record):
    """The strategies, and which of them run.

    Each strategy is already merged with the defaults, and each augmentation with the section `augmentation`.
    """

    run: Annotated[tuple[Name, ...], AfterValidator(_distinct)]
    seeds: Seeds
    augmentations: dict[Name, Augmentation]
    defaults: dict[str, Any]
    strategies: dict[Name, Strategy]


class Margins(Record):
    """By metric, the difference that does not matter in practice: fractions, and nats for the NLL."""

    accuracy: Margin
    balanced_accuracy: Margin
    macro_f1: Margin
    auroc: Margin
    nll: Positive


class Compare(Record):
    """How strategies are compared, and the largest regressions allowed in a pull request."""

    baseline: Name
    metric: Literal["accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll"]
    practical_margin: Margins
    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    positive_class: Text | None
    specificity: Annotated[float, Field(gt=0, lt=1)]
    guard_by: Literal["bound", "difference"]
    guard: dict[str, NonNegative]


class Runtime(Record):
    """Settings that change no result, except the device."""

    device: Literal["auto", "cpu", "cuda"]
    workers: Annotated[Natural, BeforeValidator(_workers)]
    store: Annotated[Text, AfterValidator(_directory)] | None
    store_max_gb: Positive
    pixel_cache: Literal["auto", "on", "off"]


class Params(Record):
    """The whole of params.yaml."""

    dataset: Dataset
    split: Splitting
    backbone: BackboneChoice
    features: FeatureOptions
    augmentation: Augmentation
    evaluation: Evaluation
    threads: Count
    head: HeadOptions
    references: ReferenceOptions
    label_suspects: SuspectOptions
    advise: AdviseOptions
    fine_tune: FineTune
    compare: Compare
    runtime: Runtime

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        strategies, run, baseline = self.fine_tune.strategies, self.fine_tune.run, self.compare.baseline
        unknown = [name for name in run if name not in strategies]
        unsplit = [seed for seed in self.fine_tune.seeds if seed not in self.split.seeds]
        reported = {HEAD_ONLY, HEAD_ALL_SEEDS, *strategies}
        unguarded = [name for name in self.compare.guard if name.partition(".")[0] not in reported or "." not in name]
        guarded = (
            f"a strategy of fine_tune.strategies, {HEAD_ONLY} or {HEAD_ALL_SEEDS}, then keys of reports/details.json"
        )
        seeds, is_folds = self.split.seeds, self.split.method == "folds"
        test_fraction = 1 / len(seeds) if is_folds else self.split.test_fraction
        share = test_fraction + self.split.val_fraction
        unnumbered = is_folds and (len(seeds) < 2 or sorted(seeds) != [*range(len(seeds))])
        left_out = is_folds and run and set(self.fine_tune.seeds) != set(seeds)
        cut, pool = self.features.cut, self.features.pool
        is_late = self.features.has_several_cuts or cut == "all" or pool != "none"
        ends_late = self.head.kind == "pretrained" and is_late
        base = f"found `cut: {[*cut] if isinstance(cut, tuple) else cut}` and `pool: {pool}`"
        needs = "a cut before the network's own dense layers (python -m pipeline cuts NAME), no list, and `pool: none`"
        reserved = (HEAD_ONLY, HEAD_ALL_SEEDS, *REFERENCES, "backbone")  # the last is a file of data/plan/
        baselines = f"{HEAD_ONLY} or an entry of fine_tune.run"
        for is_wrong, problem in (
            (unnumbered, f"split.seeds: found {[*seeds]}; with `method: folds` expected the K folds, 0 to K - 1"),
            (share >= 1, f"split: the shares of test and validation: found {share:g} in all, expected less than 1"),
            (
                left_out,
                f"fine_tune.seeds: found {[*self.fine_tune.seeds]}; with `split.method: folds` expected all of "
                f"split.seeds, {[*seeds]}, so that every unit is tested once",
            ),
            (ends_late, f"features: {base}; `head.kind: pretrained` needs {needs}"),
            (strategies.keys() & {*reserved}, f"fine_tune.strategies: the names {', '.join(reserved)} are reserved"),
            (unknown, f"fine_tune.run: found {unknown}, expected some of {', '.join(strategies)}"),
            (unsplit, f"fine_tune.seeds: found {unsplit}, expected some of split.seeds"),
            (run and not self.fine_tune.seeds, "fine_tune.seeds: found [], expected a seed, or `run: []`"),
            (baseline not in (HEAD_ONLY, *run), f"compare.baseline: found {baseline}, expected {baselines}"),
            (unguarded, f"compare.guard: found {unguarded}, expected {guarded}"),
        ):
            if is_wrong:
                raise ValueError(problem)
        return self


def load_params(path: Path = PARAMS) -> Params:
    """Read and validate `path`; ValueError with one line per mistake.

    The file is parsed as DVC parses it (ruamel.yaml, YAML 1.2: 1e-5 is a number, on and off are words). It is then
    validated as JSON, because a JSON list is a valid tuple while the text "3" is no valid integer.
    """
    try:
        document = json.loads(json.dumps(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found; run from the top of the repository") from None
    except (YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a YAML mapping: {' '.join(str(error).split())}") from None
    try:
        return Params.model_validate_json(json.dumps(_with_defaults(document)))
    except ValidationError as error:
        mistakes = [(_origin([*mistake["loc"]], document), dict(mistake)) for mistake in error.errors()]
        wrong = [where for where, _ in mistakes]
        lines = {
            f"{path}: {_describe(where, mistake)}": None
            for where, mistake in mistakes
            if not any(where[:n] in wrong for n in range(len(where)))  # what is no section lacks no keys
        }
        raise ValueError("\n".join(lines)) from None


def _with_defaults(document: Any) -> Any:  # noqa: ANN401
    """The document with `fine_tune.defaults` merged into each strategy, and `augmentation` into that of fine-tuning.

    The strategy's own keys win. `evaluation.views: auto` becomes the flips of `augmentation`.
    """
    match document:
        case {"evaluation": {"views": "auto"}}:
            match document.get("augmentation"):
                case {"flips": "none" | "horizontal" | "vertical" | "both" as flips}:
                    views = FLIPS[flips]
                case _:  # an error of its own
                    views = FLIPS["none"]
            document = document | {"evaluation": document["evaluation"] | {"views": [*views]}}
    match document:
        case {"fine_tune": dict(fine_tune)}:
            base = document.get("augmentation")
            presets, strategies = fine_tune.get("augmentations"), fine_tune.get("strategies")
            is_named = isinstance(presets, dict)
            presets = {name: _merged(base, own) for name, own in presets.items()} if is_named else {}
            fine_tune = fine_tune | ({"augmentations": presets} if is_named else {})
            if isinstance(strategies, dict):
                # Where the defaults are wrong, the error is about them, not about every key that they would have given
                is_whole = isinstance(fine_tune.get("defaults"), dict)
                merged = {name: _merged(fine_tune["defaults"], own) for name, own in strategies.items() if is_whole}
                for name, strategy in merged.items():
                    if isinstance(strategy, dict) and (given := strategy.get("augmentation")) is not None:
                        named = _merged(base, presets.get(given, given) if isinstance(given, str) else given)
                        merged[name] = strategy | {"augmentation": named}
                fine_tune = fine_tune | {"strategies": merged}
            return document | {"fine_tune": fine_tune}
    return document


def _merged(base: Any, own: Any) -> Any:  # noqa: ANN401
    return base | own if isinstance(base, dict) and isinstance(own, dict) else own


EXPECTED = {  # replaces those of pydantic's messages that speak of Python, by type of mistake
    "too_short": "expected at least one entry",
    "string_too_short": "expected a word",
    "string_pattern_mismatch": "expected letters, digits and _ only",
    "tuple_type": "expected a list, e.g. [0, 1]",
    "model_type": "expected a section with keys",
    "dict_type": "expected a section with keys",
    "augmentation": "expected the name of an entry of fine_tune.augmentations, or keys of the section augmentation",
}


def _origin(where: list, document: dict) -> list:
    """Where the value at `where` of the merged document was given: in a strategy, in the defaults, …

    A key of an augmentation of fine-tuning: there, in `augmentations`, or in `augmentation`.
    """
    match where:  # "[key]" stands for the name of the strategy itself
        case ["fine_tune", "strategies", name, key, *_] if key != "[key]":
            if key not in document["fine_tune"]["strategies"][name]:
                where = ["fine_tune", "defaults", *where[3:]]
    match where:
        case ["fine_tune", "augmentations", _, key, *_] | ["fine_tune", "defaults", "augmentation", key, *_]:
            end = 3
        case ["fine_tune", "strategies", _, "augmentation", key, *_]:
            end = 4
        case _:
            return where
    given: Any = document
    for name in where[:end]:
        given = given[name]
    if isinstance(given, str):
        return _origin(["fine_tune", "augmentations", given, *where[end:]], document)
    return where if key in given else ["augmentation", *where[end:]]


def _describe(where: list, mistake: dict) -> str:
    """One line: the key, what was found, what was expected."""
    key = f"{'.'.join(map(str, where))}: " if where else ""
    if mistake["type"] == "missing":
        return f"{key}is missing"
    if mistake["type"] == "extra_forbidden":
        records = [record for record in Record.__subclasses__() if record.__module__ == __name__]
        known = {field for record in records for field in record.model_fields}
        near = difflib.get_close_matches(str(where[-1]), known - {where[-1]}, n=1)  # it may be a key elsewhere
        return f"{key}unknown key; expected {near[0] if near else 'only keys of the params.yaml in git'}"
    if where[-1:] == ["augmentation"] != where and mistake["type"] == "model_type":
        mistake["type"] = "augmentation"
    found = "" if isinstance(mistake["input"], dict) else f"found {json.dumps(mistake['input'])}; "
    message = mistake["msg"].removeprefix("Value error, ").replace("Input should", "expected it to")
    return f"{key}{found}{EXPECTED.get(mistake['type'], message)}"
