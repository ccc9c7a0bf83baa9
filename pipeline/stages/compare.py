"""compare: what each strategy reaches on the test images, and what it costs.

Reads   reports/runs/, data/labels.csv, data/splits/
Writes  reports/comparison.json, comparison.md, details.json
        reports/curves.json, reports/confusion/<strategy>.json     (DVC plots)

Strategies are compared over the seeds that all of them have. Runs that params.yaml does not list are deleted first,
or a clean clone would see other runs than this one.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import artifacts, logs, manifest, metrics, statistics
from pipeline.artifacts import Run
from pipeline.files import write_json, write_text
from pipeline.manifest import Labels, Split
from pipeline.params import HEAD_ALL_SEEDS, HEAD_ONLY, load_params
from pipeline.statistics import Predictions

REPORTS = Path("reports")


def main() -> None:
    """Write every report."""
    params = load_params()
    labels = manifest.read_labels()
    splits = {split.seed: split for split in manifest.read_splits(labels.image_id)}
    names = [HEAD_ONLY, *params.fine_tune.run]
    common = list(params.fine_tune.seeds if params.fine_tune.run else splits)
    delete_unlisted({name: set(common) for name in names} | {HEAD_ONLY: set(splits)})
    runs = {name: [read_run(name, splits[seed]) for seed in common] for name in names}
    runs[HEAD_ALL_SEEDS] = [read_run(HEAD_ONLY, split) for split in splits.values()]
    scored = {name: [score(run, labels) for run in runs[name]] for name in runs}

    write_json(REPORTS / "comparison.json", {name: summarise(results) for name, results in scored.items()})
    details = {name: {**intervals(runs[name], labels), "runs": scored[name]} for name in runs}
    write_json(REPORTS / "details.json", rounded(details))
    table = as_markdown(scored, params.compare.baseline, common)
    write_text(REPORTS / "comparison.md", table)
    curves = [{"run": f"{name}-{run.seed}", **line} for name in names for run in runs[name] for line in run.curve]
    write_json(REPORTS / "curves.json", rounded(curves))
    for name in names:
        write_json(REPORTS / "confusion" / f"{name}.json", confusion(runs[name], labels))
    logs.log.info("\n%s", table)


def delete_unlisted(listed: dict[str, set[int]]) -> None:
    """Delete runs and models of other strategies and seeds than those listed."""
    for path in [*artifacts.RUNS.glob("*/seed_[0-9]*"), *artifacts.MODELS.glob("*/seed_[0-9]*")]:
        if int(path.name.removeprefix("seed_").partition(".")[0]) not in listed.get(path.parent.name, ()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in [*artifacts.RUNS.glob("*"), *artifacts.MODELS.glob("*")]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def read_run(name: str, split: Split) -> Run:
    """Read a run; ValueError if it is about other images than the split says."""
    run = artifacts.read_run(name, split.seed)
    for rows, part in ((run.val_rows, "val"), (run.test_rows, "test")):
        if not np.array_equal(rows, split.rows(part)):
            raise ValueError(f"{name}, seed {split.seed}: other {part} images than in the split; run: dvc repro")
    return run


def score(run: Run, labels: Labels) -> dict[str, Any]:
    """Metrics of one run on validation and test, its cost and what was chosen."""
    scores = {
        part: {"n": len(rows), **metrics.score(logits, labels.label[rows], labels.weight[rows])}
        for part, rows, logits in (("val", run.val_rows, run.val_logits), ("test", run.test_rows, run.test_logits))
    }
    return {"seed": run.seed, **scores, "cost": run.cost.model_dump(), "chosen": run.chosen, "network": run.network}


def intervals(runs: Sequence[Run], labels: Labels) -> dict[str, Any]:
    """Mean accuracy over the seeds with its 95 % interval, on validation and test."""
    found = {}
    for part in ("val", "test"):
        said = [Predictions(getattr(run, f"{part}_rows"), getattr(run, f"{part}_logits")) for run in runs]
        accuracy = statistics.intervals(said, labels.label, labels.weight)["accuracy"]
        if accuracy is not None:
            found[part] = {"accuracy": accuracy.value, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high}
    return found


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, of the metrics to 6 digits (None where one is undefined)."""

    def mean(section: str, name: str) -> float | None:
        values = [result[section][name] for result in results]
        return None if None in values else float(np.mean(values))

    test = {name: mean("test", name) for name in results[0]["test"] if name != "n"}
    cost = {name: round(mean("cost", name) or 0) for name in results[0]["cost"]}
    return {"test": rounded(test), "cost": cost, "seeds": len(results)}


def rounded(value: Any) -> Any:  # noqa: ANN401
    """JSON with every float to 6 digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 6) if isinstance(value, float) else value


def as_markdown(scored: dict[str, list[dict[str, Any]]], baseline: str, common: Sequence[int]) -> str:
    """The table for people: means over seeds, with the standard deviation where there are several."""
    n_test = sorted({result["test"]["n"] for result in scored[HEAD_ALL_SEEDS]})
    lines = [
        f"Test accuracy in %, weighted by the images' weights, on {' to '.join(map(str, n_test))} test images a seed; "
        f"mean ± standard deviation over n seeds. Compared on seed {', '.join(map(str, common))}.",
        "",
        f"| strategy | n | accuracy | gain over {baseline} | balanced accuracy | NLL (nats) | trained parameters "
        "| training TFLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reference = summarise(scored[baseline])["test"]["accuracy"]
    for name, results in scored.items():
        summary = summarise(results)
        test, cost = summary["test"], summary["cost"]
        accuracies = [100 * result["test"]["accuracy"] for result in results]
        spread = f" ± {np.std(accuracies, ddof=1):.1f}" if len(results) > 1 else ""
        gain = "" if name in (baseline, HEAD_ALL_SEEDS) else f"{100 * (test['accuracy'] - reference):+.1f}"
        cells = [
            name.replace("_all_seeds", ", all seeds"),
            f"{len(results)}",
            f"{100 * test['accuracy']:.1f}{spread}",
            gain,
            f"{100 * test['balanced_accuracy']:.1f}",
            f"{test['nll']:.3f}",
            f"{cost['trainable_params']:,}",
            f"{cost['train_flops'] / 1e12:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def confusion(runs: Sequence[Run], labels: Labels) -> list[dict[str, str]]:
    """Rows of the confusion plot: actual and predicted class of every test image, seed by seed."""
    names = labels.class_names
    return [
        {"actual": names[labels.label[row]], "predicted": names[predicted]}
        for run in runs
        for row, predicted in zip(run.test_rows, run.test_logits.argmax(axis=1), strict=True)
    ]


if __name__ == "__main__":
    logs.run(main)
