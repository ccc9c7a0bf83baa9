"""plan: what params.yaml means for the network; a wrong name, file or combination fails here, in seconds.

Reads   data/weights/<backbone.weights>
Writes  data/plan/backbone.json       the weights' digest, preprocessing and licence; where the base ends, what it costs
        data/plan/<strategy>.json     the merged recipe, the freeze boundary as a cut point, and what it costs
"""

import numpy as np
import torch
from torch import nn

from pipeline import logs
from pipeline.features import engine
from pipeline.network import backbones, cuts, plans
from pipeline.network.backbones import Backbone, NoDropPathError, count_parameters
from pipeline.network.device import choose_device
from pipeline.network.flops import flops_per_image
from pipeline.network.plans import BackbonePlan, StrategyPlan
from pipeline.params import STORE_DTYPES, Params, Strategy, load_params
from pipeline.training import heads

LARGE_SIZE = 384  # px; above it, the log says what an image costs


def main() -> None:
    """Write one file for the backbone, and one for each strategy that runs."""
    params = load_params()
    device = choose_device(params.runtime.device)
    engine.check_precision("features.precision", params.features.precision, device)
    backbone = backbones.load(params.backbone, params.features.image_size)
    backbone = backbone.with_inputs(params.features.resize, params.dataset.jpeg_decoding)
    base = plan_backbone(backbone, params)
    strategies, value_bytes = {}, np.dtype(STORE_DTYPES[params.features.store_dtype]).itemsize
    for name in params.fine_tune.run:
        recipe, key = params.fine_tune.strategies[name], f"fine_tune.strategies.{name}"
        engine.check_precision(f"{key}.precision", recipe.precision, device)
        strategies[name] = plan_strategy(backbone, base, recipe, value_bytes, key)
    plans.write(base, "backbone")
    n, shape = len(base.taps), "x".join(map(str, base.feature_shape))
    where = f"{n} points from {base.taps[0].cut} to {base.cut}" if n else base.cut
    logs.log.info("%s, cut at %s: features of %s", backbone.name, where, shape)
    remark(base)
    for name, plan in strategies.items():
        plans.write(plan, name)
        share = plan.trained_parameters / max(base.parameters, 1)
        logs.log.info("%s: frozen until %s, trains %.1f %% of the base", name, plan.boundary, 100 * share)


def plan_backbone(backbone: Backbone, params: Params) -> BackbonePlan:
    """Resolve `features.cut`, measure the base, and check that the head fits it; ValueError if not."""
    features, pixels = params.features, _black_image(backbone)
    try:
        names = cuts.resolve_cuts(backbone, features.cut, features.pool)
    except ValueError as error:
        raise ValueError(f"params.yaml: features.cut: {error}") from None
    taps, cut = cuts.lay_out(backbone, names, features.pool) if len(names) > 1 else (), names[-1]
    if taps:
        pools = {tap.cut: cuts.Pool(tap.pool, tap.prefix_tokens) for tap in taps}
    else:
        whole, _ = cuts.prefix_and_suffix(backbone, cut, {cut: cuts.Pool(cuts.NONE, 0)})
        n = cuts.count_prefix_tokens(backbone, cut, _shape(whole.module, pixels), features.pool)
        pools = {cut: cuts.Pool(features.pool, n)}
    base, _ = cuts.prefix_and_suffix(backbone, cut, pools)
    shape = _shape(base.module, pixels)
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
        pool=pools[cut].kind,
        prefix_tokens=pools[cut].prefix_tokens,
        feature_shape=shape,
        parameters=count_parameters(base.module),
        flops_per_image=flops_per_image(base.module, pixels),
        taps=taps,
    )


def plan_strategy(backbone: Backbone, base: BackbonePlan, recipe: Strategy, value_bytes: int, key: str) -> StrategyPlan:
    """Resolve the freeze boundary and measure prefix and suffix.

    Raises ValueError, naming the parameter below `key`, if the boundary is behind the base, or if the suffix has no
    stochastic depth where the recipe sets it.
    """
    if recipe.drop_path is not None:
        try:
            backbone = backbones.load_planned(base, str(plans.BACKBONE), recipe.drop_path)
        except NoDropPathError as error:
            raise ValueError(f"params.yaml: {key}.drop_path: {error}; expected null") from None
    try:
        boundary = cuts.resolve(backbone, recipe.freeze_until)
        boundary = base.cut if boundary == cuts.ALL else boundary
        prefix, suffix = cuts.prefix_and_suffix(backbone, boundary, cuts.pools(base))
    except ValueError as error:
        raise ValueError(f"params.yaml: {key}.freeze_until: {error}") from None
    if recipe.drop_path and not backbones.has_drop_path(suffix):
        raise ValueError(
            f"params.yaml: {key}.drop_path: {backbone.name} has no stochastic depth behind the freeze boundary "
            f"{prefix.boundary}; expected null"
        )
    pixels = _black_image(backbone)
    with torch.no_grad():
        activation = prefix.module(pixels)
    is_cached = recipe.boundary_cache == "on" and prefix.boundary != cuts.NONE
    return StrategyPlan(
        recipe=recipe,
        boundary=prefix.boundary,
        trained_parameters=count_parameters(suffix),
        prefix_flops=flops_per_image(prefix.module, pixels),
        suffix_training_flops=flops_per_image(suffix.requires_grad_(True), activation, is_training=True),
        cached_bytes_per_image=value_bytes * activation[0].numel() if is_cached else 0,
    )


def remark(base: BackbonePlan) -> None:
    """Log the licence of the weights, and what an image costs where the published size is large."""
    if base.licence:
        logs.log.info("licence of the weights: %s", base.licence)
    if base.is_non_commercial:
        logs.log.warning("warning: the licence of the weights (%s) excludes commercial use", base.licence)
    size = base.preprocessing.crop
    if base.image_size is None and size > LARGE_SIZE:
        logs.log.info(
            "%s takes images of %d px: %.1f GFLOPs a view; features.image_size can be set to a smaller size, and the "
            "cost is about proportional to its square",
            base.choice.name,
            size,
            base.flops_per_image / 1e9,
        )


def _shape(module: nn.Module, pixels: torch.Tensor) -> tuple[int, ...]:
    """The shape of what comes out for one image."""
    with torch.no_grad():
        return tuple(module(pixels).shape[1:])


def _black_image(backbone: Backbone) -> torch.Tensor:
    """One image, as the base takes it."""
    return torch.zeros(1, *[backbone.preprocessing.crop] * 2, 3, dtype=torch.uint8)


if __name__ == "__main__":
    logs.run(main, memory=("features.image_size",))
