"""How far images lie from those that a network was trained on, in its penultimate layer.

The distance is that of Mahalanobis to the nearest class mean, with one covariance within all classes (Lee et al. 2018,
"A simple unified framework for detecting out-of-distribution samples and adversarial attacks"). With more dimensions
than images a sample covariance has no inverse. It is taken as probabilistic PCA (Tipping & Bishop 1999): the q largest
principal components as they are, and one variance for all other directions. That is regular for every number of images,
keeps the file small (q + classes vectors), and the number q <= 64 is the one with which the validation images are most
likely (of 0, 1, 2, 4, …). Distances have no scale of their own: those of the validation images are kept beside them.

Features are those of the first evaluation view, of the training, the validation and the new images alike.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

MAX_COMPONENTS = 64
MAX_IMAGES, MAX_BYTES = 10_000, 128 * 2**20  # of training, and of validation, whose features are used at most
CHUNK = 512  # images whose distances are computed at a time
PREFIX = "novelty"  # of the names of the tensors in the file of a saved network


@dataclass(frozen=True)
class Novelty:
    """Tensors, float32: class means (k, d), of the classes with training images; components (q, d), orthonormal.

    `variances` (q,) along them, `noise` () along every other direction; `validation` (n,): the distances of the
    validation images, the nearest first.
    """

    means: torch.Tensor
    components: torch.Tensor
    variances: torch.Tensor
    noise: torch.Tensor
    validation: torch.Tensor

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Distances (n,) float32 of features (n, d), in standard deviations of training images around their class."""
        centre = self.means.double().mean(0)
        means = self._whitened(self.means.double() - centre)
        chunks = torch.from_numpy(features).split(CHUNK)
        found = [torch.cdist(self._whitened(chunk.double() - centre), means).amin(1) for chunk in chunks]
        return torch.cat(found).float().numpy() if found else np.zeros(0, np.float32)

    def _whitened(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (n, d) float64, transformed so that the covariance within classes becomes the identity."""
        components, scale = self.components.double(), self.noise.double().rsqrt()
        return x * scale + x @ components.T * (self.variances.double().rsqrt() - scale) @ components


def penultimate(head: nn.Module) -> tuple[nn.Sequential, int]:
    """The layers of a head before its last one, and how many features they give."""
    *layers, last = head.children()
    assert isinstance(last, nn.Linear)
    return nn.Sequential(*layers), last.in_features


def sample(label: np.ndarray, width: int) -> np.ndarray:
    """Positions of the images that are used, of those with label (n,): all, or as many of each class as there is room.

    `width`: their number of features.
    """
    n = min(MAX_IMAGES, MAX_BYTES // (4 * width))
    if len(label) <= n:
        return np.arange(len(label))
    order = np.random.default_rng(0).permutation(len(label))
    by_class = order[np.argsort(label[order], kind="stable")]
    _, first, count = np.unique(label[by_class], return_index=True, return_counts=True)
    turn = np.arange(len(label)) - np.repeat(first, count)  # in which each image of its class is taken
    return np.sort(by_class[np.argsort(turn, kind="stable")[:n]])


def fit(train: np.ndarray, label: np.ndarray, val: np.ndarray, val_label: np.ndarray) -> Novelty:
    """From features (n, d) float32 of training and validation images, and their labels.

    Classes without training images have no mean; their validation images do not choose the number of components.
    """
    classes, index, count = np.unique(label, return_inverse=True, return_counts=True)
    own, of_class = torch.from_numpy(index), torch.from_numpy(count)[:, None]
    x = torch.from_numpy(train)
    means = (torch.zeros(len(classes), x.shape[1]).double().index_add_(0, own, x.double()) / of_class).float()
    residuals, degrees = x - means[own], max(len(x) - len(classes), 1)
    total, width = residuals.double().square().sum() / degrees, x.shape[1]
    n_components = min(MAX_COMPONENTS, width - 1, len(x) - len(classes))
    variances, components = torch.zeros(0), torch.zeros(0, width)
    if n_components > 0 and total > 0:
        variances, components = _principal(residuals, n_components)
        variances = variances / degrees
    known = np.isin(val_label, classes)
    nearest = torch.from_numpy(np.searchsorted(classes, val_label[known]))
    q, noise = _choose(torch.from_numpy(val[known]) - means[nearest], components, variances, total)
    made = Novelty(means, components[:q].contiguous(), variances[:q].float(), noise.float(), torch.zeros(0))
    return replace(made, validation=torch.from_numpy(np.sort(made.distances(val))))


def _principal(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The n largest squared singular values (n,) float64 of x, and their right vectors (n, d) float32.

    By subspace iteration from a random start (Halko, Martinsson & Tropp 2011, "Finding structure with randomness").
    """
    start = torch.Generator().manual_seed(0)
    basis = torch.randn(x.shape[1], min(n + 8, *x.shape), generator=start)
    for _ in range(4):
        basis, _ = torch.linalg.qr(x.T @ (x @ basis))
    projected = x @ basis
    values, rotation = torch.linalg.eigh((projected.T @ projected).double())
    return values.flip(0)[:n].clamp_min(0), (basis @ rotation.flip(1)[:, :n].float()).T


def _choose(
    residuals: torch.Tensor, components: torch.Tensor, variances: torch.Tensor, total: torch.Tensor
) -> tuple[int, torch.Tensor]:
    """The number of components with the highest likelihood of residuals (n, d), and the variance of the rest.

    `total`: the sum of all variances.
    """
    width = residuals.shape[1]
    along = (residuals @ components.T).double().square()
    squares = residuals.double().square().sum(1)
    best = (0, total / width if total > 0 else torch.ones(()).double())
    highest = -torch.inf
    for q in (0, *(2**k for k in range(7))):
        noise = (total - variances[:q].sum()) / (width - q)
        if q > len(variances) or not noise > 1e-6 * total / width or not (variances[:q] > noise).all():
            break
        distance = (along[:, :q] / variances[:q]).sum(1) + (squares - along[:, :q].sum(1)) / noise
        likelihood = -float(distance.mean() + variances[:q].log().sum() + (width - q) * noise.log())
        if likelihood > highest:
            best, highest = (q, noise), likelihood
    return best
