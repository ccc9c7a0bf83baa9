"""The learning curve of a linear head, and what more images would bring: err(n) = a n^-b + c.

Heads are fitted on nested subsets of the training units whose sizes double, several times, and judged on the same
held-out images. The power law with an offset is that of Cortes et al. 1994, "Learning curves: asymptotic values and
rate of convergence". Its three parameters are integrated over a grid instead of being fitted, so that what the sizes at
hand cannot tell (above all the offset) widens the interval. `python -m benchmarks.learning_curves` scores it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.advice.probes import Sample, choose, outside, predict_linear
from pipeline.comparison.intervals import CONFIDENCE, Interval

MAX_SIZES = 6
MIN_IMAGES, MIN_SIZES = 8, 3  # in the smallest subset, which also has an image per class on average; of a curve
# The grid: the error at the largest size, within so many standard errors; the share of it that no number of images
# removes, with a prior that grows with it; the exponent. That of a linear head on fixed features is about 1/2 to 1,
# that of whole networks can be lower (Hestness et al. 2017, "Deep learning scaling is predictable, empirically").
REACH, N_LEVELS = 5.0, 61
SHARES = np.sqrt(np.linspace(0, 0.99, 40))
EXPONENTS = np.geomspace(0.3, 2.0, 30)
MISFIT = 0.05  # of the error, by which a curve is off a power law at half the largest size; twice that at a quarter, …


@dataclass(frozen=True)
class Curve:
    """Errors of heads fitted on more and more images.

    `sizes` (n_sizes,): images, the largest last; `wrong` (n_sizes, n): of each image the share of the draws in which it
    is predicted wrongly; `draw_variance` (n_sizes,): of the error, from which units were drawn.
    """

    sizes: np.ndarray
    wrong: np.ndarray
    draw_variance: np.ndarray


def subset_sizes(n: int, n_classes: int) -> list[int]:
    """Numbers of images, the largest (n) last: each about half of the next; fewer than MIN_SIZES if n is small."""
    sizes = [n >> power for power in range(MAX_SIZES)]
    return [size for size in sizes[::-1] if size >= max(MIN_IMAGES, n_classes)]


def measure(x: np.ndarray, sample: Sample, fold: np.ndarray, strengths: Sequence[float], n_draws: int) -> Curve | None:
    """The curve of linear heads on standardised features (n, d); None if there are too few images for one."""
    training = outside(fold)
    n_full = round(float(np.mean([len(rows) for rows in training])))
    sizes = subset_sizes(n_full, len(np.unique(sample.label)))
    if len(sizes) < MIN_SIZES or len(training) < 2:
        return None
    random = np.random.default_rng(0)
    orders = [[_in_order(rows, sample.unit, random) for rows in training] for _ in range(n_draws)]
    wrong, variance, n_images = [], [], []
    for size in sizes:
        is_whole = size == sizes[-1]
        draws = [training] if is_whole else [[_first(rows, sample.unit, size) for rows in order] for order in orders]
        hits = np.stack([predict_linear(x, sample, fold, rows, strengths) == sample.label for rows in draws])
        best = choose(hits.mean(0), fold, sample.weight)
        missed = 1.0 - hits[:, best, np.arange(len(x))]
        errors = np.average(missed, axis=1, weights=sample.weight)
        wrong.append(missed.mean(0))
        variance.append(variance[-1] if is_whole else float(errors.var(ddof=1)) / n_draws if n_draws > 1 else 0.0)
        n_images.append(float(np.mean([len(rows) for order in draws for rows in order])))
    return Curve(np.array(n_images), np.stack(wrong), np.array(variance))


def _in_order(rows: np.ndarray, unit: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The rows of images in a random order of their units."""
    return rows[np.argsort(random.permutation(unit.max() + 1)[unit[rows]], kind="stable")]


def _first(rows: np.ndarray, unit: np.ndarray, size: int) -> np.ndarray:
    """The first `size` of rows that stand in order of their units, to the end of the last one's unit."""
    return rows[: np.flatnonzero(unit[rows] == unit[rows[min(size, len(rows)) - 1]])[-1] + 1]


@dataclass(frozen=True)
class Fitted:
    """A grid of curves err(n) = level (share + (1 - share) (n / n_largest)^-exponent) with their probabilities."""

    n_largest: float
    level: np.ndarray
    share: np.ndarray
    exponent: np.ndarray
    probability: np.ndarray

    def accuracy(self, n: float) -> Interval:
        """With `n` training images: the median and the central 95 %."""
        decay = (n / self.n_largest) ** -self.exponent
        error = self.level * (self.share + (1 - self.share) * decay)
        order = np.argsort(error)
        cumulative = self.probability[order].cumsum() - self.probability[order] / 2
        tail = (1 - CONFIDENCE) / 2
        high, middle, low = np.interp([tail, 0.5, 1 - tail], cumulative, error[order])
        return Interval(*(float(min(max(1 - each, 0.0), 1.0)) for each in (middle, low, high)))


def fit(curve: Curve, sample: Sample) -> Fitted:
    """The probability of each curve of the grid, with equal prior probabilities.

    The errors at all sizes are of the same images, so they vary together: their covariance is that over units, plus
    that of the draws and of the misfit. With few units the likelihood is that of a t distribution.
    """
    share = sample.weight / sample.weight.sum()
    error = curve.wrong @ share
    moved = np.zeros((int(sample.unit.max()) + 1, len(error)))
    np.add.at(moved, sample.unit, ((curve.wrong - error[:, None]) * share).T)
    n_units = len(np.unique(sample.unit))
    # Half a wrong image more: where no image is wrong, the error is not known to be 0
    least = 0.5 * float(np.square(share).sum())
    noise = np.square(MISFIT * error * np.log2(curve.sizes[-1] / curve.sizes)) + curve.draw_variance
    covariance = moved.T @ moved * n_units / max(n_units - 1, 1) + np.diag(noise) + least**2
    deviation = float(np.sqrt(covariance[-1, -1])) + least
    level = np.linspace(max(error[-1] - REACH * deviation, least / 10), error[-1] + REACH * deviation, N_LEVELS)
    level, constant, exponent = (each.ravel() for each in np.meshgrid(level, SHARES, EXPONENTS, indexing="ij"))
    decay = (curve.sizes[:, None] / curve.sizes[-1]) ** -exponent
    residual = level * (constant + (1 - constant) * decay) - error[:, None]
    distance = (residual * np.linalg.solve(covariance + np.diag(np.full(len(error), 1e-12)), residual)).sum(0)
    degrees = max(n_units - 1, 1)
    log_likelihood = -(degrees + len(error)) / 2 * np.log1p(distance / degrees)
    probability = np.exp(log_likelihood - log_likelihood.max())
    return Fitted(float(curve.sizes[-1]), level, constant, exponent, probability / probability.sum())
