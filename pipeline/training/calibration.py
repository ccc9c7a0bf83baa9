"""Calibration of probabilities: the temperature that training fits on validation, and probabilities at it.

log_probability (n, n_classes), label (n,) int and weight (n,) of at least 0 are numpy arrays.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import softmax

TEMPERATURES = (0.05, 20.0)


def temperature(log_probability: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float:
    """The T between 0.05 and 20 that minimises the NLL of log_probability / T, fitted on validation (Guo et al. 2017).

    1 where all predictions are correct: any smaller T would then be better, which is not credible.
    """
    if (log_probability.argmax(axis=1) == label)[weight > 0].all():
        return 1.0
    shifted = log_probability.astype(np.float64) - log_probability.max(axis=1, keepdims=True)
    share = weight / weight.sum()
    true_logit = float(share @ np.take_along_axis(shifted, label[:, None], axis=1)[:, 0])

    def nll(log_temperature: float) -> float:
        sharpness = np.exp(-log_temperature)
        return float(share @ np.log(np.exp(sharpness * shifted).sum(axis=1))) - sharpness * true_logit

    found = minimize_scalar(nll, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def scaled(log_probability: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (n, n_classes) float64 at this temperature."""
    return softmax(log_probability.astype(np.float64) / temperature, axis=1)
