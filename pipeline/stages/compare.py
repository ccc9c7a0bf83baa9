"""compare: metrics of every strategy on the test images, their uncertainty, the cost, and a recommendation.

Reads   reports/runs/, data/labels.csv, data/near_duplicates.csv, data/splits/
Writes  reports/metrics/<strategy>.json, comparison.md, details.json
        reports/outcomes.json     which test images are predicted correctly, for pull requests
        reports/curves.json, reliability.json, cost.json, confusion/<strategy>.json     (DVC plots)

Strategies are compared on the seeds that all of them have. Runs that params.yaml does not list are deleted first:
otherwise a clean clone would have other runs than this checkout.
"""

import re
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from pipeline import logs
from pipeline.comparison import details, plots, tables, tested_images
from pipeline.comparison.details import Data
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Split
from pipeline.dataset.near_duplicates import find_twins
from pipeline.dataset.units import unit_of
from pipeline.files import write_json, write_text
from pipeline.params import HEAD_ALL_SEEDS, HEAD_ONLY, REFERENCES, load_params
from pipeline.training.runs import MODELS, RUNS, Run, read_run

REPORTS = Path("reports")
METRICS, CONFUSION = REPORTS / "metrics", REPORTS / "confusion"


def main() -> None:
    """Write every report."""
    params = load_params()
    labels = manifest.read_labels()
    splits = {seed: manifest.read_split(seed, labels.image_id) for seed in sorted(params.split.seeds)}
    names = [HEAD_ONLY, *params.fine_tune.run]
    common = list(params.fine_tune.seeds if params.fine_tune.run else splits)
    used_before = {"val": ("train",), "test": ("train", "val")}
    n_train = {
        name: float(np.mean([np.isin(splits[seed].split, used).sum() for seed in common]))
        for name, used in used_before.items()
    }
    delete_unlisted({name: set(common) for name in names} | {name: set(splits) for name in (HEAD_ONLY, *REFERENCES)})
    runs, references = (
        {name: [read_checked(name, splits[seed]) for seed in common] for name in these} for these in (names, REFERENCES)
    )
    every_head = [read_checked(HEAD_ONLY, split) for split in splits.values()]
    pairs = manifest.read_near_duplicates()
    twins = {seed: find_twins(labels, split, pairs).tested for seed, split in splits.items()}
    n_folds = len(splits) if params.split.method == "folds" else 0
    data = Data(labels, unit_of(labels), params.compare, twins, n_folds)

    found = details.round_floats(details.assemble(runs, every_head, references, data, n_train))
    strategies, table = found["strategies"], tables.as_markdown(found)
    compared = {name: strategies[name] for name in names}
    write_json(REPORTS / "details.json", found)
    write_text(REPORTS / "comparison.md", table)
    write_json(REPORTS / "outcomes.json", tested_images.encode({**runs, HEAD_ALL_SEEDS: every_head}, data))
    write_json(REPORTS / "curves.json", details.round_floats(plots.curves(runs, labels)))
    write_json(REPORTS / "reliability.json", plots.reliability(compared))
    write_json(REPORTS / "cost.json", plots.cost(compared))
    for directory in (METRICS, CONFUSION):  # where a run by hand would leave files of strategies no longer listed
        shutil.rmtree(directory, ignore_errors=True)
    for name, strategy in strategies.items():
        write_json(METRICS / f"{name}.json", details.summarise(strategy))
    for name, strategy in compared.items():
        write_json(CONFUSION / f"{name}.json", plots.confusion(name, strategy, labels.class_names))
    logs.log.info("\n%s", table)


def delete_unlisted(listed: dict[str, set[int]]) -> None:
    """Delete runs and models of other strategies and seeds than those listed."""
    for path in [*RUNS.glob("*/seed_[0-9]*"), *MODELS.glob("*/seed_[0-9]*")]:
        seed = re.fullmatch(r"seed_(\d+)(\.\w+)?", path.name)
        if seed and int(seed[1]) not in listed.get(path.parent.name, ()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in [*RUNS.glob("*"), *MODELS.glob("*")]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def read_checked(name: str, split: Split) -> Run:
    """Read a run; ValueError if it is damaged, not finite, or about other images than the split."""
    try:
        run = read_run(name, split.seed)
        candidates, expected = run.candidates, (len(run.candidates.names), len(run.val.rows))
        if not candidates.predicted.shape == candidates.true_log_probability.shape == expected:
            raise ValueError("candidates that are not of the validation images")
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        problem = f"damaged, or of another version ({logs.one_line(error)})"
        raise ValueError(f"{RUNS / name}/seed_{split.seed}: {problem}; run: dvc repro") from None
    for role, predictions in (("val", run.val), ("test", run.test)):
        if not np.isfinite(predictions.log_probability).all():
            raise ValueError(f"{name}, seed {split.seed}: {role} predictions are not finite; the run has diverged")
        if not np.array_equal(predictions.rows, split.rows(role)):
            raise ValueError(f"{name}, seed {split.seed}: other {role} images than in the split; run: dvc repro")
    return run


if __name__ == "__main__":
    logs.run(main)
