"""fine_tune: train one strategy with one seed, from the cached head or from scratch.

Reads   data/images.csv and the images it names, data/labels.csv, data/splits/seed_<s>.csv,
        models/feature_extraction/seed_<s>.*, data/weights/
Writes  models/<strategy>/seed_<s>.safetensors, .json
        reports/runs/<strategy>/seed_<s>/     logits of validation and test, learning curve
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from pipeline import artifacts, backbones, cuts, engine, extraction, heads, images, logs, manifest, training
from pipeline.artifacts import Card, Cost, Run
from pipeline.backbones import Backbone
from pipeline.extraction import Share
from pipeline.images import Sample
from pipeline.params import HEAD_ONLY, STORE_DTYPES, Params, Strategy, load_params
from pipeline.training import Batch, Load, Task


def main() -> None:
    """`python -m pipeline.stages.fine_tune STRATEGY SEED`."""
    name, seed = sys.argv[1], int(sys.argv[2])
    params = load_params()
    strategy, views = params.fine_tune.strategies[name], params.evaluation.views
    device = engine.choose_device(params.runtime.device)
    engine.check_precision(f"fine_tune.strategies.{name}.precision", strategy.precision, device)
    files, labels = manifest.read_images(), manifest.read_labels()
    split = manifest.read_split(seed, labels.image_id)
    train, val, test = (split.rows(part) for part in ("train", "val", "test"))
    card, backbone, head = start(params, strategy, seed, labels.class_names)
    try:
        boundary, frozen, body = divide(backbone, card, strategy.freeze_until)
    except ValueError as error:
        raise ValueError(f"params.yaml: fine_tune.strategies.{name}.freeze_until: {error}") from None
    train_views = range(1, min(strategy.views, strategy.epochs) + 1) or [0]
    is_cached = strategy.boundary_cache == "on" and boundary != cuts.NONE
    pairs: list[tuple[int, int]] = []
    if is_cached:
        pairs += [(int(row), view) for row in train for view in train_views]
        pairs += [(int(row), view) for row in (*val, *test) for view in range(views)]
        load, rounding = load_activations(files, pairs, frozen, backbone, boundary, params, device)
    else:
        load, rounding = load_images(files, backbone, params), 0.0
    network = nn.Sequential(nn.Identity() if is_cached else frozen, body, head)
    example = next(load([[(int(val[0]), 0)] * engine.BATCH[device.type]]))
    chosen = engine.prepare(params.features.engine, network, example, strategy.precision, device).engine
    task = Task(load, labels.label, labels.weight, train, val, views, chosen)
    best_epoch, curve = training.fit(network, task, strategy, seed, device, f"{name}-{seed}")
    said = {
        f"{part}_logits": training.predict(network, task, rows, strategy.precision, device)
        for part, rows in (("val", val), ("test", test))
    }

    network.cpu()
    n_epochs = len(curve) - 1
    passes = len(train) * (len(train_views) if is_cached else n_epochs)
    before = card.cost if strategy.init == "cached_head" else None
    value_bytes = np.dtype(STORE_DTYPES[params.features.store_dtype]).itemsize
    spent = passes, n_epochs * len(train), len(pairs) * value_bytes
    cost = _cost(frozen.cpu(), body, head, backbone, *spent, before)
    tuned = {
        "strategy": name,
        "freeze_until": boundary,
        "weights_sha256": backbones.state_sha256(backbone.module),
        "cost": cost,
    }
    base, _ = cuts.split(backbone, card.cut)  # as load_network cuts it, around the same tensors
    artifacts.save_model(card.model_copy(update=tuned), head, base)
    n_params = sum(parameter.numel() for part in (frozen, body, head) for parameter in part.parameters())
    described = {"params": n_params, "boundary": boundary, "largest_rounding": rounding}
    artifacts.save_run(
        Run(name, seed, cost, {"epoch": best_epoch}, described, curve, val_rows=val, test_rows=test, **said)
    )


def start(params: Params, strategy: Strategy, seed: int, class_names: list[str]) -> tuple[Card, Backbone, nn.Module]:
    """The cached head's card, and the backbone and head to start from; ValueError if they do not fit together."""
    path = artifacts.MODELS / HEAD_ONLY / f"seed_{seed}.json"
    card = artifacts.read_card(path)
    if list(card.class_names) != class_names:
        raise ValueError(f"{path}: other classes than in {manifest.LABELS}; run: dvc repro train_head")
    if strategy.init == "random":
        random = params.backbone.model_copy(update={"weights": "random", "seed": seed})
        backbone = backbones.load(random, params.features.image_size)
        _, dense = cuts.split(backbone, card.cut)
        torch.manual_seed(seed)
        return card, backbone, heads.build(card.feature_shape, len(class_names), card.head, dense)
    backbone = backbones.load(params.backbone, params.features.image_size)
    if backbone.weights_sha256 != card.weights_sha256:
        raise ValueError(f"{path}: fitted on features of other weights; run: dvc repro train_head")
    _, dense = cuts.split(backbone, card.cut)
    return card, backbone, artifacts.load_head(path, card, dense)


