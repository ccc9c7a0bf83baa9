"""How often the recommendation errs, simulated: `python -m benchmarks.decisions [--studies N] [--only KIND]`.

Every row draws studies with known accuracies of 2, 3 or 5 strategies, the first of which is the cheapest, and applies
the rule of pipeline/comparison/recommendation.py with the margin and the confidence of params.yaml. It counts how
often the set contains the best strategy, how often the cheapest is recommended, and how often a strategy is called
settled that is truly worse than the best by more than the margin. The loss is the accuracy of the best minus that of
the chosen strategy, in points: of this rule, of taking the best on validation, and of the rule before it (the cheapest
that is shown to be at most 1 point below the best on validation, else that best one).
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product

import click
import numpy as np
from scipy import optimize, special, stats

from pipeline.comparison import outcomes, paired, recommendation
from pipeline.comparison.outcomes import Outcomes
from pipeline.comparison.paired import Study
from pipeline.params import load_params

PARAMS = load_params()
MARGIN, CONFIDENCE = PARAMS.compare.practical_margin.accuracy, PARAMS.compare.confidence
RARE_SHARE, RARE_MARGIN = 0.05, PARAMS.compare.practical_margin.balanced_accuracy  # of the rarer of two classes
ACCURACY, OLD_MARGIN = 0.85, 0.01
WEIGHTS = (1 / 3, 2 / 3, 1.0)  # of images, as in the default data
SIZES, DISCORDANCES, DIFFERENCES = (100, 300, 1000, 3000, 10_000), (0.04, 0.1, 0.2), (-3, -2, -1, 0, 1, 2, 3)
VAL_SHARE = PARAMS.split.val_fraction  # of all images, from which each seed draws its validation images
KEPT_OVER_SEEDS = 0.7  # share of the variance of a strategy's errors that is the same in all seeds
SEED_SD = 0.005  # of the accuracy of a run around that of its strategy; with one seed, the result is about the run


@dataclass(frozen=True)
class Case:
    """A row: validation images a seed, discordance of two strategies, images of a unit, seeds, and true differences.

    `points`: the accuracy of each strategy minus ACCURACY, in percentage points.
    """

    n: int
    discordance: float
    points: tuple[float, ...]
    n_seeds: int = 1
    unit_size: int = 1
    kind: str = "plain"  # or "weighted"; or "rare": the points are of balanced accuracy, by the recall of a rare class


def cases() -> Iterator[tuple[str, Case]]:
    """Equal strategies; some that are just beyond the margin; the cheapest better or worse by up to 3 points."""
    beyond = 100 * MARGIN + 0.01
    for n, discordance, k in product(SIZES, DISCORDANCES, (2, 3, 5)):
        yield "equal", Case(n, discordance, (0.0,) * k)
        yield "the cheapest just beyond the margin", Case(n, discordance, (-beyond,) + (0.0,) * (k - 1))
    for n, discordance, (n_seeds, unit_size) in product(SIZES, DISCORDANCES, ((1, 10), (5, 1), (5, 10))):
        if n_seeds > 1 and n == SIZES[-1] and discordance != DISCORDANCES[1]:
            continue  # as slow as all others together
        yield "equal", Case(n, discordance, (0.0,) * 3, n_seeds, unit_size)
        yield "the cheapest just beyond the margin", Case(n, discordance, (-beyond, 0.0, 0.0), n_seeds, unit_size)
        worse = Case(n, discordance, (-beyond, -beyond, 0), n_seeds, unit_size)
        yield "all but the dearest just beyond the margin", worse
    for n, kind in product((120, 150, 200, 300, 1000), ("plain", "weighted", "rare")):
        worse = 100 * RARE_MARGIN + 0.01 if kind == "rare" else beyond
        discordance = 0.04 if kind == "plain" else 0.1
        yield "small studies, weights, a rare class", Case(n, discordance, (-worse, 0.0), kind=kind)
    for n, points in product(SIZES, DIFFERENCES):
        yield "the cheapest differs", Case(n, 0.1, (float(points), 0.0, 0.0))


def correlation(discordance: float) -> float:
    """That of two normal variables of which one is below the quantile ACCURACY and one above with this probability."""
    cut = [special.ndtri(ACCURACY)] * 2

    def excess(rho: float) -> float:
        both = stats.multivariate_normal.cdf(cut, mean=[0, 0], cov=np.array([[1, rho], [rho, 1]]))  # pyright: ignore[reportArgumentType]
        return 2 * (ACCURACY - float(both)) - discordance

    return optimize.root_scalar(excess, bracket=(0.0, 0.9999)).root


def draw(case: Case, rho: float, random: np.random.Generator) -> tuple[dict[str, list[Outcomes]], Study]:
    """The validation outcomes of every strategy and seed, and the study."""
    k, is_redrawn = len(case.points), case.n_seeds > 1
    n_units = round((case.n / VAL_SHARE if is_redrawn else case.n) / case.unit_size)
    unit = np.repeat(np.arange(n_units), case.unit_size)

    def noise(*shape: int) -> np.ndarray:
        """Normal, of variance 1, correlated by 0.5 within units."""
        if case.unit_size == 1:
            return random.normal(size=(*shape, n_units))
        half = random.normal(size=(*shape, n_units, 1)) + random.normal(size=(*shape, n_units, case.unit_size))
        return (half / np.sqrt(2)).reshape(*shape, -1)

    difficulty, own = noise(1), noise(k)
    label = np.ones(len(unit), np.int64)
    if case.kind == "rare":
        label[round(RARE_SHARE * len(unit)) :] = 0
    runs: dict[str, list[Outcomes]] = {str(number): [] for number in range(k)}
    for _ in range(case.n_seeds):
        rows, of_run, shift = np.arange(len(unit)), own, np.zeros(k)
        if is_redrawn:
            drawn = np.sort(random.permutation(n_units)[: round(case.n / case.unit_size)])
            rows = (drawn[:, None] * case.unit_size + np.arange(case.unit_size)).ravel()
            of_run = np.sqrt(KEPT_OVER_SEEDS) * own + np.sqrt(1 - KEPT_OVER_SEEDS) * noise(k)
            shift = random.normal(0, SEED_SD, k)
        accuracy = ACCURACY + np.array(case.points) / 100 + shift
        ability = np.repeat(special.ndtri(accuracy)[:, None], len(rows), axis=1)
        if case.kind == "rare":
            recall = ACCURACY + 2 * np.array(case.points) / 100
            ability = special.ndtri(np.where(label[rows] == 1, recall[:, None], ACCURACY))
        latent = np.sqrt(rho) * difficulty[:, rows] + np.sqrt(1 - rho) * of_run[:, rows]
        for name, is_correct in zip(runs, latent < ability, strict=True):
            predicted = np.where(is_correct, label[rows], 1 - label[rows])
            # In folds, as validation always is: its bounds are wider by paired.CROSS_FITTED
            runs[name].append(outcomes.of_classes(predicted, rows, outcomes.folds(unit[rows])))
    n_train = len(unit) * (1 - VAL_SHARE - PARAMS.split.test_fraction) if is_redrawn else 0
    weight = random.choice(WEIGHTS, len(unit)) if case.kind == "weighted" else np.ones(len(unit))
    return runs, Study(label, weight, unit, n_train, "balanced_accuracy" if case.kind == "rare" else "accuracy")


def old_rule(runs: Mapping[str, list[Outcomes]], study: Study, best: str) -> str:
    """The cheapest strategy that is shown to be at most 1 point below the best on validation, else that one."""
    cheaper = list(runs)[: list(runs).index(best)]
    bounds = ((name, paired.lower_bound(runs[name], runs[best], study, CONFIDENCE)) for name in cheaper)
    return next((name for name, bound in bounds if bound >= -OLD_MARGIN), best)


def simulate(case: Case, studies: int) -> dict[str, float]:
    """Rates over studies, and mean losses in points."""
    rho, random = correlation(case.discordance), np.random.default_rng(0)
    truth = {str(number): points for number, points in enumerate(case.points)}
    best, names, margin = max(truth.values()), list(truth), RARE_MARGIN if case.kind == "rare" else MARGIN
    costs = {name: number for number, name in enumerate(names)}
    each: list[dict[str, float]] = []
    for _ in range(studies):
        runs, study = draw(case, rho, random)
        found = recommendation.recommend(runs, costs, study, margin, CONFIDENCE, {})
        in_set = {found.strategy, *(rival.strategy for rival in found.rivals if not rival.beaten_by)}
        accuracy = {name: np.mean([_accuracy(run, study) for run in these]) for name, these in runs.items()}
        observed = max(names, key=accuracy.__getitem__)
        old = old_rule(runs, study, observed)
        is_worse = truth[found.strategy] < best - 100 * margin
        each.append(
            {
                "best in the set": max(names, key=truth.__getitem__) in in_set,
                "cheapest chosen": found.strategy == names[0],
                "cheapest chosen by the old rule": old == names[0],
                "settled": found.is_settled,
                "settled wrongly": found.is_settled and is_worse,
                "loss": best - truth[found.strategy],
                "loss of argmax": best - truth[observed],
                "loss of the old rule": best - truth[old],
            }
        )
    return {name: float(np.mean([rates[name] for rates in each])) for name in each[0]}


def _accuracy(run: Outcomes, study: Study) -> float:
    return float(np.average(run.predicted == study.label[run.rows], weights=study.weight[run.rows]))


@click.command()
@click.option("--studies", default=1_000, show_default=True, help="How many a row simulates.")
@click.option("--only", type=click.Choice([*dict.fromkeys(kind for kind, _ in cases())]), help="Rows of one kind.")
def main(studies: int, only: str | None) -> None:
    """Print a line for each row, and the worst of each kind."""
    kinds, rows = zip(*((kind, case) for kind, case in cases() if only in (None, kind)), strict=True)
    print(f"n = {studies:,} studies a row: images, discordance, differences in points, seeds, images of a unit")
    found = []
    with ProcessPoolExecutor() as pool:
        for kind, case, rates in zip(kinds, rows, pool.map(partial(simulate, studies=studies), rows), strict=True):
            found.append((kind, case, rates))
            points = " ".join(f"{one:+g}" for one in case.points)
            row = f"{case.n:>6} {case.discordance:.2f} {points:<24} {case.n_seeds} {case.unit_size:>2} {case.kind:<8}"
            print(f"{row}   {', '.join(f'{name} {rate:.3f}' for name, rate in rates.items())}", flush=True)
    for kind in dict.fromkeys(kinds):
        these = [rates for other, _, rates in found if other == kind]
        lowest = min(rates["best in the set"] for rates in these)
        cheapest, before = (min(r[f"cheapest chosen{by}"] for r in these) for by in ("", " by the old rule"))
        wrongly = max(rates["settled wrongly"] for rates in these)
        losses = (np.mean([rates[name] for rates in these]) for name in these[0] if name.startswith("loss"))
        print(f"\n{kind}, {len(these)} rows:")
        print(f"  best in the set at least {lowest:.3f}")
        print(f"  cheapest chosen at least {cheapest:.3f} (old rule: {before:.3f})")
        print(f"  settled wrongly at most {wrongly:.3f}")
        print(f"  mean loss in points: {', '.join(f'{loss:.2f}' for loss in losses)} (this rule, argmax, the old rule)")


if __name__ == "__main__":
    main()
