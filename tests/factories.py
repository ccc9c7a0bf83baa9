"""The records of tests: options, labels, plans, runs, small pictures, and a finished study of 24 images.

Each factory gives a plain record; keyword arguments replace its fields.
"""

import contextlib
import copy
import io
import json
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from ruamel.yaml import YAML

from pipeline.comparison import details
from pipeline.comparison.outcomes import Outcomes, of_predictions
from pipeline.comparison.paired import Study
from pipeline.dataset import decoding, manifest
from pipeline.dataset.manifest import Images, Labels, Split
from pipeline.dataset.units import unit_of
from pipeline.features import hdf5
from pipeline.features.extraction import Computation
from pipeline.features.hdf5 import Provenance, Row
from pipeline.features.loading import Loader
from pipeline.features.store import Key, Store, root
from pipeline.files import write_json, write_text
from pipeline.network.plans import BackbonePlan, StrategyPlan
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import (
    REFERENCES,
    Augmentation,
    BackboneChoice,
    BatchSize,
    Compare,
    FeatureOptions,
    HeadOptions,
    Margins,
    Strategy,
)
from pipeline.training.runs import Candidates, Cost, Predictions, Run, make_candidates, save_run
from pipeline.training.saved_networks import Card

REPOSITORY = Path(__file__).parents[1]
CARRIED = (  # by a copy of the repository in which dvc repro runs
    "dvc.yaml",
    "params.yaml",
    "pipeline",
    "requirements*.lock",
    ".gitignore",
    ".dvcignore",
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvc/plots",
    "data/weights/README.md",
    "data/weights/bundled",
    "data/weights/default",
    "data/weights/random",
)


def carry(root: Path) -> None:
    """Copy what git knows, or would, of the repository as it is now, as far as dvc repro needs it."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *CARRIED]
    tracked = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, tracked):
        if (REPOSITORY / name).exists():  # git may list a file that has just been deleted
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, root / name)


# Pictures


def noise(*shape: int) -> np.ndarray:
    """Grey levels (uint8), the same in every call."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photograph() -> Image.Image:
    """36 x 28 px with soft edges."""
    return Image.fromarray(noise(7, 9, 3)).resize((36, 28), Image.Resampling.BICUBIC)


# params.yaml, and options as they are there


@cache
def _params_of_the_repository() -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(REPOSITORY / "params.yaml")


def params_document() -> dict[str, Any]:
    """params.yaml of the repository, to be changed at will. It is parsed once: that takes longer than many tests."""
    return copy.deepcopy(_params_of_the_repository())


def write_params(document: dict[str, Any], path: Path = Path("params.yaml")) -> None:
    """Write params.yaml, as JSON, which is YAML too."""
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")


PLAIN = Augmentation(
    seed=0,
    flips="none",
    right_angles=False,
    rotation_degrees=0.0,
    shift_fraction=0.0,
    scale=(1.0, 1.0),
    crop_area=(1.0, 1.0),
    crop_aspect=(1.0, 1.0),
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    noise_std=0.0,
)
FLIPS = PLAIN.model_copy(update={"flips": "both"})
LINEAR = HeadOptions(
    kind="linear",
    hidden=(),
    dropout=0.0,
    standardize=True,
    penalty="l2",
    l1_ratio=0.5,
    class_weights="none",
    regularization_strengths=(0.1,),
    max_iterations=500,
    learning_rate=1e-3,
    epochs=1,
    batch_size=8,
)
PREPROCESSING = Preprocessing(
    geometry="crop",
    jpeg_decoding="exact",
    resize=(8,),
    crop=8,
    interpolation="bilinear",
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
)
CHOICE = BackboneChoice.of("timm/test_resnet", "random", 0)


def feature_options(**changes: Any) -> FeatureOptions:
    """Two views, in torch."""
    plain: dict[str, Any] = {"views": 2, "image_size": None, "cut": "all", "pool": "none", "resize": "crop"}
    precision: dict[str, Any] = {"precision": "fp32", "store_dtype": "fp32", "engine": "torch"}
    sizes: dict[str, Any] = {"batch_size": BatchSize(cpu=8, cuda=256)}
    return FeatureOptions(**plain | precision | sizes | changes)


