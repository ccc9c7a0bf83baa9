"""How sure a figure is. The unit is the image: over several seeds, what an image contributes is summed first."""

from collections.abc import Sequence

import numpy as np
from statsmodels.stats.proportion import proportion_confint


def accuracy_interval(
    hits: Sequence[np.ndarray], rows: Sequence[np.ndarray], weight: np.ndarray
) -> tuple[float, float]:
    """95 % interval of the mean over seeds of the weighted accuracy, conditional on the trained runs.

    `hits` and `rows` (n,) of each seed say which images were right; `weight` (n_images,). Wilson's score interval with
    the effective sample size (Kish 1965, "Survey sampling"; Franco et al. 2019, "Comparative study of confidence
    intervals for proportions in complex sample surveys"), the variance being that of the images' linearised shares.
    """
    share, contribution, accuracy = np.zeros(len(weight)), np.zeros(len(weight)), 0.0
    for hit, row in zip(hits, rows, strict=True):
        part = weight[row] / weight[row].sum() / len(hits)
        share[row] += part
        contribution[row] += part * hit
        accuracy += float(part @ hit)
    seen = share > 0
    n = int(seen.sum())
    effective = 1 / float((share**2).sum())  # where all are right or all wrong
    variance = float(((contribution - accuracy * share)[seen] ** 2).sum()) * n / max(n - 1, 1)
    n_right, n_seen = sum(int(hit.sum()) for hit in hits), sum(map(len, hits))
    accuracy = min(max(accuracy, 0.0), 1.0)  # up to rounding
    if 0 < n_right < n_seen and variance > 0:
        effective = accuracy * (1 - accuracy) / variance
    low, high = np.asarray(proportion_confint(accuracy * effective, effective, method="wilson")).tolist()
    return low, high
