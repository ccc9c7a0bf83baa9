"""fine_tune: train one strategy with one seed, from the cached head or from scratch.

Reads   data/images.csv and the images it names, data/labels.csv, data/splits/seed_<s>.csv,
        data/plan/backbone.json, data/plan/<strategy>.json, models/feature_extraction/seed_<s>.*
Writes  models/<strategy>/seed_<s>.safetensors, .json
        reports/runs/<strategy>/seed_<s>/     predictions for validation and test, candidates, learning curve
        data/.checkpoints/    what an interrupted run goes on from; deleted when the run is saved
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline import logs
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Images
from pipeline.dataset.units import unit_of
from pipeline.features import engine, extraction, store
from pipeline.features.extraction import Computation, Share
from pipeline.features.loading import Loader, open_loader
from pipeline.features.views import evaluation_views, training_views
from pipeline.fine_tuning import checkpoints, fit, learning_rates
from pipeline.fine_tuning.fit import Batch, Load, Task
from pipeline.network import backbones, cuts, plans
from pipeline.network.backbones import Backbone, count_parameters
from pipeline.network.device import choose_device, place
from pipeline.network.flops import flops_per_image
from pipeline.network.plans import BackbonePlan, StrategyPlan
from pipeline.params import HEAD_ONLY, HeadOptions, Params, Strategy, load_params
from pipeline.training import calibration, heads, novelty
from pipeline.training.heads import Examples
from pipeline.training.novelty import Novelty
from pipeline.training.runs import MODELS, Cost, Predictions, Run, save_run
from pipeline.training.saved_networks import Card, load_head, read_card, save_model


def main() -> None:
    """`python -m pipeline.stages.fine_tune STRATEGY SEED`."""
    name, seed = sys.argv[1], int(sys.argv[2])
    params, base, plan = load_params(), plans.read_backbone(), plans.read_strategy(name)
    recipe, eval_views = plan.recipe, evaluation_views(params.evaluation.views)
    torch.set_num_threads(params.threads)
    store.put_at(params.runtime.store)
    device = choose_device(params.runtime.device)
    engine.check_precision(f"fine_tune.strategies.{name}.precision", recipe.precision, device)
    images, labels = manifest.read_images(), manifest.read_labels()
    split = manifest.read_split(seed, labels.image_id)
    train, val, test = (split.rows(part) for part in ("train", "val", "test"))
    card, backbone, head = start(base, recipe, seed, labels.class_names)
    prefix, suffix = cuts.prefix_and_suffix(backbone, plan.boundary, cuts.pools(base))
    aside = learning_rates.set_aside(recipe, train, labels.label, unit_of(labels), seed)
    train_views = training_views(recipe.augmentation, recipe.n_views + 1)[1:] or [0]
    cached_views = list(dict.fromkeys(train_views))
    paths, codes = extraction.locate(images, params.dataset.path), [*cached_views, *eval_views]
    with closing(open_loader(paths, base.preprocessing, recipe.augmentation, codes, params.runtime, device)) as loader:
        if plan.is_cached:
            pairs = [(int(row), view) for row in train for view in cached_views]
            pairs += [(int(row), view) for row in (*aside, *val, *test) for view in eval_views]
            computation = extraction.prepare(prefix, recipe.augmentation, params.features, device)
            load, largest_rounding = load_activations(computation, images, pairs, loader, params.runtime.store_max_gb)
        else:
            pairs, load, largest_rounding = [], load_images(images, loader), 0.0
        if recipe.dropout:
            suffix.append(nn.Dropout(recipe.dropout))
        network = nn.Sequential(nn.Identity() if plan.is_cached else prefix.module, suffix, head)
        batch_size = params.features.batch_size.on(device.type)
        example = next(load([[(int(val[0]), eval_views[0])] * batch_size]))
        with torch.no_grad():
            expected = network.eval()(example[:1]).numpy()
        given_engine, logits = params.features.engine, engine.LOGITS
        prepared = engine.prepare(given_engine, network, example, recipe.precision, device, expected, logits)
        evaluation_engine = prepared.engine
        place(network, device)
        engine_and_batch = evaluation_engine, batch_size
        task = Task(load, labels.label, labels.weight, train, val, train_views, eval_views, *engine_and_batch)
        machine = engine.machine(evaluation_engine, device)

        def locate(one: Strategy, part: Task) -> Path:
            inputs = describe(part, images, params, base, plan.model_copy(update={"recipe": one}), seed)
            return checkpoints.locate(network, inputs | {"machine": machine})

        def refit(part: Task) -> dict[str, torch.Tensor]:
            torch.manual_seed(seed)
            _, dense = cuts.split(backbone, base.cut)
            one = heads.build(base.feature_shape, len(labels.class_names), card.head, dense)
            return refit_head(network[:-1], one.to(device), part, card.head, params.features.views, recipe.precision)

        given = refit if recipe.init == "cached_head" else None
        trained = learning_rates.train(network, task, recipe, seed, f"{name}-{seed}", aside, locate, given)
        val_predictions, test_predictions = (
            Predictions(rows, fit.predict(network, task, rows, recipe.precision)) for rows in (val, test)
        )
        whole = nn.Sequential(prefix.module, suffix, head)  # from pixels: the cache may lack this view of training
        place(whole, device)
        pixels = replace(task, load=load_images(images, loader))
        whole_engine = given_engine if evaluation_engine == "openvino" else "torch"
        known = locate_training_images(whole, pixels, whole_engine, recipe.precision, device)

    network.cpu()
    passes = len(train) * len(cached_views) if plan.is_cached else trained.n_steps
    cost = measure_cost(base, plan, head, passes, trained.n_steps, len(pairs))
    if recipe.init == "cached_head":
        cost = cost.after(card.cost)
    whole_base, _ = cuts.split(backbone, base.cut)  # as load_network cuts it, around the same tensors
    changed = {"strategy": name, "freeze_until": plan.boundary, "cost": cost, "augmentation": recipe.augmentation}
    validated = val_predictions.log_probability, labels.label[val], labels.weight[val]
    changed["temperature"] = calibration.temperature(*validated)
    save_model(card.model_copy(update=changed), head, whole_base, known)
    described = {
        "params": base.parameters + count_parameters(head),
        "boundary": plan.boundary,
        "largest_rounding": largest_rounding,
        "recipe": recipe.model_dump(mode="json"),
        "n_views": len(cached_views),
    }
    predictions = val_predictions, test_predictions
    chosen, curve, others = trained.chosen, trained.curve, trained.others
    save_run(Run(name, seed, cost, chosen, described, curve, others, *predictions, trained.candidates))
    for checkpoint in trained.checkpoints:
        checkpoints.remove(checkpoint)


def describe(
    task: Task, images: Images, params: Params, base: BackbonePlan, plan: StrategyPlan, seed: int
) -> dict[str, Any]:
    """Everything that can change the run but the network and the code, as JSON: a checkpoint is found by it."""
    rows = {part: [images.sha256[row] for row in getattr(task, part)] for part in ("train", "val")}
    plain = {"seed": seed, "threads": params.threads, "versions": extraction.versions(), **rows}
    options = (base, plan, params.evaluation, params.features)
    return {
        **plain,
        "options": [record.model_dump(mode="json") for record in options],
        "labels": [[values[rows].tolist() for values in (task.label, task.weight)] for rows in (task.train, task.val)],
        "views": [[*task.train_views], [*task.evaluation_views]],
    }


def start(base: BackbonePlan, recipe: Strategy, seed: int, class_names: list[str]) -> tuple[Card, Backbone, nn.Module]:
    """The cached head's card, and the backbone and head to start from; ValueError if they do not fit together."""
    path = MODELS / HEAD_ONLY / f"seed_{seed}.json"
    card = read_card(path)
    if list(card.class_names) != class_names:
        raise ValueError(f"{path}: other classes than in {manifest.LABELS}; run: dvc repro train_head")
    if card.backbone != base:
        raise ValueError(f"{path}: fitted on features of another backbone; run: dvc repro train_head")
    if recipe.init == "cached_head":
        backbone = backbones.load_planned(base, str(plans.BACKBONE), recipe.drop_path)
        _, dense = cuts.split(backbone, base.cut)
        return card, backbone, load_head(path, card, dense)
    random = base.choice.model_copy(update={"weights": "random", "seed": seed})
    given = base.preprocessing
    backbone = backbones.load(random, base.image_size, recipe.drop_path).with_inputs(
        given.geometry, given.jpeg_decoding
    )
    _, dense = cuts.split(backbone, base.cut)
    torch.manual_seed(seed)
    return card, backbone, heads.build(base.feature_shape, len(class_names), card.head, dense)