def loader(computation: Computation, paths: dict[str, Path], workers: int = 0) -> Loader:
    """Loads the views of image files, without pixels in the store."""
    preprocessing = Preprocessing.model_validate_json(json.dumps(computation.key.description["preprocessing"]))
    return Loader(paths, preprocessing, computation.key.augmentation, None, workers, torch.device("cpu"))


def strategy(**changes: Any) -> Strategy:
    """Two epochs of everything, from the cached head."""
    plain: dict[str, Any] = {
        "init": "cached_head",
        "freeze_until": "none",
        "boundary_cache": "on",
        "batchnorm": "frozen",
        "views": 1,
        "augmentation": FLIPS,
        "mixup": 0.0,
        "dropout": 0.0,
        "drop_path": None,
        "epochs": 2,
        "patience": 2,
        "batch_size": 8,
        "optimizer": "adamw",
        "momentum": 0.9,
        "learning_rate_base": 1e-3,
        "learning_rate_head": 1e-3,
        "learning_rates": (),
        "ema_warm_up": 0.75,
        "halving_keeps": 3,
        "halving_epochs": 2,
        "halving_share": 0.2,
        "warmup_epochs": 0,
        "weight_decay": 0.0,
        "gradient_clipping": None,
        "ema": 0.0,
        "label_smoothing": 0.0,
        "class_weights": "none",
        "precision": "fp32",
    }
    return Strategy(**plain | changes)


# Tables


def labels(n: int, n_classes: int = 2, **columns: Any) -> Labels:
    """`n` images whose classes take turns, each with bytes and a weight (1) of its own."""
    names = [f"{row:03}.png" for row in range(n)]
    text = dict.fromkeys(("group", "near_duplicate_group", "stratum", "subset", "given_split"), [""] * n)
    numbers = {"label": np.arange(n) % n_classes, "weight": np.ones(n)}
    classes = [f"class {index}" for index in range(n_classes)]
    digests = [decoding.sha256(name.encode()) for name in names]
    plain: dict[str, Any] = {"image_id": names, "sha256": digests, "class_names": classes, **text, **numbers}
    return Labels(**plain | columns)


# Plans and provenance


def backbone_plan(**changes: Any) -> BackbonePlan:
    """A network of five features that exists only here."""
    plain: dict[str, Any] = {
        "choice": CHOICE,
        "image_size": None,
        "licence": None,
        "weights_sha256": "0" * 64,
        "preprocessing": PREPROCESSING,
        "feature_dim": 5,
        "cut": "all",
        "pool": "none",
        "prefix_tokens": 0,
        "feature_shape": (5,),
        "parameters": 1000,
        "flops_per_image": 10**6,
    }
    return BackbonePlan(**plain | changes)


def strategy_plan(**changes: Any) -> StrategyPlan:
    """All of the base of `backbone_plan` is trained."""
    plain: dict[str, Any] = {
        "recipe": strategy(),
        "boundary": "none",
        "trained_parameters": 1000,
        "prefix_flops": 0,
        "suffix_training_flops": 3 * 10**6,
        "cached_bytes_per_image": 0,
    }
    return StrategyPlan(**plain | changes)


def provenance(**changes: Any) -> Provenance:
    """Features of `backbone_plan`."""
    plain: dict[str, Any] = {"backbone": backbone_plan(), "augmentation": FLIPS, "engine": "torch"}
    plain |= {"training_views": (0,), "evaluation_views": ("identity",)}
    stored: dict[str, Any] = {"precision": "fp32", "store_dtype": "fp32", "largest_rounding": 0.0}
    return Provenance(**plain | stored | changes)


# The feature store

STORE_ROWS: list[Row] = [(f"{number:064x}", 0) for number in range(12)]
STORE_VALUES = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)


