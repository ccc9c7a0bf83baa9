"""compare: what each strategy reaches on the test images, how sure that is, what it costs, and which one to take.

Reads   reports/runs/, data/labels.csv, data/splits/
Writes  reports/comparison.json, comparison.md, details.json
        reports/curves.json, reliability.json, cost.json, confusion/<strategy>.json     (DVC plots)

With --against REV it prints the Markdown of a pull request instead, and fails if a guarded metric is worse.

Strategies are compared over the seeds that all of them have. Runs that params.yaml does not list are deleted first,
or a clean clone would see other runs than this one.
"""

import argparse
import re
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from pipeline import artifacts, comparison, logs, manifest, plots, pull_request, tables
from pipeline.artifacts import Run
from pipeline.files import write_json, write_text
from pipeline.manifest import Split
from pipeline.params import HEAD_ONLY, load_params

REPORTS = Path("reports")


def main() -> None:
    """`python -m pipeline.stages.compare [--against REV [--pictures DIR]]`."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.stages.compare", description="Compare the strategies.")
    parser.add_argument("--against", metavar="REV", help="print the Markdown of a pull request against this revision")
    parser.add_argument("--pictures", metavar="DIR", type=Path, help="with pictures, written into this directory")
    arguments = parser.parse_args()
    if arguments.against is None:
        compare()
    else:
        report(arguments.against, arguments.pictures)


def report(revision: str, pictures: Path | None) -> None:
    """Print the Markdown of a pull request; ValueError if it makes a guarded metric worse by more than is tolerated."""
    guard = load_params().compare.guard
    (after, recommendation), before = pull_request.here(), pull_request.at(revision)
    verdicts = pull_request.judge(before, after, guard)
    print(pull_request.as_markdown(revision, before, after, recommendation, verdicts))
    if pictures is not None:
        print(pull_request.draw(revision, pictures))
    worse = [str(verdict) for verdict in verdicts if not verdict.holds]
    if worse:
        raise ValueError(f"worse than in {revision}: {'; '.join(worse)}")


def compare() -> None:
    """Write every report."""
    params = load_params()
    labels = manifest.read_labels()
    splits = {seed: manifest.read_split(seed, labels.image_id) for seed in sorted(params.split.seeds)}
    names = [HEAD_ONLY, *params.fine_tune.run]
    common = list(params.fine_tune.seeds if params.fine_tune.run else splits)
    n_train = float(np.mean([np.isin(splits[seed].split, ("train", "val")).sum() for seed in common]))
    delete_unlisted({name: set(common) for name in names} | {HEAD_ONLY: set(splits)})
    runs = {name: [read_run(name, splits[seed]) for seed in common] for name in names}
    every_head = [read_run(HEAD_ONLY, split) for split in splits.values()]

    details = comparison.rounded(comparison.assemble(runs, every_head, labels, n_train, params.compare))
    strategies, table = details["strategies"], tables.as_markdown(details)
    summary = {name: comparison.summarise(strategy) for name, strategy in strategies.items()}
    write_json(REPORTS / "comparison.json", summary)
    write_json(REPORTS / "details.json", details)
    write_text(REPORTS / "comparison.md", table)
    compared = {name: strategies[name] for name in names}
    write_json(REPORTS / "curves.json", comparison.rounded(plots.curves(runs, compared)))
    write_json(REPORTS / "reliability.json", plots.reliability(compared))
    write_json(REPORTS / "cost.json", plots.cost(compared))
    for name, strategy in compared.items():
        write_json(REPORTS / "confusion" / f"{name}.json", plots.confusion(name, strategy, labels.class_names))
    logs.log.info("\n%s", table)


def delete_unlisted(listed: dict[str, set[int]]) -> None:
    """Delete runs and models of other strategies and seeds than those listed."""
    for path in [*artifacts.RUNS.glob("*/seed_[0-9]*"), *artifacts.MODELS.glob("*/seed_[0-9]*")]:
        seed = re.fullmatch(r"seed_(\d+)(\.\w+)?", path.name)
        if seed and int(seed[1]) not in listed.get(path.parent.name, ()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in [*artifacts.RUNS.glob("*"), *artifacts.MODELS.glob("*")]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def read_run(name: str, split: Split) -> Run:
    """Read a run; ValueError if it is about other images than the split says."""
    try:
        run = artifacts.read_run(name, split.seed)
    except (SafetensorError, LookupError, TypeError, ValueError):
        raise ValueError(
            f"{artifacts.RUNS / name}/seed_{split.seed}: damaged, or of another version; run: dvc repro"
        ) from None
    for rows, logits, part in ((run.val_rows, run.val_logits, "val"), (run.test_rows, run.test_logits, "test")):
        if not np.isfinite(logits).all():
            raise ValueError(f"{name}, seed {split.seed}: {part} logits that are not finite; it has diverged")
        if not np.array_equal(rows, split.rows(part)):
            raise ValueError(f"{name}, seed {split.seed}: other {part} images than in the split; run: dvc repro")
    return run


if __name__ == "__main__":
    logs.run(main)
