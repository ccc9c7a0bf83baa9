"""How sure a figure is, and a difference. The unit is the image: over several seeds, what it contributes is summed.

Everywhere `runs` are what one strategy said with each seed, label and weight (n_images,) are of all images, and
intervals are 95 %, conditional on the trained runs: they say what other test images would have changed, not what other
seeds would. Images of weight 0 are absent.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import softmax
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from pipeline import influence, metrics, resampling
from pipeline.influence import Influence

Z = float(stats.norm.ppf(0.975))
MOST_IMAGES_FOR_ECE = 10_000
FEWEST_SEEDS_FOR_T = 5


@dataclass(frozen=True)
class Predictions:
    """What one run says of some images: rows (n,) int64, positions in labels.csv; logits (n, n_classes)."""

    rows: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Interval:
    """The mean over seeds and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gain:
    """Accuracy over the baseline's, on the same images of the common seeds.

    `by_seed` has one gain per distinct pair of runs, and `seeds` is their number. `method`: "exact McNemar" or
    "sign-flip permutation by image". `corrected_t_p_value` is None below five seeds, and where all test on the same
    images: the variance over seeds does not know that others might have been drawn.
    """

    baseline_accuracy: float
    accuracy: float
    gain: float
    low: float
    high: float
    p_value: float
    method: str
    corrected_t_p_value: float | None
    by_seed: list[float]
    seeds: int


def distinct(runs: Sequence[Predictions]) -> list[Predictions]:
    """The runs without repetitions: a given split and a convex head give the same run with every seed."""
    found: dict[bytes, Predictions] = {}
    for run in runs:
        found.setdefault(_digest(run), run)
    return list(found.values())


def intervals(runs: Sequence[Predictions], label: np.ndarray, weight: np.ndarray) -> dict[str, Interval | None]:
    """Every metric of metrics.score with its interval; None where a class does not occur (`auroc`), for `ece` also
    over 10,000 images.
    """
    kept = [_weighty(run, weight) for run in distinct(runs)]
    rows = [run.rows for run in kept]
    by_run = [influence.linearise(run.logits, label[run.rows], weight[run.rows]) for run in kept]
    found = {name: _interval([run[name] for run in by_run], rows) for name in by_run[0]}
    return found | {"ece": ece_interval(runs, label, weight)}


def ece_interval(runs: Sequence[Predictions], label: np.ndarray, weight: np.ndarray) -> Interval | None:
    """ECE with its interval (resampling.ece_interval); None over 10,000 images."""
    kept = [_weighty(run, weight) for run in distinct(runs)]
    images = np.unique(np.concatenate([run.rows for run in kept]))
    if len(images) > MOST_IMAGES_FOR_ECE:
        return None
    confidence, is_right, weights = np.zeros((3, len(images), len(kept)))
    for s, run in enumerate(kept):
        at = np.searchsorted(images, run.rows)
        probability = softmax(run.logits.astype(np.float64), axis=1)
        confidence[at, s], is_right[at, s] = metrics.top_label(probability, label[run.rows])
        weights[at, s] = weight[run.rows]
    return Interval(*resampling.ece_interval(confidence, is_right, weights))


def gain(
    runs: Sequence[Predictions],
    baseline: Sequence[Predictions],
    label: np.ndarray,
    weight: np.ndarray,
    n_train: float = 0,
) -> Gain:
    """The gain over the baseline with its interval and p-value; runs[i] and baseline[i] are about the same images.

    `n_train`: images per seed that train and validate, for the corrected t; 0: without it.
    One distinct pair of runs and equal weights: McNemar's exact test (McNemar 1947, "Note on the sampling error of
    the difference between correlated proportions"). Otherwise the signs of the images' differences are flipped.
    """
    pairs = _pairs(runs, baseline, label, weight)
    low, high = (pairs.bound(z) for z in (-Z, Z))
    if len(pairs.hits) == 1 and np.ptp(pairs.weights[0]) == 0:
        method, p_value = "exact McNemar", exact_mcnemar(*pairs.hits[0])
    else:
        method, p_value = "sign-flip permutation by image", resampling.sign_flip(pairs.by_image())
    by_seed = [part.value for part in pairs.differences]
    n_test = float(np.mean([len(rows) for rows in pairs.rows]))
    is_redrawn = any(not np.array_equal(rows, pairs.rows[0]) for rows in pairs.rows)
    return Gain(
        baseline_accuracy=pairs.accuracy(1),
        accuracy=pairs.accuracy(0),
        gain=pairs.gain,
        low=low,
        high=high,
        p_value=p_value,
        method=method,
        corrected_t_p_value=corrected_t(by_seed, n_test, n_train) if is_redrawn else None,
        by_seed=by_seed,
        seeds=len(by_seed),
    )


