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
from scipy import special

from pipeline.comparison import influence, intervals, outcomes, paired
from pipeline.comparison.outcomes import Outcomes
from pipeline.comparison.paired import Study
from pipeline.training.runs import Candidates

STUDIES = 5_000
GROUPS, KINDS, CORRELATIONS = (10, 33, 66), ("equal", "unequal"), (0.0, 0.2, 0.5)
GROUP_SIZE = 10  # images, the mean of unequal sizes (log-normal, sigma 1) too
RARE_SHARE = 0.02
RARE_RECALLS, COMMON_RECALLS, SIZES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.93, 0.95, 0.97), (0.9, 0.97), (295, 656, 2000)
# The same figures with the code of commit 5a6e86a, by row: 2,000 studies a row, 500 of a rare class
BEFORE: dict[tuple, tuple[float, ...]] = {
    (10, "equal", 0.0, 0.85): (0.929, 0.138),
    (10, "equal", 0.0, 0.95): (0.972, 0.088),
    (10, "equal", 0.2, 0.85): (0.741, 0.136),
    (10, "equal", 0.2, 0.95): (0.828, 0.085),
    (10, "equal", 0.5, 0.85): (0.572, 0.134),
    (10, "equal", 0.5, 0.95): (0.587, 0.081),
    (10, "unequal", 0.0, 0.85): (0.957, 0.144),
    (10, "unequal", 0.0, 0.95): (0.959, 0.093),
    (10, "unequal", 0.2, 0.85): (0.650, 0.142),
    (10, "unequal", 0.2, 0.95): (0.743, 0.088),
    (10, "unequal", 0.5, 0.85): (0.476, 0.134),
    (10, "unequal", 0.5, 0.95): (0.569, 0.082),
    (33, "equal", 0.0, 0.85): (0.958, 0.077),
    (33, "equal", 0.0, 0.95): (0.965, 0.048),
    (33, "equal", 0.2, 0.85): (0.765, 0.076),
    (33, "equal", 0.2, 0.95): (0.790, 0.047),
    (33, "equal", 0.5, 0.85): (0.598, 0.076),
    (33, "equal", 0.5, 0.95): (0.598, 0.046),
    (33, "unequal", 0.0, 0.85): (0.946, 0.078),
    (33, "unequal", 0.0, 0.95): (0.951, 0.049),
    (33, "unequal", 0.2, 0.85): (0.627, 0.078),
    (33, "unequal", 0.2, 0.95): (0.620, 0.047),
    (33, "unequal", 0.5, 0.85): (0.430, 0.075),
    (33, "unequal", 0.5, 0.95): (0.458, 0.045),
    (66, "equal", 0.0, 0.85): (0.935, 0.054),
    (66, "equal", 0.0, 0.95): (0.940, 0.033),
    (66, "equal", 0.2, 0.85): (0.724, 0.054),
    (66, "equal", 0.2, 0.95): (0.740, 0.033),
    (66, "equal", 0.5, 0.85): (0.572, 0.054),
    (66, "equal", 0.5, 0.95): (0.589, 0.033),
    (66, "unequal", 0.0, 0.85): (0.951, 0.055),
    (66, "unequal", 0.0, 0.95): (0.952, 0.034),
    (66, "unequal", 0.2, 0.85): (0.599, 0.055),
    (66, "unequal", 0.2, 0.95): (0.621, 0.033),
    (66, "unequal", 0.5, 0.85): (0.413, 0.054),
    (66, "unequal", 0.5, 0.95): (0.437, 0.032),
    (10, "equal", 0.0): (0.025, 0.048),
    (10, "equal", 0.2): (0.188, 0.157),
    (10, "equal", 0.5): (0.376, 0.247),
    (10, "unequal", 0.0): (0.030, 0.049),
    (10, "unequal", 0.2): (0.277, 0.195),
    (10, "unequal", 0.5): (0.431, 0.271),
    (33, "equal", 0.0): (0.043, 0.054),
    (33, "equal", 0.2): (0.217, 0.159),
    (33, "equal", 0.5): (0.382, 0.242),
    (33, "unequal", 0.0): (0.040, 0.054),
    (33, "unequal", 0.2): (0.337, 0.217),
    (33, "unequal", 0.5): (0.519, 0.315),
    (66, "equal", 0.0): (0.043, 0.054),
    (66, "equal", 0.2): (0.221, 0.174),
    (66, "equal", 0.5): (0.395, 0.247),
    (66, "unequal", 0.0): (0.043, 0.053),
    (66, "unequal", 0.2): (0.363, 0.232),
    (66, "unequal", 0.5): (0.542, 0.309),
    ("balanced_accuracy", 295): (0.923, 0.776, 0.258),
    ("macro_f1", 295): (0.988, 0.948, 0.245),
    ("balanced_accuracy", 656): (0.937, 0.742, 0.183),
    ("macro_f1", 656): (0.994, 0.970, 0.161),
    ("balanced_accuracy", 2000): (0.903, 0.794, 0.107),
    ("macro_f1", 2000): (0.988, 0.964, 0.089),
    (295, 9, 0.85): (1.239, 0.149),
    (295, 9, 0.95): (0.785, 0.115),
}


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
    """Equal accuracy, 20 % of the images discordant: rejected at 5 %, one-sided 95 % bound above 0."""
    for n_groups, kind, rho in product(GROUPS, KINDS, CORRELATIONS):
        random, rejected, wrong = np.random.default_rng(0), 0, 0
        for _ in range(studies):
            groups = draw_groups(random, n_groups, kind)
            category = draw_correlated(random, groups, np.array([0.1, 0.1, 0.8]), rho)  # ours better, theirs, both
            label = np.zeros(len(groups.unit), np.int64)
            study = Study(label, np.ones(len(label)), groups.unit)
            ours, theirs = [made_up((category == 1).astype(int))], [made_up((category == 0).astype(int))]
            rejected += paired.compare(ours, theirs, study).p_value <= 0.05
            wrong += paired.lower_bound(ours, theirs, study, 0.95) > 0
        yield (n_groups, kind, rho), {"rejected": rejected / studies, "bound wrong": wrong / studies}


