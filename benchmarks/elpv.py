"""The published ELPV protocol on seeded splits: `python -m benchmarks.elpv [--seeds N] [--head-seeds N] […]`.

Reads   params.yaml, changed by benchmarks/elpv.yaml and `--set`
Writes  reports/elpv.json; data/.elpv/, a DVC repository of the study, so that the next call continues it

75 % of the images train and validate, 25 % test, stratified by defect probability and type of module; an image counts
by its defect probability, a functional one by 1 (Deitsch et al. 2019, "Automatic classification of defective
photovoltaic module cells in electroluminescence images"). `dvc repro` runs the stages. Parameters are chosen with
`--validation`, which takes seeds from 100 up and reads validation images only.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

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
from pipeline.training.runs import Predictions, Run, read_run

OVERRIDES = REPOSITORY / "benchmarks" / "elpv.yaml"
RESULTS = REPOSITORY / "reports" / "elpv.json"
STUDIES = REPOSITORY / "data" / ".elpv"
FIRST_VALIDATION_SEED = 100
PUBLISHED = {"SVM, published": 0.8244, "VGG19 fine-tuned, published": 0.8842}  # weighted accuracy
LINKED = (".dvcignore", "data/weights", "dvc.yaml", "pipeline", "requirements.lock", "requirements-compare.lock")
SUBSETS = {"mono": "monocrystalline", "poly": "polycrystalline"}

yaml = YAML(typ="safe", pure=True)


def main() -> None:
    """Run the study; a mistake is one line."""
    logs.run(study)


def study() -> None:
    """Run what is missing, then score."""
    options = arguments()
    work = STUDIES / ("validation" if options.validation else "test")
    params = prepare(work, document(options))
    for targets in steps(params):
        reproduce(targets, work)
    seeds = {HEAD_ONLY: params.split.seeds, **dict.fromkeys(params.fine_tune.run, params.fine_tune.seeds)}
    with contextlib.chdir(work):
        labels = manifest.read_labels()
        runs = {name: [read_run(name, seed) for seed in chosen] for name, chosen in seeds.items()}
    results = {name: score(found, labels, "val" if options.validation else "test") for name, found in runs.items()}
    if not options.validation:
        write_json(RESULTS, results)
    print(as_markdown(results, {} if options.validation else PUBLISHED))


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, `line` if there is one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elpv", description="The published ELPV protocol.")
    parser.add_argument("--seeds", type=int, help="splits on which strategies are fine-tuned, from 0 up")
    parser.add_argument("--head-seeds", type=int, help="splits on which a head is fitted, from 0 up")
    parser.add_argument("--strategies", nargs="*", help="what to fine-tune; nothing: the head alone")
    parser.add_argument("--validation", action="store_true", help="seeds from 100 up, validation images alone")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="parameters, as section.key=value")
    return parser.parse_args(line)


def document(options: argparse.Namespace) -> dict[str, Any]:
    """params.yaml, changed by elpv.yaml and the command line."""
    found = merged(*(yaml.load(path.read_text(encoding="utf-8")) for path in (REPOSITORY / "params.yaml", OVERRIDES)))
    for change in options.set:
        key, _, text = change.partition("=")
        value = yaml.load(text)
        for name in reversed(key.split(".")):
            value = {name: value}
        found = merged(found, value)
    tuned, split = found["fine_tune"], found["split"]
    if options.strategies is not None:
        tuned["run"] = options.strategies
    n_tuned = len(tuned["seeds"]) if options.seeds is None else options.seeds
    n_heads = max(len(split["seeds"]) if options.head_seeds is None else options.head_seeds, n_tuned)
    first = FIRST_VALIDATION_SEED if options.validation else 0
    tuned["seeds"], split["seeds"] = ([*range(first, first + n)] for n in (n_tuned, n_heads))
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


def score(runs: Sequence[Run], labels: Labels, part: str) -> dict[str, Any]:
    """Means over the runs' `part` (val or test), of all images and by `subset`; floats to 6 digits."""
    whole: list[Predictions] = [getattr(run, part) for run in runs]
    kind = np.asarray(labels.subset)
    subsets = {}
    for subset, words in SUBSETS.items():
        kept = [kind[one.rows] == subset for one in whole]
        chosen = [Predictions(one.rows[keep], one.log_probability[keep]) for one, keep in zip(whole, kept, strict=True)]
        subsets[words] = measure(chosen, labels)
    return {**measure(whole, labels), "seeds": [run.seed for run in runs], "subsets": subsets}


def measure(runs: Sequence[Predictions], labels: Labels) -> dict[str, Any]:
    """The published measures: means over runs; of the weighted accuracy its 95 % interval and standard deviation."""
    outcomes = [of_predictions(one, labels.label) for one in runs]
    each = [one_run(one, labels.label[one.rows], labels.weight[one.rows]) for one in outcomes]
    mean = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
    interval = intervals.metric_intervals(outcomes, labels.label, labels.weight, unit_of(labels), 2)["accuracy"]
    accuracies = [one["weighted_accuracy"] for one in each]
    spread = {"sd": float(np.std(accuracies, ddof=1))} if len(runs) > 1 else {}
    values = {**mean, "low": cast(Interval, interval).low, "high": cast(Interval, interval).high, **spread}
    return {name: round(value, 6) for name, value in values.items()} | {"n": len(runs)}


def one_run(outcomes: Outcomes, label: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
    """Measures of one run. `weighted_f1`: the classes' F1, averaged by their (weighted) number of images."""
    predicted = outcomes.predicted
    scored = metrics.score(outcomes, label, weight, 2)
    return {
        "weighted_accuracy": scored["accuracy"],
        "unweighted_accuracy": float(np.mean(predicted == label)),
        "weighted_f1": float(f1_score(label, predicted, average="weighted", sample_weight=weight)),
        "auroc": scored["auroc"],
        "nll": scored["nll"],
    }


def as_markdown(results: dict[str, dict[str, Any]], published: dict[str, float]) -> str:
    """The table; below it, published weighted accuracies."""
    lines = [
        "| what | cells | n | weighted accuracy | 95 % interval | accuracy | weighted F1 | AUROC | NLL (nats) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for cells, one in {"all": result, **result["subsets"]}.items():
            lines.append(_row(name if cells == "all" else "", cells, one))
    lines += [f"| {name} | all | | {100 * value:.2f} | | | | | |" for name, value in published.items()]
    return "\n".join(lines) + "\n"


def _row(name: str, cells: str, one: dict[str, Any]) -> str:
    spread = f" ± {100 * one['sd']:.2f}" if "sd" in one else ""
    accuracy = f"{100 * one['weighted_accuracy']:.2f}{spread}"
    interval = f"{100 * one['low']:.1f} to {100 * one['high']:.1f}"
    others = [f"{100 * one[key]:.1f}" for key in ("unweighted_accuracy", "weighted_f1", "auroc")]
    others.append(f"{one['nll']:.3f}")
    return f"| {' | '.join([name, cells, str(one['n']), accuracy, interval, *others])} |"


if __name__ == "__main__":
    main()
