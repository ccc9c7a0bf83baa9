"""The one fit loop for networks: what is trainable, on batches from images or from cached activations.

A network is Sequential(frozen, body, head). `frozen` turns what is loaded (uint8 images, or cached
activations, for which it is the identity) into the input of `body`, the trainable part of the
backbone; `head` is the dense head.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline import engine
from pipeline.heads import mean_log_probability
from pipeline.logs import progress
from pipeline.params import Strategy

log = logging.getLogger("pipeline")
EVALUATION_BATCH = 8

Batch = Sequence[tuple[int, int]]  # (row of the image, view)
Load = Callable[[Sequence[Batch]], Iterator[torch.Tensor]]  # the network's inputs, a tensor a batch


@dataclass(frozen=True)
class Task:
    """What is learnt: inputs by row and view, label (n,) int64, weight (n,), and the rows' parts."""

    load: Load
    label: np.ndarray
    weight: np.ndarray
    train: np.ndarray
    val: np.ndarray
    evaluation_views: int
    evaluation_engine: str


@dataclass(frozen=True)
class Epoch:
    """One line of the learning curve; epoch 0 is the network before the first step."""

    epoch: int
    train_loss: float | None
    train_accuracy: float | None
    val_loss: float
    val_accuracy: float


@dataclass(frozen=True)
class History:
    """The learning curve, and the epoch whose weights the network was left with."""

    epochs: list[Epoch]
    best_epoch: int


def fit(network: nn.Sequential, task: Task, strategy: Strategy, seed: int, device: torch.device, name: str) -> History:
    """Train in place and restore the epoch of the lowest weighted validation NLL.

    Raises ValueError, naming the run `name`, when the loss is not finite.
    """
    torch.set_num_threads(strategy.threads)
    torch.manual_seed(seed)
    network.to(device, memory_format=torch.channels_last)
    frozen, body, head = network
    frozen.requires_grad_(False)
    body.requires_grad_(True)
    head.requires_grad_(True)
    optimizer = _optimizer(body, head, strategy)
    order = np.random.default_rng(seed)
    steps = math.ceil(len(task.train) / strategy.batch_size)
    rates = [group["lr"] for group in optimizer.param_groups]

    epochs = [Epoch(0, None, None, *_validate(network, task, strategy, device))]
    best_epoch, best = 0, _snapshot(network)
    _report(name, epochs[0])
    for number in range(1, strategy.epochs + 1):
        view = (number - 1) % strategy.views + 1 if strategy.views else 0
        rows = order.permutation(task.train)
        batches = [
            [(int(row), view) for row in rows[start : start + strategy.batch_size]]
            for start in range(0, len(rows), strategy.batch_size)
        ]
        set_training_mode(network, strategy)
        losses, hits = 0.0, 0.0
        described = progress(task.load(batches), steps, "batches", f"{name} {number}/{strategy.epochs}")
        for step, (batch, inputs) in enumerate(zip(batches, described, strict=True)):
            done = (number - 1) * steps + step
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _schedule(done, steps, strategy)
            loss, hit = _step(network, inputs, batch, task, strategy, optimizer, device)
            if not math.isfinite(loss):
                raise ValueError(
                    f"{name}: the loss is {loss} at step {done + 1} (epoch {number}); lower "
                    "learning_rate_base and learning_rate_head, or raise warmup_epochs"
                )
            losses, hits = losses + loss, hits + hit
        total = task.weight[task.train].sum()
        validated = _validate(network, task, strategy, device)
        epochs.append(Epoch(number, losses / total, hits / total, *validated))
        _report(name, epochs[-1])
        if epochs[-1].val_loss < epochs[best_epoch].val_loss:
            best_epoch, best = number, _snapshot(network)
        elif number - best_epoch >= strategy.patience:
            break
    network.load_state_dict(best)
    network.eval()
    return History(epochs, best_epoch)


