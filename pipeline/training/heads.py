"""Dense heads: linear, an MLP, or the network's own dense layers; fitted on cached features in seconds.

A head minimises, with loss weights w_i that sum to 1 (loss_weight) and W its linear layers' weights without biases,

    sum_i w_i NLL_i + strength * (l1_ratio |W|_1 + (1 - l1_ratio) / 2 |W|^2)

with the regularization strength `strength`. Linear heads are fitted on all rows at once (L-BFGS-B), from the strongest
penalty to the weakest, each started from the ones before, so that within the solver's tolerance a result depends on
the stronger penalties; the others in minibatches (Adam, and for the l1 part soft-thresholding after each step), where
the result of a strength does not depend on the others. The validation NLL selects the strength, and the epoch where
there are epochs. It is weighted by the images' weights alone, as the metrics are: `class_weights` changes the fit, not
the selection.

Features for which there is no room on the device are read again in each pass; the results have the same bytes.
"""

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from scipy.optimize import Bounds, minimize
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pipeline.files import digest
from pipeline.network.device import resident_bytes
from pipeline.params import HeadOptions
from pipeline.training.runs import Candidates, join_candidates, make_candidates

log = logging.getLogger("pipeline")

# Least deviation of a feature that standardisation divides by, as a share of the median deviation: a few features of
# another size do not change it. A small one magnifies features that hardly vary on these images, and fine-tuning
# from such a head blows up: on ELPV, one step of AdamW at 1e-4 moved the logits by 10 with 0.04. Chosen on validation,
# seeds 100 to 102: NLL 0.331 with 0.01, 0.332 with 0.1, 0.331 with 0.3, 0.330 with 0.5 and 1; of the last two, 1 has
# the smaller weights.
DEVIATION_FLOOR = 1.0
RESIDENT_BYTES = 4 * 2**30  # the most that training rows take in memory, as float32; on a GPU see resident_bytes
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
    """Some images of an array (n_all, n_views, *shape), read when they are used; indexed as an array is."""

    values: np.ndarray
    images: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_images, n_views, *shape)."""
        return (len(self.images), *self.values.shape[1:])

    def __getitem__(self, index: slice | tuple) -> np.ndarray:
        """Read images; further indices select views and values."""
        images, *rest = index if isinstance(index, tuple) else (index,)
        return self.values[(self.images[images], *rest)]


@dataclass(frozen=True)
class Examples:
    """Features (n, n_views, *shape) with label (n,) int64 and weight (n,) float64."""

    features: np.ndarray | Selection
    label: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class RegularizationPath:
    """What fits with different regularization strengths found.

    `strength`: the one that validation selected; `at_end`: which end of the strengths it is, if one (strength 0 is no
    end: nothing is weaker); `val_nll`: of each strength, in its best epoch; `not_converged`: the strengths with which
    the solver stopped at its limit.
    """

    strength: float
    at_end: Literal["weakest", "strongest"] | None
    val_nll: dict[float, float]
    not_converged: list[float]


@dataclass(frozen=True)
class Fitted:
    """The fitted head that validation selected, and all candidates: one per strength, and epoch where there are epochs.

    `train_flops`: of all passes, epochs and strengths, forward and backward; the features need no gradient.
    """

    head: nn.Sequential
    path: RegularizationPath
    candidates: Candidates
    train_flops: int


def build(shape: tuple[int, ...], n_classes: int, options: HeadOptions, dense: nn.Module) -> nn.Sequential:
    """A new head (n, *shape) -> logits (n, n_classes), with the identity as standardisation.

    `dense`: the layers of the pretrained network behind the base, without the last one; a pretrained head contains a
    copy of them. Raises ValueError if features of this shape, or this network, do not go with the kind of head.
    """
    if options.kind == "pretrained":
        return _build_pretrained(shape, n_classes, options, dense)
    if len(shape) != 1:
        raise ValueError(
            f"params.yaml: features.pool: the features at features.cut have the shape {shape}, and "
            f"`head.kind: {options.kind}` needs vectors; expected avg or flatten; of tokens, also cls or cls+avg"
        )
    width = shape[0]
    layers: list[nn.Module] = [Standardize(width)]
    for hidden in options.hidden:
        layers += [nn.Dropout(options.dropout), nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*layers, nn.Dropout(options.dropout), nn.Linear(width, n_classes))


def _build_pretrained(shape: tuple[int, ...], n_classes: int, options: HeadOptions, dense: nn.Module) -> nn.Sequential:
    dense = copy.deepcopy(dense).eval().requires_grad_(True)
    pixels, handles = [1], []  # of each convolution's output; a convolution with one output pixel is a dense layer
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


def fit(head: nn.Sequential, train: Examples, val: Examples, options: HeadOptions) -> Fitted:
    """Fit a new `head` on all views of `train`, on its device, and select on all views of `val`.

    With one seed (torch.manual_seed) and one number of threads the result has the same bytes on one kind of device.
    Raises ValueError if a validation NLL is not finite.
    """
    x = _Rows(train, loss_weight(train.label, train.weight, options.class_weights), next(head.parameters()).device)
    if options.standardize:
        _standardize(head, x, x.per_row(train.weight))

    steps = _fit_linear(head, x, options) if options.kind == "linear" else _fit_minibatches(head, x, options)
    best, best_nll, train_flops = head, math.inf, 0
    candidates: list[Candidates] = []
    val_nll: dict[float, float] = {}
    not_converged: list[float] = []
    for step in steps:
        candidates.append(make_candidates({step.name: predict(step.head, val.features)}, val.label))
        (nll,) = candidates[-1].nll(val.weight)
        if not math.isfinite(nll):
            way_out = "raise head.regularization_strengths" if options.kind == "linear" else "lower head.learning_rate"
            raise ValueError(f"params.yaml: head: the validation NLL is {nll} with strength {step.name}; {way_out}")
        if nll < best_nll:
            best, best_nll = copy.deepcopy(step.head), nll
        val_nll[step.strength] = min(nll, val_nll.get(step.strength, math.inf))
        not_converged += [] if step.is_converged else [step.strength]
        train_flops += step.flops
    strength, weakest, strongest = min(val_nll, key=val_nll.__getitem__), min(val_nll), max(val_nll)
    at_end = None
    if weakest < strongest:
        at_end = "strongest" if strength == strongest else "weakest" if strength == weakest > 0 else None
    path = RegularizationPath(strength, at_end, val_nll, not_converged)
    return Fitted(best.eval(), path, join_candidates(candidates), train_flops)


def warn(paths: Sequence[RegularizationPath], section: str) -> None:
    """Log what the fits of a stage, configured by this section of params.yaml, should be given: more of what."""
    for end, more in (("weakest", "weaker"), ("strongest", "stronger")):
        if n := sum(path.at_end == end for path in paths):
            found = f"the best is the {end} in {n} of {len(paths)} fits"
            log.warning("%s.regularization_strengths: %s; add %s ones", section, found, more)
    if stopped := [path.not_converged for path in paths if path.not_converged]:
        strengths = ", ".join(f"{strength:g}" for strength in sorted(set().union(*stopped), reverse=True))
        found = f"did not converge in {len(stopped)} of {len(paths)} fits (strengths: {strengths})"
        log.warning("%s: the solver %s; raise %s.max_iterations", section, found, section)


def weight_shares(head: nn.Sequential, train: Selection, widths: Mapping[str, int]) -> dict[str, float]:
    """Which cuts carry the weight of a linear head, or of the first layer of an MLP, on features of several.

    The share of each cut in the squared weights, each multiplied by the variance of its feature over all views of
    `train`: what the cut would add to the variance of the layer's outputs if features were uncorrelated. It does not
    depend on the scale of the features. `widths`: how many of them are of each cut, in order. The shares sum to 1, or
    are 0 if all weights are.
    """
    standardize, first = head[0], next(layer for layer in head if isinstance(layer, nn.Linear))
    sums, squares = torch.zeros(2, first.in_features, dtype=torch.float64, device=first.weight.device)
    with torch.inference_mode():
        for start in range(0, train.shape[0], 256):
            rows = torch.from_numpy(train[start : start + 256]).float().flatten(0, 1).to(first.weight.device)
            x = standardize(rows).double()
            sums, squares = sums + x.sum(0), squares + x.square().sum(0)
        n = train.shape[0] * train.shape[1]
        carried = first.weight.double().square().sum(0) * (squares / n - (sums / n).square())
        parts = [part.sum().item() for part in carried.split([*widths.values()])]
    return {cut: part / (sum(parts) or 1.0) for cut, part in zip(widths, parts, strict=True)}


def loss_weight(label: np.ndarray, weight: np.ndarray, class_weights: str) -> np.ndarray:
    """The weight of each training image in the loss: `weight`, or with `balanced` weight * n / (k n_c).

    n is the sum of all weights, n_c that of the image's class, k the number of classes that occur. Each class has n / k
    in all, and the sum of the weights stays n.
    """
    if class_weights == "none":
        return weight
    counts = np.bincount(label, weight)
    return weight * weight.sum() / (np.count_nonzero(counts) * counts[label])


def predict(head: nn.Module, features: np.ndarray | Selection) -> np.ndarray:
    """Log of the mean probability over the views of features (n, n_views, …): (n, n_classes) float32."""
    device = next(head.parameters()).device
    head.eval()
    chunks = []
    with torch.inference_mode():
        for start in range(0, features.shape[0], 1024):
            chunk = torch.from_numpy(features[start : start + 1024]).float().to(device)
            logits = head(chunk.flatten(0, 1)).unflatten(0, chunk.shape[:2])
            chunks.append(mean_log_probability(logits).cpu().numpy())
    return np.concatenate(chunks)


def mean_log_probability(logits: torch.Tensor) -> torch.Tensor:
    """Logits (n, views, n_classes) -> log of the probabilities averaged over views (n, n_classes) float32."""
    log_sum = F.log_softmax(logits.double(), dim=-1).logsumexp(1)
    return (log_sum - math.log(logits.shape[1])).float()


class _Rows:
    """Every view of the training images: rows (n, *shape) float32 with label (n,) and loss weight (n,).

    The weights sum to 1. The rows are on the device if there is room, else they are read when they are used.
    """

    def __init__(self, examples: Examples, weight: np.ndarray, device: torch.device) -> None:
        n_images, self._n_views, *shape = examples.features.shape
        self._features, self._device = examples.features, device
        self.label = torch.from_numpy(examples.label).repeat_interleave(self._n_views).to(device)
        self.weight = self.per_row(weight)
        image_bytes = 4 * self._n_views * math.prod(shape)
        self._chunk_rows = self._n_views * max(1, CHUNK_BYTES // image_bytes)
        self._transform: nn.Module = nn.Identity()
        self._resident = None
        if n_images * image_bytes <= resident_bytes(device, RESIDENT_BYTES):
            resident = torch.empty(len(self.label), *shape, device=device)
            for rows, chunk in self.chunks():
                resident[rows] = chunk
            self._resident = resident

    def per_row(self, weight: np.ndarray) -> torch.Tensor:
        """Weights of the images (n_images,) as weights of the rows (n,), which sum to 1."""
        rows = torch.from_numpy(weight).repeat_interleave(self._n_views).to(self._device)
        return rows / rows.sum()

    def apply(self, transform: nn.Module) -> None:
        """Pass all rows through `transform`, which keeps their shape."""
        self._transform = transform
        for _, chunk in self.chunks() if self._resident is not None else ():
            chunk.copy_(transform(chunk))

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """All rows in order, in the same chunks each time: their positions and their values."""
        for start in range(0, len(self.label), self._chunk_rows):
            rows = slice(start, start + self._chunk_rows)
            if self._resident is not None:
                yield rows, self._resident[rows]
            else:
                images = self._features[start // self._n_views : rows.stop // self._n_views]
                yield rows, self._transform(torch.from_numpy(np.array(images)).float().flatten(0, 1).to(self._device))

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Some rows, in any order."""
        if self._resident is not None:
            return self._resident[rows]
        images, views = np.divmod(rows.cpu().numpy(), self._n_views)
        return self._transform(torch.from_numpy(self._features[images, views]).float().to(self._device))