def refit_head(
    base: nn.Sequential, head: nn.Sequential, task: Task, options: HeadOptions, n_views: int, precision: str
) -> dict[str, torch.Tensor]:
    """The state of the new `head`, fitted on features of task.train, in n_views views at most, selected on task.val."""
    device, views = next(head.parameters()).device, list(dict.fromkeys(task.train_views))[:n_views]

    def examples(rows: np.ndarray, views: Sequence[int]) -> Examples:
        features = fit.run(base, task, rows, views, "torch", precision, device)
        return Examples(features, task.label[rows], task.weight[rows])

    train, val = examples(task.train, views), examples(task.val, task.evaluation_views)
    return heads.fit(head, train, val, options).head.state_dict()


def locate_training_images(
    network: nn.Sequential, task: Task, engine: str, precision: str, device: torch.device
) -> Novelty:
    """Where the training images lie in the penultimate layer, and how far the validation images are from them."""
    layers, width = novelty.penultimate(network[-1])
    train, val = (rows[novelty.sample(task.label[rows], width)] for rows in (task.train, task.val))
    whole = nn.Sequential(*network[:-1], layers)
    first = task.evaluation_views[:1]
    of_train, of_val = (fit.run(whole, task, rows, first, engine, precision, device)[:, 0] for rows in (train, val))
    return novelty.fit(of_train, task.label[train], of_val, task.label[val])


