"""checkpoints: a run that is interrupted goes on after its last epoch, with the bytes of one that is not."""

import copy
import hashlib
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from pipeline.fine_tuning import checkpoints, fit
from pipeline.fine_tuning.fit import Batch, Task
from pipeline.network.device import place
from tests import factories

N_IMAGES, EPOCHS = 20, 5
INPUTS = torch.randn(N_IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABEL = np.arange(N_IMAGES) % 2
PATH = Path("data/.checkpoints/0a1b")
RECIPES = {
    "adamw": {"optimizer": "adamw", "batchnorm": "train"},
    "sgd": {"optimizer": "sgd", "batchnorm": "frozen", "momentum": 0.9},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0},
    "the first epoch is the best": {"optimizer": "sgd", "learning_rate_base": 0.5, "learning_rate_head": 0.5},
    "mixup and a moving average": {"mixup": 0.4, "ema": 0.9, "batchnorm": "train"},
    "the first epoch is the best, on average": {"ema": 0.5, "optimizer": "sgd", "learning_rate_base": 0.5},
    "patience": {"optimizer": "sgd", "learning_rate_base": 0.5, "learning_rate_head": 0.5, "patience": 2},
}


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_network() -> nn.Sequential:
    """A prefix, a suffix with BatchNorm and dropout, and a head; filters are channels-last."""
    torch.manual_seed(1)
    prefix = nn.Conv2d(3, 4, 3)
    suffix = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten())
    network = nn.Sequential(prefix, suffix, nn.Linear(6 * 16, 2))
    place(network, torch.device("cpu"))
    return network


def recipe(**changes: Any) -> Any:
    rates = {"learning_rate_base": 0.01, "learning_rate_head": 0.01}
    return factories.strategy(**rates | {"epochs": EPOCHS, "batch_size": 4, "patience": None} | changes)


def train(strategy: Any, n_batches: int | None = None, path: Path | None = PATH) -> tuple[Any, ...]:
    """The whole result, as bytes and values; KeyboardInterrupt after `n_batches` batches (of evaluation, too)."""
    network, n_loaded = make_network(), 0

    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        nonlocal n_loaded
        for batch in batches:
            n_loaded += 1
            if n_batches is not None and n_loaded > n_batches:
                raise KeyboardInterrupt
            yield INPUTS[[row for row, _ in batch]]

    task = Task(load, LABEL, np.ones(N_IMAGES), np.arange(13), np.arange(13, 20), [0], [0], "torch", 8)
    best, curve, candidates = fit.train(network, task, strategy, 0, "run", path)
    arrays = [getattr(candidates, name).tobytes() for name in checkpoints.ARRAYS]
    return best, curve, candidates.names, arrays, save(contiguous(network.state_dict())), n_loaded


def contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.contiguous() for name, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_run_that_is_interrupted_anywhere_ends_with_the_same_bytes(changes: dict[str, Any]) -> None:
    *expected, n_batches = train(recipe(**changes), path=None)
    assert not PATH.exists()
    assert len(expected[1]) == (3 if "patience" in changes else EPOCHS + 1)
    for stop in range(1, n_batches, 2):
        with pytest.raises(KeyboardInterrupt):
            train(recipe(**changes), stop)
        *found, n_more = train(recipe(**changes))
        assert found == expected
        assert n_more <= n_batches - stop + 4, "only the epoch that was not finished is repeated"
        *again, n_none = train(recipe(**changes))  # killed after the last epoch, before the run was saved
        assert (again, n_none) == (expected, 0)
        checkpoints.remove(PATH)


def test_run_that_is_interrupted_again_and_again_comes_to_its_end() -> None:
    *expected, _ = train(recipe(), path=None)
    for _ in range(EPOCHS - 1):
        with pytest.raises(KeyboardInterrupt):
            train(recipe(), 6)  # an epoch and its evaluation are five batches
    *found, _ = train(recipe(), 6)
    assert found == expected


def of_another_run(path: Path) -> None:
    train(recipe(epochs=1), path=path.with_name("ffff"))
    path.with_name("ffff").rename(path)


def with_digest(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}\n".encode() + content


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a bit": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\x55" + path.read_bytes()[-8:]),
    "text": lambda path: path.write_text("epoch 3"),
    "a pickle": lambda path: path.write_bytes(with_digest(pickle.dumps({"values": 1}))),
    "other tensors": lambda path: path.write_bytes(with_digest(save({"values": torch.zeros(3)}))),
    "no tensors": lambda path: path.write_bytes(with_digest(save({"values": torch.tensor([123, 125]).byte()}))),
    "another run": of_another_run,
    "a link": lambda path: (path.rename("elsewhere"), path.symlink_to(Path("elsewhere").resolve())),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_or_of_another_run_is_ignored_with_a_line(
    damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    *expected, n_batches = train(recipe(), path=None)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), n_batches - 2)
    damage(PATH)
    with caplog.at_level(logging.WARNING):
        *found, n_again = train(recipe())
    assert (found, n_again) == (expected, n_batches)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(f"{PATH}: not a checkpoint of this run (")
    assert "\n" not in line


def test_disk_that_is_full_costs_the_checkpoint_and_not_the_run(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    *expected, _ = train(recipe(), path=None)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        *found, _ = train(recipe())
    assert found == expected
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == EPOCHS + 1
    assert "No space left on device" in warnings[0]
    assert not [*PATH.parent.iterdir()]


def test_path_depends_on_the_network_the_inputs_and_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network()
    path = checkpoints.locate(network, {"seed": 0})
    assert path == checkpoints.locate(copy.deepcopy(network), {"seed": 0})
    assert path.parent == Path("data/.checkpoints")
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[2].bias[0] += 1e-6  # pyright: ignore[reportArgumentType, reportIndexIssue]
    assert len({path, checkpoints.locate(other, {"seed": 0}), checkpoints.locate(network, {"seed": 1})}) == 3
    monkeypatch.setattr(checkpoints, "digest_of_code", lambda **_: "other code")
    assert checkpoints.locate(network, {"seed": 0}) != path


def test_checkpoint_and_what_a_killed_process_left_of_it_are_removed_and_no_other() -> None:
    train(recipe(epochs=1))
    left_over, other = PATH.with_name(f".{PATH.name}.c0ffee.tmp"), PATH.with_name("0a1b2c")
    left_over.touch()
    other.touch()
    checkpoints.remove(PATH)
    assert [*PATH.parent.iterdir()] == [other]
    checkpoints.remove(PATH)
