"""What the boundary cache buys: `python -m benchmarks.boundary [--quick]`.

Trains on images of dataset.path (needs `dvc repro split`) with fp32 and frozen BatchNorm: from activations cached at
the freeze boundary, and the same through the whole network, decoding included. ResNet-18 has random weights, which
changes no speed.

    python -m benchmarks.boundary memory IMAGES     peak memory (MB) of one cached run over so many images
"""

import copy
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from benchmarks.common import LITE, Line, choose, run
from pipeline.dataset import manifest
from pipeline.features import engine, extraction
from pipeline.features.store import Store
from pipeline.network import backbones, cuts
from pipeline.network.cuts import Prefix
from pipeline.params import Strategy, load_params
from pipeline.stages import fine_tune
from pipeline.training import fit
from pipeline.training.fit import Load, Task

RESNET = "torchvision/resnet18"
LEAST = {RESNET: {"layer1": 1, "layer2": 1, "layer3": 2}, LITE: {"blocks.3": 1, "blocks.4": 1, "blocks.5": 4}}
CPU = torch.device("cpu")
VIEWS = [1, 2]  # codes of the two flips
N_TIMED, N_QUICK = 128, 96  # images a timing trains on


class Study:
    """Images, labels and parameters that all timings of one split share."""

    def __init__(self, name: str, n_images: int | None, seed: int = 0) -> None:
        params = load_params()
        augmentation = params.augmentation.model_copy(update={"flips": "both"})
        self.params = params.model_copy(update={"augmentation": augmentation})
        self.files, self.labels = manifest.read_images(), manifest.read_labels()
        self.seed = seed
        self.backbone = backbones.load(choose(name), None)
        torch.set_num_threads(params.threads)
        split = manifest.read_split(seed, self.labels.image_id)
        self.train, self.val = split.rows("train")[:n_images], split.rows("val")

    def strategy(self, **changes: object) -> Strategy:
        """The partial freeze of params.yaml, in batches of 32."""
        base = self.params.fine_tune.strategies["partial_freeze"].model_dump()
        return Strategy.model_validate({**base, "batch_size": 32, "patience": None, "views": len(VIEWS), **changes})

    def parts(self, boundary: str) -> tuple[Prefix, nn.Sequential]:
        """What lies before the boundary, and what lies behind it with a new head."""
        boundary, pool = cuts.resolve(self.backbone, boundary), cuts.Pool("none", 0)
        prefix, suffix = cuts.prefix_and_suffix(self.backbone, boundary, cuts.ALL, pool)
        head = nn.Linear(self.backbone.feature_dim, len(self.labels.class_names))
        return prefix, nn.Sequential(suffix, head)

    def cached(self, boundary: str, val: np.ndarray, views: int) -> Load:
        """Compute the activations of so many training views, and of view 0 of `val`; how they are loaded."""
        pairs = [(int(row), view) for row in self.train for view in VIEWS[:views]] + [(int(row), 0) for row in val]
        load, _ = fine_tune.load_activations(self.parts(boundary)[0], self.files, pairs, self.params, CPU)
        return load

    def fit(self, boundary: str, load: Load, val: np.ndarray, strategy: Strategy, *, is_cached: bool) -> float:
        """Seconds."""
        prefix, rest = self.parts(boundary)
        network = copy.deepcopy(nn.Sequential(nn.Identity() if is_cached else prefix.module, *rest))
        task = Task(load, self.labels.label, self.labels.weight, self.train, val, VIEWS, [0], "torch")
        start = time.perf_counter()
        fit.train(network, task, strategy, self.seed, "benchmark")
        return time.perf_counter() - start

    def epoch(self, boundary: str, load: Load, val: np.ndarray, n: int, *, is_cached: bool) -> float:
        """Seconds of one epoch, with its validation: of n + 1 epochs, less those of the first, by n."""
        times = [
            self.fit(boundary, load, val, self.strategy(epochs=epochs, warmup_epochs=0), is_cached=is_cached)
            for epochs in (1, n + 1)
        ]
        return (times[1] - times[0]) / n

    def whole(self) -> Load:
        """Images, decoded as the stage does."""
        return fine_tune.load_images(self.files, self.backbone, self.params)


