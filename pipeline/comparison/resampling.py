"""Resampling: the interval of the ECE, and the sign-flip permutation test. Seeded, so that results repeat."""

from collections.abc import Iterator

import numpy as np
from scipy import special

from pipeline.comparison import metrics

N_BOOTSTRAP = 1_000
N_PERMUTATIONS = 9_999
MAX_ENUMERATED = 12  # with so many differences all 2^n signs are tried
CHUNK = 1 << 22  # numbers drawn at once, to bound the memory


def sign_flip(difference: np.ndarray) -> float:
    """Two-sided p-value of the sum of differences (n_units,), under the hypothesis that every sign is a fair coin.

    Enumerates all signs where at most 12 differences are not 0. Otherwise draws 9,999 and adds the observed one, so
    that p is never 0 (Phipson & Smyth 2010, "Permutation p-values should never be zero"). The order does not matter.
    """
    size = np.sort(np.abs(difference))
    size = size[size > 1e-12 * size.max(initial=0.0)]
    observed = abs(float(difference.sum())) - 1e-9 * float(size.sum())  # ties are ties whatever the rounding
    if len(size) <= MAX_ENUMERATED:
        is_plus = (np.arange(2 ** len(size))[:, None] >> np.arange(len(size))) & 1
        return float(np.mean(np.abs((2 * is_plus - 1) @ size) >= observed))
    random, n_beyond = np.random.default_rng(0), 0
    for count in _chunks(N_PERMUTATIONS, len(size)):
        packed = random.integers(0, 256, (count, -(-len(size) // 8)), dtype=np.uint8)
        is_plus = np.unpackbits(packed, axis=1, count=len(size)).astype(float)
        n_beyond += int(np.sum(np.abs(2 * (is_plus @ size) - size.sum()) >= observed))
    return (n_beyond + 1) / (N_PERMUTATIONS + 1)


def ece_interval(
    confidence: np.ndarray, is_correct: np.ndarray, weight: np.ndarray, unit: np.ndarray
) -> tuple[float, float, float]:
    """Mean over runs of the ECE, and its 95 % interval: value, low, high.

    All arrays but unit (n_images,) are (n_images, n_runs); the weight is 0 where a run has no prediction for an image.
    The interval is the basic bootstrap over units (Davison & Hinkley 1997, "Bootstrap methods and their application",
    section 5.2), since an ECE is biased upwards and resampling adds the bias once more. It is widened to contain the
    value, and for few units as a t interval is. It starts at 0 where calibrated predictions could have such an ECE
    (Bröcker & Smith 2007, "Increasing the reliability of reliability diagrams").
    """
    in_bin = weight[..., None] * (metrics.bin_of(confidence)[..., None] == np.arange(metrics.N_BINS))
    gap, total = in_bin * (is_correct - confidence)[..., None], weight.sum(axis=0)
    value = float(_mean_ece(gap.sum(axis=0), total))
    _, index = np.unique(unit, return_inverse=True)
    n = index.max() + 1
    gap_of_unit, weight_of_unit = np.zeros((n, *gap.shape[1:])), np.zeros((n, *weight.shape[1:]))
    np.add.at(gap_of_unit, index, gap)
    np.add.at(weight_of_unit, index, weight)
    random, n_runs = np.random.default_rng(0), weight.shape[1]
    resampled, if_calibrated = [], []
    for count in _chunks(N_BOOTSTRAP, len(unit) * n_runs):
        drawn = random.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n).astype(float)
        resampled.append(_mean_ece(np.tensordot(times, gap_of_unit, 1), times @ weight_of_unit))
        would_be_correct = random.random((count, len(unit), 1)) < confidence
        by_chance = np.einsum("bnr,nrk->brk", would_be_correct - confidence, in_bin, optimize=True)
        if_calibrated.append(_mean_ece(by_chance, total))
    if n == 1:
        return value, 0.0, 1.0
    wider = special.stdtrit(n - 1, 0.975) / special.ndtri(0.975) * np.sqrt(n / (n - 1))
    low, high = value + wider * (value - np.quantile(np.concatenate(resampled), [0.975, 0.025]))
    if value <= np.quantile(np.concatenate(if_calibrated), 0.975) + 1e-9:  # ties are ties whatever the rounding
        low = 0.0
    return value, float(min(max(low, 0.0), value)), float(max(min(high, 1.0), value))


def _mean_ece(gap: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Mean ECE of gaps (…, n_runs, n_bins) and weights (…, n_runs); a run without weight counts as 0."""
    by_run = np.abs(gap).sum(axis=-1)
    return np.divide(by_run, total, out=np.zeros_like(by_run), where=total > 0).mean(axis=-1)


def _chunks(total: int, width: int) -> Iterator[int]:
    """Numbers of rows of `width` numbers that fit into memory; their sum is `total`."""
    size = max(1, CHUNK // max(width, 1))
    yield from (min(size, total - start) for start in range(0, total, size))
