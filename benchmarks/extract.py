"""Extraction against the plain loop: `python -m benchmarks.extract [IMAGES]`.

The plain loop is what one writes first: images in the main process, torch in fp32, batches of 32. Both go from the
image files of dataset.path to an HDF5 file, one view each, and both are timed as a whole, from the loaded network on.
Needs an indexed data set (`dvc repro index`).
"""

import math
import os
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import nn

from pipeline import backbones, cuts, engine, feature_store, images, manifest
from pipeline.params import load_params


def plain_loop(backbone: backbones.Backbone, paths: dict[str, Path], out: Path) -> float:
    """Seconds."""
    params = load_params()
    start = time.perf_counter()
    normalize, rows, names = backbones.Normalize(backbone.preprocessing), [], list(paths)
    how = backbone.preprocessing, params.augmentation
    with torch.no_grad():
        for i in range(0, len(names), 32):
            pixels = [
                images.views(images.decode(paths[name].read_bytes()), name, [0], *how) for name in names[i : i + 32]
            ]
            inputs = normalize(torch.from_numpy(np.concatenate(pixels))).contiguous()
            rows.append(backbone.module(inputs).numpy())
    with h5py.File(out, "w") as file:
        file["features"] = np.concatenate(rows)
    return time.perf_counter() - start


def pipelined(network: nn.Module, paths: dict[str, Path], backbone: backbones.Backbone, out: Path) -> float:
    """Seconds, conversion of the network and the store included."""
    params = load_params()
    device = engine.choose_device("cpu")
    start = time.perf_counter()
    computation = feature_store.computation(
        network, backbone, cuts.ALL, "none", params.augmentation, params.features, device
    )
    store = feature_store.fill(computation, paths, [(name, 0) for name in paths], params.runtime.workers, math.inf)
    feature_store.assemble(store, list(paths), 1, computation.description, out)
    return time.perf_counter() - start


def main() -> None:
    """Print both rates and their ratio."""
    params, files = load_params(), manifest.read_images()
    paths = {sha256: Path(params.dataset.path, name) for name, sha256 in zip(files.image_id, files.sha256, strict=True)}
    paths = dict(list(paths.items())[: int(sys.argv[1]) if len(sys.argv) > 1 else None])
    backbone = backbones.load(params.backbone, params.features.image_size)
    network = nn.Sequential(backbones.Normalize(backbone.preprocessing), backbone.module)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "features.h5")
        os.environ["DVC_ROOT"] = folder  # an empty store
        fast = pipelined(network, paths, backbone, out)
        with h5py.File(out) as file:
            ours = np.array(file["features"])[:, 0]
        slow = plain_loop(backbone, paths, out)
        with h5py.File(out) as file:
            theirs = np.array(file["features"])
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{backbone.name}, {len(paths)} images, {torch.get_num_threads()} threads")
    print(f"plain loop  {len(paths) / slow:7.1f} images/s")
    print(f"extract     {len(paths) / fast:7.1f} images/s, {slow / fast:.1f} times the plain loop")
    print(f"largest difference, relative to the largest feature: {difference:.1e}")


if __name__ == "__main__":
    main()