def divide(backbone: Backbone, card: Card, freeze_until: str | int) -> tuple[str, nn.Sequential, nn.Sequential]:
    """The freeze boundary, what is frozen (from pixels on), and the body, up to the end of the cached head's base.

    The base's pooling belongs to whichever of the two ends it.
    """
    boundary = cuts.resolve(backbone, freeze_until)
    if boundary == cuts.ALL:
        boundary = card.cut
    prefix, body, _ = cuts.split(backbone, boundary, card.cut)
    pools = [cuts.Pool(card.pool), cuts.Pool("none")]
    if boundary != card.cut:
        pools.reverse()
    frozen = nn.Sequential(backbones.Normalize(backbone.preprocessing), prefix, pools[0])
    return boundary, frozen, nn.Sequential(body, pools[1])


def load_activations(
    files: manifest.Images,
    pairs: Sequence[tuple[int, int]],
    frozen: nn.Sequential,
    backbone: Backbone,
    boundary: str,
    params: Params,
    device: torch.device,
) -> tuple[Load, float]:
    """Batches from the activations at the freeze boundary, which are computed where they are missing.

    Also the largest relative error of storing them.
    """
    pool = cast(cuts.Pool, frozen[2]).kind
    how = params.augmentation, params.features, device
    computation = extraction.computation(frozen, backbone, boundary, pool, *how)
    paths = {sha256: Path(params.dataset.path, name) for name, sha256 in zip(files.image_id, files.sha256, strict=True)}
    rows = [(files.sha256[row], view) for row, view in pairs]
    runtime, everything = params.runtime, Share(0, 1)
    store = extraction.fill(computation, paths, rows, runtime.workers, runtime.store_max_gb, everything)

    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        for batch in batches:
            yield torch.from_numpy(store.read([(files.sha256[row], view) for row, view in batch])).float()

    return load, store.largest_rounding(rows)


def load_images(files: manifest.Images, backbone: Backbone, params: Params) -> Load:
    """Batches from the image files."""
    paths = [Path(params.dataset.path, name) for name in files.image_id]

    def samples(batch: Batch) -> list[Sample]:
        return [Sample(paths[row], files.sha256[row], view) for row, view in batch]

    how = backbone.preprocessing, params.augmentation, params.runtime.workers
    return lambda batches: images.load_batches([samples(batch) for batch in batches], *how)


def _cost(
    frozen: nn.Module,
    body: nn.Module,
    head: nn.Module,
    backbone: Backbone,
    passes: int,
    steps: int,
    read_bytes: int,
    before: Cost | None,
) -> Cost:
    """Cost of `passes` images through the frozen part, `steps` through the rest and back, and what was spent before.

    `read_bytes` are read from the cache for every value at the freeze boundary.
    """
    pixels = torch.zeros(1, *[backbone.preprocessing.crop] * 2, 3, dtype=torch.uint8)
    with torch.no_grad():
        boundary = frozen(pixels)
    rest = nn.Sequential(body, head)
    flops = passes * backbones.flops_per_image(frozen, pixels)
    flops += steps * backbones.flops_per_image(rest, boundary, is_training=True)
    return Cost(
        trainable_params=sum(parameter.numel() for parameter in rest.parameters()),
        train_flops=flops + (before.train_flops if before else 0),
        base_passes=passes + (before.base_passes if before else 0),
        cached_bytes=read_bytes * boundary[0].numel() + (before.cached_bytes if before else 0),
    )


if __name__ == "__main__":
    logs.run(main)
