"""fine_tune: train one strategy with one seed, from the cached head or from scratch.

Reads   data/images.csv and the images it names, data/labels.csv, data/splits/seed_<s>.csv,
        data/plan/backbone.json, data/plan/<strategy>.json, models/feature_extraction/seed_<s>.*
Writes  models/<strategy>/seed_<s>.safetensors, .json
        reports/runs/<strategy>/seed_<s>/     predictions for validation and test, learning curve
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from pipeline import logs
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Images
from pipeline.features import extraction
from pipeline.features.extraction import Share
from pipeline.features.views import Sample, load_batches
from pipeline.network import backbones, cuts, engine, plans
from pipeline.network.backbones import Backbone
from pipeline.network.device import BATCH, choose_device
from pipeline.network.flops import flops_per_image
from pipeline.network.plans import BackbonePlan, StrategyPlan
from pipeline.params import HEAD_ONLY, Params, Strategy, load_params
from pipeline.training import fit, heads
from pipeline.training.fit import Batch, Load, Task
from pipeline.training.models import Card, load_head, read_card, save_model
from pipeline.training.runs import MODELS, Cost, Predictions, Run, save_run


def main() -> None:
    """`python -m pipeline.stages.fine_tune STRATEGY SEED`."""
    name, seed = sys.argv[1], int(sys.argv[2])
    params, base, plan = load_params(), plans.read_backbone(), plans.read_strategy(name)
    recipe, views = plan.recipe, params.evaluation.views
    device = choose_device(params.runtime.device)
    engine.check_precision(f"fine_tune.strategies.{name}.precision", recipe.precision, device)
    images, labels = manifest.read_images(), manifest.read_labels()
    split = manifest.read_split(seed, labels.image_id)
    train, val, test = (split.rows(part) for part in ("train", "val", "test"))
    card, backbone, head = start(base, recipe, seed, labels.class_names)
    prefix, suffix = cuts.prefix_and_suffix(backbone, plan.boundary, base.cut, base.pool)
    train_views = range(1, min(recipe.views, recipe.epochs) + 1) or [0]
    n_read, rounding = 0, 0.0
    if plan.is_cached:
        pairs = [(int(row), view) for row in train for view in train_views]
        pairs += [(int(row), view) for row in (*val, *test) for view in range(views)]
        load, rounding = load_activations(images, pairs, prefix, backbone, plan.boundary, base, params, device)
        n_read = len(pairs)
    else:
        load = load_images(images, backbone, params)
    network = nn.Sequential(nn.Identity() if plan.is_cached else prefix, suffix, head)
    example = next(load([[(int(val[0]), 0)] * BATCH[device.type]]))
    evaluation_engine = engine.prepare(params.features.engine, network, example, recipe.precision, device).engine
    task = Task(load, labels.label, labels.weight, train, val, views, evaluation_engine)
    best_epoch, curve = fit.train(network, task, recipe, seed, params.threads, device, f"{name}-{seed}")
    val_predictions, test_predictions = (
        Predictions(rows, fit.predict(network, task, rows, recipe.precision, device)) for rows in (val, test)
    )

    network.cpu()
    n_epochs = len(curve) - 1
    passes = len(train) * (len(train_views) if plan.is_cached else n_epochs)
    before = card.cost if recipe.init == "cached_head" else None
    cost = measure_cost(base, plan, head, passes, n_epochs * len(train), n_read, before)
    whole_base, _ = cuts.split(backbone, base.cut)  # as load_network cuts it, around the same tensors
    tuned = {"strategy": name, "freeze_until": plan.boundary, "cost": cost}
    save_model(card.model_copy(update=tuned), head, whole_base)
    described = {
        "params": base.parameters + sum(parameter.numel() for parameter in head.parameters()),
        "boundary": plan.boundary,
        "largest_rounding": rounding,
    }
    chosen = {"epoch": best_epoch}
    save_run(Run(name, seed, cost, chosen, described, curve, val_predictions, test_predictions))


def start(base: BackbonePlan, recipe: Strategy, seed: int, class_names: list[str]) -> tuple[Card, Backbone, nn.Module]:
    """The cached head's card, and the backbone and head to start from; ValueError if they do not fit together."""
    path = MODELS / HEAD_ONLY / f"seed_{seed}.json"
    card = read_card(path)
    if list(card.class_names) != class_names:
        raise ValueError(f"{path}: other classes than in {manifest.LABELS}; run: dvc repro train_head")
    if card.backbone != base:
        raise ValueError(f"{path}: fitted on features of another backbone; run: dvc repro train_head")
    if recipe.init == "random":
        random = base.choice.model_copy(update={"weights": "random", "seed": seed})
        backbone = backbones.load(random, base.image_size)
        _, dense = cuts.split(backbone, base.cut)
        torch.manual_seed(seed)
        return card, backbone, heads.build(base.feature_shape, len(class_names), card.head, dense)
    backbone = backbones.load_planned(base, "data/plan/backbone.json")
    _, dense = cuts.split(backbone, base.cut)
    return card, backbone, load_head(path, card, dense)


def load_activations(
    images: Images,
    pairs: Sequence[tuple[int, int]],
    prefix: nn.Sequential,
    backbone: Backbone,
    boundary: str,
    base: BackbonePlan,
    params: Params,
    device: torch.device,
) -> tuple[Load, float]:
    """Batches from the activations at the freeze boundary, which are computed where they are missing.

    Also the largest relative error of storing them.
    """
    pool = base.pool if boundary == base.cut else "none"
    computation = extraction.prepare(
        prefix, backbone, boundary, pool, params.augmentation, params.features, params.threads, device
    )
    paths = {
        sha256: Path(params.dataset.path, name) for name, sha256 in zip(images.image_id, images.sha256, strict=True)
    }
    rows = [(images.sha256[row], view) for row, view in pairs]
    runtime, everything = params.runtime, Share(0, 1)
    store = extraction.fill(computation, paths, rows, runtime.workers, runtime.store_max_gb, everything)

    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        for batch in batches:
            yield torch.from_numpy(store.read([(images.sha256[row], view) for row, view in batch])).float()

    return load, store.largest_rounding(rows)


def load_images(images: Images, backbone: Backbone, params: Params) -> Load:
    """Batches from the image files."""
    paths = [Path(params.dataset.path, name) for name in images.image_id]

    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        samples = [[Sample(paths[row], images.sha256[row], view) for row, view in batch] for batch in batches]
        return load_batches(samples, backbone.preprocessing, params.augmentation, params.runtime.workers)

    return load


def measure_cost(
    base: BackbonePlan, plan: StrategyPlan, head: nn.Module, passes: int, steps: int, n_read: int, before: Cost | None
) -> Cost:
    """The cost of `passes` images through the prefix, of `steps` through suffix and head and back, and what was before.

    `n_read`: activations that are read from the store; `before`: the cost of the cached head.
    """
    features = torch.zeros(1, *base.feature_shape, requires_grad=plan.trained_parameters > 0)
    head_flops = flops_per_image(head, features, is_training=True)
    flops = passes * plan.prefix_flops + steps * (plan.suffix_training_flops + head_flops)
    return Cost(
        trainable_params=plan.trained_parameters + sum(parameter.numel() for parameter in head.parameters()),
        train_flops=flops + (before.train_flops if before else 0),
        base_passes=passes + (before.base_passes if before else 0),
        cached_bytes=n_read * plan.cached_bytes_per_image + (before.cached_bytes if before else 0),
    )


if __name__ == "__main__":
    logs.run(main)
