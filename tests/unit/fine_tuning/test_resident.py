"""resident: what is on the device is not loaded again, whatever fits, and the values are those that were loaded."""

import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.fine_tuning import fit, resident
from pipeline.fine_tuning.fit import Task
from pipeline.fine_tuning.resident import Batch, Pair, Resident
from pipeline.network.device import choose_device, place
from tests.factories import strategy

CPU = torch.device("cpu")
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3)).astype(np.uint8))


class Files:
    """Images whose view v has v added; `loaded` grows by every pair that is asked for."""

    def __init__(self) -> None:
        self.loaded: list[Pair] = []

    def load(self, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        for batch in batches:
            self.loaded += batch
            yield torch.stack([PIXELS[row] + view for row, view in batch])


def passes(n: int, size: int = 6) -> list[list[Batch]]:
    """Batches of all images in `n` orders."""
    random = np.random.default_rng(1)
    orders = [[(int(row), 2) for row in random.permutation(20)] for _ in range(n)]
    return [[order[i : i + size] for i in range(0, 20, size)] for order in orders]


@pytest.mark.parametrize("room", [0, 1, 7, 19, 20, 100])
def test_batches_are_those_that_were_loaded_and_what_fits_is_loaded_once(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "resident_bytes", lambda *_: room * 48 + 47)
    files, plain = Files(), Files()
    kept = Resident(files.load, 20, CPU)
    kept.open()
    for n_pass, batches in enumerate(passes(3)):
        files.loaded.clear()
        found, expected = list(kept.load(batches)), list(plain.load(batches))
        assert [values.dtype for values in found] == [torch.uint8] * 4
        assert all(map(torch.equal, found, expected))
        assert len({*files.loaded}) == len(files.loaded) == (20 if n_pass == 0 else 20 - min(room, 20))


def test_nothing_is_kept_before_it_is_opened() -> None:
    files = Files()
    kept = Resident(files.load, 20, CPU)
    first, second, third = passes(3)
    list(kept.load(first))
    files.loaded.clear()
    stream = kept.load(second)
    next(stream)
    kept.open()  # after the first step
    list(stream)
    assert len(files.loaded) == 20
    files.loaded.clear()
    list(kept.load(third))
    assert sorted(files.loaded) == sorted(second[0])


def test_pairs_that_repeat_in_a_batch_take_one_place() -> None:
    files = Files()
    kept = Resident(files.load, 2, CPU)
    kept.open()
    for _ in range(2):
        (found,) = kept.load([[(3, 0), (3, 0), (4, 1), (3, 0)]])
        assert torch.equal(found, torch.stack([PIXELS[3], PIXELS[3], PIXELS[4] + 1, PIXELS[3]]))
    assert len(files.loaded) == 4


def test_pairs_that_repeat_in_a_pass_take_one_place() -> None:
    files = Files()
    kept = Resident(files.load, 2, CPU)
    kept.open()
    for _ in range(2):
        files.loaded.clear()
        list(kept.load([[(3, 0)], [(3, 0), (4, 1)]]))
    assert files.loaded == []


def test_views_of_a_row_are_different_inputs() -> None:
    kept = Resident(Files().load, 40, CPU)
    kept.open()
    for _ in range(2):
        (found,) = kept.load([[(3, 0), (3, 1)]])
        assert torch.equal(found, torch.stack([PIXELS[3], PIXELS[3] + 1]))


class Scale(nn.Module):
    """uint8 (n, 4, 4, 3) to float32 (n, 3, 4, 4)."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.permute(0, 3, 1, 2).float() / 255


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(Scale(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()), nn.Linear(16, 3))


def train(load: resident.Load, device: torch.device, **changes: object) -> tuple[list, dict[str, torch.Tensor]]:
    """Learning curve and state after three epochs, of which the last is loaded again."""
    task = Task(load, np.arange(20) % 3, np.ones(20), np.arange(15), np.arange(15, 20), [0, 1], [0, 2], "torch", 8)
    trained = network()
    place(trained, device)
    _, curve, _ = fit.train(trained, task, strategy(epochs=3, patience=None, batch_size=4, **changes), 0, "run")
    return curve, copy.deepcopy(trained.cpu().state_dict())


def test_training_from_the_device_gives_the_same_bytes() -> None:
    kept = Resident(Files().load, 100, CPU)
    kept.open()
    (curve, state), (expected_curve, expected) = train(kept.load, CPU), train(Files().load, CPU)
    assert curve == expected_curve
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_training_on_a_gpu_gives_the_same_bytes_whatever_stays_there(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, found, loaded = choose_device("cuda"), [], []
    for room in (math.inf, 500, 0):
        files = Files()
        monkeypatch.setattr(resident, "resident_bytes", lambda *_, room=room: int(min(room, 10**6)))
        found.append(train(files.load, gpu, precision=precision))
        loaded.append(len(files.loaded))
    assert found[0][0] == found[1][0] == found[2][0]
    assert all(torch.equal(found[0][1][name], other[name]) for _, other in found[1:] for name in other)
    assert loaded[0] < loaded[1] < loaded[2]
