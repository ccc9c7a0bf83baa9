"""The published ELPV protocol on seeded splits: `python -m benchmarks.elpv [--validation] [--set KEY=VALUE …]`.

Reads   params.yaml, changed by benchmarks/elpv.yaml and `--set`
Writes  data/.studies/<key>/, where the stages run, so that the next call goes on where this one ended;
        reports/elpv.json, or with `--set` elpv.json in that directory

75 % of the images train and validate, 25 % test, stratified by defect probability and type of module; an image counts
by its defect probability, a functional one by 1 (Deitsch et al. 2019, "Automatic classification of defective
photovoltaic module cells in electroluminescence images"). All stages run in this process, without DVC. Parameters are
chosen with `--validation`, which takes seeds from 100 up and reads validation images only.
"""

from collections.abc import Sequence
from typing import Any, cast

import click
import numpy as np
import torch
from scipy import stats
from sklearn.metrics import f1_score

from benchmarks import common, studies
from benchmarks.common import REPOSITORY
from pipeline import logs
from pipeline.comparison import intervals, metrics
from pipeline.comparison.intervals import Interval
from pipeline.comparison.outcomes import Outcomes, of_predictions
from pipeline.dataset.manifest import Labels
from pipeline.dataset.units import unit_of
from pipeline.files import write_json
from pipeline.network.device import choose_device
from pipeline.training.runs import Run

OVERRIDES = REPOSITORY / "benchmarks" / "elpv.yaml"
RESULTS = REPOSITORY / "reports" / "elpv.json"
PUBLISHED = {"SVM, published": 0.8244, "VGG19 fine-tuned, published": 0.8842}  # weighted accuracy
SUBSETS = {"mono": "monocrystalline", "poly": "polycrystalline"}


@click.command()
@click.option("--validation", "is_validation", is_flag=True, help="Seeds from 100 up, and validation images alone.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="A parameter, as section.key=value.")
def study(changes: tuple[str, ...], *, is_validation: bool) -> None:
    """Run what is missing of the study, then score it."""
    found, scored = document(changes, is_validation=is_validation), "val" if is_validation else "test"
    labels, runs = studies.run(found)
    device = choose_device(found["runtime"]["device"])
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    results = {name: score(found, labels, scored) | {"device": where} for name, found in runs.items()}
    if not is_validation:
        write_json(studies.locate(found) / RESULTS.name if changes else RESULTS, results)
    test, val = found["split"]["test_fraction"], found["split"]["val_fraction"]
    share = val if is_validation else test
    rest = 1 - test - (val if is_validation else 0)
    print(as_markdown(results, {} if is_validation else PUBLISHED, share / rest))


def document(changes: Sequence[str], *, is_validation: bool) -> dict[str, Any]:
    """params.yaml, changed by elpv.yaml and by `changes`, each of which is section.key=value."""
    found = common.document(common.read(OVERRIDES), changes)
    if is_validation:
        for section in (found["split"], found["fine_tune"]):
            section["seeds"] = [studies.FIRST_VALIDATION_SEED + seed for seed in section["seeds"]]
    return found


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
