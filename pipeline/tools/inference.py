"""Run a saved network over image files: paths -> what it says of each, in their order, in bounded memory.

Files are decoded by worker processes and transformed as training did; the network runs in the engine of extraction. A
file that cannot be read is an answer like any other.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pipeline.dataset import manifest
from pipeline.dataset.decoding import sha256
from pipeline.features import engine
from pipeline.features.views import evaluation_views, make_views
from pipeline.files import LFS_START
from pipeline.ingest import indexing
from pipeline.logs import leave_signals
from pipeline.network.device import choose_device
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import HEAD_ONLY, Augmentation, count_cores
from pipeline.report import provenance
from pipeline.report.provenance import Stage
from pipeline.training import heads, novelty, saved_networks
from pipeline.training.novelty import Novelty
from pipeline.training.runs import MODELS
from pipeline.training.saved_networks import Card

BATCH = {"cpu": 8, "cuda": 256}  # views that the network gets at a time, as features.batch_size
PREFETCHED = 4  # batches for each worker
MAX_ALONE = 16  # images up to which no process is started


@dataclass(frozen=True)
class Answer:
    """An image file, the SHA-256 (hex) of its bytes, and what the network says of it, or why there is no prediction.

    log_probability (n_classes,) float32: averaged over the evaluation views. `distance` from the training images, NaN
    where it was not asked for. Of an image with an error, there is neither.
    """

    path: Path
    sha256: str
    error: str = ""
    log_probability: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    distance: float = np.nan


@dataclass(frozen=True)
class Network:
    """A saved network that is ready to run; `novelty` if distances are asked for, and its file holds what they need."""

    card: Card
    novelty: Novelty | None
    runner: engine.Runner


class Observed(nn.Module):
    """A network Sequential(base, head) that gives the features of its penultimate layer (n, d), and then the logits."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.base, head = network
        self.layers, _ = novelty.penultimate(head)
        *_, self.last = head.children()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (n, …) -> (n, d + n_classes)."""
        features = self.layers(self.base(x))
        return torch.cat((features, self.last(features)), 1)


def path_of(run: str) -> Path:
    """The card of a run, which is given with or without an ending, e.g. models/full_retrain/seed_0."""
    return Path(run.removesuffix(".safetensors").removesuffix(".json") + ".json")


def repository_of(run: Path) -> Path:
    """The repository that holds the card `run`, models/<strategy>/seed_<s>.json."""
    parents = Path(os.path.abspath(run)).parents
    return parents[min(2, len(parents) - 1)]


def check_data(stages: dict[str, Stage], card: Card) -> None:
    """ValueError if a saved run was trained with other labels or another split than are in this directory now.

    `stages` of dvc.lock: the head of all seeds is one stage, any other run is one of its own.
    """
    output, used = MODELS / card.strategy, manifest.SPLITS
    if card.strategy != HEAD_ONLY:
        output, used = output / f"seed_{card.seed}.json", used / f"seed_{card.seed}.csv"
    provenance.check_inputs(stages, output.as_posix(), [str(manifest.LABELS), str(used)])


def open_network(run: Path, n_images: int, *, has_distances: bool = False, engine_name: str = "auto") -> Network:
    """Load the run `run` (.json) and make it ready for about `n_images`; raises as saved_networks.load_network does."""
    network, card = saved_networks.load_network(run)
    known = saved_networks.load_novelty(run) if has_distances else None
    device, n_views = choose_device("auto"), len(card.evaluation_views)
    size = n_views * max(1, min(BATCH[device.type] // n_views, n_images))
    shape = size, *[card.backbone.preprocessing.crop] * 2, 3
    example = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    module = network if known is None else Observed(network)
    with torch.inference_mode():
        expected = module.eval()(example[:1]).numpy()
    return Network(card, known, engine.prepare(engine_name, module, example, "fp32", device, expected))


def run(network: Network, paths: Sequence[Path], workers: int | None) -> Iterator[Answer]:
    """The answers for all `paths`, in order; `workers` processes decode, 0: this one, None: one for each core."""
    views, waiting = evaluation_views(network.card.evaluation_views), deque[list[Answer]]()
    n = max(1, network.runner.piece // len(views))
    batches = [paths[i : i + n] for i in range(0, len(paths), n)]
    wanted = count_cores() if workers is None else workers
    workers = 0 if len(paths) <= MAX_ALONE else min(wanted, len(batches))
    decoder = _Decoder(views, network.card.backbone.preprocessing, network.card.augmentation)
    loader = DataLoader(
        decoder,
        batch_size=None,
        sampler=batches,
        collate_fn=_same,
        num_workers=workers,
        worker_init_fn=leave_signals,
        prefetch_factor=PREFETCHED if workers else None,
        generator=torch.Generator(),
    )

    def pieces() -> Iterator[torch.Tensor]:
        without: list[Answer] = []  # those of batches of which nothing can be read come before the next ones
        for pixels, found in loader:
            without += found
            if len(pixels):
                waiting.append(without)
                without = []
                yield torch.from_numpy(pixels)
        waiting.append(without)

    for output in network.runner.run(pieces()):
        yield from _answers(network, waiting.popleft(), output.reshape(-1, len(views), output.shape[-1]))
    for found in waiting:
        yield from found


def _answers(network: Network, found: list[Answer], output: np.ndarray) -> Iterator[Answer]:
    """From the output (n, n_views, d + n_classes) for those images that can be read."""
    n_classes = len(network.card.class_names)
    logits = torch.from_numpy(np.ascontiguousarray(output[..., -n_classes:]))
    log_probability = heads.mean_log_probability(logits).numpy()
    distance = np.full(len(output), np.nan)
    if network.novelty is not None:
        distance = network.novelty.distances(np.ascontiguousarray(output[:, 0, :-n_classes]))
    rows = iter(zip(log_probability, distance.tolist(), strict=True))
    for answer in found:
        if answer.error:
            yield answer
            continue
        own, away = next(rows)
        if not np.isfinite(own).all():
            yield replace(answer, error="gives probabilities that are not finite")
        else:
            yield replace(answer, log_probability=own, distance=away)


@dataclass(frozen=True)
class _Decoder(Dataset):
    """What a worker does: paths -> the views of those that can be read, uint8 (n, crop, crop, 3), and how each was."""

    views: list[int]
    preprocessing: Preprocessing
    augmentation: Augmentation

    def __getitem__(self, paths: Sequence[Path]) -> tuple[np.ndarray, list[Answer]]:
        pixels, found = [], []
        for path in paths:
            try:
                content = indexing.read(str(path))
                name = sha256(content)
                if content.startswith(LFS_START):
                    raise ValueError("a pointer of Git LFS to a file that is not here; run: git lfs pull")
                pixels.append(make_views(content, name, self.views, self.preprocessing, self.augmentation))
                found.append(Answer(path, name))
            except MemoryError:
                found.append(Answer(path, "", "needs more memory than there was"))
            except OSError as error:
                found.append(Answer(path, "", f"cannot be read: {error.strerror or error}"))
            except ValueError as error:
                found.append(Answer(path, "", str(error)))
        return np.concatenate(pixels) if pixels else np.zeros(0, np.uint8), found


def _same(batch: object) -> object:
    return batch
