"""Checkpoints: an interrupted fine-tuning goes on after its last finished epoch, and ends with the same bytes.

data/.checkpoints/<key>     the SHA-256 (hex) of the rest and a line break, then a safetensors file; `values` is JSON

A key digests everything that can change the run, its code included, so a checkpoint fits one run only. A file is whole
or absent, and deleted when the run is saved. One that is damaged, or of another run, is ignored with a warning.
"""

import hashlib
import json
import logging
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from pipeline.features.code_digest import MODULES, digest_of_code
from pipeline.files import digest, replacing, shared
from pipeline.logs import one_line
from pipeline.network.backbones import state_sha256
from pipeline.training.runs import CHECKPOINTS, Candidates, join_candidates

STORE = ("features/hdf5.py", "features/shard_index.py", "features/store.py")
TRAINING = (*MODULES, *STORE, "training/*.py", "fine_tuning/*.py", "stages/fine_tune.py")
ARRAYS = ("predicted", "true_log_probability", "positive_log_probability")  # of candidates
log = logging.getLogger("pipeline")


@dataclass
class Training:
    """Everything that changes while a network is trained; `curve` and `candidates` have an entry per finished epoch.

    `average`, if there is one, follows the suffix and the head. `best` is the state after `best_epoch` of the network
    that is validated: of the average, where there is one.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    order: np.random.Generator
    average: nn.Module | None
    best_epoch: int
    best: dict[str, torch.Tensor]
    curve: list[dict[str, Any]]
    candidates: list[Candidates]


def locate(network: nn.Module, inputs: dict[str, Any]) -> Path:
    """The path of the checkpoint of the run that starts from `network` as it is now, with `inputs` (JSON)."""
    described = {"start": state_sha256(network), "code": digest_of_code(modules=TRAINING), **inputs}
    return shared(CHECKPOINTS) / digest(described)


def write(path: Path, training: Training) -> int:
    """Replace the checkpoint; its size in bytes. A disk without room is a warning: training can go on without it."""
    optimizer, candidates = training.optimizer.state_dict(), join_candidates(training.candidates)
    device = next(training.network.parameters()).device
    tensors = {f"network.{name}": value for name, value in training.network.state_dict().items()}
    if training.average is not None:
        tensors |= {f"average.{name}": value for name, value in training.average.state_dict().items()}
    if training.average is not None or training.best_epoch < len(training.curve) - 1:
        tensors |= {f"best.{name}": value for name, value in training.best.items()}
    for number, state in optimizer["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    tensors |= {f"candidates.{name}": torch.from_numpy(getattr(candidates, name)) for name in ARRAYS}
    tensors["random.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    values = {
        "key": path.name,
        "groups": optimizer["param_groups"],
        "schedule": training.schedule.state_dict(),
        "order": training.order.bit_generator.state,
        "best_epoch": training.best_epoch,
        "curve": training.curve,
        "names": candidates.names,
    }
    tensors["values"] = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    content = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(f"{hashlib.sha256(content).hexdigest()}\n".encode())
            file.write(content)
    except OSError as error:
        log.warning("%s: the checkpoint cannot be written (%s); training goes on without it", path, one_line(error))
    return len(content)


def restore(path: Path, training: Training) -> bool:
    """Set `training` to its last finished epoch; False, and nothing is changed, if there is no checkpoint that fits."""
    network, device = training.network, next(training.network.parameters()).device
    try:
        tensors, values = _read(path)
        saved = {name: value for name, value in tensors.items() if name.startswith("network.")}
        expected = {f"network.{name}": value.shape for name, value in network.state_dict().items()}
        if values["key"] != path.name or {name: value.shape for name, value in saved.items()} != expected:
            raise ValueError("it belongs to another run")
    except FileNotFoundError:
        return False
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        log.warning("%s: not a checkpoint of this run (%s); training starts at the beginning", path, one_line(error))
        return False

    def part(name: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}

    network.load_state_dict(part("network"))
    if training.average is not None:
        training.average.load_state_dict(part("average"))
    parameters = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in part("optimizer").items():
        number, _, name = key.partition(".")
        # In the layout of the parameter, by which the kernels are chosen; a step is a number on the CPU
        placed = value if name == "step" else torch.empty_like(parameters[int(number)]).copy_(value)
        state.setdefault(int(number), {})[name] = placed
    training.optimizer.load_state_dict({"state": state, "param_groups": values["groups"]})
    training.schedule.load_state_dict(values["schedule"])
    training.order.bit_generator.state = values["order"]
    training.best_epoch, training.curve = values["best_epoch"], values["curve"]
    training.best = part("best") or part("network")
    arrays = {name: value.numpy() for name, value in part("candidates").items()}
    training.candidates = [Candidates(values["names"], **arrays)]
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
    return True


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("it is no plain file")
    sha256, _, content = path.read_bytes().partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != sha256:
        raise ValueError("its bytes do not have the SHA-256 that it begins with")
    tensors = load(content)
    return tensors, json.loads(tensors.pop("values").numpy().tobytes())


def remove(path: Path) -> None:
    """Delete the checkpoint of a run that is saved, and what a killed process left of it."""
    for file in (path, *path.parent.glob(f".{path.name}.*.tmp")):
        with suppress(OSError):  # it costs room, no result
            file.unlink()
