"""One GPU against what its machine can do: `python -m benchmarks.gpu [--device cpu] [--images N] …`.

Makes images and random weights, and runs the stages of this repository on them, in this process and a temporary
directory. Every line is a ratio of two things in this run; rates are of loops without what is paid once, which is
printed beside them. Needs neither DVC nor OpenVINO. docs/machines.md says how to run it on a bare machine.

- Extraction, from image files to data/features.h5, four flips of each image: against its limit, the smaller of two
  rates: of the cores, which decode, resize and crop and do nothing else; and of the network alone, on pixels that are
  there, in its best batch. One view against the plain loop of benchmarks.plain_loop with as many workers.
- Training at batches of 16: against a bare eager loop on the same network with all inputs on the device.
"""

import argparse
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
from functools import partial
from logging.handlers import BufferingHandler
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from benchmarks import plain_loop
from benchmarks.common import (
    LITE,
    REPOSITORY,
    Line,
    call,
    choose_rows,
    document,
    generate,
    merged,
    on_all_cores,
    run,
    took,
    write_params,
)
from pipeline.dataset import manifest
from pipeline.dataset.decoding import sha256
from pipeline.features import hdf5, pixels
from pipeline.network import backbones, cuts, plans
from pipeline.network.cuts import Prefix
from pipeline.network.device import arithmetic, autocast, choose_device, place
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import BackboneChoice, count_cores, load_params
from pipeline.stages import extract, fine_tune, index, plan, split, train_head
from pipeline.training import heads
from pipeline.training.heads import Examples

N_WARM = 64  # images that pay what is paid once
N_STEPS = 100  # of a loop that is measured, at most
EPOCHS = 4  # the first of which loads what then stays on the device
FEATURES, STORE = Path("data/features.h5"), Path("data/.feature_store")
STRATEGIES = ("full_retrain", "partial_freeze")


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="One GPU against its machine.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cuda")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--side", type=int, default=300, help="px of the images")
    parser.add_argument("--size", type=int, default=224, help="px of what the network sees")
    parser.add_argument("--backbone", default=LITE)
    parser.add_argument("--freeze-until", default="blocks.5")
    given = parser.parse_args()
    logging.getLogger("pipeline").setLevel(logging.INFO)
    os.environ.pop("DVC_ROOT", None)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):  # where the stages run, in this process
        run(lambda *, is_quick: measure(given))


