"""fine_tune: train one strategy with one seed, from the cached head or from scratch.

Reads   data/images.csv and the images it names, data/labels.csv, data/splits/seed_<s>.csv,
        models/feature_extraction/seed_<s>.*, data/weights/
Writes  models/<strategy>/seed_<s>.safetensors, .json
        reports/runs/<strategy>/seed_<s>/     logits of validation and test, learning curve
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from pipeline import artifacts, backbones, cuts, engine, feature_store, heads, images, logs, manifest, training
from pipeline.artifacts import Cost, Run
from pipeline.backbones import Backbone
from pipeline.feature_store import Row, Store
from pipeline.images import Sample
from pipeline.params import HEAD_ONLY, Params, Strategy, load_params
from pipeline.training import Batch, Load, Task


def main() -> None:
    """`python -m pipeline.stages.fine_tune STRATEGY SEED`."""
    name, seed = sys.argv[1], int(sys.argv[2])
    params = load_params()
    strategy = params.fine_tune.strategies[name]
    device = engine.choose_device(params.runtime.device)
    where = f"fine_tune.strategies.{name}"
    engine.check_precision(f"{where}.precision", strategy.precision, device)
    files, labels = manifest.read_images(), manifest.read_labels()
    split = manifest.read_split(manifest.SPLITS / f"seed_{seed}.csv", labels.image_id)
    train, val, test = (split.rows(part) for part in ("train", "val", "test"))
    paths = [Path(params.dataset.path, image_id) for image_id in files.image_id]

    cached = artifacts.MODELS / HEAD_ONLY / f"seed_{seed}.json"
    card = artifacts.read_card(cached)
    if card.class_names != labels.class_names:
        raise ValueError(f"{cached}: other classes than in {manifest.LABELS}; run: dvc repro train_head")
    choice = params.backbone
    if strategy.init == "random":
        choice = choice.model_copy(update={"weights": "random", "seed": seed})
    backbone = backbones.load(choice, params.features.image_size)
    if strategy.init == "cached_head" and backbone.weights_sha256 != card.weights_sha256:
        raise ValueError(f"{cached}: fitted on features of other weights; run: dvc repro train_head")
    try:
        prefix, body = cuts.split(backbone.module, backbone.name, strategy.freeze_until)
    except ValueError as error:
        raise ValueError(f"params.yaml: {where}.{error}") from None
    if strategy.init == "cached_head":
        head = artifacts.load_head(cached.with_suffix(".safetensors"), card)
    else:
        torch.manual_seed(seed)
        head = heads.build(backbone.feature_dim, len(labels.class_names), card.head)

    frozen = nn.Sequential(backbones.Normalize(backbone.preprocessing), prefix)
    is_cached = strategy.boundary_cache == "on" and strategy.freeze_until != "none"
    views = min(strategy.views, strategy.epochs)
    if is_cached:
        wanted = [(int(row), view) for row in train for view in range(1, views + 1) or [0]]
        wanted += [(int(row), v) for row in [*val, *test] for v in range(params.evaluation.views)]
        rows = [(files.sha256[row], view) for row, view in wanted]
        located = dict(zip(files.sha256, paths, strict=True))
        store = _boundary_store(frozen, backbone, strategy, where, params, device, located, rows)
        load = _load_activations(store, files.sha256)
        network = nn.Sequential(nn.Identity(), body, head)
    else:
        load = _load_images(paths, files.sha256, backbone, params)
        network = nn.Sequential(frozen, body, head)

    example = next(load([[(int(train[0]), 0)] * engine.BATCH]))
    chosen = engine.choose_engine(params.features.engine, network, example.numpy(), device)
    task = Task(load, labels.label, labels.weight, train, val, params.evaluation.views, chosen)
    history = training.fit(network, task, strategy, seed, device, f"{name}-{seed}")
    logits = {
        part: training.predict(network, task, rows, strategy.precision, device)
        for part, rows in (("val", val), ("test", test))
    }

    epochs = len(history.epochs) - 1
    passes = len(train) * (min(epochs, max(1, views)) if is_cached else epochs)
    cost = _cost(frozen, body, head, backbone, passes, epochs * len(train))
    if strategy.init == "cached_head":
        cost = dataclasses.replace(
            cost,
            train_flops=cost.train_flops + card.cost.train_flops,
            base_passes=cost.base_passes + card.cost.base_passes,
        )
    tuned = dataclasses.replace(
        card,
        strategy=name,
        backbone=params.backbone,
        freeze_until=strategy.freeze_until,
        weights_sha256=backbones.state_sha256(backbone.module),
        cost=cost,
    )
    artifacts.save_model(artifacts.MODELS / name, tuned, head, backbone.module)
    curve = [dataclasses.asdict(epoch) for epoch in history.epochs]
    chosen = {"epoch": history.best_epoch}
    run = Run(name, seed, val, logits["val"], test, logits["test"], cost, chosen, curve)
    artifacts.save_run(artifacts.RUNS, run)


def _boundary_store(
    frozen: nn.Module,
    backbone: Backbone,
    strategy: Strategy,
    where: str,
    params: Params,
    device: torch.device,
    paths: dict[str, Path],
    rows: Sequence[Row],
) -> Store:
    """The activations at the freeze boundary, computed where they are missing."""
    computation = feature_store.computation(
        frozen,
        backbone,
        strategy.freeze_until,
        params.augmentation,
        params.features.engine,
        params.features.precision,
        device,
    )
    limit = params.runtime.store_max_gb * 1e9
    try:
        return feature_store.fill(computation, paths, rows, params.runtime.workers, limit)
    except feature_store.OverBudgetError as error:
        raise ValueError(f"params.yaml: {where}: {error}") from None


def _load_activations(store: Store, sha256: Sequence[str]) -> Load:
    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        for batch in batches:
            yield torch.from_numpy(store.read([(sha256[row], view) for row, view in batch]))

    return load


def _load_images(paths: Sequence[Path], sha256: Sequence[str], backbone: Backbone, params: Params) -> Load:
    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        samples = [[Sample(paths[row], sha256[row], view) for row, view in batch] for batch in batches]
        return images.load_batches(samples, backbone.preprocessing, params.augmentation, params.runtime.workers)

    return load


def _cost(frozen: nn.Module, body: nn.Module, head: nn.Module, backbone: Backbone, passes: int, steps: int) -> Cost:
    """Cost of `passes` images through the frozen part and `steps` through the rest and back."""
    size = backbone.preprocessing.crop
    pixels = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    with torch.no_grad():
        boundary = frozen.eval()(pixels)
    rest = nn.Sequential(body, head)
    before = backbones.flops_per_image(frozen, pixels)
    behind = backbones.flops_per_image(rest, boundary, is_training=True)
    n_parameters = sum(p.numel() for p in rest.parameters())
    return Cost(n_parameters, passes * before + steps * behind, passes)


if __name__ == "__main__":
    logs.run(main)