def set_training_mode(network: nn.Sequential, strategy: Strategy) -> None:
    """Training mode for all but the frozen part, whose BatchNorm statistics would move otherwise.

    `batchnorm: frozen` keeps the body's statistics too; its affine parameters learn with the rest.
    """
    frozen, body, _ = network
    network.train()
    frozen.eval()
    if strategy.batchnorm == "frozen":
        for module in body.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def predict(network: nn.Module, task: Task, rows: np.ndarray, precision: str, device: torch.device) -> np.ndarray:
    """Log of the probability averaged over the evaluation views of `rows`: (len(rows), n_classes)."""
    pairs = [(int(row), view) for row in rows for view in range(task.evaluation_views)]
    batches = [pairs[start : start + EVALUATION_BATCH] for start in range(0, len(pairs), EVALUATION_BATCH)]
    inputs = task.load(batches)
    outputs = engine.run(network, inputs, task.evaluation_engine, precision, device)
    logits = torch.from_numpy(np.concatenate(list(outputs)))
    return mean_log_probability(logits.unflatten(0, (len(rows), task.evaluation_views))).numpy()


def _validate(network: nn.Module, task: Task, strategy: Strategy, device: torch.device) -> tuple[float, float]:
    """Weighted NLL and accuracy on validation, over the evaluation views."""
    log_probability = predict(network, task, task.val, strategy.precision, device)
    label, weight = task.label[task.val], task.weight[task.val]
    nll = np.average(-log_probability[np.arange(len(label)), label].astype(float), weights=weight)
    return float(nll), float(np.average(log_probability.argmax(1) == label, weights=weight))


def _optimizer(body: nn.Module, head: nn.Module, strategy: Strategy) -> torch.optim.Optimizer:
    """Separate rates for body and head; decay on matrices and filters only."""
    groups = []
    for module, rate in ((body, strategy.learning_rate_base), (head, strategy.learning_rate_head)):
        matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
        groups += [
            {"params": matrices, "lr": rate, "weight_decay": strategy.weight_decay},
            {"params": others, "lr": rate, "weight_decay": 0.0},
        ]
    if strategy.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=strategy.momentum)
    return torch.optim.AdamW(groups)


def _schedule(done: int, steps: int, strategy: Strategy) -> float:
    """Factor of the learning rates: linear warm-up, then half a cosine to zero."""
    warmup, total = strategy.warmup_epochs * steps, strategy.epochs * steps
    if done < warmup:
        return (done + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))


def _step(
    network: nn.Module,
    inputs: torch.Tensor,
    batch: Batch,
    task: Task,
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> tuple[float, float]:
    """One step; the batch's summed weighted loss and hits (both to be divided by all weights)."""
    rows = [row for row, _ in batch]
    label = torch.from_numpy(task.label[rows]).to(device)
    weight = torch.from_numpy(task.weight[rows]).to(device, torch.float32)
    with engine.autocast(strategy.precision, device):
        logits = network(inputs.to(device, non_blocking=True)).float()
    losses = F.cross_entropy(logits, label, reduction="none", label_smoothing=strategy.label_smoothing)
    optimizer.zero_grad()
    # Divided by the mean weight of all training images: an image counts by its weight, whichever
    # batch it falls into
    (losses * weight).mean().div(float(task.weight[task.train].mean())).backward()
    optimizer.step()
    hits = (logits.argmax(1) == label) * weight
    return float((losses * weight).sum()), float(hits.sum())


def _snapshot(network: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy({name: value.cpu() for name, value in network.state_dict().items()})


def _report(name: str, epoch: Epoch) -> None:
    trained = (
        f"train loss {epoch.train_loss:.4f} accuracy {epoch.train_accuracy:.4f}, "
        if epoch.train_loss is not None and epoch.train_accuracy is not None
        else ""
    )
    log.info(
        "%s epoch %d: %sval loss %.4f accuracy %.4f", name, epoch.epoch, trained, epoch.val_loss, epoch.val_accuracy
    )
