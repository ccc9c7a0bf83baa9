"""One thread for torch: tests are small, and run side by side."""

import os

# Before torch is loaded, here and in every process that a test starts; threads that wait sleep at once
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import signal
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from pipeline.features import extraction
from pipeline.features.extraction import Computation
from pipeline.features.hdf5 import Row
from pipeline.features.loading import Loader

# The processes of pytest-xdist ignore Ctrl-C, and so would all that they start
signal.signal(signal.SIGINT, signal.default_int_handler)


# The same examples in every run: what fails here fails everywhere, and no run fails by chance
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)  # some of what is tested sets its own


@pytest.fixture(autouse=True)
def _store_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATURE_STORE", "")  # a stage that is tested sets its own


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved networks run in torch, for tests that look at what is made of the predictions: nothing is compiled."""
    from pipeline.tools import inference

    monkeypatch.setattr(inference, "open_network", partial(inference.open_network, engine_name="torch"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Grows by every row that the store computes because it is missing; none is checked."""
    rows: list[Row] = []
    compute = extraction._compute

    def counted(
        computation: Computation, loader: Loader, missing: Sequence[Row], **options: Any
    ) -> Generator[np.ndarray, None, None]:
        rows.extend(missing)
        return compute(computation, loader, missing, **options)

    monkeypatch.setattr(extraction, "_compute", counted)
    monkeypatch.setattr(extraction, "N_CHECKED", 0)
    return rows
