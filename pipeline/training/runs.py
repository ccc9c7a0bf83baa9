"""Runs: what one strategy with one seed predicted, what it cost, and how it was selected.

reports/runs/<strategy>/seed_<s>/     predictions.safetensors (validation and test), run.json
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors.numpy import load_file, save

from pipeline.files import replacing, write_json
from pipeline.params import Record

RUNS = Path("reports/runs")
MODELS = Path("models")  # the networks of the runs, see models.py


class Cost(Record):
    """Nominal cost of a run, including the cached head that it starts from.

    `base_passes`: how often a training image went through the base, or through its frozen prefix, from pixels;
    `train_flops`: of these passes and of the training itself, forward and backward; `cached_bytes`: of the cached
    features and activations that the run reads, those of validation and test included. Evaluation on validation is not
    counted.
    """

    trainable_params: int
    train_flops: int
    base_passes: int
    cached_bytes: int

    def after(self, earlier: Self) -> Self:
        """This cost and that of the earlier run that it starts from; the trainable parameters are this run's."""
        summed = ("train_flops", "base_passes", "cached_bytes")
        return self.model_copy(update={name: getattr(self, name) + getattr(earlier, name) for name in summed})


@dataclass(frozen=True)
class Predictions:
    """Predictions for some images: rows (n,) int64, positions in labels.csv, and log_probability (n, n_classes).

    float32, averaged over the evaluation views.
    """

    rows: np.ndarray
    log_probability: np.ndarray


@dataclass(frozen=True)
class Run:
    """One strategy with one seed.

    `chosen`: what validation selected. `network`: its number of parameters, the freeze boundary, and the largest error
    of storing features, relative to the largest value of an image. `curve`: one entry per epoch.
    """

    strategy: str
    seed: int
    cost: Cost
    chosen: dict[str, Any]
    network: dict[str, Any]
    curve: list[dict[str, Any]]
    val: Predictions
    test: Predictions


def save_run(run: Run) -> None:
    """Write predictions.safetensors and run.json."""
    folder = RUNS / run.strategy / f"seed_{run.seed}"
    splits = {"val": run.val, "test": run.test}
    arrays = {f"{split}_{name}": array for split, found in splits.items() for name, array in vars(found).items()}
    with replacing(folder / "predictions.safetensors") as temporary:
        temporary.write_bytes(save(arrays))
    rest = {name: value for name, value in vars(run).items() if name not in splits}
    write_json(folder / "run.json", rest | {"cost": run.cost.model_dump()})


def read_run(strategy: str, seed: int) -> Run:
    """Read the files that save_run writes."""
    folder = RUNS / strategy / f"seed_{seed}"
    described = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    arrays = load_file(folder / "predictions.safetensors")
    val, test = (Predictions(arrays[f"{split}_rows"], arrays[f"{split}_log_probability"]) for split in ("val", "test"))
    return Run(**described | {"cost": Cost(**described["cost"]), "val": val, "test": test})
