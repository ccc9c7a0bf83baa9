"""The one training loop for networks, on batches of images or of cached activations.

A network is Sequential(prefix, suffix, head). The frozen prefix maps what is loaded (uint8 images, or cached
activations, for which it is the identity) to the input of the suffix, the trained part of the backbone. What the prefix
gives is where mixup mixes images (Zhang et al. 2018, "mixup: beyond empirical risk minimization"; Verma et al. 2019,
"Manifold mixup", at a later boundary).
"""

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.features import engine
from pipeline.fine_tuning import checkpoints
from pipeline.fine_tuning.checkpoints import Training
from pipeline.fine_tuning.resident import Batch, Load, Resident
from pipeline.logs import progress
from pipeline.network.device import arithmetic, autocast, upload
from pipeline.params import Strategy
from pipeline.training.heads import loss_weight, mean_log_probability
from pipeline.training.runs import Candidates, join_candidates, make_candidates

if TYPE_CHECKING:
    from timm.utils.model_ema import ModelEmaV3

CHECKED = 100  # steps after which a GPU's loss is looked at, besides the end of an epoch
log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class Task:
    """The images: how to load their inputs, label (n,) int64, weight (n,), and the rows of training and validation.

    Epochs cycle through `train_views`. Predictions are averaged over `evaluation_views`, and run in the engine
    `evaluation_engine` in batches of `evaluation_batch`.
    """

    load: Load
    label: np.ndarray
    weight: np.ndarray
    train: np.ndarray
    val: np.ndarray
    train_views: Sequence[int]
    evaluation_views: Sequence[int]
    evaluation_engine: str
    evaluation_batch: int


