"""extract: every image once through the frozen backbone, in evaluation mode.

Reads   data/images.csv and the images it names, data/weights/
Writes  data/features.h5     (n_images, n_views, d), in the order of images.csv
"""

from pathlib import Path

import torch
from torch import nn

from pipeline import backbones, cuts, engine, feature_store, logs, manifest
from pipeline.params import load_params


def main() -> None:
    """Compute what the store lacks, then assemble data/features.h5."""
    params = load_params()
    images = manifest.read_images()
    device = engine.choose_device(params.runtime.device)
    backbone = backbones.load(params.backbone, params.features.image_size)
    try:
        cut = cuts.resolve(backbone, params.features.cut)
    except ValueError as error:
        raise ValueError(f"params.yaml: features.cut: {error}") from None
    base, _ = cuts.split(backbone, cut)
    pool = params.features.pool
    network = nn.Sequential(backbones.Normalize(backbone.preprocessing), base, cuts.Pool(pool))
    example = torch.zeros(1, *[backbone.preprocessing.crop] * 2, 3, dtype=torch.uint8)
    provenance = {
        "backbone": params.backbone.model_dump(mode="json"),
        "image_size": params.features.image_size,
        "augmentation": params.augmentation.model_dump(mode="json"),
        "flops_per_image": backbones.flops_per_image(network, example),
        "params": sum(parameter.numel() for parameter in network.parameters()),
    }
    how = params.augmentation, params.features, device
    computation = feature_store.computation(network, backbone, cut, pool, *how)
    paths = {
        sha256: Path(params.dataset.path, name) for name, sha256 in zip(images.image_id, images.sha256, strict=True)
    }
    rows = [(sha256, view) for sha256 in images.sha256 for view in range(params.features.views)]
    store = feature_store.fill(computation, paths, rows, params.runtime.workers, params.runtime.store_max_gb)
    provenance["computation"] = computation.description
    provenance["largest_rounding"] = store.largest_rounding(rows)
    feature_store.assemble(store, images.sha256, params.features.views, provenance, feature_store.FEATURES)


if __name__ == "__main__":
    logs.run(main)