def _standardize(head: nn.Sequential, x: _Rows, weight: torch.Tensor) -> None:
    """Give the head the mean and deviation of the rows, weighted by `weight` (n,).

    The median that bounds the deviation is of the features that vary by more than float32 rounds their mean.
    """
    weights = weight.float()
    mean = torch.stack([weights[rows] @ chunk for rows, chunk in x.chunks()]).sum(0)
    variance = torch.stack([weights[rows] @ (chunk - mean) ** 2 for rows, chunk in x.chunks()]).sum(0)
    deviation = variance.sqrt()
    varying = deviation[deviation > 1e-5 * mean.abs()]
    floor = DEVIATION_FLOOR * varying.median().item() if len(varying) else 1.0
    standardize = cast(Standardize, head[0])
    standardize.mean.copy_(mean)
    standardize.deviation.copy_(deviation.clamp_min(floor))


def _l1_ratio(options: HeadOptions) -> float:
    return {"l2": 0.0, "l1": 1.0, "elasticnet": options.l1_ratio}[options.penalty]


@dataclass(frozen=True)
class _Step:
    """A candidate with this strength, and the FLOPs that it took."""

    name: str
    strength: float
    head: nn.Sequential
    flops: int
    is_converged: bool = True


def _fit_linear(head: nn.Sequential, x: _Rows, options: HeadOptions) -> Iterator[_Step]:
    """The same module each time, with the optimum of one strength after the other."""
    x.apply(head[0])
    linear, ratio = cast(nn.Linear, head[-1]), _l1_ratio(options)
    n_classes, width = linear.weight.shape
    # W = B U. Without l1 the optimum sums to 0 over the classes, so that two classes need only one vector of the same
    # length. That halves the products with the rows.
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
    bounds = Bounds(cast(Any, least)) if ratio else None
    settings = {"maxiter": options.max_iterations, "ftol": 1e-9, "gtol": 2e-5, "maxcor": 30, "maxfun": math.inf}
    for strength in sorted(options.regularization_strengths, reverse=True):
        start = np.maximum(2 * point - before, least)  # extrapolated from the last two strengths
        with threadpool_limits(1, "blas"):  # scipy's and torch's threads would wait for each other: 16 times slower
            found = minimize(objective, start, (strength,), "L-BFGS-B", True, bounds=bounds, options=settings)
        before, point = point, found.x
        with torch.no_grad():
            for parameter, value in zip((linear.weight, linear.bias), parts(point), strict=True):
                parameter.copy_(value if basis is None else basis @ value)
        # A pass multiplies every row twice: with the vectors, and for their gradient
        flops = 2 * 2 * n_vectors * width * len(x.label) * found.nfev
        yield _Step(f"{strength:g}", strength, head, flops, is_converged=found.status != 1)  # 1: at the limit