def lower_bound(
    runs: Sequence[Predictions], others: Sequence[Predictions], label: np.ndarray, weight: np.ndarray, confidence: float
) -> float:
    """What accuracy(runs) - accuracy(others) is not below, with this one-sided confidence (0 to 1)."""
    return _pairs(runs, others, label, weight).bound(-float(stats.norm.ppf(confidence)))


def images_needed(
    runs: Sequence[Predictions],
    others: Sequence[Predictions],
    label: np.ndarray,
    weight: np.ndarray,
    margin: float,
    confidence: float,
    power: float = 0.8,
) -> int | None:
    """Images per seed with which lower_bound would be above -margin with probability `power`.

    As if the difference seen were the true one, and more images like these; None if it is not above -margin, where no
    number would do.
    """
    pairs = _pairs(runs, others, label, weight)
    if pairs.gain + margin <= 0:
        return None
    n_images = float(np.mean([len(rows) for rows in pairs.rows]))
    reach = float(stats.norm.ppf(confidence) + stats.norm.ppf(power)) / (pairs.gain + margin)
    return max(1, math.ceil(n_images * pairs.adjusted()[1] * reach**2))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979, "A simple sequentially rejective multiple test procedure")."""
    return np.asarray(multipletests(p_values, method="holm")[1]).tolist() if len(p_values) else []


def exact_mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Two-sided p-value of two strategies being right, bool (n,) each, on the same images."""
    table = [[np.sum(ours & theirs), np.sum(ours & ~theirs)], [np.sum(~ours & theirs), np.sum(~ours & ~theirs)]]
    found: Any = mcnemar(table, exact=True)
    return min(float(found.pvalue), 1.0)


def corrected_t(by_seed: Sequence[float], n_test: float, n_train: float) -> float | None:
    """Two-sided p-value of the corrected resampled t-test (Nadeau & Bengio 2003, "Inference for the generalization
    error", section 5): the variance over seeds times 1 / seeds + n_test / n_train, since splits overlap.

    None with fewer than five seeds, and where all differ by the same, not 0. `n_train` counts validation too, for it
    chooses.
    """
    if len(by_seed) < FEWEST_SEEDS_FOR_T or n_train <= 0:
        return None
    seeds, average, variance = len(by_seed), float(np.mean(by_seed)), float(np.var(by_seed, ddof=1))
    if variance < 1e-24:
        return 1.0 if abs(average) < 1e-12 else None
    t = average / math.sqrt((1 / seeds + n_test / n_train) * variance)
    return float(2 * stats.t.sf(abs(t), seeds - 1))


@dataclass(frozen=True)
class _Pairs:
    """Distinct pairs of runs: rows, which of them each of the two had right, and the difference of the two."""

    rows: list[np.ndarray]
    hits: list[tuple[np.ndarray, np.ndarray]]
    weights: list[np.ndarray]
    differences: list[Influence]

    @property
    def gain(self) -> float:
        return float(np.mean([part.value for part in self.differences]))

    def accuracy(self, which: int) -> float:
        shares = [np.average(hit[which], weights=w) for hit, w in zip(self.hits, self.weights, strict=True)]
        return float(np.mean(shares))

    def by_image(self) -> np.ndarray:
        """What each image contributes to the gain, over all seeds."""
        parts = [
            part.share * (ours.astype(float) - theirs)
            for part, (ours, theirs) in zip(self.differences, self.hits, strict=True)
        ]
        return _by_image(parts, self.rows)

    def adjusted(self) -> tuple[float, float]:
        """Gain and its variance with two more images of average weight, on one of which either side is better.

        Agresti & Min 2005, "Simple improved confidence intervals for comparing matched proportions".
        """
        spread, n = _spread_and_n(self.differences, self.rows)
        centre = n * self.gain / (n + 2)
        return centre, ((n * (spread + self.gain**2) + 1) / (n + 2) - centre**2) / (n + 2)

    def bound(self, z: float) -> float:
        centre, variance = self.adjusted()
        return min(max(centre + z * math.sqrt(variance), -1.0), 1.0)