def store_key(backbone: str = "torchvision/resnet18", width: int = 5, store_dtype: str = "fp32") -> Key:
    """The key of rows of `width` numbers."""
    description = {
        "backbone": backbone,
        "weights_sha256": "c0ffee00" * 8,
        "cut": "layer3",
        "pool": "avg",
        "preprocessing": {"crop": 224},
        "precision": "fp32",
        "store_dtype": store_dtype,
        "engine": "openvino",
        "device": "cpu",
    }
    return Key(description, FLIPS, (width,))


def fill_store(key: Key, rows: list[Row] = STORE_ROWS) -> list[Path]:
    """Write STORE_VALUES as three shards of four rows each; the paths of those that are new."""
    store = Store(key)
    before = {*root().glob("*/*.h5")}
    for start in range(0, 12, 4):
        values = np.resize(STORE_VALUES, (12, *key.row_shape))[start : start + 4]
        store.write(rows[start : start + 4], values)
    return sorted({*root().glob("*/*.h5")} - before)


# Runs


def cost(**changes: int) -> Cost:
    """What a small head costs."""
    return Cost(**{"trainable_params": 10, "train_flops": 4, "base_passes": 2, "cached_bytes": 8} | changes)


def predictions(rows: Sequence[int] | np.ndarray, logits: np.ndarray) -> Predictions:
    """Logits (n, n_classes) of images, as log-probabilities (float32)."""
    logits = np.asarray(logits, float)
    log_probability = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return Predictions(np.asarray(rows, np.int64), log_probability.astype(np.float32))


def predictions_with(is_correct: np.ndarray, rows: np.ndarray | None = None) -> Predictions:
    """Predictions (class 0 or 1) for images of class 0 that are correct where `is_correct` (n,) says so."""
    rows = np.arange(len(is_correct)) if rows is None else rows
    return Predictions(rows, np.stack([is_correct, ~is_correct], axis=1).astype(float))


def outcomes_of(log_probability: np.ndarray, label: np.ndarray) -> Outcomes:
    """Outcomes of log-probabilities (n, n_classes), or logits, for images 0 to n - 1 with these labels."""
    return of_predictions(Predictions(np.arange(len(label)), np.asarray(log_probability)), label)


def outcomes_with(is_correct: np.ndarray, rows: np.ndarray | None = None) -> Outcomes:
    """Outcomes of predictions_with."""
    made = predictions_with(is_correct, rows)
    return of_predictions(made, np.zeros(made.rows.max() + 1, np.int64))


def ones_study(n: int, **changes: Any) -> Study:
    """A study of n images of class 0 and weight 1, each its own unit."""
    return Study(**{"label": np.zeros(n, np.int64), "weight": np.ones(n), "unit": np.arange(n)} | changes)


def two_strategies(
    n_classes: int, seeds: int, n_images: int = 400, n_test: int = 150
) -> tuple[list[Outcomes], list[Outcomes], Study]:
    """A better and a worse strategy on overlapping test images, every image its own unit."""
    random = np.random.default_rng(0)
    label, weight = random.integers(0, n_classes, n_images), random.choice([1 / 3, 2 / 3, 1.0], n_images)
    rows = [np.sort(random.permutation(n_images)[:n_test]) for _ in range(seeds)]

    def predict(row: np.ndarray, strength: float) -> Outcomes:
        logits = random.normal(size=(len(row), n_classes))
        logits[np.arange(len(row)), label[row]] += strength
        return of_predictions(Predictions(row, logits.astype(np.float32)), label)

    study = Study(label, weight, np.arange(n_images))
    return [predict(row, 2.0) for row in rows], [predict(row, 1.0) for row in rows], study


def candidates(val: Predictions, label: np.ndarray) -> Candidates:
    """The one candidate that predicts `val`; label (n,) of all images."""
    return make_candidates({"0.1": val.log_probability}, label[val.rows])


def run(strategy: str, seed: int, val: Predictions, test: Predictions, label: np.ndarray, **changes: Any) -> Run:
    """A run with these predictions, chosen from one candidate; that of the head by default. label is of all images."""
    network = {"params": 1000, "boundary": "all", "largest_rounding": 0.0}
    plain: dict[str, Any] = {
        "cost": cost(),
        "chosen": {"strength": 0.1},
        "network": network,
        "curve": [],
        "other_curves": {},
    }
    plain["candidates"] = candidates(val, label)
    return Run(strategy=strategy, seed=seed, val=val, test=test, **plain | changes)


