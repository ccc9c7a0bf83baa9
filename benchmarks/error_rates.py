"""How often intervals miss and tests err, simulated: `python -m benchmarks.error_rates [--studies N]`.

Every row draws studies with a known truth and runs the project's own code on them. `before` is what the same simulation
gave with the code of commit 5a6e86a. Four tables: intervals of accuracy where test images come in groups, tests of a
true null hypothesis there, intervals of balanced accuracy and macro F1 with a rare class, and what choosing an epoch on
the validation images does to their figures.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from benchmarks.common import run
from pipeline.comparison import influence, intervals, outcomes, paired
from pipeline.comparison.outcomes import Outcomes
from pipeline.comparison.paired import Study
from pipeline.training.runs import Candidates

STUDIES = 5_000
GROUPS, KINDS, CORRELATIONS = (10, 33, 66), ("equal", "unequal"), (0.0, 0.2, 0.5)
GROUP_SIZE = 10  # images, the mean of unequal sizes (log-normal, sigma 1) too
RARE_SHARE = 0.02
RARE_RECALLS, COMMON_RECALLS, SIZES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.93, 0.95, 0.97), (0.9, 0.97), (295, 656, 2000)
BEFORE: dict[tuple, float] = {}  # of commit 5a6e86a, by row


@dataclass(frozen=True)
class Groups:
    """Groups of images: the unit (n,) of each image, and their sizes (n_groups,)."""

    unit: np.ndarray
    size: np.ndarray


def draw_groups(random: np.random.Generator, n_groups: int, kind: str) -> Groups:
    """Groups of equal or of very unequal sizes."""
    size = np.full(n_groups, GROUP_SIZE)
    if kind == "unequal":
        size = np.maximum(1, np.round(GROUP_SIZE * random.lognormal(-0.5, 1.0, n_groups))).astype(int)
    return Groups(np.repeat(np.arange(n_groups), size), size)


def draw_correlated(random: np.random.Generator, groups: Groups, share: np.ndarray, rho: float) -> np.ndarray:
    """A category (n,) of each image, of probabilities `share` (k,) and this correlation within groups (Dirichlet)."""
    n = len(groups.size)
    probability = np.tile(share, (n, 1)) if rho == 0 else random.dirichlet(share * (1 - rho) / rho + 1e-9, n)
    threshold = probability.cumsum(axis=1)[groups.unit]
    return (random.random(len(groups.unit))[:, None] > threshold[:, :-1]).sum(axis=1)


def grouped_intervals(studies: int) -> Iterator[tuple[tuple, dict[str, float]]]:
    """Coverage and mean width of the 95 % interval of accuracy."""
    for n_groups, kind, rho, accuracy in product(GROUPS, KINDS, CORRELATIONS, (0.85, 0.95)):
        random, covered, width = np.random.default_rng(0), 0, 0.0
        for _ in range(studies):
            groups = draw_groups(random, n_groups, kind)
            is_correct = draw_correlated(random, groups, np.array([accuracy, 1 - accuracy]), rho) == 0
            rows = np.arange(len(groups.unit))
            found = intervals.interval([influence.mean(is_correct, np.ones(len(rows)))], [rows], groups.unit)
            assert found is not None
            covered += found.low <= accuracy <= found.high
            width += (found.high - found.low) / studies
        yield (n_groups, kind, rho, accuracy), {"coverage": covered / studies, "mean width": width}


def made_up(predicted: np.ndarray) -> Outcomes:
    """Outcomes of predictions of which only the class matters."""
    n = len(predicted)
    return Outcomes(np.arange(n), predicted, np.zeros(n), np.zeros((n, 0)), np.zeros(n, np.int64), None)


def null_tests(studies: int) -> Iterator[tuple[tuple, dict[str, float]]]:
    """How often a true null hypothesis (equal accuracy, 20 % of the images discordant) is rejected at 5 %."""
    for n_groups, kind, rho in product(GROUPS, KINDS, CORRELATIONS):
        random, rejected = np.random.default_rng(0), 0
        for _ in range(studies):
            groups = draw_groups(random, n_groups, kind)
            category = draw_correlated(random, groups, np.array([0.1, 0.1, 0.8]), rho)  # ours better, theirs, both
            label = np.zeros(len(groups.unit), np.int64)
            study = Study(label, np.ones(len(label)), groups.unit)
            ours, theirs = made_up((category == 1).astype(int)), made_up((category == 0).astype(int))
            rejected += paired.compare([ours], [theirs], study).p_value <= 0.05
        yield (n_groups, kind, rho), {"rejected": rejected / studies}


def rare_classes(studies: int) -> Iterator[tuple[tuple, dict[str, float]]]:
    """Coverage of the intervals of balanced accuracy and macro F1, over recalls, with a class of 2 %."""
    for metric, n in product(("balanced_accuracy", "macro_f1"), SIZES):
        rows = []
        for rare, common in product(RARE_RECALLS, COMMON_RECALLS):
            random, covered, width = np.random.default_rng(0), 0, 0.0
            n_rare = round(RARE_SHARE * n)
            label = np.repeat([0, 1], [n - n_rare, n_rare])
            truth = _expected(metric, n - n_rare, n_rare, common, rare)
            for _ in range(studies):
                is_correct = random.random(n) < np.where(label == 1, rare, common)
                predicted = np.where(is_correct, label, 1 - label)
                found = intervals.metric_intervals([made_up(predicted)], label, np.ones(n), np.arange(n), 2)[metric]
                assert found is not None
                covered += found.low <= truth <= found.high
                width += (found.high - found.low) / studies
            rows.append((covered / studies, width))
        coverage = [row[0] for row in rows]
        figures = {"mean coverage": np.mean(coverage), "lowest": np.min(coverage)}
        yield (metric, n), {**figures, "mean width": np.mean([row[1] for row in rows])}


def _expected(metric: str, n_common: int, n_rare: int, common: float, rare: float) -> float:
    if metric == "balanced_accuracy":
        return (common + rare) / 2
    hits, misses = (common * n_common, rare * n_rare), ((1 - common) * n_common, (1 - rare) * n_rare)
    return float(np.mean([2 * hit / (2 * hit + sum(misses)) for hit in hits]))


def choosing(studies: int) -> Iterator[tuple[tuple, dict[str, float]]]:
    """Nine equally good epochs of which validation chooses one, against a strategy of equal accuracy without a choice.

    The bias of the chosen epoch's validation accuracy, judged on the images that chose it and cross-fitted, in points;
    and how often the one-sided 95 % bound says that it is better.
    """
    n, n_epochs, accuracy = 295, 9, 0.855
    for kind in ("on the same images", "cross-fitted"):
        random, bias, wrong = np.random.default_rng(0), 0.0, 0
        for _ in range(studies):
            rows, label, weight = np.arange(n), np.zeros(n, np.int64), np.ones(n)
            shared, own = random.normal(size=n), random.normal(size=(n_epochs + 1, n))
            margin = 1.058 * np.sqrt(1.0) + np.sqrt(0.85) * shared + np.sqrt(0.15) * own  # correct with 85.5 %
            true_log_probability = -np.log1p(np.exp(-2 * margin))
            predicted = (margin < 0).astype(np.int32)
            chosen = Candidates(
                [str(k) for k in range(n_epochs)],
                predicted[:-1],
                true_log_probability[:-1].astype(np.float32),
                np.zeros((n_epochs, 0), np.float32),
            )
            if kind == "cross-fitted":
                judged = outcomes.cross_fitted(rows, chosen, weight, rows)
            else:
                judged = made_up(predicted[true_log_probability[:-1].mean(axis=1).argmax()])
            bias += 100 * ((judged.predicted == label).mean() - accuracy) / studies
            study = Study(label, weight, rows)
            wrong += paired.lower_bound([judged], [made_up(predicted[-1])], study, 0.95) > 0
        yield (kind,), {"bias in points": bias, "bound wrong": wrong / studies}


TABLES = {
    "Interval of accuracy: groups, sizes, correlation, accuracy": grouped_intervals,
    "True null hypothesis: groups, sizes, correlation": null_tests,
    "A class of 2 %: metric, images": rare_classes,
    "Nine equally good epochs, judged": choosing,
}


def main() -> None:
    """Print the tables."""
    studies = int(sys.argv[sys.argv.index("--studies") + 1]) if "--studies" in sys.argv else STUDIES
    for title, table in TABLES.items():
        print(f"\n{title}; n = {studies:,} studies a row")
        for row, figures in table(studies):
            text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            before = BEFORE.get(row)
            was = "" if before is None else f"   (before: {before:.3f})"
            print(f"  {', '.join(map(str, row)):<40}{text}{was}", flush=True)


if __name__ == "__main__":
    run(main)
