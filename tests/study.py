"""A finished study of 24 tiny images whose names are hostile, as the stages leave it; made in a second."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from ruamel.yaml import YAML

from pipeline.dataset import decoding, manifest
from pipeline.dataset.manifest import Labels, Split
from pipeline.features import hdf5
from pipeline.files import write_json, write_text
from pipeline.network import backbones
from pipeline.params import BackboneChoice
from pipeline.stages import compare
from pipeline.training import models
from pipeline.training.models import Cost, Run

REPOSITORY = Path(__file__).parents[1]
HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "{{ 7*7 }} ${7*7} 'a' \"b\" & \u2028"]
N = 24


def make(root: Path) -> None:
    """Write everything that the page reads below `root`."""
    with contextlib.chdir(root):
        params(Path("params.yaml"))
        labels = dataset(Path("data/mine"))
        features(labels)
        random = np.random.default_rng(0)
        for seed in (0, 1):
            part = np.array(["train", "val", "test"])[(np.arange(N) // 3 + seed) % 3]
            manifest.write_split(Split(seed, labels.image_id, part))
            for strategy in ("feature_extraction", "partial_freeze") if seed == 0 else ("feature_extraction",):
                artifacts.save_run(run(strategy, seed, labels, part, random))
        compare.compare()
        data_reports(labels)


def params(path: Path) -> None:
    yaml = YAML()
    document = yaml.load(REPOSITORY / "params.yaml")
    document["dataset"].update({"fetch": [], "path": "data/mine"})
    document["split"]["seeds"] = [0, 1]
    document["backbone"].update({"name": "timm/test_resnet", "weights": "random"})
    document["features"].update({"views": 1, "image_size": 64})
    document["evaluation"]["views"] = 1
    document["fine_tune"].update({"run": ["partial_freeze"], "seeds": [0]})
    document["compare"]["guard"] = {}
    yaml.dump(document, path)


def dataset(directory: Path) -> Labels:
    directory.mkdir(parents=True)
    names = sorted(f"{i:02} {HOSTILE[1]}.png".replace("/", "") for i in range(N))
    sha256 = []
    for i, name in enumerate(names):
        Image.new("RGB", (40, 30), (10 * i, 255 - 10 * i, 40 * (i % 3))).save(directory / name)
        sha256.append(decoding.sha256((directory / name).read_bytes()))
    manifest.write_images(manifest.Images(names, sha256, [40] * N, [30] * N))
    labels = Labels(
        image_id=names,
        sha256=sha256,
        label=np.arange(N) % 3,
        weight=np.ones(N),
        group=[""] * N,
        near_duplicate_group=[""] * N,
        stratum=[""] * N,
        subset=[HOSTILE[i % 2] for i in range(N)],
        given_split=[""] * N,
        class_names=sorted(HOSTILE),
    )
    manifest.write_labels(labels)
    return labels


def features(labels: Labels, shape: tuple[int, ...] = (16,)) -> None:
    choice = BackboneChoice(name="timm/test_resnet", weights="random", seed=0)
    backbone = backbones.load(choice, 64)
    values = np.random.default_rng(1).normal(size=(N, 1, *shape)).astype(np.float32)
    made = {
        "backbone": choice.model_dump(),
        "image_size": 64,
        "computation": {"weights_sha256": backbone.weights_sha256, "cut": "all"},
    }
    hdf5.write_features(hdf5.FEATURES, values.shape, values.dtype, [values], labels.sha256, made)


def run(strategy: str, seed: int, labels: Labels, part: np.ndarray, random: np.random.Generator) -> Run:
    is_head = strategy == "feature_extraction"
    said: dict[str, Any] = {}
    for name in ("val", "test"):
        rows = np.flatnonzero(part == name)
        logits = random.normal(size=(len(rows), 3)) + 2 * (labels.label[rows, None] == np.arange(3))
        said |= {f"{name}_rows": rows, f"{name}_logits": logits.astype(np.float32)}
    curve = [
        {"epoch": epoch, "train_loss": None if epoch == 0 else 0.5, "train_accuracy": None if epoch == 0 else 0.9}
        | {"val_loss": 0.6 - 0.1 * epoch, "val_accuracy": 0.8}
        for epoch in range(3)
    ]
    return Run(
        strategy,
        seed,
        Cost(trainable_params=51, train_flops=10**9 if is_head else 10**11, base_passes=8, cached_bytes=1536),
        {"strength": 0.1, "val_nll": {"1.0": 0.7, "0.1": 0.6, "0.01": 0.65}} if is_head else {"epoch": 2},
        {"params": 1000, "boundary": "all", "largest_rounding": 0.0},
        [] if is_head else curve,
        **said,
    )


def data_reports(labels: Labels) -> None:
    names = labels.image_id
    summary = {
        "n_images": N,
        "n_rejected": 1,
        "n_distinct": N,
        "classes": dict.fromkeys(sorted(HOSTILE), 8),
        "width": {"min": 40, "median": 40.0, "max": 40},
        "height": {"min": 30, "median": 30.0, "max": 30},
        "formats": {"PNG": N},
        "modes": {"RGB": N},
        "exact_duplicates": [names[:2]],
        "n_exact_duplicates": 1,
        "conflicts": [names[2:4]],
        "near_duplicates": [{"a": names[4], "b": "../../secret.png", "bits": 3}],
        "n_near_duplicates": 1,
        "warnings": [HOSTILE[0]],
    }
    write_json(Path("reports/data/summary.json"), summary)
    write_text(Path("reports/data/rejected.csv"), f'path,reason\n"{HOSTILE[0]}",truncated\n')
    suspects = f'rank,image_id,label,suggested,self_confidence\n1,{names[5]},"{HOSTILE[0]}","{HOSTILE[1]}",0.02\n'
    write_text(Path("reports/label_suspects.csv"), suspects)
    leaks = [{"tie": "group", "name": HOSTILE[0], "n": 2, "parts": {names[0]: "train", names[1]: "test"}}]
    splits = {"method": "stratified", "sizes": {"0": {"train": 8, "val": 8, "test": 8, "unused": 0}}, "notes": []}
    write_json(Path("reports/splits.json"), splits | {"n_leaks": 1, "leaks": leaks})
    write_json(Path("reports/timings/extract.json"), {"wall_seconds": 75.2, "peak_memory_bytes": 10**9})
    lock = {"schema": "2.0", "stages": {"index": {"outs": [{"path": "data/images.csv", "md5": "abc", "size": 12}]}}}
    write_text(Path("dvc.lock"), json.dumps(lock))
