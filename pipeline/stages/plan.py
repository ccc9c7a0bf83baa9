"""plan: what params.yaml means for the network; a wrong name, file or combination fails here, in seconds.

Reads   data/weights/
Writes  data/plan/backbone.json       the weights' digest, preprocessing and licence; where the base ends, what it costs
        data/plan/<strategy>.json     the merged recipe, the freeze boundary as a cut point, and what it costs
"""

import numpy as np
import torch
from torch import nn

from pipeline import logs
from pipeline.network import backbones, cuts, engine, plans
from pipeline.network.backbones import Backbone
from pipeline.network.device import choose_device
from pipeline.network.flops import flops_per_image
from pipeline.network.plans import BackbonePlan, StrategyPlan
from pipeline.params import STORE_DTYPES, FeatureOptions, Params, Strategy, load_params
from pipeline.training import heads


def main() -> None:
    """Write one file for the backbone, and one for each strategy that runs."""
    params = load_params()
    device = choose_device(params.runtime.device)
    engine.check_precision("features.precision", params.features.precision, device)
    backbone = backbones.load(params.backbone, params.features.image_size)
    base = plan_backbone(backbone, params)
    strategies = {}
    for name in params.fine_tune.run:
        recipe, key = params.fine_tune.strategies[name], f"fine_tune.strategies.{name}"
        engine.check_precision(f"{key}.precision", recipe.precision, device)
        try:
            strategies[name] = plan_strategy(backbone, base, recipe, params.features)
        except ValueError as error:
            raise ValueError(f"params.yaml: {key}.freeze_until: {error}") from None
    plans.write(base, "backbone")
    logs.log.info("%s, cut at %s: features of %s", backbone.name, base.cut, "x".join(map(str, base.feature_shape)))
    for name, plan in strategies.items():
        plans.write(plan, name)
        share = plan.trained_parameters / max(base.parameters, 1)
        logs.log.info("%s: frozen until %s, trains %.1f %% of the base", name, plan.boundary, 100 * share)


def plan_backbone(backbone: Backbone, params: Params) -> BackbonePlan:
    """Resolve `features.cut`, measure the base, and check that the head fits it."""
    features = params.features
    try:
        cut = cuts.resolve(backbone, features.cut)
        base, _ = cuts.prefix_and_suffix(backbone, cut, cut, features.pool)
    except ValueError as error:
        raise ValueError(f"params.yaml: features.cut: {error}") from None
    pixels = _pixels(backbone)
    with torch.no_grad():
        shape = tuple(base(pixels).shape[1:])
    _, dense = cuts.split(backbone, cut)
    heads.build(shape, 2, params.head, dense)
    return BackbonePlan(
        choice=params.backbone,
        image_size=features.image_size,
        licence=backbone.licence,
        weights_sha256=backbone.weights_sha256,
        preprocessing=backbone.preprocessing,
        feature_dim=backbone.feature_dim,
        cut=cut,
        pool=features.pool,
        feature_shape=shape,
        parameters=_count(base),
        flops_per_image=flops_per_image(base, pixels),
    )


def plan_strategy(backbone: Backbone, base: BackbonePlan, recipe: Strategy, features: FeatureOptions) -> StrategyPlan:
    """Resolve the freeze boundary and measure what lies on either side; ValueError if it lies behind the base."""
    boundary = cuts.resolve(backbone, recipe.freeze_until)
    boundary = base.cut if boundary == cuts.ALL else boundary
    prefix, suffix = cuts.prefix_and_suffix(backbone, boundary, base.cut, base.pool)
    pixels = _pixels(backbone)
    with torch.no_grad():
        activation = prefix(pixels)
    is_cached = recipe.boundary_cache == "on" and boundary != cuts.NONE
    n_bytes = np.dtype(STORE_DTYPES[features.store_dtype]).itemsize * activation[0].numel()
    suffix.requires_grad_(True)
    return StrategyPlan(
        recipe=recipe,
        boundary=boundary,
        trained_parameters=_count(suffix),
        prefix_flops=flops_per_image(prefix.requires_grad_(False), pixels),
        suffix_training_flops=flops_per_image(suffix.requires_grad_(True), activation, is_training=True),
        cached_bytes_per_image=n_bytes if is_cached else 0,
    )


def _pixels(backbone: Backbone) -> torch.Tensor:
    """One black image, as the base takes it."""
    return torch.zeros(1, *[backbone.preprocessing.crop] * 2, 3, dtype=torch.uint8)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    logs.run(main)
