"""The splits of the default data are those that every published figure of this repository is about."""

import hashlib
from pathlib import Path

import pandas as pd

from pipeline.dataset import manifest
from pipeline.dataset.decoding import sha256
from pipeline.dataset.manifest import Labels
from pipeline.dataset.units import make_units
from pipeline.ingest import sources, splits
from pipeline.params import load_params


def test_the_default_splits_of_elpv_never_change(tmp_path: Path):
    sources.elpv(tmp_path)
    table = pd.read_csv(tmp_path / "labels.csv", dtype=str).sort_values("path")
    names, none = sorted(set(table["label"])), [""] * len(table)
    labels = Labels(
        image_id=list(table["path"]),
        sha256=[sha256((tmp_path / path).read_bytes()) for path in table["path"]],
        label=table["label"].map(names.index).to_numpy(),
        weight=table["weight"].astype(float).to_numpy(),
        group=none,
        near_duplicate_group=none,
        stratum=list(table["stratum"]),
        subset=list(table["subset"]),
        given_split=none,
        class_names=names,
    )
    options = load_params().split
    units, all_seeds = make_units(labels), hashlib.sha256()
    for seed in options.seeds:
        manifest.write_split(splits.draw(labels, units, options, seed), tmp_path)
        all_seeds.update((tmp_path / f"seed_{seed}.csv").read_bytes())
    assert all_seeds.hexdigest() == "edf566a3c12aca5c5f4277965d4b00de2b033c3a40eb76d407c81409502d4330"
