"""Are the defaults earned? Recipes on data sets: `python -m benchmarks.defaults DATA… --recipe NAME --recipe NAME`.

Reads   params.yaml, changed by an entry of `data` and one of `recipes` of benchmarks/defaults.yaml
Writes  data/.studies/<key>/, where the stages run, so that the next call goes on where this one ended

For every strategy: the NLL with each recipe, and its difference from that with the first one, paired by image. Recipes
are chosen on validation images of seeds from 100 up; `--test` judges them once, on the test images of other splits.
"""

from collections.abc import Sequence
from typing import Any

import click

from benchmarks import common, studies
from benchmarks.common import REPOSITORY
from pipeline import logs
from pipeline.comparison import outcomes, paired
from pipeline.comparison.outcomes import Outcomes
from pipeline.comparison.paired import Difference, Study
from pipeline.dataset.manifest import Labels
from pipeline.dataset.units import unit_of
from pipeline.training.runs import Run

CHOICES = REPOSITORY / "benchmarks" / "defaults.yaml"


@click.command()
@click.argument("names", metavar="DATA...", nargs=-1, required=True)
@click.option("--recipe", "recipes", multiple=True, required=True, help="The first is what others are compared with.")
@click.option("--strategy", "strategies", multiple=True, help="Besides the head; repeatable.")
@click.option("--splits", type=click.IntRange(1), default=2, show_default=True, help="How many.")
@click.option("--test", "is_test", is_flag=True, help="Seeds from 0 up, and test images: once, at the end.")
def compare(
    names: tuple[str, ...], recipes: tuple[str, ...], strategies: tuple[str, ...], splits: int, *, is_test: bool
) -> None:
    """Run what is missing, then print a table."""
    choices, first = common.read(CHOICES), 0 if is_test else studies.FIRST_VALIDATION_SEED
    for key, given in (("data", names), ("recipes", recipes)):
        if unknown := [name for name in given if name not in choices[key]]:
            raise ValueError(f"{CHOICES}: {key}: found {unknown}, expected some of {', '.join(choices[key])}")
    seeds = {"split": {"seeds": [*range(first, first + splits)]}}
    seeds |= {"fine_tune": {"run": [*strategies], "seeds": seeds["split"]["seeds"] if strategies else []}}
    lines = []
    for name in names:
        found = {}
        for recipe in recipes:
            overrides = common.merged(choices["data"][name], choices["recipes"][recipe])
            found[recipe] = studies.run(common.document(common.merged(overrides, seeds)))
        lines += rows(name, found, "test" if is_test else "val")
    print(as_markdown(lines, "test" if is_test else "validation"))


def rows(data: str, found: dict[str, tuple[Labels, dict[str, list[Run]]]], split: str) -> list[list[str]]:
    """A row for each strategy and recipe of a data set; ValueError if recipes were not given the same images."""
    (labels, by_strategy), *_ = found.values()
    lines = []
    for strategy in by_strategy:
        scored = {recipe: judge(runs[strategy], labels, split) for recipe, (_, runs) in found.items()}
        (_, first), *_ = scored.items()
        for recipe, these in scored.items():
            accuracy, nll = (difference(these, first, labels, metric) for metric in ("accuracy", "nll"))
            shown = f"{nll.difference:+.3f} ({nll.low:+.3f} to {nll.high:+.3f})" if these is not first else ""
            lines.append(
                [data, strategy, recipe, f"{len(these)}", f"{100 * accuracy.value:.1f}", f"{nll.value:.3f}", shown]
            )
    return lines


def judge(runs: Sequence[Run], labels: Labels, split: str) -> list[Outcomes]:
    """What each run predicts for `split`: for validation, cross-fitted over everything that validation chose."""
    if split == "test":
        return [outcomes.of_predictions(run.test, labels.label) for run in runs]
    return [outcomes.cross_fitted(run.val.rows, run.candidates, labels.weight, unit_of(labels)) for run in runs]


def difference(runs: Sequence[Outcomes], first: Sequence[Outcomes], labels: Labels, metric: str) -> Difference:
    """The difference from the first recipe on the same images; over seeds from five splits on, else over units."""
    n_train = len(labels.label) - len(runs[0].rows)
    return paired.compare(runs, first, Study(labels.label, labels.weight, unit_of(labels), n_train, metric))


def as_markdown(lines: Sequence[Sequence[Any]], split: str) -> str:
    """The table."""
    head = ["data", "strategy", "recipe", "splits", f"{split} accuracy, %", f"{split} NLL (nats)", "difference (95 %)"]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def main() -> None:
    """Run the comparison; a mistake is one line."""
    logs.run(compare)


if __name__ == "__main__":
    main()
