"""The published ELPV protocol on seeded splits: `python -m benchmarks.elpv [--validation] [--set KEY=VALUE …]`.

Reads   params.yaml, changed by benchmarks/elpv.yaml and `--set`
Writes  reports/elpv.json, without `--set`; data/.elpv/<key>/, where the stages run, so that the next call goes on where
        this one ended, and elpv.json there with `--set`

75 % of the images train and validate, 25 % test, stratified by defect probability and type of module; an image counts
by its defect probability, a functional one by 1 (Deitsch et al. 2019, "Automatic classification of defective
photovoltaic module cells in electroluminescence images"). All stages run in this process, without DVC. Parameters are
chosen with `--validation`, which takes seeds from 100 up and reads validation images only.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch
from ruamel.yaml import YAML
from scipy import stats
from sklearn.metrics import f1_score

from benchmarks.common import REPOSITORY
from pipeline import logs
from pipeline.comparison import intervals, metrics
from pipeline.comparison.intervals import Interval
from pipeline.comparison.outcomes import Outcomes, of_predictions
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Labels
from pipeline.dataset.units import unit_of
from pipeline.features import extraction
from pipeline.features.code import digest_of_code
from pipeline.files import digest, write_json, write_text
from pipeline.network.device import choose_device
from pipeline.params import HEAD_ONLY, Params, load_params
from pipeline.stages import extract, fetch, fine_tune, index, plan, split, train_head
from pipeline.training.runs import Run, read_run

OVERRIDES = REPOSITORY / "benchmarks" / "elpv.yaml"
RESULTS = REPOSITORY / "reports" / "elpv.json"
STUDIES = REPOSITORY / "data" / ".elpv"
FIRST_VALIDATION_SEED = 100
PUBLISHED = {"SVM, published": 0.8244, "VGG19 fine-tuned, published": 0.8842}  # weighted accuracy
SUBSETS = {"mono": "monocrystalline", "poly": "polycrystalline"}
FREE = {"split": ["seeds"], "fine_tune": ["run", "seeds"]}  # may grow while a study goes on; but not the seeds of folds
USED = (
    "files.py",
    *(f"{package}/*.py" for package in ("dataset", "ingest", "network", "features", "training", "stages")),
)
Step = Callable[[], None]

yaml = YAML(typ="safe", pure=True)


@click.command()
@click.option("--validation", "is_validation", is_flag=True, help="Seeds from 100 up, and validation images alone.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="A parameter, as section.key=value.")
def study(changes: tuple[str, ...], *, is_validation: bool) -> None:
    """Run what is missing of the study, then score it."""
    found, scored = document(changes, is_validation=is_validation), "val" if is_validation else "test"
    work = locate(found)
    params = prepare(work, found)
    os.environ.setdefault("DVC_ROOT", str(REPOSITORY))  # of the feature store, which all studies share
    with contextlib.chdir(work):
        for name, step in steps(params):
            do_once(name, step)
        labels = manifest.read_labels()
        seeds = {HEAD_ONLY: params.split.seeds, **dict.fromkeys(params.fine_tune.run, params.fine_tune.seeds)}
        runs = {name: [read_run(name, seed) for seed in chosen] for name, chosen in seeds.items()}
    device = choose_device(params.runtime.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    results = {name: score(found, labels, scored) | {"device": where} for name, found in runs.items()}
    if not is_validation:
        write_json(work / RESULTS.name if changes else RESULTS, results)
    options = params.split
    share = options.val_fraction if is_validation else options.test_fraction
    rest = 1 - options.test_fraction - (options.val_fraction if is_validation else 0)
    print(as_markdown(results, {} if is_validation else PUBLISHED, share / rest))


def locate(found: dict[str, Any]) -> Path:
    """The directory of the study: one for all that can change a run, but for how many there are."""
    free = FREE | ({"split": []} if found["split"]["method"] == "folds" else {})
    fixed = {
        name: {key: value for key, value in section.items() if key not in free.get(name, ())}
        if isinstance(section, dict)
        else section
        for name, section in found.items()
        if name != "runtime"
    }
    device = choose_device(found["runtime"]["device"]).type
    code = digest_of_code(modules=USED)
    return STUDIES / digest({"params": fixed, "device": device, "code": code, "versions": extraction.versions()})[:16]


def steps(params: Params) -> Iterator[tuple[str, Step]]:
    """What is done, in order: fine-tuning seed by seed, so that an early stop leaves whole seeds."""
    for name in params.dataset.fetch:
        yield f"fetch {name}", partial(call, fetch.main, name)
    yield "index", partial(call, index.main)
    seeds, run = digest(params.split.seeds)[:16], digest(params.fine_tune.run)[:16]
    yield f"split {seeds}", partial(call, split.main)
    yield f"plan {run}", partial(call, plan.main)
    yield "extract", partial(call, extract.main)
    yield f"train_head {seeds}", partial(call, train_head.main)
    for seed in params.fine_tune.seeds:
        for name in params.fine_tune.run:
            yield f"fine_tune {name} {seed}", partial(call, fine_tune.main, name, str(seed))


def do_once(name: str, step: Step) -> None:
    """Do a step of the study in the working directory, unless an earlier call has done it, and print its time."""
    mark = Path("done", name)
    if not mark.exists():
        start = time.perf_counter()
        step()
        write_text(mark, "")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def call(main: Step, *arguments: str) -> None:
    """Run a stage as its command line would."""
    before, sys.argv = sys.argv, ["", *arguments]
    try:
        main()
    finally:
        sys.argv = before


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
    """Make `work` a directory in which stages run with these parameters; ValueError where they make no sense."""
    for name in ("data/weights", "data/raw"):
        link = work / name
        for directory in (link.parent, REPOSITORY / name):
            directory.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(REPOSITORY / name)
    write_text(work / "params.yaml", json.dumps(found, indent=2) + "\n")
    return load_params(work / "params.yaml")


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


def over_splits(one: dict[str, Any], ratio: float) -> str:
    """The 95 % interval of the weighted accuracy over other splits, in percent.

    Nadeau & Bengio 2003, "Inference for the generalization error", section 5: splits overlap; `ratio` is the number of
    images that a run is judged on by that of those it has seen.
    """
    if "sd" not in one:
        return ""
    wide = one["sd"] * np.sqrt(1 / one["n"] + ratio) * stats.t.ppf(0.975, one["n"] - 1)
    low, high = (100 * (one["weighted_accuracy"] + sign * wide) for sign in (-1, 1))
    return f"{low:.1f} to {high:.1f}"


def as_markdown(results: dict[str, dict[str, Any]], published: dict[str, float], ratio: float) -> str:
    """The table; below it, published weighted accuracies. `ratio` as in `over_splits`."""
    lines = [
        "| what | cells | n | weighted accuracy | 95 %: images | 95 %: splits | accuracy | weighted F1 | AUROC "
        "| NLL (nats) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for cells, one in {"all": result, **result["subsets"]}.items():
            percent = {key: 100 * value for key, value in one.items() if isinstance(value, float)}
            spread = f" ± {percent['sd']:.2f}" if "sd" in one else ""
            lines.append(
                f"| {name if cells == 'all' else ''} | {cells} | {one['n']} "
                f"| {percent['weighted_accuracy']:.2f}{spread} | {percent['low']:.1f} to {percent['high']:.1f} "
                f"| {over_splits(one, ratio)} | {percent['unweighted_accuracy']:.1f} | {percent['weighted_f1']:.1f} "
                f"| {percent['auroc']:.1f} | {one['nll']:.3f} |"
            )
    lines += [f"| {name} | all | | {100 * value:.2f} | | | | | | |" for name, value in published.items()]
    devices = sorted({result["device"] for result in results.values() if "device" in result})
    return "\n".join(lines) + "\n" + "".join(f"\nTrained on: {device}\n" for device in devices)


def main() -> None:
    """Run the study; a mistake is one line."""
    logs.run(study)


if __name__ == "__main__":
    main()