def measure(given: argparse.Namespace) -> Iterator[Line]:
    """All lines, in the order in which they are cheap to get."""
    n_cores, seconds = count_cores(), {}
    generate(given.images, Path("images"), given.side)
    imported = [sys.executable, "-c", "import pipeline.stages.extract"]
    seconds["imports"] = took(partial(subprocess.run, imported, cwd=REPOSITORY, check=True))
    configure(given)
    for stage in (index, split, plan):
        call(stage.main)
    paths = sorted(Path("images").rglob("*.png"))
    _, taken = on_all_cores(partial(decode, plans.read_backbone().preprocessing), paths)
    decoding = 4 * len(paths) / taken
    seconds["first use of the device"] = took(lambda: torch.zeros(1, device=choose_device(given.device)))
    device = choose_device(given.device)
    name, precisions, sizes = "CPU", ["fp32"], (8, 16)
    if device.type == "cuda":
        name, sizes = torch.cuda.get_device_name(device), (256, 512, 1024)
        precisions += ["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else []
    print(f"{name}, {n_cores} cores, {platform.platform()}, torch {torch.__version__}", flush=True)

    rates: dict[str, float] = {}
    for precision in precisions:
        configure(given, features={"precision": precision})
        seconds[f"first {N_WARM} images, {precision}"] = took(partial(extract_some, N_WARM))
        (first, digest), (second, again) = extract_all(), extract_all()
        rates[precision] = max(first, second)
        by_batch = {size: forward_rate(given, size, precision, device) for size in sizes}
        limit = min(decoding, max(by_batch.values()))
        alone = ", ".join(f"{rate:.0f} at {size}" for size, rate in by_batch.items())
        print(f"  {precision}: {rates[precision]:.0f} views/s; decoding {decoding:.0f}, network {alone}", flush=True)
        yield Line(f"extraction / its limit, {precision}", rates[precision] / limit, "times", "at least", 0.8)
        yield Line(f"two runs with the same bytes, {precision}", float(digest == again), "", "at least", 1)
    if "bf16" in rates:
        yield Line("extraction, bf16 / fp32", rates["bf16"] / rates["fp32"], "times", "at least", 1)
    for what, value in seconds.items():
        print(f"  paid once: {what}: {value:.1f} s", flush=True)

    yield from against_the_plain_loop(given, device, n_cores)
    yield from with_one_worker(given, n_cores)
    yield from head(given, device, n_cores)
    yield from training(given, device)


# The stages


def configure(given: argparse.Namespace, **changes: dict[str, Any]) -> None:
    """params.yaml of this repository for the images, the network and the device at hand, with `changes` of sections."""
    params = document(
        {
            "dataset": {"fetch": [], "path": "images"},
            "split": {"seeds": [0], "test_fraction": 0.1, "val_fraction": 0.1},
            "backbone": BackboneChoice.of(given.backbone, "random", 0).model_dump(),
            "features": {"views": 4, "image_size": given.size, "engine": "torch", "precision": "fp32"},
            "evaluation": {"views": ["identity"]},
            "fine_tune": {
                "run": [*STRATEGIES],
                "seeds": [0],
                "defaults": {"views": 1, "epochs": EPOCHS},
                "strategies": {"partial_freeze": {"freeze_until": given.freeze_until}},
            },
            # Without a cache, so that nothing is decoded before the loop that is measured
            "runtime": {"device": given.device, "workers": "auto", "store_max_gb": 1000, "pixel_cache": "off"},
        }
    )
    write_params(merged(params, changes))


def logged(main: Callable[[], None], *arguments: str) -> list[logging.LogRecord]:
    """Run a stage in this process; the lines that it logs, with their times."""
    handler, log = BufferingHandler(sys.maxsize), logging.getLogger("pipeline")
    log.addHandler(handler)
    call(main, *arguments)
    log.removeHandler(handler)
    return handler.buffer


def find(lines: Sequence[logging.LogRecord], pattern: str) -> list[tuple[float, int]]:
    """When lines with `pattern` came (s), and the number that it has as its group."""
    return [(line.created, int(found[1])) for line in lines if (found := re.search(pattern, line.getMessage()))]


def decode(preprocessing: Preprocessing, path: Path) -> None:
    """Read an image, crop and flip it; the pixels go nowhere."""
    with Image.open(path) as image:  # grey, as the pipeline resizes it
        row = pixels.crop(image, preprocessing)
    np.stack([row, row[:, ::-1], row[::-1], row[::-1, ::-1]])


# Extraction


def extract_all() -> tuple[float, str]:
    """Views per second from an empty store, once the network is ready; and the SHA-256 of data/features.h5."""
    rmtree(STORE, ignore_errors=True)
    lines = logged(extract.main)
    ((begin, n_rows),), ((end, _),) = find(lines, r"(\d+) rows to compute"), find(lines, r"(\d+) computed, ")
    return n_rows / (end - begin), sha256(FEATURES.read_bytes())


def extract_some(n: int) -> None:
    """`extract_all` of the first `n` images."""
    images = manifest.read_images()
    manifest.write_images(choose_rows(images, slice(n)))
    extract_all()
    manifest.write_images(images)


def base(boundary: str) -> tuple[Prefix, nn.Sequential]:
    """The planned network, new, before and behind a boundary."""
    found = plans.read_backbone()
    backbone = backbones.load_planned(found, str(plans.BACKBONE))
    return cuts.prefix_and_suffix(backbone, boundary, cuts.pools(found))


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward_rate(given: argparse.Namespace, size: int, precision: str, device: torch.device) -> float:
    """Views per second of the network alone, in batches of `size` that are on the device."""
    prefix, _ = base(plans.read_backbone().cut)
    module = prefix.module.eval()
    place(module, device)
    pixels = torch.randint(256, (size, given.size, given.size, 3), dtype=torch.uint8, device=device)
    n = max(1, min(N_STEPS, 4 * given.images // size))

    def run(times: int) -> None:
        with torch.inference_mode(), arithmetic(precision, device), autocast(precision, device):
            for _ in range(times):
                module(pixels)
        wait(device)

    run(3)
    return n * size / took(partial(run, n))


def against_the_plain_loop(given: argparse.Namespace, device: torch.device, n_cores: int) -> Iterator[Line]:
    """One view of every image."""
    configure(given, features={"views": 1})
    rate, _ = extract_all()
    found = plans.read_backbone()
    network = backbones.load_planned(found, str(plans.BACKBONE)).module.eval().to(device)
    paths = [Path("images", name) for name in manifest.read_images().image_id]
    run = partial(plain_loop.loop, preprocessing=found.preprocessing, network=network, device=device, workers=n_cores)
    run(paths[:N_WARM])
    few = paths[: len(paths) // 4]  # the start of the workers is no part of a rate
    plain = (len(paths) - len(few)) / max(took(partial(run, paths)) - took(partial(run, few)), 1e-9)
    print(f"  one view: {rate:.0f} images/s, plain loop {plain:.0f}", flush=True)
    yield Line("extraction / plain loop with as many workers, fp32", rate / plain, "times", "at least", 1)


def with_one_worker(given: argparse.Namespace, n_cores: int) -> Iterator[Line]:
    """Whether a few images give the same bytes."""
    digests = set()
    for workers in (1, n_cores):
        configure(given, runtime={"workers": workers})
        extract_some(min(given.images, 4 * N_WARM))
        digests.add(sha256(FEATURES.read_bytes()))
    yield Line("1 and all workers with the same bytes", float(len(digests) == 1), "", "at least", 1)


# Training


def head(given: argparse.Namespace, device: torch.device, n_cores: int) -> Iterator[Line]:
    """The linear head on four views, on the device and on all cores."""
    configure(given, runtime={"pixel_cache": "on"})  # training reads the pixels that are stored here
    extract_all()
    call(train_head.main)
    values, labels, options = hdf5.read_features().values, manifest.read_labels(), load_params().head
    parts = map(manifest.read_split(0, labels.image_id).rows, ("train", "val"))
    train, val = (Examples(values[rows], labels.label[rows], labels.weight[rows]) for rows in parts)

    def fit(where: torch.device) -> None:
        heads.fit(heads.build(values.shape[2:], 2, options, nn.Identity()).to(where), train, val, options)

    fit(device)
    seconds = took(partial(fit, device))
    torch.set_num_threads(n_cores)
    on_cores = took(partial(fit, torch.device("cpu")))
    torch.set_num_threads(load_params().threads)
    n_rows = len(train.label) * values.shape[1]
    print(f"  head: {n_rows} x {values.shape[-1]}: {seconds:.2f} s, on the cores {on_cores:.2f} s", flush=True)
    if device.type == "cuda":
        yield Line("head, seconds on the GPU / on the cores", seconds / on_cores, "times", "at most", 1)


def training(given: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """Both strategies, from their second epoch on: what fits is on the device then."""
    for name in STRATEGIES:
        lines = logged(fine_tune.main, name, "0")
        first, *later = [rate for _, rate in find(lines, r"epoch \d+: .*, (\d+) images/s$")]
        rate, bare = statistics.median(later), bare_rate(name, given, device)
        print(f"  {name}: {first}, then {rate:.0f} images/s; bare loop {bare:.0f}", flush=True)
        yield Line(f"{name} / bare eager loop", rate / bare, "times", "at least", 0.8)


def bare_rate(name: str, given: argparse.Namespace, device: torch.device) -> float:
    """Images per second of a loop that does nothing but train, on inputs and labels that are on the device."""
    recipe, n = plans.read_strategy(name).recipe, 16 * N_STEPS
    prefix, suffix = base(plans.read_strategy(name).boundary)
    pixels = torch.randint(256, (16, given.size, given.size, 3), dtype=torch.uint8)
    with torch.no_grad():
        inputs = prefix.module.eval()(pixels) if name == "partial_freeze" else pixels
        features = suffix.eval()(prefix.module(pixels[:1]))
    first = [] if name == "partial_freeze" else [prefix.module]
    network = nn.Sequential(*first, suffix, nn.Linear(features.shape[1], 2)).requires_grad_(True)
    place(network, device)
    stored = inputs.to(device).repeat(N_STEPS, *[1] * (inputs.ndim - 1))
    label = torch.randint(2, (n,), device=device)
    fused = True if device.type == "cuda" else None
    optimizer = torch.optim.AdamW(network.parameters(), recipe.learning_rate_base, fused=fused)

    def run(n_steps: int) -> None:
        for rows in torch.randperm(n, device=device).split(recipe.batch_size)[:n_steps]:
            loss = F.cross_entropy(network(stored[rows]), label[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wait(device)

    n_steps = max(1, min(N_STEPS, given.images // recipe.batch_size))
    run(max(1, n_steps // 4))
    return n_steps * recipe.batch_size / took(partial(run, n_steps))


if __name__ == "__main__":
    main()
