"""The plain loop: extraction as one writes it first, `python -m benchmarks.plain_loop`, in a workspace.

Images in the main process with torchvision's usual transforms, batches of 32, the network in fp32 as it was built;
at the end one HDF5 file. Prints the seconds that its loop took.
"""

import time
from pathlib import Path
from typing import cast

import h5py
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pipeline.dataset import manifest
from pipeline.network import backbones
from pipeline.params import load_params


def main() -> None:
    """Write data/features.h5 with one view of every image."""
    params = load_params()
    backbone = backbones.load(params.backbone, None)
    geometry = backbone.preprocessing
    transform = transforms.Compose(
        [
            transforms.Resize(geometry.resize[0], transforms.InterpolationMode(geometry.interpolation)),
            transforms.CenterCrop(geometry.crop),
            transforms.ToTensor(),
            transforms.Normalize(geometry.mean, geometry.std),
        ]
    )
    paths = [Path(params.dataset.path, name) for name in manifest.read_images().image_id]

    def read(batch: list[Path]) -> torch.Tensor:
        return torch.stack([cast(torch.Tensor, transform(Image.open(path).convert("RGB"))) for path in batch])

    loop = time.perf_counter()
    with torch.no_grad():
        rows = [backbone.module(batch).numpy() for batch in DataLoader(cast(Dataset, paths), 32, collate_fn=read)]
    with h5py.File("data/features.h5", "w") as file:
        file["features"] = np.concatenate(rows)[:, None]
    print(time.perf_counter() - loop)


if __name__ == "__main__":
    main()
