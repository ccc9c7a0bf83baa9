"""extract: every image once through the frozen base, in evaluation mode.

Reads   data/images.csv and the images it names, data/plan/backbone.json
Writes  data/features.h5     training and evaluation views, (n_images, n_views, d) each, in the order of images.csv

Several processes fill the store side by side: `torchrun --nproc-per-node N -m pipeline.stages.extract`, and then the
ordinary stage, which has nothing left to compute.
"""

from contextlib import closing

import numpy as np
import torch

from pipeline import logs
from pipeline.dataset import manifest
from pipeline.features import extraction, hdf5, store
from pipeline.features.hdf5 import Provenance
from pipeline.features.loading import open_loader
from pipeline.features.views import evaluation_views, training_views
from pipeline.network import backbones, cuts, plans
from pipeline.network.device import choose_device
from pipeline.network.preprocessing import LARGEST_SHARE
from pipeline.params import load_params


def main() -> None:
    """Compute what the store lacks, then assemble data/features.h5."""
    params, share = load_params(), extraction.share_of_environment()
    images, plan = manifest.read_images(), plans.read_backbone()
    features, runtime = params.features, params.runtime
    torch.set_num_threads(params.threads)
    store.put_at(runtime.store)
    device = choose_device(runtime.device, share.local_rank if share.world_size > 1 else None)
    training = training_views(params.augmentation, features.views)
    evaluation = evaluation_views(params.evaluation.views)
    codes, paths = list(dict.fromkeys([*training, *evaluation])), extraction.locate(images, params.dataset.path)
    if share.rank == 0:
        warn_of_crops(plan.preprocessing.cut_away(images.width, images.height))
    opened = open_loader(paths, plan.preprocessing, params.augmentation, codes, runtime, device)
    with closing(opened) as loader:
        with loader.decoding_ahead([name for name in images.sha256 if share.holds((name, 0))]):
            backbone = backbones.load_planned(plan, str(plans.BACKBONE))
            base, _ = cuts.prefix_and_suffix(backbone, plan.cut, cuts.pools(plan))
            computation = extraction.prepare(base, params.augmentation, features, device)
        rows = [(name, code) for name in images.sha256 for code in codes]
        filled = extraction.fill(computation, loader, rows, runtime.store_max_gb, share)
    if share.world_size > 1:
        logs.log.info("rank %d of %d is done; when all are: dvc repro", share.rank, share.world_size)
        return
    provenance = Provenance(
        backbone=plan,
        augmentation=params.augmentation,
        training_views=tuple(training),
        evaluation_views=params.evaluation.views,
        engine=computation.runner.engine,
        precision=features.precision,
        store_dtype=features.store_dtype,
        largest_rounding=filled.largest_rounding(rows),
    )
    extraction.assemble(filled, images.sha256, training, evaluation, provenance, hdf5.FEATURES)


def warn_of_crops(lost: np.ndarray) -> None:
    """Warn where view 0 lacks much of the images: `lost` (n_images,), shares of their area."""
    if lost.mean() > LARGEST_SHARE:
        logs.log.warning(
            "features.resize: crop cuts away %.0f %% of an image's area on average, at most %.0f %%; "
            "squash and pad show the network whole images",
            *(100 * lost.mean(), 100 * lost.max()),
        )


if __name__ == "__main__":
    logs.run(main, memory=("features.batch_size", "features.image_size", logs.WORKERS))
