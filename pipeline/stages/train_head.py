"""train_head: fit the dense head on the cached features, once per split.

Reads   data/features.h5, data/labels.csv, data/splits/
Writes  models/feature_extraction/seed_<s>.safetensors, .json
        reports/runs/feature_extraction/seed_<s>/     logits of validation and test, penalty path
"""

import json

from pipeline import artifacts, engine, feature_store, heads, logs, manifest
from pipeline.artifacts import Card, Cost, Run
from pipeline.feature_store import Features
from pipeline.images import Preprocessing
from pipeline.manifest import Labels, Split
from pipeline.params import HEAD_ONLY, Augmentation, BackboneChoice, Params, load_params


def main() -> None:
    """Fit one head per split."""
    params = load_params()
    features = feature_store.read()
    labels = manifest.read_labels()
    if features.sha256 != labels.sha256:
        raise ValueError(f"{feature_store.FEATURES}: other images than in {manifest.LABELS}; run: dvc repro")
    if params.evaluation.views > features.values.shape[1]:
        raise ValueError(f"{feature_store.FEATURES}: fewer views than evaluation.views; run: dvc repro")
    for split in manifest.read_splits(manifest.SPLITS, labels.image_id):
        fit(features, labels, split, params)


def fit(features: Features, labels: Labels, split: Split, params: Params) -> None:
    """Fit, save the model and the run, log one line."""
    train, val, test = (split.rows(name) for name in ("train", "val", "test"))
    fitted = heads.fit(
        features.values,
        labels.label,
        labels.weight,
        len(labels.class_names),
        train,
        val,
        params.evaluation.views,
        params.head,
        split.seed,
        engine.choose_device(params.runtime.device),
    )
    made = features.provenance
    n_parameters = sum(parameter.numel() for parameter in fitted.head.parameters())
    passes = len(train) * features.values.shape[1]
    # A row's way through the head and back is three products with its weights, two operations each
    flops = passes * made["flops_per_image"] + 6 * n_parameters * fitted.rows_seen
    cost = Cost(n_parameters, flops, passes)
    card = Card(
        strategy=HEAD_ONLY,
        seed=split.seed,
        class_names=labels.class_names,
        backbone=BackboneChoice.model_validate_json(json.dumps(made["backbone_choice"])),
        image_size=made["image_size"],
        preprocessing=Preprocessing(**made["preprocessing"]),
        augmentation=Augmentation.model_validate_json(json.dumps(made["augmentation"])),
        evaluation_views=params.evaluation.views,
        freeze_until="all",
        head=params.head,
        feature_dim=features.values.shape[2],
        weights_sha256=made["weights_sha256"],
        cost=cost,
    )
    artifacts.save_model(artifacts.MODELS / HEAD_ONLY, card, fitted.head, None)
    logits = {
        name: heads.predict(fitted.head, features.values[rows], params.evaluation.views)
        for name, rows in (("val", val), ("test", test))
    }
    run = Run(
        HEAD_ONLY,
        split.seed,
        val,
        logits["val"],
        test,
        logits["test"],
        cost,
        chosen={"strength": fitted.strength},
        curve=[],
    )
    artifacts.save_run(artifacts.RUNS, run)
    nll = min(entry["val_nll"] for entry in fitted.path)
    logs.log.info("head %d: strength %g, val loss %.4f", split.seed, fitted.strength, nll)


if __name__ == "__main__":
    logs.run(main)
