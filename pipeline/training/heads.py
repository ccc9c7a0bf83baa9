"""Dense heads: linear, an MLP, or the network's own dense layers; fitted on cached features in seconds.

A head minimises, with loss weights w_i that sum to 1 (loss_weight) and W its linear layers' weights without biases,

    sum_i w_i NLL_i + strength * (l1_ratio |W|_1 + (1 - l1_ratio) / 2 |W|^2)

A linear head does so over all rows at once (L-BFGS-B), from the strongest penalty to the weakest, each started from
the one before; the others by minibatches (Adam, and soft-thresholding after each step for the l1 part). Validation NLL
chooses the strength, and the epoch where there are epochs; weighted by the images' weights alone, as metrics are,
so that `class_weights` changes what is fitted and not the yardstick.

Features that would take more than RESIDENT_BYTES are read again in each pass; the same bytes come out.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from scipy.optimize import Bounds, minimize
from threadpoolctl import threadpool_limits
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
RESIDENT_BYTES = 4 * 2**30  # the most that training rows take on the device, as float32
CHUNK_BYTES = 256 * 2**20  # of rows that are multiplied at a time, resident or not: sums depend on it


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
class Selection:
    """Images of an array (n_all, n_views, *shape), read when they are asked for; indexed as an array is."""

    values: np.ndarray
    images: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the images together."""
        return (len(self.images), *self.values.shape[1:])

    def __getitem__(self, index: slice | tuple) -> np.ndarray:
        """Read some."""
        images, *rest = index if isinstance(index, tuple) else (index,)
        return self.values[(self.images[images], *rest)]


@dataclass(frozen=True)
class Examples:
    """Features (n, n_views, *shape) with label (n,) int64 and weight (n,) float64."""

    features: np.ndarray | Selection
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
    threads: int,
    device: torch.device,
) -> Fitted:
    """Fit on all views of `train`, choose on the first views of `val`; deterministic on one kind of device."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    x = _Rows(train, device)
    head = build(x.shape, n_classes, options, dense).to(device)
    if options.standardize:
        _standardize(head, x)
    x.weigh(loss_weight(train.label, train.weight, options.class_weights))

    best, val_nll, rows_seen = head, {}, 0
    path = _linear_path(head, x, options) if options.kind == "linear" else None
    for strength, candidate, passes in path or _minibatch_path(head, x, val, evaluation_views, options):
        nll = _nll(candidate, val, evaluation_views)
        rows_seen += passes * len(x.label)
        if nll < min(val_nll.values(), default=math.inf):
            best = copy.deepcopy(candidate)
        val_nll[strength] = nll
    if not all(map(math.isfinite, val_nll.values())):
        raise ValueError(
            f"params.yaml: head: the validation NLL is not finite: {val_nll}; raise head.regularization_strengths"
        )
    return Fitted(best.eval(), min(val_nll, key=val_nll.__getitem__), val_nll, rows_seen)


def loss_weight(label: np.ndarray, weight: np.ndarray, class_weights: str) -> np.ndarray:
    """What each training image counts in the loss: its weight, or with `balanced` that times n / (k n_c).

    n is the sum of all weights, n_c that of the image's class, of k that occur: each class counts n / k in all, and
    the sum stays as it is.
    """
    if class_weights == "none":
        return weight
    counts = np.bincount(label, weight)
    return weight * weight.sum() / (np.count_nonzero(counts) * counts[label])


def predict(head: nn.Module, features: np.ndarray | Selection, views: int) -> np.ndarray:
    """Log of the mean probability over the first views of features (n, n_views, …): (n, n_classes) float32."""
    device = next(head.parameters()).device
    head.eval()
    chunks = []
    with torch.inference_mode():
        for start in range(0, features.shape[0], 1024):
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


class _Rows:
    """Every view of the training images: rows (n, *shape) float32 with label (n,) and weight (n,), which sums to 1.

    They are on the device if there is room, else read when they are asked for.
    """

    def __init__(self, examples: Examples, device: torch.device) -> None:
        n_images, self._n_views, *shape = examples.features.shape
        self._features, self._device = examples.features, device
        self.shape = tuple(shape)
        self.label = torch.from_numpy(examples.label).repeat_interleave(self._n_views).to(device)
        self.weigh(examples.weight)
        image_bytes = 4 * self._n_views * math.prod(shape)
        n = max(1, CHUNK_BYTES // image_bytes)
        borders = [(start, min(start + n, n_images)) for start in range(0, n_images, n)]
        self._chunks = [(slice(i, j), slice(i * self._n_views, j * self._n_views)) for i, j in borders]
        self._transform: nn.Module = nn.Identity()
        self._resident = None
        if n_images * image_bytes <= RESIDENT_BYTES:
            self._resident = torch.empty(len(self.label), *shape, device=device)
            for images, rows in self._chunks:
                self._resident[rows] = self._read(images)

    def weigh(self, weight: np.ndarray) -> None:
        """Have each image count by `weight` (n,)."""
        rows = torch.from_numpy(weight).repeat_interleave(self._n_views).to(self._device)
        self.weight = rows / rows.sum()

    def apply(self, transform: nn.Module) -> None:
        """Have all rows go through `transform`, which keeps their shape."""
        self._transform = transform
        for _, chunk in self.chunks() if self._resident is not None else ():
            chunk.copy_(transform(chunk))

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """All rows in order, in the same chunks each time: which they are, and they themselves."""
        for images, rows in self._chunks:
            yield rows, self._transform(self._read(images)) if self._resident is None else self._resident[rows]

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Some rows, in any order."""
        if self._resident is not None:
            return self._resident[rows]
        images, views = np.divmod(rows.cpu().numpy(), self._n_views)
        return self._transform(torch.from_numpy(self._features[images, views]).float().to(self._device))

    def _read(self, images: slice) -> torch.Tensor:
        return torch.from_numpy(np.array(self._features[images])).float().flatten(0, 1).to(self._device)