# A comparison that can be checked by hand: 40 images, every fourth with weight 2, and two seeds

FORTY = labels(40, class_names=["cat", "dog"], weight=np.where(np.arange(40) % 4 == 0, 2.0, 1.0))
FORTY_SPLITS = {0: (np.arange(8), np.arange(8, 24)), 1: (np.arange(32, 40), np.arange(16, 32))}  # val, test


def run_wrong_on(strategy: str, seed: int, wrong: list[int], train_flops: int = 10**12, **changes: Any) -> Run:
    """A run on FORTY that is wrong on the images `wrong` and right on the others, with a confidence of 0.9."""
    predicted = np.where(np.isin(np.arange(40), wrong), 1 - FORTY.label, FORTY.label)
    logits = np.log(np.where(np.eye(2)[predicted] > 0, 0.9, 0.1))
    val, test = (predictions(rows, logits[rows]) for rows in FORTY_SPLITS[seed])
    spent = cost(trainable_params=100, train_flops=train_flops)
    return run(strategy, seed, val, test, FORTY.label, **{"cost": spent} | changes)


HEAD_RUNS = [
    run_wrong_on("feature_extraction", 0, [1, 8, 9, 10, 11]),
    run_wrong_on("feature_extraction", 1, [16, 17, 18]),
]
FULL_RUNS = [run_wrong_on("full", 0, [8], 9 * 10**12), run_wrong_on("full", 1, [17], 10 * 10**12)]
COMPARE = Compare(
    baseline="feature_extraction",
    metric="accuracy",
    practical_margin=Margins(accuracy=0.01, balanced_accuracy=0.01, macro_f1=0.01, auroc=0.01, nll=0.05),
    confidence=0.95,
    positive_class=None,
    specificity=0.9,
    guard_by="bound",
    guard={},
)
ALWAYS_CAT = [run_wrong_on("majority_class", seed, [*range(1, 40, 2)], 0) for seed in (0, 1)]


def forty_data(labels: Labels = FORTY, n_folds: int = 0, **options: Any) -> details.Data:
    """What the figures of FORTY share, without near-duplicates."""
    none = np.zeros(len(labels.label), bool)
    chosen = COMPARE.model_copy(update=options)
    return details.Data(labels, unit_of(labels), chosen, {0: none, 1: none}, n_folds)


def forty_details(
    head: Sequence[Run] = HEAD_RUNS, full: Sequence[Run] = FULL_RUNS, labels: Labels = FORTY, **options: Any
) -> dict[str, Any]:
    """details.json, before rounding, of HEAD_RUNS and FULL_RUNS."""
    runs, references = {"feature_extraction": head, "full": full}, {"majority_class": ALWAYS_CAT[: len(head)]}
    return details.assemble(runs, head, references, forty_data(labels, **options), {"val": 16, "test": 24})


def card(**changes: Any) -> Card:
    """The card of a head on `backbone_plan`."""
    plain: dict[str, Any] = {
        "strategy": "feature_extraction",
        "seed": 0,
        "class_names": ("a", "b"),
        "backbone": backbone_plan(),
        "augmentation": FLIPS,
        "evaluation_views": ("identity",),
        "freeze_until": "all",
        "head": LINEAR,
        "cost": cost(),
        "temperature": 1.0,
    }
    return Card(**plain | changes)


# A finished study of 24 tiny images whose names are hostile, as the stages leave it

HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "{{ 7*7 }} ${7*7} 'a' \"b\" & \u2028"]
N_STUDY = 24
STUDY_OUTPUTS = (  # and reports/*.json
    "data/images.csv",
    "data/labels.csv",
    "data/near_duplicates.csv",
    "reports/confusion",
    "reports/data",
    "reports/label_suspects.csv",
    "reports/label_suspects.json",
    "reports/runs/feature_extraction",
    "reports/runs/partial_freeze/seed_0",
)


