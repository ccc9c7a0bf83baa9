"""Runs: what one strategy with one seed predicted, what it cost, and how it was selected.

reports/runs/<strategy>/seed_<s>/     predictions.safetensors (validation, test, candidates), run.json
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors.numpy import load_file, save

from pipeline.files import replacing, write_json
from pipeline.params import Record

RUNS = Path("reports/runs")
MODELS = Path("models")  # the networks of the runs, see saved_networks.py
CHECKPOINTS = ".checkpoints"  # in the directory that all experiments share, see checkpoints.py


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
class Candidates:
    """Everything that validation chose from (epochs, regularization strengths), and what it predicts for validation.

    Only what judging by cross-fitting needs, for c candidates and the n rows of `Run.val`: `predicted` (c, n) int32,
    `true_log_probability` (c, n) float32 of the image's label, and `positive_log_probability` (c, n) float32 of the
    second of two classes, (c, 0) where there are more.
    """

    names: list[str]
    predicted: np.ndarray
    true_log_probability: np.ndarray
    positive_log_probability: np.ndarray

    def nll(self, weight: np.ndarray) -> list[float]:
        """The NLL of each candidate, by which validation chooses; weight (n,) of the images."""
        return [float(np.average(-row.astype(np.float64), weights=weight)) for row in self.true_log_probability]


def make_candidates(log_probability: Mapping[str, np.ndarray], label: np.ndarray) -> Candidates:
    """From each candidate's log-probabilities (n, n_classes) for the validation images, whose labels are label (n,)."""
    every = np.stack([*log_probability.values()])
    return Candidates(
        names=list(log_probability),
        predicted=every.argmax(axis=2).astype(np.int32),
        true_log_probability=every[:, np.arange(len(label)), label].astype(np.float32),
        positive_log_probability=every[..., 1] if every.shape[2] == 2 else np.zeros((len(every), 0), np.float32),
    )


def join_candidates(parts: Sequence[Candidates]) -> Candidates:
    """One record of candidates that were made one at a time: no log-probabilities of all classes are kept."""
    names, *arrays = zip(*(vars(part).values() for part in parts), strict=True)
    return Candidates([*chain(*names)], *map(np.concatenate, arrays))


@dataclass(frozen=True)
class Run:
    """One strategy with one seed.

    `chosen`: what validation selected. `network`: its number of parameters, the freeze boundary, the largest error of
    storing features, relative to the largest value of an image; of a fine-tuned strategy, the recipe and how many views
    of an image it trained on, counted by their pixels. `curve`: one
    entry per epoch; `other_curves`: those of the learning rates that validation did not choose, by name.
    """

    strategy: str
    seed: int
    cost: Cost
    chosen: dict[str, Any]
    network: dict[str, Any]
    curve: list[dict[str, Any]]
    other_curves: dict[str, list[dict[str, Any]]]
    val: Predictions
    test: Predictions
    candidates: Candidates


def save_run(run: Run) -> None:
    """Write predictions.safetensors and run.json."""
    folder = RUNS / run.strategy / f"seed_{run.seed}"
    parts = {"val": vars(run.val), "test": vars(run.test), "candidates": vars(run.candidates)}
    arrays = {
        f"{part}_{name}": np.ascontiguousarray(array)
        for part, fields in parts.items()
        for name, array in fields.items()
        if isinstance(array, np.ndarray)
    }
    with replacing(folder / "predictions.safetensors") as temporary:
        temporary.write_bytes(save(arrays))
    rest = {name: value for name, value in vars(run).items() if name not in parts}
    write_json(folder / "run.json", rest | {"cost": run.cost.model_dump(), "candidates": run.candidates.names})


def read_run(strategy: str, seed: int, runs: Path = RUNS) -> Run:
    """Read the files that save_run writes."""
    folder = runs / strategy / f"seed_{seed}"
    described = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    arrays = load_file(folder / "predictions.safetensors")
    val, test = (Predictions(arrays[f"{split}_rows"], arrays[f"{split}_log_probability"]) for split in ("val", "test"))
    fields = ("predicted", "true_log_probability", "positive_log_probability")
    candidates = Candidates(described["candidates"], *(arrays[f"candidates_{name}"] for name in fields))
    typed = {"cost": Cost(**described["cost"]), "val": val, "test": test, "candidates": candidates}
    return Run(**described | typed)
