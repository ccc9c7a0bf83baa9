"""references: classifiers on the cached features that cost nothing more, to compare the strategies with.

Reads   data/features.h5, data/labels.csv, data/splits/
Writes  reports/runs/<majority_class, nearest_class_mean, k_nearest_neighbours>/seed_<s>/

Features are averaged over the views of an image, and over the pixels or tokens where they are maps; they are shifted
and scaled by the mean and deviation of the training images. None of these classifiers is ever recommended.
"""

from collections.abc import Mapping

import numpy as np
import torch
from scipy.special import log_softmax
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from pipeline import logs
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Labels, Split
from pipeline.features import hdf5
from pipeline.features.hdf5 import Features
from pipeline.network.cuts import Pool
from pipeline.params import REFERENCES, load_params
from pipeline.training.runs import Cost, Predictions, Run, make_candidates, save_run

CHUNK = 256  # images that are read at a time
TEMPERATURES = (1.0, 10.0, 100.0, 1000.0)  # of the nearest class mean: features are not independent, as it assumes
EVALUATED = ("val", "test")
LogProbability = dict[str, dict[str, np.ndarray]]  # by candidate and split, (n, n_classes)


def main() -> None:
    """Predict validation and test of every seed."""
    params = load_params()
    features, labels = hdf5.read_features(), manifest.read_labels()
    if features.sha256 != labels.sha256:
        raise ValueError(f"{hdf5.FEATURES}: other images than expected; run: dvc repro")
    prefix_tokens = features.provenance.backbone.prefix_tokens
    train, evaluation = (average(values, prefix_tokens) for values in (features.values, features.evaluation))
    for seed in params.split.seeds:
        split = manifest.read_split(seed, labels.image_id)
        x = standardized(train, evaluation, split)
        with threadpool_limits(params.threads):
            made = (
                majority_class(labels, split),
                nearest_class_mean(x, labels, split),
                nearest_neighbours(x, labels, split, params.references.neighbours),
            )
        free = Cost(**dict.fromkeys(Cost.model_fields, 0))  # the majority class reads no features
        costs = (free, *[features_cost(features, split)] * 2)
        for name, found, cost in zip(REFERENCES, made, costs, strict=True):
            save(name, split, labels, found, cost)


def average(values: np.ndarray, prefix_tokens: int) -> np.ndarray:
    """The mean (n, d) float32 over the views of features (n, n_views, …), and over their pixels or tokens."""
    pool = Pool("avg" if values.ndim > 3 else "none", prefix_tokens)
    chunks = []
    for start in range(0, len(values), CHUNK):
        chunk = torch.from_numpy(values[start : start + CHUNK].astype(np.float32))
        chunks.append(pool(chunk.flatten(0, 1)).unflatten(0, chunk.shape[:2]).mean(1).numpy())
    return np.concatenate(chunks)


def standardized(train: np.ndarray, evaluation: np.ndarray, split: Split) -> dict[str, np.ndarray]:
    """Features of train, val and test, by the mean and deviation of train."""
    raw = {"train": train[split.rows("train")]} | {name: evaluation[split.rows(name)] for name in EVALUATED}
    mean, deviation = raw["train"].mean(axis=0), raw["train"].std(axis=0)
    return {name: (x - mean) / np.maximum(deviation, np.median(deviation) or 1.0) for name, x in raw.items()}


def class_shares(labels: Labels, split: Split) -> np.ndarray:
    """The share (n_classes,) of each class in the weight of train."""
    rows = split.rows("train")
    shares = np.bincount(labels.label[rows], labels.weight[rows], len(labels.class_names))
    return shares / shares.sum()


def majority_class(labels: Labels, split: Split) -> LogProbability:
    """The shares of the classes, for every image."""
    log_share = np.log(class_shares(labels, split)).astype(np.float32)
    return {"shares": {name: np.tile(log_share, (len(split.rows(name)), 1)) for name in EVALUATED}}


def nearest_class_mean(x: Mapping[str, np.ndarray], labels: Labels, split: Split) -> LogProbability:
    """A Gaussian around the mean of each class, with one variance for all; candidates are temperatures."""
    rows = split.rows("train")
    label, weight, n_classes = labels.label[rows], labels.weight[rows], len(labels.class_names)
    one_hot = np.eye(n_classes)[label] * weight[:, None]
    means = (one_hot.T @ x["train"]) / one_hot.sum(axis=0)[:, None]
    variance = float(np.average((x["train"] - means[label]) ** 2, axis=0, weights=weight).mean()) or 1.0
    found: LogProbability = {f"temperature {t:g}": {} for t in TEMPERATURES}
    for name in EVALUATED:
        # Without the length of x, which is the same for all classes
        distance = (means**2).sum(axis=1) - 2 * x[name] @ means.T
        for t in TEMPERATURES:
            scaled = log_softmax(-distance / (2 * variance * t), axis=1)
            found[f"temperature {t:g}"][name] = scaled.astype(np.float32)
    return found


def nearest_neighbours(
    x: Mapping[str, np.ndarray], labels: Labels, split: Split, numbers: tuple[int, ...]
) -> LogProbability:
    """Votes of the k nearest training images, by weight; candidates are the values of k up to the number of images.

    One more vote, of the mean weight, is divided by the shares of the classes, so that no probability is 0.
    """
    rows, shares = split.rows("train"), class_shares(labels, split)
    label, weight = labels.label[rows], labels.weight[rows]
    usable = sorted(k for k in numbers if k <= len(rows)) or [len(rows)]
    search = NearestNeighbors(n_neighbors=usable[-1], algorithm="brute").fit(x["train"])
    found: LogProbability = {f"k = {k}": {} for k in usable}
    for name in EVALUATED:
        near = search.kneighbors(x[name], return_distance=False)
        votes, start = np.tile(shares * weight.mean(), (len(near), 1)), 0
        for k in usable:
            for column in near[:, start:k].T:
                votes[np.arange(len(near)), label[column]] += weight[column]
            start = k
            found[f"k = {k}"][name] = np.log(votes / votes.sum(axis=1, keepdims=True)).astype(np.float32)
    return found


def features_cost(features: Features, split: Split) -> Cost:
    """The cost of the cached features that a classifier reads: all training views of train, all views of the others."""
    n_views = len({*features.provenance.training_views})
    passes, n_evaluated = n_views * len(split.rows("train")), sum(len(split.rows(name)) for name in EVALUATED)
    return Cost(
        trainable_params=0,
        train_flops=passes * features.provenance.backbone.flops_per_image,
        base_passes=passes,
        cached_bytes=(passes + features.evaluation.shape[1] * n_evaluated) * features.values[0, 0].nbytes,
    )


def save(name: str, split: Split, labels: Labels, found: LogProbability, cost: Cost) -> None:
    """Choose the candidate of the lowest validation NLL and write the run."""
    rows = {part: split.rows(part) for part in EVALUATED}
    candidates = make_candidates({key: by_split["val"] for key, by_split in found.items()}, labels.label[rows["val"]])
    nll = candidates.nll(labels.weight[rows["val"]])
    best = candidates.names[int(np.argmin(nll))]
    val, test = (Predictions(rows[part], found[best][part]) for part in EVALUATED)
    save_run(Run(name, split.seed, cost, {"candidate": best}, {}, [], {}, val, test, candidates))
    logs.log.info("%s %d: %s, val loss %.4f", name, split.seed, best, min(nll))


if __name__ == "__main__":
    logs.run(main, memory=("features.views", "features.image_size"))
