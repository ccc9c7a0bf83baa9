"""The rule that recommends a strategy: the set, settled and provisional choices, references, and the words."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.comparison import recommendation
from pipeline.comparison.outcomes import Outcomes
from pipeline.comparison.recommendation import Recommendation
from tests.factories import ones_study, outcomes_of

N = 400
LABEL = np.arange(N) % 2
ROWS = np.arange(N)
FLOPS = {"cheap": 1 * 10**12, "middle": 20 * 10**12, "dear": 1000 * 10**12}
Runs = dict[str, list[Outcomes]]


def right_on(images: np.ndarray) -> list[Outcomes]:
    """One run that is right on just these images."""
    predicted = np.where(np.isin(ROWS, images), LABEL, 1 - LABEL)
    return [outcomes_of(np.eye(2)[predicted] * 4.0, LABEL)]


def recommend(runs: Runs, margin: float = 0.02, references: Runs | None = None, **study: Any) -> Recommendation:
    made = ones_study(N, label=LABEL, **study)
    return recommendation.recommend(runs, FLOPS, made, margin, 0.95, references or {})


def words(found: Recommendation, runs: Runs, baseline: str = "cheap", references: Runs | None = None) -> str:
    def strategy(name: str, run: Outcomes) -> dict[str, Any]:
        accuracy = float(np.mean(run.predicted == LABEL))
        figure = {"value": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "sd": None}
        nll = {"value": 0.31, "low": 0.3, "high": 0.32, "sd": None}
        difference = {"difference": 0.02, "low": 0.01, "high": 0.03, "p_value": 0.0004, "method": "sign-flip"}
        return {
            "val": {"metrics": {"accuracy": figure, "nll": nll}, "n": [N], "n_units": [found.n_units]},
            "seeds": [0],
            "test": {"metrics": {"accuracy": figure, "nll": nll}},
            "cost": {"train_flops": FLOPS.get(name, 0)},
            "vs_baseline": None if name == baseline else {"val": difference, "test": difference},
        }

    described = {name: strategy(name, these[0]) for name, these in runs.items()}
    beside = {name: strategy(name, these[0]) for name, these in (references or {}).items()}
    return recommendation.in_words(found, described, beside)


def test_of_equal_strategies_the_cheapest_is_settled():
    runs = {"dear": right_on(ROWS[:350]), "cheap": right_on(ROWS[:350]), "middle": right_on(ROWS[:350])}
    found = recommend(runs)
    assert (found.strategy, found.is_settled, found.metric) == ("cheap", True, "accuracy")
    assert [(rival.strategy, rival.difference, rival.beaten_by) for rival in found.rivals] == [
        ("middle", 0, None),
        ("dear", 0, None),
    ]
    text = words(found, runs)
    assert text.startswith("**Recommendation: cheap, settled.** Train cheap. Among the strategies that could be")
    assert "With 95 % confidence, no other strategy is better by more than 2 points: middle (+0.0 points" in text
    assert "This is by the 400 validation images" in text
    assert "This is a result of this one run of each strategy" in text
    assert text.endswith("cheap has accuracy 87.5 % (82.5 % to 92.5 %); it is the baseline.")


def test_a_cheaper_strategy_that_is_shown_to_be_worse_is_ruled_out():
    # middle differs from dear on two images of 400, cheap on many
    runs = {"cheap": right_on(ROWS[:280]), "middle": right_on(ROWS[:358]), "dear": right_on(ROWS[:360])}
    found = recommend(runs)
    assert (found.strategy, found.is_settled) == ("middle", True)
    assert {rival.strategy: rival.beaten_by for rival in found.rivals} == {"cheap": "middle", "dear": None}
    text = words(found, runs)
    assert "Train middle. Among the strategies that could be the best, it is the cheapest to train (20 TFLOPs)." in text
    assert "Shown to be worse than another strategy: cheap (-19.5 points" in text
    assert "dear (+0.5 points" in text
    assert text.endswith("difference from the baseline +2.0 points (+1.0 to +3.0) (p < 0.001).")


def test_the_best_is_settled_where_all_others_are_ruled_out():
    runs = {"cheap": right_on(ROWS[:250]), "middle": right_on(ROWS[:280]), "dear": right_on(ROWS[:380])}
    found = recommend(runs)
    assert (found.strategy, found.is_settled) == ("dear", True)
    assert all(rival.beaten_by for rival in found.rivals)
    assert "no other strategy is better by more than 2 points. This is by" in words(found, runs)


def test_where_a_dearer_one_may_be_better_the_cheapest_is_provisional_and_it_says_how_many_units_would_tell():
    # a difference of 2.5 points, made of 40 images for and 50 against
    runs = {"cheap": right_on(np.r_[0:300, 350:390]), "dear": right_on(ROWS[:350])}
    found = recommend(runs)
    assert (found.strategy, found.is_settled) == ("cheap", False)
    (rival,) = found.rivals
    assert (rival.strategy, rival.beaten_by) == ("dear", None)
    assert rival.difference == pytest.approx(0.025)
    assert rival.low < 0 < found.margin < rival.high
    # 22.5 % of the images are discordant
    assert found.units_needed == pytest.approx((91 / 402) * ((1.645 + 0.842) / 0.02) ** 2, rel=0.02)
    text = words(found, runs)
    assert "**Recommendation: cheap, provisional.**" in text
    assert "The 400 validation images cannot tell it from: dear (+2.5 points, between" in text
    assert f"about {found.units_needed:,} validation units would show a true difference of that size" in text
    assert "there are 400. More images give more" in text


def test_the_number_of_units_does_not_depend_on_which_strategy_is_ahead():
    ahead = {"cheap": right_on(ROWS[:350]), "dear": right_on(np.r_[0:310, 350:388])}
    behind = {"cheap": right_on(np.r_[0:310, 350:388]), "dear": right_on(ROWS[:350])}
    assert recommend(ahead).units_needed == recommend(behind).units_needed


def test_a_number_above_100_000_is_not_stated():
    runs = {"cheap": right_on(np.r_[0:300, 350:390]), "dear": right_on(ROWS[:350])}
    found = recommend(runs, margin=0.001)
    assert found.units_needed is None
    assert "more than 100,000 validation units" in words(found, runs)


def test_fewer_than_ten_units_settle_nothing():
    runs = {"cheap": right_on(ROWS), "dear": right_on(ROWS)}
    assert recommend(runs, margin=0.99).is_settled
    found = recommend(runs, margin=0.99, unit=ROWS // 50)
    assert (found.n_units, found.is_settled) == (8, False)
    assert "With 8 different validation units, fewer than 10, nothing is settled." in words(found, runs)
    assert recommend(runs, margin=0.99, unit=ROWS // 20).is_settled


@pytest.mark.parametrize(("n", "is_settled"), [(100, True), (95, False)])
def test_equal_predictions_are_settled_once_a_difference_of_the_margin_would_have_shown(n: int, is_settled: bool):
    study = ones_study(n, label=LABEL[:n])
    runs = {name: [run[np.arange(n)] for run in right_on(ROWS[:80])] for name in ("cheap", "dear")}
    assert recommendation.recommend(runs, FLOPS, study, 0.03, 0.95, {}).is_settled == is_settled


def test_images_of_one_unit_say_less_than_as_many_units():
    runs = {"cheap": right_on(ROWS[:330]), "dear": right_on(ROWS[:360])}
    assert recommend(runs).strategy == "dear"
    assert recommend(runs, unit=ROWS // 30).strategy == "cheap"  # the 30 images that differ are of two units


def test_the_only_strategy_is_recommended():
    runs = {"cheap": right_on(ROWS[:350])}
    found = recommend(runs)
    assert (found.strategy, found.is_settled, found.units_needed, found.rivals) == ("cheap", False, None, [])
    assert "because nothing was compared with it: fine_tune.run is empty" in words(found, runs)
    assert words(found, runs).endswith("; it is the baseline.")


def test_seeds_are_averaged_and_their_units_counted_once():
    first, second = right_on(ROWS[:300])[0], right_on(ROWS[:340])[0]
    found = recommend({"cheap": [first, second], "dear": [second, second]})
    assert found.n_units == N
    assert (found.strategy, found.rivals[0].difference) == ("dear", pytest.approx(-0.05))


def test_what_does_not_beat_a_reference_says_so_first():
    runs = {"cheap": right_on(ROWS[:350]), "dear": right_on(ROWS[:350])}
    references = {"majority_class": right_on(ROWS[:350]), "nearest_class_mean": right_on(ROWS[:200])}
    found = recommend(runs, references=references)
    assert found.not_beaten == ["majority_class"]
    text = words(found, runs, references=references)
    assert text.startswith("**First: cheap is not shown to beat what costs nothing beyond the cached features.**")
    assert "majority_class (87.5 %)." in text
    assert "nearest_class_mean" not in text


def test_of_the_nll_the_lower_is_better():
    label = LABEL

    def sure(logit: float) -> list[Outcomes]:
        return [outcomes_of(np.eye(2)[label] * logit, label)]

    runs = {"cheap": sure(1.0), "middle": sure(3.0), "dear": sure(3.001)}
    found = recommend(runs, margin=0.05, metric="nll", references={"majority_class": sure(0.0)})
    assert (found.strategy, found.is_settled, found.not_beaten) == ("middle", True, [])
    assert {rival.strategy: rival.beaten_by for rival in found.rivals} == {"cheap": "middle", "dear": None}
    assert "no other strategy is better by more than 0.05 nats" in words(found, runs)
    assert recommend({"cheap": sure(1.0)}, metric="nll", references={"r": sure(2.0)}).not_beaten == ["r"]


def test_a_metric_that_is_undefined_is_an_error_with_the_way_out():
    one = replace(right_on(ROWS[:300])[0], scores=np.zeros((N, 0)))
    with pytest.raises(ValueError, match=r"compare.metric: auroc is undefined .* choose another metric"):
        recommend({"cheap": [one], "dear": [one]}, metric="auroc")


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1", "auroc"])
def test_every_metric_rules_out_what_is_much_worse(metric: str):
    runs = {"cheap": right_on(ROWS[:250]), "dear": right_on(ROWS[:390])}
    assert recommend(runs, metric=metric).strategy == "dear"


def test_few_seeds_say_that_other_training_seeds_may_differ():
    runs = {"cheap": right_on(ROWS[:350])}
    figure = {"value": 0.9, "low": 0.8, "high": 0.95, "sd": 0.01}
    metrics = {"metrics": {"accuracy": figure}, "n": [N], "n_units": [N]}
    strategy = {"val": metrics, "test": metrics, "cost": {"train_flops": 1}, "vs_baseline": None, "seeds": [0, 1]}
    text = recommendation.in_words(recommend(runs), {"cheap": strategy}, {})
    assert "90.0 % (80.0 % to 95.0 %)" in text
    assert "a result of these 2 runs of each strategy" in text
    five = recommendation.in_words(recommend(runs), {"cheap": strategy | {"seeds": [*range(5)]}}, {})
    assert "of each strategy" not in five