def _pairs(runs: Sequence[Predictions], others: Sequence[Predictions], label: np.ndarray, weight: np.ndarray) -> _Pairs:
    found: dict[bytes, tuple[Predictions, Predictions]] = {}
    for ours, theirs in zip(runs, others, strict=True):
        if not np.array_equal(ours.rows, theirs.rows):
            raise ValueError("two runs are about other images, or in another order; expected pairs on the same images")
        found.setdefault(_digest(ours) + _digest(theirs), (ours, theirs))
    kept = [(_weighty(ours, weight), _weighty(theirs, weight)) for ours, theirs in found.values()]
    rows = [ours.rows for ours, _ in kept]
    weights = [weight[row] for row in rows]
    hits = [
        (ours.logits.argmax(axis=1) == label[ours.rows], theirs.logits.argmax(axis=1) == label[ours.rows])
        for ours, theirs in kept
    ]
    differences = [
        influence.mean(ours.astype(float) - theirs, share, bottom=-1.0)
        for (ours, theirs), share in zip(hits, weights, strict=True)
    ]
    return _Pairs(rows, hits, weights, differences)


def _interval(parts: Sequence[Influence | None], rows: Sequence[np.ndarray]) -> Interval | None:
    """Of the mean over runs; None if one is.

    Between 0 and `top` Wilson's score interval, with the number of images, right or wrong, that give this variance
    (Kish 1965, "Survey sampling"; Franco et al. 2019, "Comparative study of confidence intervals for proportions in
    complex sample surveys"). Above 0 only, the normal interval of the logarithm. The variance includes two more images,
    one at either end, so that a few images, or images that are all alike, are not taken for certainty.
    """
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    top, value = known[0].top, float(np.mean([part.value for part in known]))
    spread, n = _spread_and_n(known, rows)
    if math.isinf(top):
        reach = Z * math.sqrt((spread + 2 * value**2 / n) / (n + 2)) / value if value > 0 else 0.0
        return Interval(value, value * math.exp(-reach), value * math.exp(reach))
    p = value / top
    with_two = (n * p + 1) / (n + 2)
    seen = (n * (spread / top**2 + p**2) + 1) / (n + 2) - with_two**2
    effective = n * with_two * (1 - with_two) / seen
    low, high = np.asarray(proportion_confint(p * effective, effective, method="wilson")).tolist()
    return Interval(value, top * min(low, p), top * max(high, p))


def _spread_and_n(parts: Sequence[Influence], rows: Sequence[np.ndarray]) -> tuple[float, float]:
    """Variance of one image, over those seen, and the effective number of images (Kish), which weights lower."""
    n = 1 / float((_by_image([part.share for part in parts], rows) ** 2).sum())
    variance = float((_by_image([part.influence for part in parts], rows) ** 2).sum())
    return max(n - 1, 0.0) * variance, n


def _by_image(parts: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over runs of what (n,) each has for its rows, 0 elsewhere: (up to the largest row,)."""
    return np.bincount(np.concatenate(rows), np.concatenate(parts)) / len(parts)


def _weighty(run: Predictions, weight: np.ndarray) -> Predictions:
    kept = weight[run.rows] > 0
    return run if kept.all() else Predictions(run.rows[kept], run.logits[kept])


def _digest(run: Predictions) -> bytes:
    return b"".join(hashlib.sha256(array.tobytes()).digest() for array in (run.rows, run.logits))
