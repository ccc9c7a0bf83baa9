"""The published ELPV protocol on seeded splits: `python -m benchmarks.elpv [--seeds N] [--head-seeds N] […]`.

Reads   params.yaml, with what benchmarks/elpv.yaml and `--set` put in its place
Writes  reports/elpv.json; the stages' own files under data/.elpv/, so that a study goes on where it stopped

75 % of the images train and validate, 25 % test, stratified by defect probability and type of module; an image counts
by its defect probability, a functional one by 1 (Deitsch et al. 2019, "Automatic classification of defective
photovoltaic module cells in electroluminescence images"). The stages of the pipeline do the work. Parameters are
chosen with `--validation`, which takes seeds from 100 up and looks at validation images alone.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from ruamel.yaml import YAML
from sklearn.metrics import f1_score

from benchmarks.common import REPOSITORY
from pipeline import logs
from pipeline.comparison import intervals, metrics
from pipeline.comparison.intervals import Interval, Predictions
from pipeline.dataset import manifest
from pipeline.dataset.decoding import sha256
from pipeline.dataset.manifest import Labels
from pipeline.files import digest, write_json, write_text
from pipeline.params import HEAD_ONLY, Params, load_params
from pipeline.training import models
from pipeline.training.models import Run

OVERRIDES = REPOSITORY / "benchmarks" / "elpv.yaml"
RESULTS = REPOSITORY / "reports" / "elpv.json"
STUDIES = REPOSITORY / "data" / ".elpv"
FIRST_VALIDATION_SEED = 100
PUBLISHED = {"SVM, published": 0.8244, "VGG19 fine-tuned, published": 0.8842}  # weighted accuracy
STAGES = ("fetch", "index", "split", "extract", "train_head", "fine_tune")
SUBSETS = {"mono": "monocrystalline", "poly": "polycrystalline"}

yaml = YAML(typ="safe", pure=True)


def main() -> None:
    """Run the study; a mistake is one line."""
    logs.run(study)


def study() -> None:
    """Run what is missing, then score."""
    asked = arguments()
    work = STUDIES / ("validation" if asked.validation else "test")
    params = prepare(work, document(asked))
    for step in steps(params):
        complete(step, work)
    with contextlib.chdir(work):
        labels = manifest.read_labels()
        runs = {HEAD_ONLY: [artifacts.read_run(HEAD_ONLY, seed) for seed in params.split.seeds]}
        runs |= {
            name: [artifacts.read_run(name, seed) for seed in params.fine_tune.seeds] for name in params.fine_tune.run
        }
    part = "val" if asked.validation else "test"
    results = {name: score(found, labels, part) for name, found in runs.items()}
    if not asked.validation:
        write_json(RESULTS, results)
    print(as_markdown(results, {} if asked.validation else PUBLISHED))


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, `line` if there is one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elpv", description="The published ELPV protocol.")
    parser.add_argument("--seeds", type=int, help="splits on which strategies are fine-tuned, from 0 up")
    parser.add_argument("--head-seeds", type=int, help="splits on which a head is fitted, from 0 up")
    parser.add_argument("--strategies", nargs="*", help="what to fine-tune; nothing: the head alone")
    parser.add_argument("--validation", action="store_true", help="seeds from 100 up, validation images alone")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="parameters, as section.key=value")
    return parser.parse_args(line)


def document(asked: argparse.Namespace) -> dict[str, Any]:
    """params.yaml with elpv.yaml and the command line's wishes in its place."""
    found = merged(*(yaml.load(path.read_text(encoding="utf-8")) for path in (REPOSITORY / "params.yaml", OVERRIDES)))
    for wish in asked.set:
        key, _, text = wish.partition("=")
        value = yaml.load(text)
        for name in reversed(key.split(".")):
            value = {name: value}
        found = merged(found, value)
    tuned, split = found["fine_tune"], found["split"]
    if asked.strategies is not None:
        tuned["run"] = asked.strategies
    n_tuned = len(tuned["seeds"]) if asked.seeds is None else asked.seeds
    n_heads = max(len(split["seeds"]) if asked.head_seeds is None else asked.head_seeds, n_tuned)
    first = FIRST_VALIDATION_SEED if asked.validation else 0
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
    """Write params.yaml and link data/weights in `work`; ValueError where the parameters make no sense."""
    (work / "data").mkdir(parents=True, exist_ok=True)
    weights = work / "data" / "weights"
    if not weights.exists():
        weights.symlink_to(REPOSITORY / "data" / "weights")
    write_text(work / "params.yaml", json.dumps(found, indent=2) + "\n")
    return load_params(work / "params.yaml")


