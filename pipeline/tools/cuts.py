"""Where a network can be cut, and what caching there takes: a table for people, or JSON."""

import json
import time
from collections import deque
from dataclasses import asdict

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.dataset import manifest
from pipeline.network import backbones, cuts, engine
from pipeline.network.backbones import Backbone
from pipeline.network.cuts import CutPoint
from pipeline.network.device import BATCH, choose_device
from pipeline.network.flops import flops_per_image
from pipeline.network.preprocessing import Normalize
from pipeline.params import PARAMS, STORE_DTYPES, BackboneChoice, load_params

N_TIMED = 16  # batches that measure how fast the network runs


def show(name: str, *, is_complete: bool, is_json: bool) -> None:
    """Print the cut points of a network: all of them if `is_complete`, else the last of each block."""
    try:
        choice = BackboneChoice(name=name, weights="random", seed=0)
    except ValidationError:
        raise ValueError(f"{name}: expected torchvision/<name> or timm/<name>") from None
    params = load_params() if PARAMS.is_file() else None
    size = params.features.image_size if params and params.backbone.name == name else None
    backbone = backbones.load(choice, size)
    store_dtype = STORE_DTYPES[params.features.store_dtype if params else "fp32"]
    points = cuts.describe(backbone, np.dtype(store_dtype).itemsize)
    if not points:
        raise ValueError(f"{name} has no cut point: it can be frozen only whole or not at all")
    if not is_complete:
        points = list({cuts.block(backbone.module, point.name): point for point in points}.values())
    if is_json:
        print(json.dumps([asdict(point) for point in points], indent=2))
        return
    n_images = len(manifest.read_images().image_id) if manifest.IMAGES.is_file() else 0
    print(_as_table(backbone, points, n_images))


def _as_table(backbone: Backbone, points: list[CutPoint], n_images: int) -> str:
    """One line a cut point; for a dataset, with what caching one view of it takes."""
    n_params = sum(parameter.numel() for parameter in backbone.module.parameters())
    example = torch.zeros(1, 3, *[backbone.preprocessing.crop] * 2)
    flops = flops_per_image(backbone.module, example)
    header = ["cut point", "shape", "parameters", "FLOPs", "layers", "kB/image"]
    rows = [
        [
            point.name,
            "x".join(map(str, point.shape)),
            f"{point.params_before / n_params:.1%}" if n_params else "",
            f"{point.flops_before / flops:.1%}" if flops else "",
            f"{point.weight_layers_before}",
            f"{point.bytes_per_image / 1e3:,.1f}",
        ]
        for point in points
    ]
    title = f"{backbone.name}: share of parameters and of FLOPs, and weight layers, before each cut point"
    if n_images:
        rate = _images_per_second(backbone)
        header += ["GB", "minutes"]
        for row, point in zip(rows, points, strict=True):
            minutes = n_images / rate / 60 * point.flops_before / flops
            row += [f"{n_images * point.bytes_per_image / 1e9:.3f}", f"{minutes:.1f}"]
        title += f"; GB and minutes to cache one view of {n_images:,} images, decoding not counted"
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for name, shape, *numbers in [header, *rows]:
        cells = [name.ljust(widths[0]), shape.ljust(widths[1])]
        cells += [number.rjust(width) for number, width in zip(numbers, widths[2:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join([title, "", *lines])


def _images_per_second(backbone: Backbone) -> float:
    """Rate of the whole network in fp32 on this machine, measured on a few batches."""
    device = choose_device("auto")
    network = nn.Sequential(Normalize(backbone.preprocessing), backbone.module)
    batch = torch.zeros(BATCH[device.type], *[backbone.preprocessing.crop] * 2, 3, dtype=torch.uint8)
    runner = engine.prepare("auto", network, batch, "fp32", device)
    deque(runner.run([batch] * 2), maxlen=0)  # the first batches are slower
    start = time.perf_counter()
    deque(runner.run([batch] * N_TIMED), maxlen=0)
    return len(batch) * N_TIMED / (time.perf_counter() - start)