def _standardize(head: nn.Sequential, x: _Rows) -> None:
    weights = x.weight.float()
    mean = torch.stack([weights[rows] @ chunk for rows, chunk in x.chunks()]).sum(0)
    variance = torch.stack([weights[rows] @ (chunk - mean) ** 2 for rows, chunk in x.chunks()]).sum(0)
    floor = DEVIATION_FLOOR * variance.mean().sqrt().item()
    standardize = cast(Standardize, head[0])
    standardize.mean.copy_(mean)
    standardize.deviation.copy_(variance.sqrt().clamp_min(floor or 1.0))


def _l1_ratio(options: HeadOptions) -> float:
    return {"l2": 0.0, "l1": 1.0, "elasticnet": options.l1_ratio}[options.penalty]


Path = Iterator[tuple[float, nn.Sequential, int]]  # strength, the head it gives, passes over the rows


def _linear_path(head: nn.Sequential, x: _Rows, options: HeadOptions) -> Path:
    x.apply(head[0])
    linear, ratio = cast(nn.Linear, head[-1]), _l1_ratio(options)
    n_classes, width = linear.weight.shape
    # W = B U. Without l1 the optimum sums to 0 over the classes; of two, one vector of the same length is left to find,
    # which halves the products with the rows.
    basis = torch.tensor([[1.0], [-1.0]]).double() / math.sqrt(2) if n_classes == 2 and not ratio else None
    n_vectors = basis.shape[1] if basis is not None else n_classes
    # With l1, U = P - N with P, N >= 0, so that |U|_1 = sum(P + N) is smooth; without, U = P.
    signs = np.array([1.0, -1.0] if ratio else [1.0])
    least = np.concatenate([np.full(len(signs) * n_vectors * width, 0.0 if ratio else -np.inf), [-np.inf] * n_vectors])

    def parts(point: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = (signs @ point[:-n_vectors].reshape(len(signs), -1)).reshape(n_vectors, width)
        return torch.from_numpy(vectors), torch.from_numpy(point[-n_vectors:])

    def objective(point: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
        vectors, bias = parts(point)
        loss, slope, bias_slope = _weighted_nll(x, vectors, bias, basis)
        loss += strength * ((1 - ratio) / 2 * vectors.square().sum().item() + ratio * point[:-n_vectors].sum())
        gradient = np.outer(signs, slope + strength * (1 - ratio) * vectors.numpy()).ravel() + strength * ratio
        return loss, np.concatenate([gradient, bias_slope])

    point = before = np.zeros_like(least)
    settings = {"maxiter": options.max_iterations, "ftol": 1e-9, "gtol": 2e-5, "maxcor": 30}
    for strength in sorted(options.regularization_strengths, reverse=True):
        start = np.maximum(2 * point - before, least)  # as far again as the last strength moved it
        with threadpool_limits(1, "blas"):  # or scipy's threads and torch's wait for each other: 16 times as long
            found = minimize(
                *(objective, start, (strength,), "L-BFGS-B"),
                jac=True,
                bounds=Bounds(least) if ratio else None,  # pyright: ignore[reportArgumentType]
                options=settings,
            )
        before, point = point, found.x
        with torch.no_grad():
            for parameter, value in zip((linear.weight, linear.bias), parts(point), strict=True):
                parameter.copy_(value if basis is None else basis @ value)
        yield strength, head, found.nfev


def _weighted_nll(
    x: _Rows, vectors: torch.Tensor, bias: torch.Tensor, basis: torch.Tensor | None
) -> tuple[float, np.ndarray, np.ndarray]:
    """Weighted NLL of the head with the weights B `vectors` (k, d) and the biases B `bias` (k,), and both slopes.

    All in float64 but for the products with the rows.
    """
    device = x.label.device
    u, c, b = vectors.float().to(device), bias.to(device), None if basis is None else basis.to(device)
    loss, slope, bias_slope = 0.0, torch.zeros(u.shape, dtype=torch.float64, device=device), torch.zeros_like(c)
    for rows, chunk in x.chunks():
        logits = (chunk @ u.T).double() + c
        log_probability = F.log_softmax(logits if b is None else logits @ b.T, dim=1)
        w, own = x.weight[rows, None], x.label[rows, None]
        loss = loss - (w * log_probability.gather(1, own)).sum()
        residual = log_probability.exp()
        residual = w * residual.scatter(1, own, residual.gather(1, own) - 1)
        residual = residual if b is None else residual @ b
        slope = slope + residual.T.float().contiguous() @ chunk  # several times faster than chunk.T @ residual
        bias_slope = bias_slope + residual.sum(0)
    return float(loss), slope.cpu().numpy(), bias_slope.cpu().numpy()


def _minibatch_path(head: nn.Sequential, x: _Rows, val: Examples, evaluation_views: int, options: HeadOptions) -> Path:
    ratio, w, n_rows = _l1_ratio(options), x.weight.float(), len(x.label)
    for strength in options.regularization_strengths:
        candidate = copy.deepcopy(head)
        matrices = [layer.weight for layer in candidate.modules() if isinstance(layer, (nn.Linear, _ConvNd))]
        optimizer = torch.optim.Adam(candidate.parameters(), options.learning_rate)
        best, best_nll = copy.deepcopy(candidate), math.inf
        for _ in range(options.epochs):
            candidate.train()
            for rows in torch.randperm(n_rows).to(w.device).split(options.batch_size):
                losses = F.cross_entropy(candidate(x.take(rows)), x.label[rows], reduction="none")
                squares = torch.stack([matrix.square().sum() for matrix in matrices]).sum()
                loss = w[rows] @ losses * n_rows / len(rows) + strength * (1 - ratio) / 2 * squares
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