def rare_classes(studies: int) -> Iterator[tuple[tuple, dict[str, float]]]:
    """Coverage of the intervals of balanced accuracy and macro F1, over recalls, with a class of 2 %."""
    for n in SIZES:
        n_rare = round(RARE_SHARE * n)
        label, rows = np.repeat([0, 1], [n - n_rare, n_rare]), np.arange(n)
        found = {metric: [] for metric in ("balanced_accuracy", "macro_f1")}
        for rare, common in product(RARE_RECALLS, COMMON_RECALLS):
            random, covered, width = np.random.default_rng(0), dict.fromkeys(found, 0.0), dict.fromkeys(found, 0.0)
            for _ in range(studies):
                is_correct = random.random(n) < np.where(label == 1, rare, common)
                predicted = made_up(np.where(is_correct, label, 1 - label))
                linear = influence.linearise(predicted, label, np.ones(n), rows, 2)
                for metric in found:
                    interval = intervals.interval([linear[metric]], [rows], rows)
                    assert interval is not None
                    covered[metric] += (
                        interval.low <= _expected(metric, n - n_rare, n_rare, common, rare) <= interval.high
                    )
                    width[metric] += interval.high - interval.low
            for metric, these in found.items():
                these.append((covered[metric] / studies, width[metric] / studies))
        for metric, these in found.items():
            coverage, width = np.array(these).T
            yield (metric, n), {"mean coverage": coverage.mean(), "lowest": coverage.min(), "mean width": width.mean()}


def _expected(metric: str, n_common: int, n_rare: int, common: float, rare: float) -> float:
    if metric == "balanced_accuracy":
        return (common + rare) / 2
    hits, misses = (common * n_common, rare * n_rare), ((1 - common) * n_common, (1 - rare) * n_rare)
    return float(np.mean([2 * hit / (2 * hit + sum(misses)) for hit in hits]))


def choosing(studies: int) -> Iterator[tuple[tuple, dict[str, float]]]:
    """Nine equally good epochs of which validation chooses one, against a strategy of equal accuracy without a choice.

    The bias of the validation accuracy, in points, and how often the one-sided 95 % bound says that it is better.
    """
    n, n_epochs, accuracy = 295, 9, 0.855
    rows, label, weight = np.arange(n), np.zeros(n, np.int64), np.ones(n)
    study = Study(label, weight, rows)
    for shared in (0.85, 0.95):
        random, bias, wrong = np.random.default_rng(0), 0.0, 0
        for _ in range(studies):
            noise = np.sqrt(shared) * random.normal(size=n) + np.sqrt(1 - shared) * random.normal(
                size=(n_epochs + 1, n)
            )
            margin = special.ndtri(accuracy) + noise
            true_log_probability = -np.log1p(np.exp(-2 * margin)).astype(np.float32)
            predicted = (margin < 0).astype(np.int32)
            names = [f"epoch {epoch}" for epoch in range(n_epochs)]
            chosen = Candidates(names, predicted[1:], true_log_probability[1:], np.zeros((n_epochs, 0), np.float32))
            judged = outcomes.cross_fitted(rows, chosen, weight, rows)
            bias += 100 * ((judged.predicted == label).mean() - accuracy) / studies
            wrong += paired.lower_bound([judged], [made_up(predicted[0])], study, 0.95) > 0
        yield (n, n_epochs, shared), {"bias in points": bias, "bound wrong": wrong / studies}


TABLES = {
    "Interval of accuracy: groups, sizes, correlation, accuracy": grouped_intervals,
    "True null hypothesis: groups, sizes, correlation": null_tests,
    "A class of 2 %: metric, images": rare_classes,
    "Equally good epochs, one is chosen: images, epochs, correlation of epochs": choosing,
}


def main() -> None:
    """Print the tables."""
    studies = int(sys.argv[sys.argv.index("--studies") + 1]) if "--studies" in sys.argv else STUDIES
    for title, table in TABLES.items():
        print(f"\n{title}; n = {studies:,} studies a row")
        for row, figures in table(studies):
            text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            before = ", ".join(f"{value:.3f}" for value in BEFORE.get(row, ()))
            was = f"   (before: {before})" if before else ""
            print(f"  {', '.join(map(str, row)):<40}{text}{was}", flush=True)


if __name__ == "__main__":
    main()
