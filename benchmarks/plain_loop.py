"""The plain loop: extraction as one writes it first, `python -m benchmarks.plain_loop`, in a workspace.

A data set in the main process with torchvision's usual transforms, batches of 32, the network in fp32 as it was built;
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


class Images(Dataset):
    """The images of images.csv."""

    def __init__(self, paths: list[Path], transform: transforms.Compose) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        """How many there are."""
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Decode and preprocess one."""
        return cast(torch.Tensor, self.transform(Image.open(self.paths[index]).convert("RGB")))


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
    loop = time.perf_counter()
    with torch.no_grad():
        rows = [backbone.module(batch).numpy() for batch in DataLoader(Images(paths, transform), batch_size=32)]
    with h5py.File("data/features.h5", "w") as file:
        file["features"] = np.concatenate(rows)[:, None]
    print(time.perf_counter() - loop)


if __name__ == "__main__":
    main()
