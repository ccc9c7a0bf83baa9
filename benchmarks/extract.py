"""Extraction against the plain loop and against the limit: `python -m benchmarks.extract [--quick]`.

From PNG files of dataset.path to data/features.h5, one view, start-up of the process included on both sides. Needs an
indexed data set (`dvc repro index`). The rate of the plain loop does not depend on the number of images, so it runs on
every fifth and its loop is extended to all. With --quick few images are taken, of which start-up is a larger part.

The limit is cores / (core-seconds to decode an image + core-seconds of its forward pass): of the loader alone and of
the forward pass alone, on all cores, in the same process.
"""

import os
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import nn

from benchmarks.common import LITE, RESNET50, Line, Workspace, choose, run, workspace
from pipeline.dataset import manifest
from pipeline.features import engine
from pipeline.features.views import Sample, load_batches
from pipeline.network import backbones
from pipeline.network.device import BATCH
from pipeline.network.preprocessing import Normalize
from pipeline.params import load_params

QUICK = {LITE: 4, RESNET50: 16}  # of how many images one is taken
TARGETS = {(LITE, "fp32"): 7, (LITE, "bf16"): 9, (RESNET50, "fp32"): 3, (RESNET50, "bf16"): 6}


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Lines of both networks and precisions."""
    listed, directory, step = manifest.read_images(), Path(load_params().dataset.path).resolve(), 5
    for name in (LITE, RESNET50):
        n = len(listed.sha256) // (QUICK[name] if is_quick else 1)
        with workspace(listed, directory, name) as place:
            place.list_images(listed, slice(0, n, step))
            plain = place.run("benchmarks.plain_loop")
            loop, theirs = float(plain.printed), read(place)
        slow = plain.seconds + loop * (n / len(theirs) - 1)
        for precision in ("fp32", "bf16"):
            title = f"{name.split('/')[1]}, {precision}"
            with workspace(listed, directory, name, precision) as place:
                place.list_images(listed, slice(n))
                place.run("plan")
                fast, ours = place.run("extract").seconds, read(place)
                size = place.features.stat().st_size / ours.nbytes
            print(f"  {n / fast:.0f} against {n / slow:.0f} images/s", flush=True)
            yield Line(f"extraction / plain loop, {title}", slow / fast, "times", "at least", TARGETS[name, precision])
            yield Line(f"in the loop / limit, {title}", in_loop(name, precision, is_quick), "times", "at least", 0.9)
            if precision == "fp32":
                apart = float(np.abs(ours[::step] - theirs).max() / np.abs(theirs).max())
                yield Line(f"largest difference from the plain loop, {title}", apart, "of the largest", "at most", 1e-4)
            if (name, precision) == (LITE, "fp32"):
                yield Line("size of features.h5 / payload", size, "times", "at most", 1.02)


def read(place: Workspace) -> np.ndarray:
    """What a run wrote."""
    with h5py.File(place.features) as file:
        return np.array(file["features"])[:, 0]


def in_loop(name: str, precision: str, is_quick: bool) -> float:
    """Rate of decoding and forward passes together, divided by the limit."""
    params, listed = load_params(), manifest.read_images()
    backbone = backbones.load(choose(name), None)
    network = nn.Sequential(Normalize(backbone.preprocessing), backbone.module)
    samples = [
        Sample(Path(params.dataset.path, path), sha256, 0)
        for path, sha256 in zip(listed.image_id, listed.sha256, strict=True)
    ]
    n = {LITE: 400 if is_quick else len(samples), RESNET50: 128 if is_quick else 320}[name]
    size, options = BATCH["cpu"], (backbone.preprocessing, params.augmentation)
    batches = [samples[i : i + size] for i in range(0, n - n % size, size)]
    pixels = torch.cat(list(load_batches(batches[:8], *options, 0)))
    runner = engine.prepare("auto", network, pixels[:size], precision, torch.device("cpu"))
    cores, skipped = len(os.sched_getaffinity(0)), 8  # the first batches are slower

    def core_seconds(results: Iterator) -> float:
        for _ in islice(results, skipped):
            pass
        start, n_done = time.perf_counter(), sum(map(len, results))
        return cores * (time.perf_counter() - start) / n_done

    decoding = core_seconds(load_batches(batches, *options, params.runtime.workers))
    forward = core_seconds(runner.run(islice(cycle(pixels.split(size)), len(batches))))
    both = core_seconds(runner.run(load_batches(batches, *options, params.runtime.workers)))
    rates = f"{cores / both:.0f} images/s; limit {cores / (decoding + forward):.0f}"
    print(f"  {rates}: {1e3 * decoding:.2f} + {1e3 * forward:.2f} core-ms an image", flush=True)
    return (decoding + forward) / both


if __name__ == "__main__":
    run(measure)
