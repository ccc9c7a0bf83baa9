"""compare: what each strategy reaches on the test images, and what it costs.

Reads   reports/runs/, data/labels.csv, data/splits/
Writes  reports/comparison.json, comparison.md, details.json
        reports/curves.json, reports/confusion/<strategy>.json     (DVC plots)

Strategies are compared over the seeds that all of them have. Runs that params.yaml does not list
are deleted first, or a clean clone would see other runs than this one.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import artifacts, logs, manifest, metrics
from pipeline.artifacts import Run
from pipeline.files import write_json, write_text
from pipeline.manifest import Labels
from pipeline.params import HEAD_ONLY, load_params

REPORTS = Path("reports")
ALL_SEEDS = f"{HEAD_ONLY}_all_seeds"


def main() -> None:
    """Write every report."""
    params = load_params()
    labels = manifest.read_labels()
    splits = {split.seed: split for split in manifest.read_splits(manifest.SPLITS, labels.image_id)}
    names = [HEAD_ONLY, *params.fine_tune.run]
    common = list(params.fine_tune.seeds) if params.fine_tune.run else sorted(splits)
    delete_unlisted({HEAD_ONLY: set(splits)} | dict.fromkeys(params.fine_tune.run, set(common)))
    runs: dict[str, list[Run]] = {name: [read_run(name, seed, splits) for seed in common] for name in names}
    all_seeds = [read_run(HEAD_ONLY, seed, splits) for seed in sorted(splits)]
    scored = {name: [score(run, labels) for run in listed] for name, listed in runs.items()}
    scored[ALL_SEEDS] = [score(run, labels) for run in all_seeds]

    comparison = {name: summarise(results) for name, results in scored.items()}
    write_json(REPORTS / "comparison.json", comparison)
    write_json(REPORTS / "details.json", rounded(scored))
    n_test = sorted({len(run.test_rows) for run in all_seeds})
    table = as_markdown(scored, params.compare.baseline, common, n_test)
    write_text(REPORTS / "comparison.md", table)
    write_json(REPORTS / "curves.json", rounded([row for name in names for row in curve(runs[name])]))
    for name in names:
        write_json(REPORTS / "confusion" / f"{name}.json", confusion(runs[name], labels))
    logs.log.info("\n%s", table)


def delete_unlisted(listed: dict[str, set[int]]) -> None:
    """Delete runs and models of other strategies and seeds than those listed."""
    for root in (artifacts.RUNS, artifacts.MODELS):
        for folder in root.glob("*"):
            seeds = {f"seed_{seed}" for seed in listed.get(folder.name, ())}
            for path in folder.glob("seed_*"):
                if path.name.partition(".")[0] not in seeds:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not any(folder.iterdir()):
                folder.rmdir()


def read_run(name: str, seed: int, splits: dict[int, manifest.Split]) -> Run:
    """Read a run; ValueError if it is about other images than the split says."""
    folder = artifacts.RUNS / name / f"seed_{seed}"
    run = artifacts.read_run(folder)
    for rows, part in ((run.val_rows, "val"), (run.test_rows, "test")):
        if not np.array_equal(rows, splits[seed].rows(part)):
            raise ValueError(f"{folder}: other {part} images than in the split; run: dvc repro")
    return run


def score(run: Run, labels: Labels) -> dict[str, Any]:
    """Metrics of one run on validation and test, its cost and what was chosen."""
    parts = {"val": (run.val_rows, run.val_logits), "test": (run.test_rows, run.test_logits)}
    scores = {
        part: {"n": len(rows), **metrics.score(logits, labels.label[rows], labels.weight[rows])}
        for part, (rows, logits) in parts.items()
    }
    return {"seed": run.seed, **scores, "cost": asdict(run.cost), "chosen": run.chosen}


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, of the metrics to 6 digits (None where one is undefined)."""
    names = [name for name in results[0]["test"] if name != "n"]
    return {
        "test": {name: mean([result["test"][name] for result in results]) for name in names},
        "cost": {name: round(np.mean([result["cost"][name] for result in results])) for name in results[0]["cost"]},
        "seeds": len(results),
    }


def mean(values: Sequence[float | None]) -> float | None:
    """Mean, to 6 digits; None if a value is."""
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 6) if len(known) == len(values) else None


def rounded(value: Any) -> Any:  # noqa: ANN401
    """JSON with every float to 6 digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 6) if isinstance(value, float) else value


def as_markdown(
    scored: dict[str, list[dict[str, Any]]], baseline: str, common: Sequence[int], n_test: list[int]
) -> str:
    """The table for people: means over seeds, with the standard deviation where there are several."""
    shown = "–".join(str(n) for n in dict.fromkeys((n_test[0], n_test[-1])))
    seeds = f"seed {common[0]}" if len(common) == 1 else f"seeds {', '.join(map(str, common))}"
    reference = np.mean([result["test"]["accuracy"] for result in scored[baseline]])
    lines = [
        f"Test accuracy in %, weighted by the images' weights; {shown} test images a seed; mean ± "
        f"standard deviation over n seeds. Strategies are compared on {seeds}.",
        "",
        f"| strategy | n | accuracy | gain over {baseline} | balanced accuracy | NLL (nats) "
        "| trained parameters | training TFLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, results in scored.items():
        accuracy = [100 * result["test"]["accuracy"] for result in results]
        spread = f" ± {np.std(accuracy, ddof=1):.1f}" if len(accuracy) > 1 else ""
        gain = f"{np.mean(accuracy) - 100 * reference:+.1f}"
        label = name if name != ALL_SEEDS else f"{HEAD_ONLY}, all seeds"
        cells = [
            label,
            str(len(results)),
            f"{np.mean(accuracy):.1f}{spread}",
            "–" if name in (baseline, ALL_SEEDS) else gain,
            f"{100 * np.mean([result['test']['balanced_accuracy'] for result in results]):.1f}",
            f"{np.mean([result['test']['nll'] for result in results]):.3f}",
            f"{np.mean([result['cost']['trainable_params'] for result in results]):,.0f}",
            f"{np.mean([result['cost']['train_flops'] for result in results]) / 1e12:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def curve(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows of the learning-curve plot."""
    return [{"run": f"{run.strategy}-{run.seed}", **epoch} for run in runs for epoch in run.curve]


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
