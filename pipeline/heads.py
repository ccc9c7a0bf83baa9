"""Dense heads: linear, an MLP, or the network's own dense layers; fitted on cached features in seconds.

A head minimises, with image weights w_i that sum to 1 and W the weights of its linear layers without the biases,

    sum_i w_i NLL_i + strength * (l1_ratio |W|_1 + (1 - l1_ratio) / 2 |W|^2)

A linear head does so over all rows at once (L-BFGS-B), from the strongest penalty to the weakest, each started from
the one before; the others by minibatches (Adam, and soft-thresholding after each step for the l1 part). Validation NLL
chooses the strength, and the epoch where there are epochs.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pipeline.params import HeadOptions

# Least deviation of a feature that standardisation divides by, as a share of the root mean square deviation of all. A
# small one magnifies features that hardly vary on these images, and fine-tuning from such a head blows up: on ELPV, one
# step of AdamW at 1e-4 moved the logits by 10 with 0.01. Chosen on validation, seeds 100 to 102: NLL 0.332 with 0.01,
# 0.331 with 0.1, 0.330 with 0.3, 0.333 with 1.
DEVIATION_FLOOR = 0.3


class Standardize(nn.Module):
    """(x - mean) / deviation, both buffers of shape (d,): they are saved with the head."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Standardise (n, d)."""
        return (x - self.mean) / self.deviation


@dataclass(frozen=True)
class Examples:
    """Features (n, n_views, *shape) float32 with label (n,) int64 and weight (n,) float64."""

    features: np.ndarray
    label: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """A fitted head, the strength that validation chose, and `val_nll` of each.

    `rows_seen` counts how often a row went forward and backward through the head, in all.
    """

    head: nn.Sequential
    strength: float
    val_nll: dict[float, float]
    rows_seen: int


def build(shape: tuple[int, ...], n_classes: int, options: HeadOptions, dense: nn.Module) -> nn.Sequential:
    """A new head (n, *shape) -> logits (n, n_classes), which standardises nothing yet.

    `dense`: what the pretrained network does behind its base, without its last layer; a copy of it becomes part of a
    pretrained head. Raises ValueError if features of this shape, or this network, do not go with such a head.
    """
    if options.kind == "pretrained":
        return _build_pretrained(shape, n_classes, options, dense)
    if len(shape) != 1:
        raise ValueError(
            f"params.yaml: features.pool: the features at features.cut have the shape {shape}, and "
            f"`head.kind: {options.kind}` needs vectors; expected avg or flatten"
        )
    width = shape[0]
    layers: list[nn.Module] = [Standardize(width)]
    for hidden in options.hidden:
        layers += [nn.Dropout(options.dropout), nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*layers, nn.Dropout(options.dropout), nn.Linear(width, n_classes))


def _build_pretrained(shape: tuple[int, ...], n_classes: int, options: HeadOptions, dense: nn.Module) -> nn.Sequential:
    dense = copy.deepcopy(dense).eval().requires_grad_(True)
    pixels, handles = [1], []  # that a convolution gives; one where it is a dense layer in other words
    for layer in dense.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = options.dropout
        if isinstance(layer, _ConvNd):
            handles.append(layer.register_forward_hook(lambda *call: pixels.append(call[-1].shape[2:].numel())))
    with torch.no_grad():
        width = dense(torch.zeros(1, *shape)).shape[1]
    for handle in handles:
        handle.remove()
    if max(pixels) > 1 or any(isinstance(layer, _BatchNorm) for layer in dense.modules()):
        raise ValueError(
            "params.yaml: head.kind: pretrained: behind features.cut there is more than dense layers; cut where they "
            "begin, or train the blocks by fine_tune"
        )
    if next(dense.parameters(), None) is None:
        raise ValueError(
            "params.yaml: head.kind: pretrained: the network has no dense layers of its own behind features.cut but "
            "the last; expected linear or mlp, or an earlier features.cut"
        )
    return nn.Sequential(dense, nn.Linear(width, n_classes))


