"""extract: every image once through the frozen backbone, in evaluation mode.

Reads   data/images.csv and the images it names, data/weights/
Writes  data/features.h5     (n_images, n_views, d) float32, in the order of images.csv
"""

from pathlib import Path

import torch
from torch import nn

from pipeline import backbones, engine, feature_store, logs, manifest
from pipeline.params import load_params


def main() -> None:
    """Compute what the store lacks, then assemble data/features.h5."""
    params = load_params()
    device = engine.choose_device(params.runtime.device)
    images = manifest.read_images()
    backbone = backbones.load(params.backbone, params.features.image_size)
    network = nn.Sequential(backbones.Normalize(backbone.preprocessing), backbone.module)
    size = backbone.preprocessing.crop
    flops = backbones.flops_per_image(network, torch.zeros(1, size, size, 3, dtype=torch.uint8))
    computation = feature_store.computation(
        network, backbone, "output", params.augmentation, params.features.engine, params.features.precision, device
    )
    dataset = Path(params.dataset.path)
    paths = {sha256: dataset / name for name, sha256 in zip(images.image_id, images.sha256, strict=True)}
    rows = [(sha256, view) for sha256 in images.sha256 for view in range(params.features.views)]
    store = feature_store.fill(computation, paths, rows, params.runtime.workers)
    provenance = {
        "backbone_choice": params.backbone.model_dump(mode="json"),
        "image_size": params.features.image_size,
        "flops_per_image": flops,
    }
    feature_store.assemble(feature_store.FEATURES, store, images.sha256, params.features.views, provenance)


if __name__ == "__main__":
    logs.run(main)
