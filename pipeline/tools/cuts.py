"""cuts: where a network can be cut, and what caching there costs, as a table or JSON."""

import json
import time
from collections import deque
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.dataset import manifest
from pipeline.features import engine
from pipeline.network import backbones, cuts
from pipeline.network.backbones import Backbone, count_parameters
from pipeline.network.cuts import CutPoint
from pipeline.network.device import choose_device
from pipeline.network.flops import flops_per_image
from pipeline.network.preprocessing import Normalize
from pipeline.params import PARAMS, STORE_DTYPES, BackboneChoice, BatchSize, load_params

N_TIMED = 16  # batches that measure how fast the network runs


def show(name: str, *, is_complete: bool, is_json: bool) -> None:
    """Print the cut points of a network: all of them if `is_complete`, else the last of each block."""
    try:
        choice = BackboneChoice.of(name, "random", 0)
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
    n_images = len(manifest.read_images().image_id) if params and manifest.IMAGES.is_file() else 0
    print(_as_table(backbone, points, n_images, params.features.batch_size if params else None))


def _as_table(backbone: Backbone, points: list[CutPoint], n_images: int, batch_size: BatchSize | None) -> str:
    """One line for each cut point; with the cost of caching one view of a dataset of `n_images`, if not 0."""
    n_params = count_parameters(backbone.module)
    flops = flops_per_image(backbone.module, torch.zeros(1, 3, *[backbone.preprocessing.crop] * 2))
    columns = {
        "shape": ["x".join(map(str, point.shape)) for point in points],
        "parameters": [f"{point.params_before / n_params:.1%}" if n_params else "" for point in points],
        "FLOPs": [f"{point.flops_before / flops:.1%}" if flops else "" for point in points],
        "layers": [point.weight_layers_before for point in points],
        "kB/image": [f"{point.bytes_per_image / 1e3:,.1f}" for point in points],
    }
    title = f"{backbone.name}: share of parameters and of FLOPs, and weight layers, before each cut point"
    if n_images and batch_size:
        minutes = n_images / _images_per_second(backbone, batch_size) / 60
        columns["GB"] = [f"{n_images * point.bytes_per_image / 1e9:.3f}" for point in points]
        columns["minutes"] = [f"{minutes * point.flops_before / flops:.1f}" for point in points]
        title += f"; GB and minutes to cache one view of {n_images:,} images, decoding not counted"
    table = pd.DataFrame(columns, index=[point.name for point in points]).rename_axis(columns="cut point")
    return f"{title}\n\n{table.to_string()}"


def _images_per_second(backbone: Backbone, batch_size: BatchSize) -> float:
    """Rate of the whole network in fp32 on this machine, measured on a few batches."""
    device = choose_device("auto")
    network = nn.Sequential(Normalize(backbone.preprocessing), backbone.module)
    batch = torch.zeros(batch_size.on(device.type), *[backbone.preprocessing.crop] * 2, 3, dtype=torch.uint8)
    runner = engine.prepare("auto", network, batch, "fp32", device)
    pieces = batch.split(runner.piece)
    deque(runner.run(pieces * 2), maxlen=0)  # the first batches are slower
    start = time.perf_counter()
    deque(runner.run(pieces * N_TIMED), maxlen=0)
    return len(batch) * N_TIMED / (time.perf_counter() - start)
