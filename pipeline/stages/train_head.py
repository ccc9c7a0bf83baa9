"""train_head: fit the dense head on the cached features, once per split.

Reads   data/features.h5, data/labels.csv, data/splits/; data/weights/ for `head.kind: pretrained`
Writes  models/feature_extraction/seed_<s>.safetensors, .json
        reports/runs/feature_extraction/seed_<s>/     predictions for validation and test
"""

from torch import nn

from pipeline import logs
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Labels, Split
from pipeline.features import hdf5
from pipeline.features.hdf5 import Features
from pipeline.network.device import choose_device
from pipeline.params import HEAD_ONLY, Params, load_params
from pipeline.training import heads
from pipeline.training.heads import Examples, Selection
from pipeline.training.models import Card, save_model
from pipeline.training.runs import Cost, Predictions, Run, save_run


def main() -> None:
    """Fit one head per split."""
    params = load_params()
    features, labels = hdf5.read_features(), manifest.read_labels()
    if features.sha256 != labels.sha256 or params.evaluation.views > features.values.shape[1]:
        raise ValueError(f"{hdf5.FEATURES}: other images, or fewer views, than expected; run: dvc repro")
    dense = dense_layers(features) if params.head.kind == "pretrained" else nn.Identity()
    for seed in params.split.seeds:
        fit(features, labels, manifest.read_split(seed, labels.image_id), params, dense)


def dense_layers(features: Features) -> nn.Module:
    """The layers of the pretrained network behind the cached features, without the classification layer."""
    from pipeline.network import backbones, cuts

    plan = features.provenance.backbone
    _, dense = cuts.split(backbones.load_planned(plan, str(hdf5.FEATURES)), plan.cut)
    return dense


def fit(features: Features, labels: Labels, split: Split, params: Params, dense: nn.Module) -> None:
    """Fit, save the model and its predictions for validation and test, log one line."""
    views, made = params.evaluation.views, features.provenance
    selected = {name: Selection(features.values, split.rows(name)) for name in ("train", "val", "test")}
    train, val = (
        Examples(selected[name], labels.label[split.rows(name)], labels.weight[split.rows(name)])
        for name in ("train", "val")
    )
    device = choose_device(params.runtime.device)
    fitted = heads.fit(
        train, val, len(labels.class_names), views, params.head, dense, split.seed, params.threads, device
    )
    n_params = sum(parameter.numel() for parameter in fitted.head.parameters())
    passes = train.features.shape[0] * train.features.shape[1]
    n_read = passes + views * (len(split.rows("val")) + len(split.rows("test")))
    cost = Cost(
        trainable_params=n_params,
        # Forward and backward, a row takes three products with the head's weights, of two operations each
        train_flops=passes * made.backbone.flops_per_image + 6 * n_params * fitted.rows_seen,
        base_passes=passes,
        cached_bytes=n_read * features.values[0, 0].nbytes,
    )
    card = Card(
        strategy=HEAD_ONLY,
        seed=split.seed,
        class_names=tuple(labels.class_names),
        backbone=made.backbone,
        augmentation=made.augmentation,
        evaluation_views=views,
        freeze_until="all",
        head=params.head,
        cost=cost,
    )
    save_model(card, fitted.head, None)
    val_predictions, test_predictions = (
        Predictions(split.rows(name), heads.predict(fitted.head, selected[name], views)) for name in ("val", "test")
    )
    network = {
        "params": made.backbone.parameters + n_params,
        "boundary": made.backbone.cut,
        "largest_rounding": made.largest_rounding,
    }
    chosen = {"strength": fitted.strength, "val_nll": {f"{s}": nll for s, nll in fitted.val_nll.items()}}
    save_run(Run(HEAD_ONLY, split.seed, cost, chosen, network, [], val_predictions, test_predictions))
    logs.log.info("head %d: strength %g, val loss %.4f", split.seed, fitted.strength, min(fitted.val_nll.values()))


if __name__ == "__main__":
    logs.run(main)
