"""The published ELPV protocol on seeded splits: `python -m benchmarks.elpv [--validation] [--set KEY=VALUE …]`.

Reads   params.yaml, changed by benchmarks/elpv.yaml and `--set`
Writes  reports/elpv.json; data/.elpv/, a DVC repository of the study, so that the next call continues it

75 % of the images train and validate, 25 % test, stratified by defect probability and type of module; an image counts
by its defect probability, a functional one by 1 (Deitsch et al. 2019, "Automatic classification of defective
photovoltaic module cells in electroluminescence images"). `dvc repro` runs the stages. Parameters are chosen with
`--validation`, which takes seeds from 100 up and reads validation images only.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
from ruamel.yaml import YAML
from sklearn.metrics import f1_score

from benchmarks.common import REPOSITORY
from pipeline import logs
from pipeline.comparison import intervals, metrics
from pipeline.comparison.intervals import Interval
from pipeline.comparison.outcomes import Outcomes, of_predictions
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Labels
from pipeline.dataset.units import unit_of
from pipeline.files import write_json, write_text
from pipeline.params import HEAD_ONLY, Params, load_params
from pipeline.training.runs import Run, read_run

OVERRIDES = REPOSITORY / "benchmarks" / "elpv.yaml"
RESULTS = REPOSITORY / "reports" / "elpv.json"
STUDIES = REPOSITORY / "data" / ".elpv"
FIRST_VALIDATION_SEED = 100
PUBLISHED = {"SVM, published": 0.8244, "VGG19 fine-tuned, published": 0.8842}  # weighted accuracy
LINKED = (".dvcignore", "data/weights", "dvc.yaml", "pipeline", "requirements.lock", "requirements-compare.lock")
SUBSETS = {"mono": "monocrystalline", "poly": "polycrystalline"}

yaml = YAML(typ="safe", pure=True)


@click.command()
@click.option("--validation", "is_validation", is_flag=True, help="Seeds from 100 up, and validation images alone.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="A parameter, as section.key=value.")
def study(changes: tuple[str, ...], *, is_validation: bool) -> None:
    """Run what is missing of the study, then score it."""
    work, split = STUDIES / ("validation" if is_validation else "test"), "val" if is_validation else "test"
    params = prepare(work, document(changes, is_validation=is_validation))
    for targets in steps(params):
        reproduce(targets, work)
    seeds = {HEAD_ONLY: params.split.seeds, **dict.fromkeys(params.fine_tune.run, params.fine_tune.seeds)}
    with contextlib.chdir(work):
        labels = manifest.read_labels()
        runs = {name: [read_run(name, seed) for seed in chosen] for name, chosen in seeds.items()}
    results = {name: score(found, labels, split) for name, found in runs.items()}
    if not is_validation:
        write_json(RESULTS, results)
    print(as_markdown(results, {} if is_validation else PUBLISHED))


def document(changes: Sequence[str], *, is_validation: bool) -> dict[str, Any]:
    """params.yaml, changed by elpv.yaml and by `changes`, each of which is section.key=value."""
    found = merged(*(yaml.load(path.read_text(encoding="utf-8")) for path in (REPOSITORY / "params.yaml", OVERRIDES)))
    for change in changes:
        key, _, text = change.partition("=")
        value = yaml.load(text)
        for name in reversed(key.split(".")):
            value = {name: value}
        found = merged(found, value)
    if is_validation:
        for section in (found["split"], found["fine_tune"]):
            section["seeds"] = [FIRST_VALIDATION_SEED + seed for seed in section["seeds"]]
    return found


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `changes` in it."""
    inner = {
        key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }
    return base | inner


def prepare(work: Path, found: dict[str, Any]) -> Params:
    """Make `work` a DVC repository of this code with these parameters; ValueError where they make no sense."""
    for name in LINKED:
        link = work / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(REPOSITORY / name)
    write_text(work / ".dvc" / "config", f"[core]\n    no_scm = true\n[cache]\n    dir = {REPOSITORY}/.dvc/cache\n")
    write_text(work / "params.yaml", json.dumps(found, indent=2) + "\n")
    return load_params(work / "params.yaml")


