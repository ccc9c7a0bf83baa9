"""extract: every image once through the frozen backbone, in evaluation mode.

Reads   data/images.csv and the images it names, data/weights/
Writes  data/features.h5     (n_images, n_views, d), in the order of images.csv

Several processes fill the store side by side: `torchrun --nproc-per-node N -m pipeline.stages.extract`, and then the
ordinary stage, which has nothing left to compute.
"""

from pathlib import Path

import torch
from torch import nn

from pipeline import backbones, cuts, engine, extraction, hdf5, logs, manifest
from pipeline.params import load_params


def main() -> None:
    """Compute what the store lacks, then assemble data/features.h5."""
    params, share = load_params(), extraction.share_of_environment()
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
    computation = extraction.computation(network, backbone, cut, pool, *how)
    paths = {
        sha256: Path(params.dataset.path, name) for name, sha256 in zip(images.image_id, images.sha256, strict=True)
    }
    rows = [(sha256, view) for sha256 in images.sha256 for view in range(params.features.views)]
    runtime = params.runtime
    store = extraction.fill(computation, paths, rows, runtime.workers, runtime.store_max_gb, share)
    if share.world_size > 1:
        logs.log.info("rank %d of %d is done; when all are: dvc repro", share.rank, share.world_size)
        return
    provenance["computation"] = computation.key.description
    provenance["largest_rounding"] = store.largest_rounding(rows)
    extraction.assemble(store, images.sha256, params.features.views, provenance, hdf5.FEATURES)


if __name__ == "__main__":
    logs.run(main)
