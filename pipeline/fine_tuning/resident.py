"""Inputs of training that stay on the GPU: what fits there is loaded and copied once, whatever loads it."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from pipeline.network.device import resident_bytes, upload

Pair = tuple[int, int]  # (row of the image, code of the view: see features/views.py)
Batch = Sequence[Pair]
Load = Callable[[Sequence[Batch]], Iterator[torch.Tensor]]  # batches -> the network's inputs, one tensor each


class Resident:
    """Loads as `load` does, with the tensors on the GPU `device`, where those of `n_pairs` stay as far as they fit."""

    def __init__(self, load: Load, n_pairs: int, device: torch.device) -> None:
        self._load, self._n_pairs, self._device = load, n_pairs, device
        self._slots: dict[Pair, int] = {}
        self._values: torch.Tensor | None = None
        self._is_open = False

    def open(self) -> None:
        """Keep what is loaded from now on: after a step of training, which has taken the memory that it needs."""
        self._is_open = True

    def load(self, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        """The batches in order; only what is not there yet is loaded."""
        slots = dict(self._slots)  # what is kept meanwhile is for the next call: its loading has begun
        missing = [[pair for pair in batch if pair not in slots] for batch in batches]
        loaded = self._load([pairs for pairs in missing if pairs]) if any(missing) else iter(())
        found = torch.tensor([slots[pair] for batch in batches for pair in batch if pair in slots], dtype=torch.int64)
        places, start = upload(found, self._device), 0
        for batch, pairs in zip(batches, missing, strict=True):
            n_found = len(batch) - len(pairs)
            parts = []
            if n_found and self._values is not None:
                parts.append(self._values[places[start : start + n_found]])
                start += n_found
            if pairs:
                parts.append(upload(next(loaded), self._device))
                if self._is_open:
                    self._keep(pairs, parts[-1])
            yield parts[0] if len(parts) == 1 else torch.cat(parts)[self._order(batch, slots)]

    def _order(self, batch: Batch, slots: dict[Pair, int]) -> torch.Tensor:
        """Where each row of the batch is, once those that are there stand before those that were loaded."""
        is_missing = torch.tensor([pair not in slots for pair in batch])
        return upload(is_missing.argsort(stable=True).argsort(), self._device)

    def _keep(self, pairs: Batch, values: torch.Tensor) -> None:
        if self._values is None:
            row_bytes = values.element_size() * math.prod(values.shape[1:])
            n_rows = min(self._n_pairs, resident_bytes(self._device, self._n_pairs * row_bytes) // row_bytes)
            self._values = values.new_empty(n_rows, *values.shape[1:])
        new = {pair: i for i, pair in enumerate(pairs) if pair not in self._slots}
        chosen = [*new.values()][: len(self._values) - len(self._slots)]
        start, end = len(self._slots), len(self._slots) + len(chosen)
        self._values[start:end] = values if len(chosen) == len(values) else values[chosen]
        self._slots |= dict(zip(new, range(start, end), strict=False))