def make_study(root: Path) -> None:
    """Write everything that the page reads below `root`, in a second."""
    from pipeline.stages import compare

    with contextlib.chdir(root):
        study_params(Path("params.yaml"))
        labels = study_dataset(Path("data/mine"))
        study_features(labels)
        random = np.random.default_rng(0)
        for seed in (0, 1):
            split = np.array(["train", "val", "test"])[(np.arange(N_STUDY) // 3 + seed) % 3]
            manifest.write_split(Split(seed, labels.image_id, split))
            fine_tuned = ("partial_freeze", *REFERENCES) if seed == 0 else ()
            for name in ("feature_extraction", *fine_tuned):
                save_run(study_run(name, seed, labels, split, random))
        write_text(manifest.NEAR_DUPLICATES, "a,b,correlation\n")
        compare.main()
        study_reports(labels)


def study_params(path: Path) -> None:
    """params.yaml of the repository, with a study of seconds."""
    document = params_document()
    document["dataset"].update({"fetch": [], "path": "data/mine"})
    document["split"]["seeds"] = [0, 1]
    document["backbone"].update({"name": CHOICE.name, "weights": CHOICE.weights})
    document["features"].update({"views": 1, "image_size": 64})
    document["evaluation"]["views"] = ["identity"]
    document["fine_tune"].update({"run": ["partial_freeze"], "seeds": [0]})
    document["compare"]["guard"] = {}
    write_params(document, path)


def study_dataset(directory: Path) -> Labels:
    """Image files, data/images.csv and data/labels.csv."""
    directory.mkdir(parents=True)
    names = sorted(f"{i:02} {HOSTILE[1]}.png".replace("/", "") for i in range(N_STUDY))
    sha256 = []
    for i, name in enumerate(names):
        Image.new("RGB", (40, 30), (10 * i, 255 - 10 * i, 40 * (i % 3))).save(directory / name)
        sha256.append(decoding.sha256((directory / name).read_bytes()))
    manifest.write_images(Images(names, sha256, [40] * N_STUDY, [30] * N_STUDY))
    subset = [HOSTILE[i % 2] for i in range(N_STUDY)]
    made = labels(N_STUDY, 3, image_id=names, sha256=sha256, subset=subset, class_names=sorted(HOSTILE))
    manifest.write_labels(made)
    return made


def study_features(labels: Labels, shape: tuple[int, ...] = (16,), licence: str | None = None) -> None:
    """data/features.h5 with random values, of a network that can be loaded again."""
    from pipeline.network import backbones

    backbone = backbones.load(CHOICE, 64)
    plan = backbone_plan(
        image_size=64,
        weights_sha256=backbone.weights_sha256,
        preprocessing=backbone.preprocessing,
        feature_dim=backbone.feature_dim,
        feature_shape=shape,
        licence=licence,
    )
    values = np.random.default_rng(1).normal(size=(N_STUDY, 1, *shape)).astype(np.float32)
    made = provenance(backbone=plan)
    hdf5.write_features(hdf5.FEATURES, [values], None, labels.sha256, made)


def study_run(name: str, seed: int, labels: Labels, split: np.ndarray, random: np.random.Generator) -> Run:
    """Predictions that are often right."""
    is_head = name == "feature_extraction"
    found = []
    for part in ("val", "test"):
        rows = np.flatnonzero(split == part)
        logits = random.normal(size=(len(rows), 3)) + 2 * (labels.label[rows, None] == np.arange(3))
        found.append(Predictions(rows, logits.astype(np.float32)))
    curve = [
        {"epoch": epoch, "train_loss": None if epoch == 0 else 0.5, "train_accuracy": None if epoch == 0 else 0.9}
        | {"val_loss": 0.6 - 0.1 * epoch, "val_accuracy": 0.8}
        for epoch in range(3)
    ]
    selected = {"strength": 0.1, "at_end": None, "val_nll": {"1.0": 0.7, "0.1": 0.6, "0.01": 0.65}}
    spent = cost(trainable_params=51, train_flops=10**9 if is_head else 10**11, base_passes=8, cached_bytes=1536)
    described = {"cost": spent, "chosen": selected if is_head else {"epoch": 2}, "curve": [] if is_head else curve}
    val, test = found
    return run(name, seed, val, test, labels.label, **described)


def study_reports(labels: Labels) -> None:
    """What index, split and label_suspects report, timings, and dvc.lock."""
    names = labels.image_id
    summary = {
        "n_images": N_STUDY,
        "n_rejected": 1,
        "n_skipped": 2,
        "skipped": {"no images": 2},
        "n_distinct": N_STUDY,
        "classes": dict.fromkeys(sorted(HOSTILE), 8),
        "width": {"min": 40, "median": 40.0, "max": 40},
        "height": {"min": 30, "median": 30.0, "max": 30},
        "formats": {"PNG": N_STUDY},
        "modes": {"RGB": N_STUDY},
        "exact_duplicates": [names[:2]],
        "n_exact_duplicates": 1,
        "conflicts": [names[2:4]],
        "n_near_duplicates": 1,
        "n_poor": {"of one colour": 30},
        "poor": {"of one colour": names[6:8]},
        "warnings": [HOSTILE[0]],
    }
    write_json(Path("reports/data/summary.json"), summary)
    write_text(Path("reports/data/near_duplicates.csv"), f"a,b,correlation\n{names[4]},../../secret.png,0.9987\n")
    write_text(Path("reports/data/rejected.csv"), f'path,reason\n"{HOSTILE[0]}",truncated\n')
    suspects = f'rank,image_id,label,suggested,self_confidence\n1,{names[5]},"{HOSTILE[0]}","{HOSTILE[1]}",0.02\n'
    write_text(Path("reports/label_suspects.csv"), suspects)
    quality = {"accuracy": 0.4, "largest_class": 0.3333, "caution": HOSTILE[0]}
    write_json(Path("reports/label_suspects.json"), quality)
    leaks = [{"tie": "group", "name": HOSTILE[0], "n": 2, "parts": {names[0]: "train", names[1]: "test"}}]
    splits = {"method": "stratified", "sizes": {"0": {"train": 8, "val": 8, "test": 8, "unused": 0}}, "notes": []}
    splits |= {"n_near_duplicates": 1, "n_straddling": [1], "straddling": [], "n_followers": []}
    write_json(Path("reports/splits.json"), splits | {"n_leaks": 1, "leaks": leaks})
    write_json(Path("reports/timings/extract.json"), {"wall_seconds": 75.2, "peak_memory_bytes": 10**9})
    shutil.copytree(REPOSITORY / ".dvc/plots", ".dvc/plots", ignore=shutil.ignore_patterns("*.html"))
    write_json(Path("reports/advice.json"), advice())
    study_lock()


def advice() -> dict[str, Any]:
    """reports/advice.json of two blocks, whose names are hostile."""
    shares = [{"value": value, "low": value - 0.05, "high": value + 0.05} for value in (0.5, 0.7, 0.75, 0.8)]
    cuts = (HOSTILE[0], "all")
    return {
        "words": [f"**Where the information sits.** After {HOSTILE[0]}.", "**Would more images help?** They may."],
        "cannot_tell": "",
        "images": 1200,
        "majority_class": shares[0],
        "blocks": [{"cut": cut, "linear": shares[1], "nearest": shares[0]} for cut in cuts],
        "curve": {
            "sizes": [{"images": 10 * 2**i, **share} for i, share in enumerate(shares)],
            "expected": [{"images": 100 * 2**i, "times": 2**i, **share} for i, share in enumerate(shares[1:])],
        },
    }


def study_lock() -> None:
    """dvc.lock, as if one stage had written everything that the page reads."""
    from pipeline.report.provenance import digest

    paths = [*Path("reports").glob("*.json"), *map(Path, STUDY_OUTPUTS)]
    outs = [{"path": path.as_posix(), "md5": digest(path), "size": 12} for path in paths]
    write_text(Path("dvc.lock"), json.dumps({"schema": "2.0", "stages": {"all": {"outs": outs}}}))