def load_activations(
    computation: Computation, images: Images, pairs: Batch, loader: Loader, max_gb: float
) -> tuple[Load, float]:
    """Batches of activations at the freeze boundary, float32, from the store; what it lacks of `pairs` is computed.

    Also the largest relative error of storing them.
    """
    rows = [(images.sha256[row], view) for row, view in pairs]
    filled = extraction.fill(computation, loader, rows, max_gb, Share(0, 1))

    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        for batch in batches:
            yield torch.from_numpy(filled.read([(images.sha256[row], view) for row, view in batch])).float()

    return load, filled.largest_rounding(rows)


def load_images(images: Images, loader: Loader) -> Load:
    """Batches of pixels, uint8."""

    def load(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        return loader.load([[(images.sha256[row], view) for row, view in batch] for batch in batches])

    return load


def measure_cost(base: BackbonePlan, plan: StrategyPlan, head: nn.Module, passes: int, steps: int, n_read: int) -> Cost:
    """The cost of `passes` images through the prefix, and of `steps` images through suffix and head and back.

    `n_read`: activations that are read from the store.
    """
    features = torch.zeros(1, *base.feature_shape, requires_grad=plan.trained_parameters > 0)
    head_flops = flops_per_image(head, features, is_training=True)
    return Cost(
        trainable_params=plan.trained_parameters + count_parameters(head),
        train_flops=passes * plan.prefix_flops + steps * (plan.suffix_training_flops + head_flops),
        base_passes=passes,
        cached_bytes=n_read * plan.cached_bytes_per_image,
    )


if __name__ == "__main__":
    logs.run(main, memory=("batch_size", "features.batch_size", "features.image_size", logs.WORKERS))
