"""train_head: fit the dense head on the cached features, once per split.

Reads   data/features.h5, data/labels.csv, data/splits/; data/weights/ for `head.kind: pretrained`
Writes  models/feature_extraction/seed_<s>.safetensors, .json
        reports/runs/feature_extraction/seed_<s>/     logits of validation and test
"""

from torch import nn

from pipeline import artifacts, backbones, cuts, engine, hdf5, heads, logs, manifest
from pipeline.artifacts import Card, Cost, Run
from pipeline.hdf5 import Features
from pipeline.heads import Examples, Selection
from pipeline.manifest import Labels, Split
from pipeline.params import HEAD_ONLY, BackboneChoice, Params, load_params


def main() -> None:
    """Fit one head per split."""
    params = load_params()
    features, labels = hdf5.read_features(), manifest.read_labels()
    dense = dense_layers(features) if params.head.kind == "pretrained" else nn.Identity()
    if features.sha256 != labels.sha256 or params.evaluation.views > features.values.shape[1]:
        raise ValueError(f"{hdf5.FEATURES}: other images, or fewer views, than are wanted; run: dvc repro")
    for split in manifest.read_splits(labels.image_id):
        fit(features, labels, split, params, dense)


def dense_layers(features: Features) -> nn.Module:
    """What the network that made the features does behind them."""
    made = features.provenance
    backbone = backbones.load(BackboneChoice(**made["backbone"]), made["image_size"])
    if backbone.weights_sha256 != made["computation"]["weights_sha256"]:
        raise ValueError(f"{hdf5.FEATURES}: made with other weights; run: dvc repro extract")
    _, dense = cuts.split(backbone, made["computation"]["cut"])
    return dense


def fit(features: Features, labels: Labels, split: Split, params: Params, dense: nn.Module) -> None:
    """Fit, save the model and what it says of validation and test, log one line."""
    views, made = params.evaluation.views, features.provenance
    train, val = (
        Examples(Selection(features.values, rows), labels.label[rows], labels.weight[rows])
        for rows in (split.rows("train"), split.rows("val"))
    )
    device = engine.choose_device(params.runtime.device)
    fitted = heads.fit(train, val, len(labels.class_names), views, params.head, dense, split.seed, device)
    n_params = sum(parameter.numel() for parameter in fitted.head.parameters())
    passes = train.features.shape[0] * train.features.shape[1]
    # A row's way through the head and back is three products with its weights, of two operations each
    flops = passes * made["flops_per_image"] + 6 * n_params * fitted.rows_seen
    n_read = passes + views * (len(split.rows("val")) + len(split.rows("test")))
    cost = Cost(
        trainable_params=n_params,
        train_flops=flops,
        base_passes=passes,
        cached_bytes=n_read * features.values[0, 0].nbytes,
    )
    described = {
        "strategy": HEAD_ONLY,
        "seed": split.seed,
        "class_names": labels.class_names,
        "backbone": made["backbone"],
        "image_size": made["image_size"],
        "preprocessing": made["computation"]["preprocessing"],
        "augmentation": made["augmentation"],
        "evaluation_views": views,
        "cut": made["computation"]["cut"],
        "pool": made["computation"]["pool"],
        "freeze_until": "all",
        "head": params.head.model_dump(mode="json"),
        "feature_shape": features.values.shape[2:],
        "weights_sha256": made["computation"]["weights_sha256"],
        "cost": cost.model_dump(),
    }
    artifacts.save_model(Card.model_validate(described, strict=False), fitted.head, None)
    said = {}
    for part in ("val", "test"):
        said[f"{part}_rows"] = split.rows(part)
        said[f"{part}_logits"] = heads.predict(fitted.head, Selection(features.values, split.rows(part)), views)
    network = {
        "params": made["params"] + n_params,
        "boundary": made["computation"]["cut"],
        "largest_rounding": made["largest_rounding"],
    }
    chosen = {"strength": fitted.strength, "val_nll": {f"{s}": nll for s, nll in fitted.val_nll.items()}}
    artifacts.save_run(Run(HEAD_ONLY, split.seed, cost, chosen, network, curve=[], **said))
    logs.log.info("head %d: strength %g, val loss %.4f", split.seed, fitted.strength, min(fitted.val_nll.values()))


if __name__ == "__main__":
    logs.run(main)