def fit(
    train: Examples,
    val: Examples,
    n_classes: int,
    evaluation_views: int,
    options: HeadOptions,
    dense: nn.Module,
    seed: int,
    device: torch.device,
) -> Fitted:
    """Fit on all views of `train`, choose on the first views of `val`; deterministic on one kind of device."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(seed)
    n_views = train.features.shape[1]
    x = torch.from_numpy(train.features).float().flatten(0, 1).to(device)
    y = torch.from_numpy(train.label).repeat_interleave(n_views).to(device)
    w = torch.from_numpy(train.weight).repeat_interleave(n_views).to(device)
    w = w / w.sum()
    head = build(tuple(x.shape[1:]), n_classes, options, dense).to(device)
    if options.standardize:
        _standardize(head, x, w)

    best, val_nll, rows_seen = head, {}, 0
    path = _linear_path(head, x, y, w, options) if options.kind == "linear" else None
    for strength, candidate, passes in path or _minibatch_path(head, x, y, w, val, evaluation_views, options):
        nll = _nll(candidate, val, evaluation_views)
        rows_seen += passes * len(x)
        if nll < min(val_nll.values(), default=math.inf):
            best = copy.deepcopy(candidate)
        val_nll[strength] = nll
    if not all(map(math.isfinite, val_nll.values())):
        raise ValueError(f"params.yaml: head: the validation NLL is not finite: {val_nll}; raise head.strengths")
    return Fitted(best.eval(), min(val_nll, key=val_nll.__getitem__), val_nll, rows_seen)


def predict(head: nn.Module, features: np.ndarray, views: int) -> np.ndarray:
    """Log of the mean probability over the first views of features (n, n_views, …): (n, n_classes) float32."""
    device = next(head.parameters()).device
    head.eval()
    chunks = []
    with torch.inference_mode():
        for start in range(0, len(features), 1024):
            chunk = torch.from_numpy(features[start : start + 1024, :views]).float().to(device)
            logits = head(chunk.flatten(0, 1)).unflatten(0, (len(chunk), views))
            chunks.append(mean_log_probability(logits).cpu().numpy())
    return np.concatenate(chunks)


def mean_log_probability(logits: torch.Tensor) -> torch.Tensor:
    """Logits (n, views, n_classes) -> log of the probabilities averaged over views (n, n_classes) float32."""
    log_sum = F.log_softmax(logits.double(), dim=-1).logsumexp(1)
    return (log_sum - math.log(logits.shape[1])).float()


def _nll(head: nn.Module, examples: Examples, views: int) -> float:
    log_probability = predict(head, examples.features, views).astype(np.float64)
    nll = -log_probability[np.arange(len(examples.label)), examples.label]
    return float(np.average(nll, weights=examples.weight))


def _standardize(head: nn.Sequential, x: torch.Tensor, w: torch.Tensor) -> None:
    mean = w.to(x.dtype) @ x
    variance = w.to(x.dtype) @ (x - mean) ** 2
    floor = DEVIATION_FLOOR * variance.mean().sqrt().item()
    standardize = cast(Standardize, head[0])
    standardize.mean.copy_(mean)
    standardize.deviation.copy_(variance.sqrt().clamp_min(floor or 1.0))


def _l1_ratio(options: HeadOptions) -> float:
    return {"l2": 0.0, "l1": 1.0, "elastic": options.l1_ratio}[options.penalty]


Path = Iterator[tuple[float, nn.Sequential, int]]  # strength, the head it gives, passes over the rows


def _linear_path(head: nn.Sequential, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, options: HeadOptions) -> Path:
    x = head[0](x)
    linear, ratio = cast(nn.Linear, head[-1]), _l1_ratio(options)
    n_classes, width = linear.weight.shape
    size = n_classes * width
    # With l1, W = P - N with P, N >= 0, so that |W|_1 = sum(P + N) is smooth; without, W = P.
    signs = np.array([1.0, -1.0] if ratio else [1.0])
    bounds = [(0, None)] * (2 * size) + [(None, None)] * n_classes if ratio else None

    def matrix(point: np.ndarray) -> np.ndarray:
        return (signs @ point[:-n_classes].reshape(len(signs), size)).reshape(n_classes, width)

    def objective(point: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(matrix(point)).to(device=x.device)
        bias = torch.from_numpy(point[-n_classes:]).to(x.device)
        log_probability = F.log_softmax(_product(x, weights.to(x.dtype).T).double() + bias, dim=1)
        residual = w[:, None] * (log_probability.exp() - F.one_hot(y, n_classes))
        slope = _product(x.T, residual.to(x.dtype)).T.double() + strength * (1 - ratio) * weights
        smooth = strength * (1 - ratio) / 2 * weights.square().sum() - w @ log_probability[range(len(y)), y]
        l1 = strength * ratio * np.abs(point[:-n_classes]).sum()
        gradient = np.outer(signs, slope.cpu().numpy()).ravel() + strength * ratio
        return smooth.item() + l1, np.concatenate([gradient, residual.sum(0).cpu().numpy()])

    point = np.zeros(len(signs) * size + n_classes)
    settings = {"maxiter": options.max_iterations, "ftol": 1e-9, "gtol": 1e-6, "maxcor": 20}
    for strength in sorted(options.strengths, reverse=True):
        found = minimize(objective, point, (strength,), "L-BFGS-B", jac=True, bounds=bounds, options=settings)
        point = found.x
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(matrix(point)))
            linear.bias.copy_(torch.from_numpy(point[-n_classes:]))
        yield strength, head, found.nfev


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right; column by column if there are few, which is several times faster on a CPU."""
    if right.shape[1] > 8:
        return left @ right
    return torch.stack([left @ column for column in right.T.contiguous()], dim=1)