@dataclass(frozen=True)
class Step:
    """A stage with its arguments, and the digest of the parameters and code that its results depend on."""

    stage: str
    arguments: tuple[str, ...]
    digest: str

    @property
    def name(self) -> str:
        """As in dvc.yaml."""
        return "-".join((self.stage, *self.arguments))


def steps(params: Params) -> Iterator[Step]:
    """The stages in order, fine-tuning seed by seed, so that an early stop leaves whole seeds."""
    cells = [(name, str(seed)) for seed in params.fine_tune.seeds for name in params.fine_tune.run]
    each = {"fetch": [(name,) for name in params.dataset.fetch], "fine_tune": cells}
    for stage in STAGES:
        for item in each.get(stage, [()]):
            yield Step(stage, item, digest(depends(stage, item, params)))


def depends(stage: str, item: Sequence[str], params: Params) -> dict[str, Any]:
    """What dvc.yaml names as parameters and code of the stage and those before it.

    A seed more changes the splits and heads that there are, not those that there were.
    """
    defined = yaml.load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    names = [name for name in STAGES[: STAGES.index(stage) + 1] if (name, stage) != ("split", "extract")]
    before = [defined[name].get("do", defined[name]) for name in names]
    found = {}
    for key in {key for one in before for key in one.get("params", ())}:
        value = params.model_dump(mode="json")
        for name in re.sub(r"\$\{item\.strategy\}", item[0] if item else "", key).split("."):
            value = value[name]
        found[key] = dict(value, seeds=None) if key == "split" and stage == "fine_tune" else value
    files = {dep for one in before for dep in one["deps"] if dep.startswith("pipeline/") or dep.endswith(".lock")}
    return found | {path: sha256((REPOSITORY / path).read_bytes()) for path in files}


def complete(step: Step, work: Path) -> None:
    """Run the stage unless it has ended well before with the same digest."""
    stamp = work / "done" / step.name
    if stamp.exists() and stamp.read_text(encoding="utf-8") == step.digest:
        return
    print(f"== {step.name}", file=sys.stderr, flush=True)
    root = os.environ.get("DVC_ROOT", str(REPOSITORY))  # of the feature store, which is shared
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DVC_ROOT": root}
    command = [sys.executable, "-m", f"pipeline.stages.{step.stage}", *step.arguments]
    stamp.unlink(missing_ok=True)
    if status := subprocess.run(command, cwd=work, env=environment, check=False).returncode:
        sys.exit(status)
    write_text(stamp, step.digest)


def score(runs: Sequence[Run], labels: Labels, part: str) -> dict[str, Any]:
    """Means over the runs' `part` (val or test), of all images and by `subset`; floats to 6 digits."""
    whole = [Predictions(getattr(one, f"{part}_rows"), getattr(one, f"{part}_logits")) for one in runs]
    kind = np.asarray(labels.subset)
    subsets = {}
    for subset, words in SUBSETS.items():
        kept = [kind[one.rows] == subset for one in whole]
        chosen = [Predictions(one.rows[keep], one.logits[keep]) for one, keep in zip(whole, kept, strict=True)]
        subsets[words] = measure(chosen, labels)
    return {**measure(whole, labels), "seeds": [one.seed for one in runs], "subsets": subsets}


def measure(runs: Sequence[Predictions], labels: Labels) -> dict[str, Any]:
    """The published measures: means over runs; of the weighted accuracy its 95 % interval and standard deviation."""
    each = [one_run(one.logits, labels.label[one.rows], labels.weight[one.rows]) for one in runs]
    mean = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
    interval = statistics.intervals(runs, labels.label, labels.weight)["accuracy"]
    accuracies = [one["weighted_accuracy"] for one in each]
    spread = {"sd": float(np.std(accuracies, ddof=1))} if len(runs) > 1 else {}
    values = {**mean, "low": cast(Interval, interval).low, "high": cast(Interval, interval).high, **spread}
    return {name: round(value, 6) for name, value in values.items()} | {"n": len(runs)}


def one_run(logits: np.ndarray, label: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
    """Measures of one run. `weighted_f1`: the classes' F1, averaged by their (weighted) number of images."""
    predicted = logits.argmax(1)
    scored = metrics.score(logits, label, weight)
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