def throughput(is_quick: bool) -> Iterator[Line]:
    """Images/s of training from the cache against the whole network, at the ends of blocks of two networks."""
    n = N_QUICK if is_quick else N_TIMED
    for name, least in LEAST.items():
        study = Study(name, n)
        val = study.val[:8]
        for boundary in list(least)[-1:] if is_quick else least:
            slow = study.epoch(boundary, study.whole(), val, 1 if is_quick else 2, is_cached=False)
            load = study.cached(boundary, val, 2)
            fast = study.epoch(boundary, load, val, 6 if is_quick else 12, is_cached=True)
            print(f"  {n / fast:.1f} against {n / slow:.1f} images/s", flush=True)
            title = f"boundary cache / none, {name.split('/')[1]} at {boundary}"
            yield Line(title, slow / fast, "times", "at least", least[boundary])


def study_time() -> Line:
    """A study of 3 rates and 2 seeds, caching included, against the same without a cache."""
    boundary, epochs, rates, seeds = "blocks.5", 20, (1e-5, 3e-5, 1e-4), load_params().split.seeds[:2]
    studies = [Study(LITE, None, seed) for seed in seeds]
    start = time.perf_counter()
    for study in studies:
        for rate in rates:
            load = study.cached(boundary, study.val, 2)
            options = study.strategy(epochs=epochs, learning_rate_base=rate, learning_rate_head=rate)
            study.fit(boundary, load, study.val, options, is_cached=True)
    with_cache = time.perf_counter() - start
    one = studies[0].epoch(boundary, studies[0].whole(), studies[0].val, 1, is_cached=False)
    without = len(rates) * len(seeds) * epochs * one
    print(f"  {with_cache:.0f} s with the cache, {without:.0f} s without (one epoch: {one:.1f} s)", flush=True)
    title = f"study of 3 rates x 2 seeds x {epochs} epochs without a cache / with"
    return Line(title, without / with_cache, "times", "at least", 3)


def reading() -> Line:
    """Activations/s in random order against the rate at which the rest of the network consumes them."""
    study = Study(RESNET, 512)
    prefix, rest = study.parts("layer3")
    computation = extraction.prepare(prefix, study.params.augmentation, study.params.features, CPU)
    study.cached("layer3", study.val[:8], 2)
    store = Store(computation.key)
    rows = [(study.files.sha256[row], view) for row in study.train for view in VIEWS]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    batches = [shuffled[i : i + 32] for i in range(0, len(rows), 32)]
    start = time.perf_counter()
    read = [store.read(batch) for batch in batches]
    reading = time.perf_counter() - start
    tensors = [torch.from_numpy(batch) for batch in read]
    start = time.perf_counter()
    for _ in engine.run(rest, tensors, "torch", "fp32", CPU):
        pass
    consuming = time.perf_counter() - start
    return Line("random reads / forward passes, resnet18 at layer3", consuming / reading, "times", "at least", 1)


def memory() -> Line:
    """Peak memory of a cached run over many images against one over few."""
    few, many = 256, 1536
    command = [sys.executable, "-m", "benchmarks.boundary", "memory"]
    peaks = [float(subprocess.check_output([*command, str(n)])) for n in (few, many)]
    return Line(f"peak memory of training, {many} images / {few}", peaks[1] / peaks[0], "times", "at most", 1.15)


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Throughput; and, if there is time, a whole study, reading and memory."""
    with tempfile.TemporaryDirectory() as folder:
        before, os.environ["DVC_ROOT"] = os.environ.get("DVC_ROOT", "."), folder  # an empty store
        if sys.argv[1:2] == ["memory"]:
            print_peak(int(sys.argv[2]))
            return
        yield from throughput(is_quick)
        if not is_quick:
            yield from (reading(), memory(), study_time())
        os.environ["DVC_ROOT"] = before


def print_peak(n_images: int) -> None:
    """Train once from the cache, and print the peak memory (MB) of this process."""
    study = Study(RESNET, n_images)
    load = study.cached("layer3", study.val[:8], 1)
    options = study.strategy(epochs=1, views=1, warmup_epochs=0)
    study.fit("layer3", load, study.val[:8], options, is_cached=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    run(measure)