def train(
    network: nn.Sequential, task: Task, strategy: Strategy, seed: int, name: str, checkpoint: Path | None = None
) -> tuple[int, list[dict[str, Any]], Candidates]:
    """Train in place, on the device of `network`, and restore the epoch of the lowest validation NLL.

    Returns that epoch, the learning curve, and the candidates, which are the epochs; epoch 0 is the network before
    training. With a moving average of the weights (`ema`), the average is what is validated and restored. With one
    number of threads the result has the same bytes on one kind of device, also if it goes on from `checkpoint`, which
    is written after every epoch. Raises NotFiniteError, naming the run `name`, when a loss is not finite, and
    ValueError before training if BatchNorm cannot be trained on a batch.
    """
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    network.requires_grad_(True)
    network[0].requires_grad_(False)
    _check_batches(network, task, strategy, name)
    n_steps = len(_batches([(0, 0)] * len(task.train), strategy.batch_size))
    optimizer = _optimizer(network, strategy)
    device, resident = _device(network), None
    if device.type == "cuda":
        n_pairs = len(task.train) * len({*task.train_views}) + len(task.val) * len(task.evaluation_views)
        resident = Resident(task.load, n_pairs, device)
        task = replace(task, load=resident.load)
    targets = _targets(task, strategy, device)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / n_steps, strategy))

    trained = network[1:]
    average = _average(trained, strategy)
    judged = network if average is None else nn.Sequential(network[0], *average.module)
    state = Training(network, optimizer, schedule, order, average, best_epoch=0, best={}, curve=[], candidates=[])
    if checkpoint is not None and checkpoints.restore(checkpoint, state):
        log.info("%s goes on after epoch %d, from %s", name, len(state.curve) - 1, checkpoint)
    start, n_bytes, writing_seconds = time.perf_counter(), 0, 0.0
    for epoch in range(len(state.curve), strategy.epochs + 1):
        if strategy.patience is not None and epoch - 1 - state.best_epoch >= strategy.patience:
            break
        train_loss, train_accuracy, rate = None, None, ""
        if epoch:
            view = task.train_views[(epoch - 1) % len(task.train_views)]
            rows = order.permutation(task.train)
            batches = _batches([(int(row), view) for row in rows], strategy.batch_size)
            shuffled = targets.take(upload(torch.from_numpy(rows), device)).split([*map(len, batches)])
            set_training_mode(network, strategy)
            total, begin = torch.zeros(2, dtype=torch.float64, device=device), time.perf_counter()
            inputs = progress(task.load(batches), n_steps, "batches", f"{name} {epoch}/{strategy.epochs}")
            for step, (target, loaded) in enumerate(zip(shuffled, inputs, strict=True)):
                total += _step(network, loaded, _mix(target, strategy, order), strategy, optimizer)
                schedule.step()
                if average is not None:
                    average.update(trained, step=schedule.last_epoch)
                if resident is not None:
                    resident.open()
                if device.type == "cpu" or step % CHECKED == 0:  # to look at a GPU's numbers is to wait for it
                    _check_finite(name, epoch, "training", total[0].item())
            loss, n_right = total.tolist()
            _check_finite(name, epoch, "training", loss)
            rate = f", {len(rows) / (time.perf_counter() - begin):.0f} images/s"
            n_all = task.weight[task.train].sum()
            train_loss, train_accuracy = float(loss / n_all), float(n_right / n_all)
        log_probability = predict(judged, task, task.val, strategy.precision)
        candidate = make_candidates({f"epoch {epoch}": log_probability}, task.label[task.val])
        line = {"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy}
        line |= _validate(candidate, task)
        _check_finite(name, epoch, "validation", line["val_loss"])
        values = ", ".join(f"{key} {value:.4f}" for key, value in line.items() if isinstance(value, float))
        log.info("%s epoch %d: %s%s", name, epoch, values, rate)
        if epoch == 0 or line["val_loss"] < state.curve[state.best_epoch]["val_loss"]:
            state.best_epoch, state.best = epoch, copy.deepcopy(judged.state_dict())
        state.curve.append(line)
        state.candidates.append(candidate)
        if checkpoint is not None:
            writing = time.perf_counter()
            n_bytes = checkpoints.write(checkpoint, state)
            writing_seconds += time.perf_counter() - writing
    if n_bytes:
        share = writing_seconds / (time.perf_counter() - start)
        spent = f"{n_bytes / 1e6:.1f} MB took {writing_seconds:.1f} s, {share:.1%} of the time"
        log.info("%s: checkpoints of %s", name, spent)
    network.load_state_dict(state.best)
    network.eval()
    return state.best_epoch, state.curve, join_candidates(state.candidates)


def _batches(pairs: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Batches of `size`; a single image that is left joins the batch before it: BatchNorm needs more than one."""
    batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def _check_batches(network: nn.Sequential, task: Task, strategy: Strategy, name: str) -> None:
    """ValueError if a batch of one image gives one value per channel to a BatchNorm layer in training mode.

    The shapes are seen in evaluation mode, which changes no statistics and draws no random numbers.
    """
    set_training_mode(network, strategy)
    layers = [(path, one) for path, one in network.named_modules() if isinstance(one, _BatchNorm) and one.training]
    network.eval()
    if not layers or min(map(len, _batches([(0, 0)] * len(task.train), strategy.batch_size))) > 1:
        return
    shapes: dict[str, torch.Size] = {}

    def note(path: str, _: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        shapes[path] = given[0].shape

    hooks = [layer.register_forward_pre_hook(partial(note, path)) for path, layer in layers]
    (inputs,) = task.load([[(int(task.train[0]), task.train_views[0])]])
    with torch.inference_mode():
        network(upload(inputs, _device(network)))
    for hook in hooks:
        hook.remove()
    for path, shape in shapes.items():
        if shape.numel() == shape[1]:
            where = f"batch_size {strategy.batch_size}, {len(task.train)} training images"
            raise ValueError(
                f"{name}: `batchnorm: train` with a batch of one image ({where}): layer {path} gets {tuple(shape)}, "
                "one value per channel, which has no variance; expected 2 or more of both, or `batchnorm: frozen`"
            )


def set_training_mode(network: nn.Sequential, strategy: Strategy) -> None:
    """Training mode for all but the prefix, whose BatchNorm statistics would change otherwise.

    `batchnorm: frozen` keeps the statistics of the suffix too; its affine parameters are trained with the rest.
    """
    prefix, suffix, _ = network
    network.train()
    prefix.eval()
    if strategy.batchnorm == "frozen":
        for module in suffix.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def predict(network: nn.Module, task: Task, rows: np.ndarray, precision: str) -> np.ndarray:
    """Log of the mean probability over the evaluation views of `rows`: (len(rows), n_classes) float32."""
    logits = run(network, task, rows, task.evaluation_views, task.evaluation_engine, precision, _device(network))
    return mean_log_probability(torch.from_numpy(logits)).numpy()


def run(
    module: nn.Module,
    task: Task,
    rows: np.ndarray,
    views: Sequence[int],
    name: str,
    precision: str,
    device: torch.device,
) -> np.ndarray:
    """What `module` gives for each view of `rows`, in the engine `name`: (len(rows), len(views), …) float32."""
    pairs: Batch = [(int(row), view) for row in rows for view in views]
    size = engine.piece_size(task.evaluation_batch, device)
    pieces = task.load([pairs[i : i + size] for i in range(0, len(pairs), size)])
    outputs = np.concatenate([*engine.run(module, pieces, name, precision, device, task.evaluation_batch)])
    return outputs.reshape(len(rows), len(views), *outputs.shape[1:])


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _validate(candidate: Candidates, task: Task) -> dict[str, float]:
    """NLL and accuracy, weighted by image as the metrics are."""
    is_right, weight = candidate.predicted[0] == task.label[task.val], task.weight[task.val]
    return {"val_loss": candidate.nll(weight)[0], "val_accuracy": float(np.average(is_right, weights=weight))}


def _optimizer(network: nn.Sequential, strategy: Strategy) -> torch.optim.Optimizer:
    """Separate learning rates for suffix and head; weight decay on matrices and filters only."""
    _, suffix, head = network
    groups = []
    for module, rate in ((suffix, strategy.learning_rate_base), (head, strategy.learning_rate_head)):
        matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
        groups.append({"params": matrices, "lr": rate, "weight_decay": strategy.weight_decay})
        groups.append({"params": others, "lr": rate, "weight_decay": 0.0})
    fused = True if _device(network).type == "cuda" else None  # one kernel for all parameters
    if strategy.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=strategy.momentum, fused=fused)
    return torch.optim.AdamW(groups, fused=fused)


def _average(trained: nn.Sequential, strategy: Strategy) -> "ModelEmaV3 | None":
    """The moving average of suffix and head, whose decay grows to that of the strategy; None if it has none."""
    if not strategy.ema:
        return None
    from timm.utils.model_ema import ModelEmaV3

    return ModelEmaV3(trained, strategy.ema, use_warmup=True, warmup_power=strategy.ema_warm_up)


def _rate(epoch: float, strategy: Strategy) -> float:
    """Factor of the learning rates after `epoch` epochs: linear warm-up, then half a cosine to zero."""
    if epoch < strategy.warmup_epochs:
        return (epoch + 0.01) / (strategy.warmup_epochs + 0.01)
    left = max(strategy.epochs - strategy.warmup_epochs, 1)
    return 0.5 * (1 + math.cos(math.pi * (epoch - strategy.warmup_epochs) / left))


@dataclass(frozen=True)
class _Targets:
    """Of images: label (n,) int64, weight and weight in the loss (n,) float32; and the mean weight in training."""

    label: torch.Tensor
    weight: torch.Tensor
    in_loss: torch.Tensor
    mean_weight: float

    def take(self, rows: torch.Tensor) -> Self:
        """Those of `rows`."""
        return replace(self, label=self.label[rows], weight=self.weight[rows], in_loss=self.in_loss[rows])

    def split(self, lengths: list[int]) -> Iterator[Self]:
        """Successive parts of these lengths."""
        parts = (values.split(lengths) for values in (self.label, self.weight, self.in_loss))
        for label, weight, in_loss in zip(*parts, strict=True):
            yield replace(self, label=label, weight=weight, in_loss=in_loss)


def _targets(task: Task, strategy: Strategy, device: torch.device) -> _Targets:
    """Those of all images, on the device."""
    in_loss, train = task.weight.copy(), task.train
    in_loss[train] = loss_weight(task.label[train], task.weight[train], strategy.class_weights)
    label, mean_weight = torch.tensor(task.label, device=device), float(task.weight[train].mean())
    weight, in_loss = (torch.tensor(each, dtype=torch.float32, device=device) for each in (task.weight, in_loss))
    return _Targets(label, weight, in_loss, mean_weight)


@dataclass(frozen=True)
class _Mixed:
    """A batch that is mixed with itself: images `order` (n,) take the share 1 - `share` beside `target`."""

    target: _Targets
    share: float
    order: torch.Tensor | None

    @property
    def parts(self) -> list[tuple[_Targets, float]]:
        """The targets, and the share that each has in the loss."""
        alone = [(self.target, self.share)]
        return alone if self.order is None else [*alone, (self.target.take(self.order), 1 - self.share)]

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """The inputs (n, …), mixed."""
        return x if self.order is None else self.share * x + (1 - self.share) * x[self.order]


def _mix(target: _Targets, strategy: Strategy, random: np.random.Generator) -> _Mixed:
    """How to mix a batch; nothing is drawn without mixup."""
    if not strategy.mixup:
        return _Mixed(target, 1.0, None)
    order = torch.from_numpy(random.permutation(len(target.label)))
    return _Mixed(target, float(random.beta(strategy.mixup, strategy.mixup)), upload(order, target.label.device))


def _step(
    network: nn.Sequential, inputs: torch.Tensor, mixed: _Mixed, strategy: Strategy, optimizer: torch.optim.Optimizer
) -> torch.Tensor:
    """One step. Returns the sums of the losses, weighted in the loss, and of the hits, weighted by image.

    They are float64 (2,) on the device: to fetch them in every step would be to wait for it. The loss of the batch is
    divided by the mean weight of all training images, not of the batch, so that the weight of an image does not depend
    on the batch it is in. Of mixed images, losses and hits are those of both labels, by their shares.
    """
    device = mixed.target.label.device
    with arithmetic(strategy.precision, device):
        with autocast(strategy.precision, device):
            prefix, suffix, head = network
            logits = head(suffix(mixed.mix(prefix(upload(inputs, device))))).float()
        smoothing, parts = strategy.label_smoothing, mixed.parts
        each = [F.cross_entropy(logits, one.label, reduction="none", label_smoothing=smoothing) for one, _ in parts]
        losses = torch.stack([share * (one.in_loss * loss) for (one, share), loss in zip(parts, each, strict=True)])
        losses = losses.sum(0)
        optimizer.zero_grad()
        (losses.mean() / mixed.target.mean_weight).backward()
    if strategy.gradient_clipping is not None:
        nn.utils.clip_grad_norm_(network.parameters(), strategy.gradient_clipping)
    optimizer.step()
    predicted = logits.argmax(1)
    n_right = torch.stack([share * (one.weight * (predicted == one.label)).sum() for one, share in parts]).sum()
    return torch.stack([losses.detach().sum(), n_right]).double()


class NotFiniteError(ValueError):
    """A loss is not finite in an epoch: the learning rate is too high."""

    def __init__(self, epoch: int, message: str) -> None:
        super().__init__(message)
        self.epoch = epoch


def _check_finite(name: str, epoch: int, split: str, loss: float) -> None:
    if not math.isfinite(loss):
        raise NotFiniteError(
            epoch,
            f"{name}: the {split} loss is {loss} in epoch {epoch}; lower its learning rates, or raise warmup_epochs",
        )