def _minibatch_path(
    head: nn.Sequential,
    x: torch.Tensor,
    y: torch.Tensor,
    w: torch.Tensor,
    val: Examples,
    evaluation_views: int,
    options: HeadOptions,
) -> Path:
    ratio, w = _l1_ratio(options), w.to(x.dtype)
    for strength in options.strengths:
        candidate = copy.deepcopy(head)
        matrices = [layer.weight for layer in candidate.modules() if isinstance(layer, (nn.Linear, _ConvNd))]
        optimizer = torch.optim.Adam(candidate.parameters(), options.learning_rate)
        best, best_nll = copy.deepcopy(candidate), math.inf
        for _ in range(options.epochs):
            candidate.train()
            for rows in torch.randperm(len(x)).to(x.device).split(options.batch_size):
                losses = F.cross_entropy(candidate(x[rows]), y[rows], reduction="none")
                squares = torch.stack([matrix.square().sum() for matrix in matrices]).sum()
                loss = w[rows] @ losses * len(x) / len(rows) + strength * (1 - ratio) / 2 * squares
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if ratio:
                    for matrix in matrices:  # the threshold in the metric of Adam's step, or it counts for nothing
                        state = optimizer.state[matrix]
                        unbiased = state["exp_avg_sq"] / (1 - optimizer.defaults["betas"][1] ** state["step"].item())
                        threshold = options.learning_rate * strength * ratio / (unbiased.sqrt() + 1e-8)
                        matrix.data = matrix.data.sign() * (matrix.data.abs() - threshold).clamp_min(0)
            nll = _nll(candidate, val, evaluation_views)
            if not math.isfinite(nll):
                raise ValueError(
                    f"params.yaml: head: the validation NLL is {nll} with strength {strength:g}; lower "
                    "head.learning_rate"
                )
            if nll < best_nll:
                best, best_nll = copy.deepcopy(candidate), nll
        yield strength, best, options.epochs
