"""advise: what frozen features say before anything is fine-tuned; nothing depends on it.

`python -m pipeline.stages.advise SEED`

Reads   data/images.csv and the images it names, data/labels.csv, data/splits/seed_<SEED>.csv, data/plan/backbone.json
Writes  reports/advice.json

One pass over view 0 of the images gives pooled features of every block, and another the features of a network of the
same kind with random weights. Images of test are not looked at.
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from pipeline import logs
from pipeline.advice import findings, words
from pipeline.advice.probes import Sample
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Labels, Split
from pipeline.dataset.units import unit_of
from pipeline.features import extraction, store
from pipeline.features.extraction import Share
from pipeline.features.loading import open_loader
from pipeline.files import digest, write_json
from pipeline.logs import one_line
from pipeline.network import backbones, cuts, plans
from pipeline.network.backbones import Backbone
from pipeline.network.cuts import Pool, Prefix
from pipeline.network.device import choose_device
from pipeline.network.plans import BackbonePlan, Tap
from pipeline.params import EVERY_BLOCK, Params, load_params

ADVICE = Path("reports/advice.json")
POOLED = ("avg", "cls", "cls+avg")  # of features.pool; else avg


def main() -> None:
    """Write reports/advice.json."""
    params, plan = load_params(), plans.read_backbone()
    images, labels = manifest.read_images(), manifest.read_labels()
    if images.sha256 != labels.sha256:
        raise ValueError(f"{manifest.IMAGES}: other images than in {manifest.LABELS}; run: dvc repro index")
    split, options = manifest.read_split(int(sys.argv[1]), labels.image_id), params.advise
    torch.set_num_threads(params.threads)
    store.put_at(params.runtime.store)
    rows = choose_rows(labels, split, options.images)
    sample = make_sample(labels, rows)
    backbone = backbones.load_planned(plan, str(plans.BACKBONE))
    taps, own, remark = lay_out(backbone, plan)
    paths = extraction.locate(images, params.dataset.path)
    names = [images.sha256[row] for row in rows]
    prefixes = [prefix_of(backbone, taps)]
    if plan.choice.weights != "random":
        prefixes.append(prefix_of(untrained(plan), taps[-1:]))
    try:
        features, failure = compute(prefixes, names, paths, params)
    except ValueError as error:
        if len(taps) == 1 or not cannot_be_stored(error):
            raise
        taps, own = lay_out_end(backbone, plan)
        remark = f"only the end of the network is looked at: {one_line(error)}"
        features, failure = compute([prefix_of(backbone, taps), *prefixes[1:]], names, paths, params)
    ends = np.cumsum([tap.width for tap in taps])[:-1]
    blocks = dict(zip([tap.cut for tap in taps], np.split(features[0], ends, axis=1), strict=True))
    n_train = len(split.rows("train"))
    with threadpool_limits(1):  # small matrices; bytes that do not depend on `threads`
        found = findings.find(blocks, own, features[1] if len(features) > 1 else None, sample, n_train, options)
    network = {"name": plan.choice.name, "weights": plan.choice.weights, "licence": plan.licence}
    network |= {"parameters": plan.parameters, "flops_per_image": plan.flops_per_image}
    network["features"] = sum(tap.width for tap in taps if tap.cut in own)
    found |= {"network": network | {"image_size": plan.preprocessing.crop, "cuts": own}, "seed": split.seed}
    # Advice on the same images and labels can be compared
    looked_at = digest([(labels.sha256[row], labels.class_names[labels.label[row]]) for row in rows])
    found |= {"remarks": [line for line in (remark, failure) if line], "data_sha256": looked_at}
    n_all = sum(len(split.rows(part)) for part in ("train", "val"))
    found["left_out"] = n_all - len(rows)
    if found["cannot_tell"] and found["left_out"]:
        found["cannot_tell"] += f"; advise.images ({options.images:,}) left out {found['left_out']:,} images: raise it"
    write_json(ADVICE, found | {"words": words.paragraphs(found, options)})
    logs.log.info("%s: python -m pipeline advise prints it", ADVICE)


def choose_rows(labels: Labels, split: Split, most: int) -> np.ndarray:
    """Rows of train and val whose weight is above 0: of all units, or of so many at random that `most` are reached.

    Classes, each unit's being that of its first image, take turns, so that none is left out while there is room.
    """
    rows = np.flatnonzero(np.isin(split.split, ["train", "val"]) & (labels.weight > 0))
    if len(rows) <= most:
        return rows
    _, first, unit = np.unique(unit_of(labels)[rows], return_index=True, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(first))
    label = labels.label[rows][first][order]
    turn = pd.Series(label).groupby(label).cumcount()  # in which each unit of its class is taken
    order = order[np.lexsort((label, turn))]
    place = np.empty_like(order)
    place[order] = np.bincount(unit)[order].cumsum()
    return rows[place[unit] <= max(most, place.min())]


def make_sample(labels: Labels, rows: np.ndarray) -> Sample:
    """Labels, weights and units of these rows; classes and units are those that occur there."""
    classes, label = np.unique(labels.label[rows], return_inverse=True)
    _, unit = np.unique(unit_of(labels)[rows], return_inverse=True)
    return Sample(label, labels.weight[rows], unit, len(classes))


def lay_out(backbone: Backbone, plan: BackbonePlan) -> tuple[tuple[Tap, ...], list[str], str]:
    """Where features are taken: every block, and the cuts of the plan; those of the plan; and a remark, "" if none.

    Where blocks cannot be cut, or pooled, only the end of the network is left, and the remark says why.
    """
    own = [tap.cut for tap in plan.taps] or [plan.cut]
    pool, problem = pool_of(plan), ""
    try:
        blocks = cuts.resolve_cuts(backbone, EVERY_BLOCK, pool)
    except ValueError as error:
        blocks, problem = [cuts.ALL], str(error)
    for names in (dict.fromkeys([*blocks, *own]), dict.fromkeys(blocks)):
        try:
            ordered = cuts.resolve_cuts(backbone, tuple(names), pool) if len(names) > 1 else [*names]
            taps = cuts.lay_out(backbone, ordered, pool)
        except ValueError as error:
            problem = problem or str(error)
            continue
        kept = own if {*own} <= {*ordered} else [cuts.ALL]
        return taps, kept, f"not every block of {backbone.name} can be looked at: {problem}" if problem else ""
    return *lay_out_end(backbone, plan), f"only the end of the network is looked at: {problem}"


def lay_out_end(backbone: Backbone, plan: BackbonePlan) -> tuple[tuple[Tap, ...], list[str]]:
    """The same with the end of the network alone."""
    return cuts.lay_out(backbone, [cuts.ALL], pool_of(plan)), [cuts.ALL]


def pool_of(plan: BackbonePlan) -> str:
    """How features are pooled: as the plan does it, or else by their mean."""
    return next((each for each in (*(tap.pool for tap in plan.taps), plan.pool) if each in POOLED), "avg")


def prefix_of(backbone: Backbone, taps: Sequence[Tap]) -> Prefix:
    """The network up to the last of the taps, whose pooled features it gives."""
    pools = {tap.cut: Pool(tap.pool, tap.prefix_tokens) for tap in taps}
    return cuts.prefix_and_suffix(backbone, taps[-1].cut, pools)[0]


def untrained(plan: BackbonePlan) -> Backbone:
    """The network of the plan with random weights and the same inputs."""
    choice = plan.choice.model_copy(update={"weights": "random", "checkpoint_key": None})
    given = plan.preprocessing
    return backbones.load(choice, plan.image_size).with_inputs(given.geometry, given.jpeg_decoding)


def compute(
    prefixes: Sequence[Prefix], names: Sequence[str], paths: dict[str, Path], params: Params
) -> tuple[list[np.ndarray], str]:
    """Features (len(names), d) of view 0 for each prefix, from the store; what it lacks is computed.

    A prefix behind the first whose features are not finite, or are too large to store, is left out; then also why.
    """
    features, runtime = params.features, params.runtime
    device, found, failure = choose_device(runtime.device), [], ""
    preprocessing = prefixes[0].backbone.preprocessing
    rows: list[Any] = [(name, 0) for name in names]
    with closing(open_loader(paths, preprocessing, params.augmentation, [0], runtime, device)) as loader:
        for number, prefix in enumerate(prefixes):
            computation = extraction.prepare(prefix, params.augmentation, features, device)
            try:
                filled = extraction.fill(computation, loader, rows, runtime.store_max_gb, Share(0, 1))
                found.append(filled.read(rows).astype(np.float32))
            except ValueError as error:
                if not number or not cannot_be_stored(error):
                    raise
                failure = "the network with random weights gives features that are not finite: no comparison with it"
    return found, failure


def cannot_be_stored(error: ValueError) -> bool:
    """Whether features are not finite, or too large for `features.store_dtype`."""
    return any(part in str(error) for part in ("not finite", "cannot hold"))


if __name__ == "__main__":
    logs.run(main, memory=("advise.images", "features.batch_size", "features.image_size", logs.WORKERS))
