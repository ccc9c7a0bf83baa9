"""train_head: fit the dense head on the cached features, once per split.

Reads   data/features.h5, data/labels.csv, data/splits/; data/weights/ for `head.kind: pretrained`
Writes  models/feature_extraction/seed_<s>.safetensors, .json
        reports/runs/feature_extraction/seed_<s>/     predictions for validation and test, candidates
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from pipeline import logs
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Labels, Split
from pipeline.features import hdf5
from pipeline.features.hdf5 import Features
from pipeline.network.backbones import count_parameters
from pipeline.network.device import choose_device
from pipeline.params import HEAD_ONLY, Params, load_params
from pipeline.training import calibration, heads, novelty
from pipeline.training.heads import Examples, Selection
from pipeline.training.novelty import Novelty
from pipeline.training.runs import Cost, Predictions, Run, save_run
from pipeline.training.saved_networks import Card, save_model

CHUNK = 1024  # images whose features pass through a head at a time


def main() -> None:
    """Fit one head per split."""
    params = load_params()
    features, labels = hdf5.read_features(), manifest.read_labels()
    if features.sha256 != labels.sha256 or features.provenance.evaluation_views != params.evaluation.views:
        raise ValueError(f"{hdf5.FEATURES}: other images, or other views, than expected; run: dvc repro")
    torch.set_num_threads(params.threads)
    dense = dense_layers(features) if params.head.kind == "pretrained" else nn.Identity()
    splits = (manifest.read_split(seed, labels.image_id) for seed in params.split.seeds)
    heads.warn([fit(features, labels, split, params, dense) for split in splits], "head")


def dense_layers(features: Features) -> nn.Module:
    """The layers of the pretrained network behind the cached features, without the classification layer.

    Raises ValueError if its weights changed since the features were computed.
    """
    from pipeline.network import backbones, cuts

    plan = features.provenance.backbone
    _, dense = cuts.split(backbones.load_planned(plan, str(hdf5.FEATURES)), plan.cut)
    return dense


def fit(features: Features, labels: Labels, split: Split, params: Params, dense: nn.Module) -> heads.RegularizationPath:
    """Fit, save the model and its predictions for validation and test, log one line."""
    made, base = features.provenance, features.provenance.backbone
    rows = {name: split.rows(name) for name in ("train", "val", "test")}
    selected = {
        name: Selection(features.values if name == "train" else features.evaluation, rows[name]) for name in rows
    }
    train, val = (
        Examples(selected[name], labels.label[rows[name]], labels.weight[rows[name]]) for name in ("train", "val")
    )
    torch.manual_seed(split.seed)
    head = heads.build(features.values.shape[2:], len(labels.class_names), params.head, dense)
    fitted = heads.fit(head.to(choose_device(params.runtime.device)), train, val, params.head)
    n_params = count_parameters(fitted.head)
    passes = len(rows["train"]) * len({*made.training_views})
    n_evaluated = features.evaluation.shape[1] * (len(rows["val"]) + len(rows["test"]))
    cost = Cost(
        trainable_params=n_params,
        train_flops=passes * base.flops_per_image + fitted.train_flops,
        base_passes=passes,
        cached_bytes=(passes + n_evaluated) * features.values[0, 0].nbytes,
    )
    val_predictions, test_predictions = (
        Predictions(rows[name], heads.predict(fitted.head, selected[name])) for name in ("val", "test")
    )
    card = Card(
        strategy=HEAD_ONLY,
        seed=split.seed,
        class_names=tuple(labels.class_names),
        backbone=base,
        augmentation=made.augmentation,
        evaluation_views=params.evaluation.views,
        freeze_until="all",
        head=params.head,
        cost=cost,
        temperature=calibration.temperature(val_predictions.log_probability, val.label, val.weight),
    )
    save_model(card, fitted.head, None, locate_training_images(fitted.head, features, labels, rows))
    network = {"params": base.parameters + n_params, "boundary": base.cut, "largest_rounding": made.largest_rounding}
    if base.taps:
        shares = heads.weight_shares(fitted.head, selected["train"], base.widths)
        network |= {"widths": base.widths, "weight_shares": shares}
    path = fitted.path
    chosen = vars(path) | {"val_nll": {f"{strength}": nll for strength, nll in path.val_nll.items()}}
    run = Run(
        HEAD_ONLY, split.seed, cost, chosen, network, [], {}, val_predictions, test_predictions, fitted.candidates
    )
    save_run(run)
    logs.log.info("head %d: strength %g, val loss %.4f", split.seed, path.strength, min(path.val_nll.values()))
    return path


def locate_training_images(
    head: nn.Sequential, features: Features, labels: Labels, rows: Mapping[str, np.ndarray]
) -> Novelty:
    """Where the training images lie in the penultimate layer, and how far the validation images are from them."""
    layers, width = novelty.penultimate(head.eval())
    device = next(head.parameters()).device
    train, val = (rows[name][novelty.sample(labels.label[rows[name]], width)] for name in ("train", "val"))

    @torch.inference_mode()
    def pass_through(images: np.ndarray) -> np.ndarray:
        chunks = (features.evaluation[images[i : i + CHUNK], 0] for i in range(0, len(images), CHUNK))
        return torch.cat([layers(torch.from_numpy(chunk).float().to(device)).cpu() for chunk in chunks]).numpy()

    return novelty.fit(pass_through(train), labels.label[train], pass_through(val), labels.label[val])


if __name__ == "__main__":
    logs.run(main, memory=("features.views", "features.image_size", "head.batch_size"))
