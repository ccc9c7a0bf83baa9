"""How well the learning curve of `advise` foretells accuracy: `python -m benchmarks.learning_curves [OPTIONS]`.

From half and from a quarter of the images of a data set, the interval for the accuracy with all of them is foretold,
and scored by the interval score (Gneiting & Raftery 2007, "Strictly proper scoring rules, prediction, and estimation",
section 6.2): its width, plus 40 times what it misses by; lower is better. Beside it stand two intervals that say that
accuracy stays as it is: that of all images given, cross-validated, and that of the 15 % of them that validation would
have. The truth is the mean accuracy, over all repeats, of heads on all images, on images that took part in nothing.

Needs data/features.h5 of the default data; the other data sets come from scikit-learn, and from packages that are named
by options. The prior and the misfit in pipeline/advice/curve.py were set on the data sets of `--tuning`, and revised
twice after looking at the others: docs/advice.md.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits

from pipeline.advice import curve, probes
from pipeline.advice.probes import Sample
from pipeline.comparison.intervals import Interval
from pipeline.dataset import manifest
from pipeline.features import hdf5
from pipeline.ingest import idx

Data = tuple[np.ndarray, np.ndarray, np.ndarray]  # features (n, d), label (n,), weight (n,)
STRENGTHS, FOLDS, DRAWS = (10.0, 3.0, 1.0, 0.3, 0.1), 5, 4  # as in params.yaml
MOST, SHARE, SIDE = 2000, 0.7, 32  # the most images called all; their share of small data sets; px of pictures
MISSED = 40  # 2 / 0.05
METHODS = ("curve", "stays, cross-validated", "stays, validation")


def plain(x: Any, label: Any) -> Data:  # noqa: ANN401
    """Images or rows of equal weight, as vectors."""
    _, index = np.unique(label, return_inverse=True)
    return np.asarray(x, np.float32).reshape(len(x), -1), index, np.ones(len(x))


def tuning() -> Iterator[tuple[str, Data]]:
    """What the numbers of curve.py were set on."""
    from sklearn import datasets

    yield "breast cancer (table)", plain(*datasets.load_breast_cancer(return_X_y=True))
    for n_classes, informative, apart in ((2, 10, 1), (5, 20, 1), (10, 30, 1), (10, 30, 4), (3, 15, 3), (10, 50, 6)):
        made = datasets.make_classification(
            n_samples=6000,
            n_features=60,
            n_informative=informative,
            n_redundant=5,
            n_classes=n_classes,
            n_clusters_per_class=3 if apart > 1 else 2,
            class_sep=apart,
            flip_y=0.02 if apart > 1 else 0.05,
            random_state=0,
        )
        yield f"simulated, {n_classes} classes, {apart}", plain(*made)


def reported(fashion: Path | None, folders: tuple[Path, ...]) -> Iterator[tuple[str, Data]]:
    """What is reported."""
    from sklearn import datasets

    yield "digits (pixels)", plain(*datasets.load_digits(return_X_y=True))
    features, labels = hdf5.read_features(), manifest.read_labels()
    yield "elpv (features)", (features.values[:, 0].reshape(len(labels.label), -1), labels.label, labels.weight)
    if fashion:
        (pair,) = [pair for pair in idx.find_pairs(fashion) if "t10k" in str(pair)]
        yield "Fashion-MNIST (pixels)", plain(*idx.read(pair))
    for folder in folders:
        files = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png"))
        pictures = [np.asarray(Image.open(path).convert("L").resize((SIDE, SIDE))) for path in files]
        yield f"{folder.name} (pixels)", plain(np.stack(pictures), np.array([path.parent.name for path in files]))
    try:
        mnist1d = import_module("mnist1d.data")
    except ImportError as error:
        print(f"without MNIST-1D: {error}; pip install mnist1d")
        return
    arguments = mnist1d.get_dataset_args()
    arguments.num_samples = 6000
    made = mnist1d.make_dataset(arguments)
    yield (
        "MNIST-1D (signals)",
        plain(np.concatenate([made["x"], made["x_test"]]), np.concatenate([made["y"], made["y_test"]])),
    )


def foretell(x: np.ndarray, sample: Sample, n: int) -> dict[str, Interval]:
    """The interval of each method for the accuracy with `n` images, from the images given."""
    fold = probes.assign_folds(sample, FOLDS)
    scaled = probes.standardize(x)
    measured = curve.measure(scaled, sample, fold, STRENGTHS, DRAWS)
    assert measured is not None
    hits = 1 - measured.wrong[-1]
    validation = np.random.default_rng(0).permutation(len(hits))[: round(0.15 * len(hits))]
    few = Sample(sample.label[validation], sample.weight[validation], np.arange(len(validation)), sample.n_classes)
    found = (curve.fit(measured, sample).accuracy(n), sample.interval(hits), few.interval(hits[validation]))
    return dict(zip(METHODS, found, strict=True))


def accuracy(x: np.ndarray, sample: Sample, tested: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float:
    """The accuracy on features `tested` of a head on all of `x`, whose strength cross-validation chooses."""
    mean, scaled = x.mean(axis=0), probes.standardize(x)
    deviation = x.astype(np.float64).std(axis=0)
    other = ((tested - mean) / np.maximum(deviation, np.median(deviation) or deviation.max())).astype(np.float32)
    fold = probes.assign_folds(sample, FOLDS)
    hits = probes.predict_linear(scaled, sample, fold, probes.outside(fold), STRENGTHS) == sample.label
    best = STRENGTHS[int((hits @ sample.weight).argmax())]
    ((weights, offset),) = probes.fit_ridge(
        scaled, np.eye(sample.n_classes, dtype=np.float32)[sample.label], sample.weight, [best]
    )
    return float(np.average((other @ weights + offset).argmax(1) == label, weights=weight))


def score(interval: Interval, truth: float) -> float:
    """The interval score, in points."""
    missed = max(interval.low - truth, 0.0) + max(truth - interval.high, 0.0)
    return 100 * (interval.high - interval.low + MISSED * missed)


def show(name: str, data: Data, repeats: int) -> dict[tuple[int, str], float]:
    """Print and return the mean scores of a data set, by part (2: from half) and method."""
    x, label, weight = data
    n, n_classes = min(MOST, round(SHARE * len(x))) // 4 * 4, int(label.max()) + 1
    orders = [np.random.default_rng(seed).permutation(len(x)) for seed in range(repeats)]

    def sample(rows: np.ndarray) -> Sample:
        return Sample(label[rows], weight[rows], np.arange(len(rows)), n_classes)

    truths = [
        accuracy(x[order[:n]], sample(order[:n]), x[order[n:]], label[order[n:]], weight[order[n:]]) for order in orders
    ]
    truth, scores = float(np.mean(truths)), {}
    for part in (2, 4):
        found = [foretell(x[order[: n // part]], sample(order[: n // part]), n) for order in orders]
        for method in METHODS:
            intervals = [one[method] for one in found]
            scores[part, method] = float(np.mean([score(one, truth) for one in intervals]))
            covered = np.mean([one.low <= truth <= one.high for one in intervals])
            width = 100 * np.mean([one.high - one.low for one in intervals])
            print(
                f"{name:<26}{n // part:>5} to {n:<6}{method:<24}{100 * truth:>6.1f}{100 * covered:>8.0f} %{width:>8.1f}"
                f"{scores[part, method]:>9.1f}",
                flush=True,
            )
    return scores


@click.command()
@click.option("--repeats", default=10, show_default=True, help="Random choices of the images, each data set.")
@click.option("--tuning", "is_tuning", is_flag=True, help="The data sets on which the method was tuned, instead.")
@click.option("--fashion", type=click.Path(path_type=Path), help="IDX files, e.g. of Debian's dataset-fashion-mnist.")
@click.option(
    "--images", "folders", multiple=True, type=click.Path(path_type=Path), help="A folder per class; repeatable."
)
def main(repeats: int, is_tuning: bool, fashion: Path | None, folders: tuple[Path, ...]) -> None:
    """Score the learning curve of `advise`."""
    print(f"{'data set':<26}{'images':<15}{'method':<24}{'truth %':>7}{'covered':>9}{'width':>8}{'score':>9}")
    with threadpool_limits(1):
        scores = [show(name, data, repeats) for name, data in (tuning() if is_tuning else reported(fashion, folders))]
    for part in (2, 4):
        means = {method: np.mean([each[part, method] for each in scores]) for method in METHODS}
        text = ", ".join(f"{method} {mean:.1f}" for method, mean in means.items())
        print(f"from 1/{part}, mean of {len(scores)} data sets, n = {repeats} repeats each: {text}")


if __name__ == "__main__":
    main()
