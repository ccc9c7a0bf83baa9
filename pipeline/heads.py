"""Dense heads: standardise, then linear or an MLP; fitted on cached features in seconds.

A linear head minimises, with weights w_i that sum to 1 and W the weights without the bias,

    sum_i w_i NLL_i + strength * (l1_ratio |W|_1 + (1 - l1_ratio) / 2 |W|^2)

over all rows at once (L-BFGS-B), from the strongest penalty to the weakest, each started from the
one before. An MLP minimises the same by minibatches (Adam; the l1 part by soft-thresholding after
each step). Validation NLL chooses the strength, and the epoch of an MLP.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

from pipeline.logs import progress
from pipeline.params import HeadOptions

DEVIATION_FLOOR = 1e-2  # of a feature, as a share of the root mean square deviation of all


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
class Fitted:
    """A fitted head, and how it came about: one entry of `path` per strength tried.

    `rows_seen` counts how often a row went forward and backward through the head, in all.
    """

    head: nn.Sequential
    strength: float
    path: list[dict[str, float]]
    rows_seen: int


def build(width: int, n_classes: int, options: HeadOptions) -> nn.Sequential:
    """A new head (n, width) -> logits (n, n_classes)."""
    layers: list[nn.Module] = [Standardize(width)]
    for hidden in options.hidden:
        layers += [nn.Dropout(options.dropout), nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    if options.hidden:
        layers.append(nn.Dropout(options.dropout))
    return nn.Sequential(*layers, nn.Linear(width, n_classes))


def fit(
    features: np.ndarray,
    label: np.ndarray,
    weight: np.ndarray,
    n_classes: int,
    train: np.ndarray,
    val: np.ndarray,
    evaluation_views: int,
    options: HeadOptions,
    seed: int,
    device: torch.device,
) -> Fitted:
    """Fit on all views of the rows `train` of features (n, n_views, d); choose on the rows `val`.

    Deterministic for one device and number of threads.
    """
    torch.set_num_threads(options.threads)
    n_views = features.shape[1]
    x = torch.from_numpy(features[train]).flatten(0, 1).to(device)
    y = torch.from_numpy(label[train]).repeat_interleave(n_views).to(device)
    w = torch.from_numpy(weight[train]).repeat_interleave(n_views).to(device)
    w = w / w.sum()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build(features.shape[2], n_classes, options)
    if options.standardize:
        _standardize(head, x, w)
    head.to(device)
    validation = features[val], label[val], weight[val]

    best, path, rows_seen = (math.inf, head, math.nan), [], 0
    fitted_one_by_one = (
        _linear_path(head, x, y, w, options)
        if options.kind == "linear"
        else _mlp_path(head, x, y, w, validation, evaluation_views, options, seed)
    )
    for strength, candidate, passes in fitted_one_by_one:
        rows_seen += passes * len(x)
        nll = _nll(candidate, *validation, evaluation_views)
        path.append({"strength": strength, "val_nll": nll})
        if nll < best[0]:
            best = (nll, copy.deepcopy(candidate), strength)
    if not math.isfinite(best[0]):
        raise ValueError("head: the validation NLL is not finite for any of head.strengths")
    return Fitted(best[1].eval(), best[2], path, rows_seen)


def predict(head: nn.Module, features: np.ndarray, views: int) -> np.ndarray:
    """Log of the mean probability over the first views of features (n, n_views, d): (n, n_classes)."""
    device = next(head.parameters()).device
    head.eval()
    chunks = []
    with torch.inference_mode():
        for start in range(0, len(features), 1024):
            chunk = torch.from_numpy(features[start : start + 1024, :views]).to(device)
            logits = head(chunk.flatten(0, 1)).unflatten(0, (len(chunk), views))
            chunks.append(mean_log_probability(logits).cpu())
    return torch.cat(chunks).numpy()


def mean_log_probability(logits: torch.Tensor) -> torch.Tensor:
    """Logits (n, views, n_classes) -> log of the probabilities averaged over views (n, n_classes)."""
    return F.log_softmax(logits.double(), dim=-1).logsumexp(1).sub(math.log(logits.shape[1])).float()


def _nll(head: nn.Module, features: np.ndarray, label: np.ndarray, weight: np.ndarray, views: int) -> float:
    log_probability = predict(head, features, views).astype(np.float64)
    return float(np.average(-log_probability[np.arange(len(label)), label], weights=weight))


def _standardize(head: nn.Sequential, x: torch.Tensor, w: torch.Tensor) -> None:
    mean = (w[:, None] * x).sum(0)
    variance = (w[:, None] * (x - mean) ** 2).sum(0)
    floor = DEVIATION_FLOOR * variance.mean().sqrt()
    standardize = head[0]
    assert isinstance(standardize, Standardize)
    standardize.mean.copy_(mean)
    standardize.deviation.copy_(variance.sqrt().clamp_min(max(floor.item(), 1e-12)))


def _l1_ratio(options: HeadOptions) -> float:
    return {"l2": 0.0, "l1": 1.0, "elastic": options.l1_ratio}[options.penalty]


def _linear_path(
    head: nn.Sequential, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, options: HeadOptions
) -> Iterator[tuple[float, nn.Sequential, int]]:
    """Yield strength, head (the same module every time) and number of passes over the rows."""
    linear = head[-1]
    assert isinstance(linear, nn.Linear)
    x = head[0](x)
    n_classes, width = linear.weight.shape
    ratio = _l1_ratio(options)
    # With l1, W = P - N, both >= 0, so that |W|_1 = sum(P + N) is smooth under the bounds.
    parts = 2 if ratio else 1
    size = n_classes * width
    point = np.zeros(parts * size + n_classes)
    bounds = [(0, None)] * (2 * size) + [(None, None)] * n_classes if ratio else None

    def matrix(point: np.ndarray) -> np.ndarray:
        positive = point[:size]
        flat = positive - point[size : 2 * size] if ratio else positive
        return flat.reshape(n_classes, width)

    def objective(point: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
        weights, bias = matrix(point), point[parts * size :]
        logits = (x @ torch.from_numpy(weights).to(x).T).double() + torch.from_numpy(bias).to(w)
        log_probability = F.log_softmax(logits, dim=1)
        residual = w[:, None] * (log_probability.exp() - F.one_hot(y, n_classes))
        slope = (residual.to(x.dtype).T @ x).double().cpu().numpy()
        slope += strength * (1 - ratio) * weights
        value = -(w @ log_probability.gather(1, y[:, None]).squeeze(1)).item()
        value += strength * (1 - ratio) / 2 * float((weights**2).sum())
        gradient = [slope.ravel()]
        if ratio:
            value += strength * ratio * float(point[: 2 * size].sum())
            gradient = [slope.ravel() + strength * ratio, strength * ratio - slope.ravel()]
        return value, np.concatenate([*gradient, residual.sum(0).cpu().numpy()])

    for strength in sorted(options.strengths, reverse=True):
        solution = minimize(
            objective,
            point,
            args=(strength,),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": options.max_iterations, "ftol": 1e-9, "gtol": 1e-6, "maxcor": 20},
        )
        point = solution.x
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(matrix(point)))
            linear.bias.copy_(torch.from_numpy(point[parts * size :]))
        yield strength, head, solution.nfev


def _mlp_path(
    head: nn.Sequential,
    x: torch.Tensor,
    y: torch.Tensor,
    w: torch.Tensor,
    validation: tuple[np.ndarray, np.ndarray, np.ndarray],
    evaluation_views: int,
    options: HeadOptions,
    seed: int,
) -> Iterator[tuple[float, nn.Sequential, int]]:
    """Yield strength, the best epoch's head and passes over the rows, all from the same start."""
    ratio = _l1_ratio(options)
    for strength in progress(options.strengths, len(options.strengths), "strengths", "mlp"):
        candidate = copy.deepcopy(head)
        matrices = [layer.weight for layer in candidate if isinstance(layer, nn.Linear)]
        optimizer = torch.optim.Adam(candidate.parameters(), options.learning_rate)
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # of the dropout
        best_nll, best = math.inf, copy.deepcopy(candidate)
        for _ in range(options.epochs):
            candidate.train()
            for rows in torch.randperm(len(x), generator=generator).split(options.batch_size):
                rows = rows.to(x.device)
                losses = F.cross_entropy(candidate(x[rows]), y[rows], reduction="none")
                squares = sum((matrix**2).sum() for matrix in matrices)
                loss = (losses * w[rows]).sum() * (len(x) / len(rows))
                optimizer.zero_grad()
                (loss + strength * (1 - ratio) / 2 * squares).backward()
                optimizer.step()
                if ratio:
                    shrink = options.learning_rate * strength * ratio
                    for matrix in matrices:
                        matrix.data = F.softshrink(matrix.data, shrink)
            nll = _nll(candidate, *validation, evaluation_views)
            if nll < best_nll:
                best_nll, best = nll, copy.deepcopy(candidate)
        yield strength, best, options.epochs
