"""The plain loop: extraction as one writes it first, `python -m benchmarks.plain_loop`, in a workspace.

Images in the main process with torchvision's usual transforms, batches of 32, the network in fp32 as it was built;
at the end one HDF5 file. Prints the seconds that its loop took.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast

import h5py
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pipeline.dataset import manifest
from pipeline.network import backbones
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import load_params


def main() -> None:
    """Write data/features.h5 with one view of every image."""
    params = load_params()
    backbone = backbones.load(params.backbone, None)
    paths = [Path(params.dataset.path, name) for name in manifest.read_images().image_id]
    start = time.perf_counter()
    rows = loop(paths, backbone.preprocessing, backbone.module, torch.device("cpu"), workers=0)
    with h5py.File("data/features.h5", "w") as file:
        file["features"] = rows[:, None]
    print(time.perf_counter() - start)


def loop(
    paths: Sequence[Path], preprocessing: Preprocessing, network: nn.Module, device: torch.device, workers: int
) -> np.ndarray:
    """The rows of the images at `paths`, in order; they are decoded by `workers` processes, 0 for this one."""
    interpolation = transforms.InterpolationMode(preprocessing.interpolation)
    geometry = transforms.Resize(preprocessing.resize[0], interpolation), transforms.CenterCrop(preprocessing.crop)
    values = transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)
    collate = partial(_read, transforms.Compose([*geometry, *values]))
    batches = DataLoader(cast(Dataset, paths), 32, collate_fn=collate, num_workers=workers)
    with torch.no_grad():
        return np.concatenate([network(batch.to(device)).cpu().numpy() for batch in batches])


def _read(transform: transforms.Compose, batch: list[Path]) -> torch.Tensor:
    return torch.stack([cast(torch.Tensor, transform(Image.open(path).convert("RGB"))) for path in batch])


if __name__ == "__main__":
    main()
