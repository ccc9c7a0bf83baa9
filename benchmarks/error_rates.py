"""How often intervals miss and tests err, simulated: `python -m benchmarks.error_rates [--studies N]`.

Every row draws studies with a known truth and runs the project's own code on them. Four tables: intervals of accuracy
where test images come in groups, tests of a true null hypothesis there, intervals of balanced accuracy and macro F1
with a rare class, and what choosing an epoch on the validation images does to their figures. The last two lines of a
table give the lowest and the highest of its figures. `before` is what the same simulation gave with the code of commit
5a6e86a; of the two large tables, these two lines alone.
"""

from collections.abc import Iterator
from itertools import product

import click
import numpy as np
from scipy import special

from pipeline.comparison import influence, intervals, outcomes, paired
from pipeline.comparison.paired import Study
from pipeline.training.runs import Candidates

Row = tuple[tuple, dict[str, float]]  # what was simulated, and its figures
GROUPS, KINDS, CORRELATIONS = (10, 33, 66), ("equal", "unequal"), (0.0, 0.2, 0.5)
GROUP_SIZE = 10  # images, the mean of unequal sizes (log-normal, sigma 1) too
RARE_SHARE = 0.02
RARE_RECALLS, COMMON_RECALLS, SIZES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.93, 0.95, 0.97), (0.9, 0.97), (295, 656, 2000)
# The same figures with the code of commit 5a6e86a: 2,000 studies a row, 500 of a rare class
BEFORE: dict[tuple, tuple[float, ...]] = {
    ("intervals", "lowest"): (0.413, 0.032),
    ("intervals", "highest"): (0.972, 0.144),
    ("tests", "lowest"): (0.025, 0.048),
    ("tests", "highest"): (0.542, 0.315),
    ("balanced_accuracy", 295): (0.923, 0.776, 0.258),
    ("macro_f1", 295): (0.988, 0.948, 0.245),
    ("balanced_accuracy", 656): (0.937, 0.742, 0.183),
    ("macro_f1", 656): (0.994, 0.970, 0.161),
    ("balanced_accuracy", 2000): (0.903, 0.794, 0.107),
    ("macro_f1", 2000): (0.988, 0.964, 0.089),
    (295, 9, 0.85): (1.239, 0.149),
    (295, 9, 0.95): (0.785, 0.115),
    (295, 9, 0.98): (0.543, 0.100),
}


def draw_groups(random: np.random.Generator, n_groups: int, kind: str) -> np.ndarray:
    """The group (n,) of each image: groups of equal or of very unequal sizes."""
    size = np.full(n_groups, GROUP_SIZE)
    if kind == "unequal":
        size = np.maximum(1, np.round(GROUP_SIZE * random.lognormal(-0.5, 1.0, n_groups))).astype(int)
    return np.repeat(np.arange(n_groups), size)


def draw_correlated(random: np.random.Generator, group: np.ndarray, share: list[float], rho: float) -> np.ndarray:
    """A category (n,) of each image, of probabilities `share` (k,) and this correlation within groups (Dirichlet)."""
    n = group[-1] + 1
    probability = np.tile(share, (n, 1)) if rho == 0 else random.dirichlet(np.multiply(share, 1 - rho) / rho + 1e-9, n)
    threshold = probability.cumsum(axis=1)[group]
    return (random.random(len(group))[:, None] > threshold[:, :-1]).sum(axis=1)


def grouped_intervals(studies: int) -> Iterator[Row]:
    """Coverage and mean width of the 95 % interval of accuracy."""
    for n_groups, kind, rho, accuracy in product(GROUPS, KINDS, CORRELATIONS, (0.85, 0.95)):
        random, covered, width = np.random.default_rng(0), 0, 0.0
        for _ in range(studies):
            group = draw_groups(random, n_groups, kind)
            is_correct = draw_correlated(random, group, [accuracy, 1 - accuracy], rho) == 0
            rows = np.arange(len(group))
            found = intervals.interval([influence.mean(is_correct, np.ones(len(rows)))], [rows], group)
            assert found is not None
            covered += found.low <= accuracy <= found.high
            width += (found.high - found.low) / studies
        yield (n_groups, kind, rho, accuracy), {"coverage": covered / studies, "mean width": width}


def null_tests(studies: int) -> Iterator[Row]:
    """Equal accuracy, 20 % of the images discordant: rejected at 5 %, one-sided 95 % bound above 0."""
    for n_groups, kind, rho in product(GROUPS, KINDS, CORRELATIONS):
        random, rejected, wrong = np.random.default_rng(0), 0, 0
        for _ in range(studies):
            group = draw_groups(random, n_groups, kind)
            category = draw_correlated(random, group, [0.1, 0.1, 0.8], rho)  # ours better, theirs, both
            label = np.zeros(len(group), np.int64)
            study = Study(label, np.ones(len(label)), group)
            ours, theirs = ([outcomes.of_classes((category == better).astype(int))] for better in (1, 0))
            rejected += paired.compare(ours, theirs, study).p_value <= 0.05
            wrong += paired.lower_bound(ours, theirs, study, 0.95) > 0
        yield (n_groups, kind, rho), {"rejected": rejected / studies, "bound wrong": wrong / studies}