def steps(params: Params) -> Iterator[list[str]]:
    """Targets of `dvc repro` in order: fine-tuning seed by seed, so that an early stop leaves whole seeds."""
    yield from (["plan"], ["train_head"])
    for seed in params.fine_tune.seeds:
        yield [f"fine_tune@{name}-{seed}" for name in params.fine_tune.run]


def reproduce(targets: Sequence[str], work: Path) -> None:
    """Run what is not up to date of `targets`; exit with DVC's status if that fails."""
    root = os.environ.get("DVC_ROOT", str(REPOSITORY))  # of the feature store, which is shared
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "DVC_ROOT": root, "PATH": path, "PYTHONPATH": str(work)}
    command = [sys.executable, "-m", "dvc", "repro", *targets]
    if status := subprocess.run(command, cwd=work, env=environment, check=False).returncode:
        sys.exit(status)


def score(runs: Sequence[Run], labels: Labels, split: str) -> dict[str, Any]:
    """Means over the runs on `split` (val or test), of all images and by `subset`; floats to 6 digits."""
    outcomes = [of_predictions(getattr(run, split), labels.label) for run in runs]
    subset = np.asarray(labels.subset)
    subsets = {
        words: measure([one[subset[one.rows] == name] for one in outcomes], labels) for name, words in SUBSETS.items()
    }
    return {**measure(outcomes, labels), "seeds": [run.seed for run in runs], "subsets": subsets}


def measure(outcomes: Sequence[Outcomes], labels: Labels) -> dict[str, Any]:
    """The published measures: means over runs; of the weighted accuracy its 95 % interval and standard deviation.

    `weighted_f1`: the classes' F1, averaged by their (weighted) number of images.
    """
    each = []
    for one in outcomes:
        label, weight = labels.label[one.rows], labels.weight[one.rows]
        scored = metrics.score(one, label, weight, 2)
        unweighted = np.mean(one.predicted == label)
        f1 = f1_score(label, one.predicted, average="weighted", sample_weight=weight)
        each.append((scored["accuracy"], unweighted, f1, scored["auroc"], scored["nll"]))
    names = ("weighted_accuracy", "unweighted_accuracy", "weighted_f1", "auroc", "nll")
    interval = intervals.metric_intervals(outcomes, labels.label, labels.weight, unit_of(labels), 2)["accuracy"]
    values = dict(zip(names, np.mean(each, axis=0).tolist(), strict=True))
    values |= {"low": cast(Interval, interval).low, "high": cast(Interval, interval).high}
    if len(outcomes) > 1:
        values["sd"] = float(np.std([accuracy for accuracy, *_ in each], ddof=1))
    return {name: round(value, 6) for name, value in values.items()} | {"n": len(outcomes)}


def as_markdown(results: dict[str, dict[str, Any]], published: dict[str, float]) -> str:
    """The table; below it, published weighted accuracies."""
    lines = [
        "| what | cells | n | weighted accuracy | 95 % interval | accuracy | weighted F1 | AUROC | NLL (nats) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for cells, one in {"all": result, **result["subsets"]}.items():
            percent = {key: 100 * value for key, value in one.items() if isinstance(value, float)}
            spread = f" ± {percent['sd']:.2f}" if "sd" in one else ""
            lines.append(
                f"| {name if cells == 'all' else ''} | {cells} | {one['n']} "
                f"| {percent['weighted_accuracy']:.2f}{spread} | {percent['low']:.1f} to {percent['high']:.1f} "
                f"| {percent['unweighted_accuracy']:.1f} | {percent['weighted_f1']:.1f} | {percent['auroc']:.1f} "
                f"| {one['nll']:.3f} |"
            )
    lines += [f"| {name} | all | | {100 * value:.2f} | | | | | |" for name, value in published.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the study; a mistake is one line."""
    logs.run(study)


if __name__ == "__main__":
    main()
