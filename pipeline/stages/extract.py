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
    images = manifest.read_images()
    device = engine.choose_device(params.runtime.device)
    backbone = backbones.load(params.backbone, params.features.image_size)
    network = nn.Sequential(backbones.Normalize(backbone.preprocessing), backbone.module)
    example = torch.zeros(1, *[backbone.preprocessing.crop] * 2, 3, dtype=torch.uint8)
    provenance = {
        "backbone": params.backbone.model_dump(mode="json"),
        "image_size": params.features.image_size,
        "augmentation": params.augmentation.model_dump(mode="json"),
        "flops_per_image": backbones.flops_per_image(network, example),
    }
    computation = feature_store.computation(network, backbone, "output", params.augmentation, params.features, device)
    paths = {
        sha256: Path(params.dataset.path, name) for name, sha256 in zip(images.image_id, images.sha256, strict=True)
    }
    rows = [(sha256, view) for sha256 in images.sha256 for view in range(params.features.views)]
    store = feature_store.fill(computation, paths, rows, params.runtime.workers)
    provenance["computation"] = computation.description
    feature_store.assemble(store, images.sha256, params.features.views, provenance, feature_store.FEATURES)


if __name__ == "__main__":
    logs.run(main)