def rare_classes(studies: int) -> Iterator[Row]:
    """Coverage of the intervals of balanced accuracy and macro F1, over recalls, with a class of 2 %."""
    metrics, recalls = ("balanced_accuracy", "macro_f1"), [*product(RARE_RECALLS, COMMON_RECALLS)]
    for n in SIZES:
        n_rare = round(RARE_SHARE * n)
        label, rows = np.repeat([0, 1], [n - n_rare, n_rare]), np.arange(n)
        covered, width = np.zeros((2, len(metrics), len(recalls)))
        for i, (rare, common) in enumerate(recalls):
            random, truth = np.random.default_rng(0), expected(n - n_rare, n_rare, common, rare)
            for _ in range(studies):
                is_correct = random.random(n) < np.where(label == 1, rare, common)
                predicted = outcomes.of_classes(np.where(is_correct, label, 1 - label))
                linear = influence.linearise(predicted, label, np.ones(n), rows, 2)
                for m, metric in enumerate(metrics):
                    found = intervals.interval([linear[metric]], [rows], rows)
                    assert found is not None
                    covered[m, i] += (found.low <= truth[m] <= found.high) / studies
                    width[m, i] += (found.high - found.low) / studies
        for m, metric in enumerate(metrics):
            figures = {"mean coverage": covered[m].mean(), "lowest": covered[m].min(), "mean width": width[m].mean()}
            yield (metric, n), figures


def expected(n_common: int, n_rare: int, common: float, rare: float) -> tuple[float, float]:
    """Balanced accuracy and macro F1 if the classes have exactly these recalls."""
    hits, misses = (common * n_common, rare * n_rare), ((1 - common) * n_common, (1 - rare) * n_rare)
    return (common + rare) / 2, float(np.mean([2 * hit / (2 * hit + sum(misses)) for hit in hits]))


def choosing(studies: int) -> Iterator[Row]:
    """Nine equally good epochs of which validation chooses one, against a strategy of equal accuracy without a choice.

    The bias of the validation accuracy, in points, and how often the one-sided 95 % bound says that it is better.
    """
    n, n_epochs, accuracy = 295, 9, 0.855
    rows, label, weight = np.arange(n), np.zeros(n, np.int64), np.ones(n)
    study = Study(label, weight, rows)
    for shared in (0.85, 0.95, 0.98):
        random, bias, wrong = np.random.default_rng(0), 0.0, 0
        for _ in range(studies):
            common, own = random.normal(size=n), random.normal(size=(n_epochs + 1, n))
            margin = special.ndtri(accuracy) + (np.sqrt(shared) * common + np.sqrt(1 - shared) * own)
            true_log_probability = -np.log1p(np.exp(-2 * margin)).astype(np.float32)
            predicted = (margin < 0).astype(np.int32)
            names = [f"epoch {epoch}" for epoch in range(n_epochs)]
            chosen = Candidates(names, predicted[1:], true_log_probability[1:], np.zeros((n_epochs, 0), np.float32))
            judged = outcomes.cross_fitted(rows, chosen, weight, rows)
            bias += 100 * ((judged.predicted == label).mean() - accuracy) / studies
            wrong += paired.lower_bound([judged], [outcomes.of_classes(predicted[0])], study, 0.95) > 0
        yield (n, n_epochs, shared), {"bias in points": bias, "bound wrong": wrong / studies}


TABLES = {
    "intervals": ("Interval of accuracy: groups, sizes, correlation, accuracy", grouped_intervals),
    "tests": ("True null hypothesis: groups, sizes, correlation", null_tests),
    "rare class": ("A class of 2 %: metric, images", rare_classes),
    "choosing": ("Equally good epochs, one is chosen: images, epochs, correlation of epochs", choosing),
}


def show(row: tuple, figures: dict[str, float]) -> None:
    """Print a row, and what it was before."""
    text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
    before = ", ".join(f"{value:.3f}" for value in BEFORE.get(row, ()))
    print(f"  {', '.join(map(str, row)):<40}{text}{before and f'   (before: {before})'}", flush=True)


@click.command()
@click.option("--studies", default=5_000, show_default=True, help="How many a row simulates.")
def main(studies: int) -> None:
    """How often intervals miss and tests err, simulated."""
    for name, (title, table) in TABLES.items():
        print(f"\n{title}; n = {studies:,} studies a row")
        rows = []
        for row, figures in table(studies):
            show(row, figures)
            rows.append(figures)
        for word, extreme in (("lowest", min), ("highest", max)):
            show((name, word), {figure: extreme(found[figure] for found in rows) for figure in rows[0]})


if __name__ == "__main__":
    main()
