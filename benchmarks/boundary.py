"""What the boundary cache buys: `python -m benchmarks.boundary [--quick]`.

Trains on images of dataset.path (needs `dvc repro split`) with fp32 and frozen BatchNorm: from activations cached at
the freeze boundary, and the same through the whole network, from pixels in the store. ResNet-18 has random weights,
which changes no speed. The time of an epoch, with its validation, is that of several less that of the first.
"""

import copy
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch
from torch import nn

from benchmarks.common import LITE, Line, choose, run, took
from pipeline.dataset import manifest
from pipeline.features import extraction
from pipeline.features.loading import open_loader
from pipeline.fine_tuning import fit
from pipeline.fine_tuning.fit import Task
from pipeline.network import backbones, cuts
from pipeline.params import Strategy, load_params
from pipeline.stages import fine_tune

RESNET = "torchvision/resnet18"
LEAST = {RESNET: {"layer1": 1, "layer2": 1, "layer3": 2}, LITE: {"blocks.3": 1, "blocks.4": 1, "blocks.5": 4}}
VIEWS = [1, 2]  # codes of the two flips
N_TIMED, N_QUICK = 128, 96  # images a timing trains on


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Images/s of training from the cache against the whole network, at the ends of blocks of two networks."""
    n = N_QUICK if is_quick else N_TIMED
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, DVC_ROOT=folder):  # an empty store
        for name, least in LEAST.items():
            for boundary in list(least)[-1:] if is_quick else least:
                slow = epoch_seconds(name, boundary, n, 1 if is_quick else 2, is_cached=False)
                fast = epoch_seconds(name, boundary, n, 6 if is_quick else 12, is_cached=True)
                print(f"  {n / fast:.1f} against {n / slow:.1f} images/s", flush=True)
                title = f"boundary cache / none, {name.split('/')[1]} at {boundary}"
                yield Line(title, slow / fast, "times", "at least", least[boundary])


def epoch_seconds(name: str, boundary: str, n_images: int, n_epochs: int, *, is_cached: bool) -> float:
    """Seconds of one epoch on so many images, the mean of `n_epochs` after the first."""
    params, files, labels = load_params(), manifest.read_images(), manifest.read_labels()
    augmentation = params.augmentation.model_copy(update={"flips": "both"})
    torch.set_num_threads(params.threads)
    split = manifest.read_split(0, labels.image_id)
    train, val = split.rows("train")[:n_images], split.rows("val")[:8]
    backbone = backbones.load(choose(name), None)
    pools = {cuts.ALL: cuts.Pool("none", 0)}
    prefix, suffix = cuts.prefix_and_suffix(backbone, cuts.resolve(backbone, boundary), pools)
    device, paths = torch.device("cpu"), extraction.locate(files, params.dataset.path)
    loader = open_loader(paths, backbone.preprocessing, augmentation, [0, *VIEWS], params.runtime, device)
    if is_cached:
        pairs = [(int(row), view) for row in train for view in VIEWS] + [(int(row), 0) for row in val]
        computation = extraction.prepare(prefix, augmentation, params.features, device)
        load, _ = fine_tune.load_activations(computation, files, pairs, loader, params.runtime.store_max_gb)
    else:
        load = fine_tune.load_images(files, loader)
        deque(load([[(int(row), 0)] for row in (*train, *val)]), maxlen=0)  # each image is decoded once, and before
    head = nn.Linear(backbone.feature_dim, len(labels.class_names))
    network = nn.Sequential(nn.Identity() if is_cached else prefix.module, suffix, head)
    task = Task(load, labels.label, labels.weight, train, val, VIEWS, [0], "torch", params.features.batch_size.cpu)
    base = params.fine_tune.strategies["partial_freeze"].model_dump()
    changes = {"batch_size": 32, "patience": None, "views": len(VIEWS), "warmup_epochs": 0}
    seconds = []
    for epochs in (1, n_epochs + 1):
        strategy = Strategy.model_validate(base | changes | {"epochs": epochs})
        seconds.append(took(partial(fit.train, copy.deepcopy(network), task, strategy, 0, "benchmark")))
    return (seconds[1] - seconds[0]) / n_epochs


if __name__ == "__main__":
    run(measure)
