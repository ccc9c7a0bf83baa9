"""The one fit loop for networks, on batches of images or of cached activations.

A network is Sequential(frozen, body, head). `frozen` turns what is loaded (uint8 images, or cached activations, for
which it is the identity) into the input of `body`, the trainable part of the backbone; `head` is the dense head.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.logs import progress
from pipeline.network import engine
from pipeline.network.device import BATCH, autocast, place
from pipeline.params import Strategy
from pipeline.training.heads import loss_weight, mean_log_probability

log = logging.getLogger("pipeline")

Batch = Sequence[tuple[int, int]]  # (row of the image, view)
Load = Callable[[Sequence[Batch]], Iterator[torch.Tensor]]  # batches -> the network's inputs, one tensor each


@dataclass(frozen=True)
class Task:
    """What is learnt: inputs by row and view, label (n,) int64, weight (n,), the rows to train and to choose on."""

    load: Load
    label: np.ndarray
    weight: np.ndarray
    train: np.ndarray
    val: np.ndarray
    evaluation_views: int
    evaluation_engine: str


def train(
    network: nn.Sequential, task: Task, strategy: Strategy, seed: int, threads: int, device: torch.device, name: str
) -> tuple[int, list[dict[str, Any]]]:
    """Train in place and restore the epoch of the lowest validation NLL, weighted as the metrics are: by image.

    Returns that epoch and the learning curve; epoch 0 is the network as it was. Epochs cycle through the views 1 to
    strategy.views. Raises ValueError, naming the run `name`, when the loss is not finite.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    place(network, device)
    network.requires_grad_(True)
    network[0].requires_grad_(False)
    n_steps = len(_batches([(0, 0)] * len(task.train), strategy.batch_size))
    optimizer = _optimizer(network, strategy)
    counted = task.weight.copy()
    counted[task.train] = loss_weight(task.label[task.train], task.weight[task.train], strategy.class_weights)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / n_steps, strategy))

    curve = [{"epoch": 0, "train_loss": None, "train_accuracy": None, **_validate(network, task, strategy, device)}]
    _check_finite(name, 0, "validation", curve[0]["val_loss"])
    best_epoch, best = 0, copy.deepcopy(network.state_dict())
    _report(name, curve[0])
    for epoch in range(1, strategy.epochs + 1):
        view = (epoch - 1) % strategy.views + 1 if strategy.views else 0
        pairs = [(int(row), view) for row in order.permutation(task.train)]
        batches = _batches(pairs, strategy.batch_size)
        set_training_mode(network, strategy)
        total = np.zeros(2)
        inputs = progress(task.load(batches), n_steps, "batches", f"{name} {epoch}/{strategy.epochs}")
        for batch, tensor in zip(batches, inputs, strict=True):
            total += _step(network, tensor, batch, task, counted, strategy, optimizer, device)
            schedule.step()
            _check_finite(name, epoch, "training", total[0])
        loss, accuracy = (total / task.weight[task.train].sum()).tolist()
        validated = _validate(network, task, strategy, device)
        _check_finite(name, epoch, "validation", validated["val_loss"])
        curve.append({"epoch": epoch, "train_loss": loss, "train_accuracy": accuracy, **validated})
        _report(name, curve[-1])
        if curve[-1]["val_loss"] < curve[best_epoch]["val_loss"]:
            best_epoch, best = epoch, copy.deepcopy(network.state_dict())
        elif epoch - best_epoch >= strategy.patience:
            break
    network.load_state_dict(best)
    network.eval()
    return best_epoch, curve


def _batches(pairs: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Batches of `size`; one image left over joins the batch before it, for it has no statistics of its own."""
    batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


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
    """Log of the mean probability over the evaluation views of `rows`: (len(rows), n_classes) float32."""
    pairs = [(int(row), view) for row in rows for view in range(task.evaluation_views)]
    size = BATCH[device.type]
    batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    outputs = engine.run(network, task.load(batches), task.evaluation_engine, precision, device)
    logits = torch.from_numpy(np.concatenate(list(outputs)))
    return mean_log_probability(logits.unflatten(0, (len(rows), task.evaluation_views))).numpy()


def _validate(network: nn.Module, task: Task, strategy: Strategy, device: torch.device) -> dict[str, float]:
    log_probability = predict(network, task, task.val, strategy.precision, device).astype(np.float64)
    label, weight = task.label[task.val], task.weight[task.val]
    nll = -log_probability[np.arange(len(label)), label]
    is_right = log_probability.argmax(1) == label
    averages = {"val_loss": nll, "val_accuracy": is_right}
    return {name: float(np.average(values, weights=weight)) for name, values in averages.items()}


def _optimizer(network: nn.Sequential, strategy: Strategy) -> torch.optim.Optimizer:
    """Separate rates for body and head; decay on matrices and filters only."""
    _, body, head = network
    groups = []
    for module, rate in ((body, strategy.learning_rate_base), (head, strategy.learning_rate_head)):
        matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
        groups.append({"params": matrices, "lr": rate, "weight_decay": strategy.weight_decay})
        groups.append({"params": others, "lr": rate, "weight_decay": 0.0})
    if strategy.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=strategy.momentum)
    return torch.optim.AdamW(groups)


def _rate(epoch: float, strategy: Strategy) -> float:
    """Factor of the learning rates after so many epochs: linear warm-up, then half a cosine to zero."""
    if epoch < strategy.warmup_epochs:
        return (epoch + 0.01) / (strategy.warmup_epochs + 0.01)
    left = max(strategy.epochs - strategy.warmup_epochs, 1)
    return 0.5 * (1 + math.cos(math.pi * (epoch - strategy.warmup_epochs) / left))


def _step(
    network: nn.Module,
    inputs: torch.Tensor,
    batch: Batch,
    task: Task,
    counted: np.ndarray,
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> tuple[float, float]:
    """One step; returns the sums of the losses, weighted by `counted`, and of the hits, weighted by image.

    The batch's loss is divided by the mean weight of all training images, not of the batch: an image counts by its
    weight, whichever batch it falls into.
    """
    rows = [row for row, _ in batch]
    label = torch.from_numpy(task.label[rows]).to(device)
    weight = torch.from_numpy(task.weight[rows]).to(device, torch.float32)
    with autocast(strategy.precision, device):
        logits = network(inputs.to(device, non_blocking=True)).float()
    in_loss = torch.from_numpy(counted[rows]).to(device, torch.float32)
    losses = in_loss * F.cross_entropy(logits, label, reduction="none", label_smoothing=strategy.label_smoothing)
    optimizer.zero_grad()
    (losses.mean() / task.weight[task.train].mean()).backward()
    optimizer.step()
    return losses.sum().item(), (weight * (logits.argmax(1) == label)).sum().item()


def _check_finite(name: str, epoch: int, part: str, loss: float) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"{name}: the {part} loss is {loss} in epoch {epoch}; lower learning_rate_base and learning_rate_head, or "
            "raise warmup_epochs"
        )


def _report(name: str, line: dict[str, Any]) -> None:
    values = ", ".join(f"{key} {value:.4f}" for key, value in line.items() if isinstance(value, float))
    log.info("%s epoch %d: %s", name, line["epoch"], values)