def _weighted_nll(
    x: _Rows, vectors: torch.Tensor, bias: torch.Tensor, basis: torch.Tensor | None
) -> tuple[float, np.ndarray, np.ndarray]:
    """Weighted NLL of the head with the weights B `vectors` (k, d) and the biases B `bias` (k,), and both gradients.

    All in float64 except for the products with the rows.
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


def _fit_minibatches(head: nn.Sequential, x: _Rows, options: HeadOptions) -> Iterator[_Step]:
    """A copy of `head` for each strength, trained from the same start with random numbers of its own."""
    from pipeline.network.flops import flops_per_image  # torch's counter takes half a second to import

    ratio, w, n_rows, seed = _l1_ratio(options), x.weight.float(), len(x.label), torch.initial_seed()
    flops = n_rows * flops_per_image(head, x.take(torch.tensor([0])), is_training=True)
    for strength in options.regularization_strengths:
        torch.manual_seed(int(digest([seed, float(strength)])[:15], 16))
        candidate = copy.deepcopy(head)
        matrices = [layer.weight for layer in candidate.modules() if isinstance(layer, (nn.Linear, _ConvNd))]
        optimizer = torch.optim.Adam(candidate.parameters(), options.learning_rate)
        for epoch in range(1, options.epochs + 1):
            candidate.train()
            for rows in torch.randperm(n_rows).to(w.device).split(options.batch_size):
                losses = F.cross_entropy(candidate(x.take(rows)), x.label[rows], reduction="none")
                squares = torch.stack([matrix.square().sum() for matrix in matrices]).sum()
                loss = w[rows] @ losses * n_rows / len(rows) + strength * (1 - ratio) / 2 * squares
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if ratio:
                    for matrix in matrices:  # the threshold is scaled as Adam's step is, or it would have no effect
                        state = optimizer.state[matrix]
                        unbiased = state["exp_avg_sq"] / (1 - optimizer.defaults["betas"][1] ** state["step"].item())
                        threshold = options.learning_rate * strength * ratio / (unbiased.sqrt() + 1e-8)
                        matrix.data = matrix.data.sign() * (matrix.data.abs() - threshold).clamp_min(0)
            yield _Step(f"{strength:g}, epoch {epoch}", strength, candidate, flops)
