"""The rule that recommends a strategy: decided, undecided, ties, and the words."""

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


def right_on(images: np.ndarray) -> list[Outcomes]:
    """One run that is right on just these images."""
    predicted = np.where(np.isin(ROWS, images), LABEL, 1 - LABEL)
    return [outcomes_of(np.eye(2)[predicted] * 4.0, LABEL)]


def recommend(runs: dict[str, list[Outcomes]], margin: float = 0.01) -> Recommendation:
    return recommendation.recommend(runs, FLOPS, ones_study(N, label=LABEL), margin, 0.95)


def words(
    found: Recommendation, runs: dict[str, list[Outcomes]], baseline: str = "cheap", images_per_unit: int = 1
) -> str:
    def strategy(name: str) -> dict[str, Any]:
        accuracy = float(np.mean(runs[name][0].predicted == LABEL))
        figure = {"value": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "sd": None}
        difference = {"difference": 0.02, "low": 0.01, "high": 0.03, "p_value": 0.0004, "method": "sign-flip"}
        return {
            "val": {"metrics": {"accuracy": figure}, "n": [N], "n_units": [N // images_per_unit]},
            "seeds": [0],
            "test": {"metrics": {"accuracy": figure}},
            "cost": {"train_flops": FLOPS[name]},
            "vs_baseline": None if name == baseline else {"val": difference, "test": difference},
        }

    return recommendation.in_words(found, {name: strategy(name) for name in runs})


def test_the_cheapest_that_is_shown_to_be_no_worse_is_taken():
    # middle differs from dear on two images of 400, cheap on many
    runs = {"cheap": right_on(ROWS[:280]), "middle": right_on(ROWS[:358]), "dear": right_on(ROWS[:360])}
    found = recommend(runs, margin=0.02)
    assert (found.strategy, found.best, found.is_decided, found.images_needed) == ("middle", "dear", True, None)
    assert [(verdict.strategy, verdict.finding) for verdict in found.verdicts] == [
        ("cheap", "worse"),
        ("middle", "not worse"),
    ]
    text = words(found, runs)
    assert text.startswith(
        "**Recommendation: middle** (the cheapest strategy whose cross-fitted validation accuracy is, with 95 %"
    )
    assert "This is a result of this one run of each strategy" in text
    assert "at most 2 points below the best" in text
    assert "middle is -0.5 points from it" in text
    assert "trains with 20 TFLOPs in place of 1,000" in text
    assert "cannot decide" not in text
    assert text.endswith("+2.0 (+1.0 to +3.0) points from the baseline (p < 0.001).")


def test_the_best_is_taken_where_everything_cheaper_is_shown_worse():
    runs = {"cheap": right_on(ROWS[:250]), "middle": right_on(ROWS[:280]), "dear": right_on(ROWS[:380])}
    found = recommend(runs)
    assert (found.strategy, found.is_decided) == ("dear", True)
    assert "shown worse by more than the margin: cheap, middle." in words(found, runs)


def test_where_the_images_cannot_decide_it_says_so_and_how_many_would():
    # a difference of 2.5 points, made of 40 images for and 50 against
    runs = {"cheap": right_on(np.r_[0:300, 350:390]), "dear": right_on(ROWS[:350])}
    found = recommend(runs)
    assert (found.strategy, found.best, found.is_decided) == ("dear", "dear", False)
    (verdict,) = found.verdicts
    assert verdict.finding == "undecided"
    assert verdict.low < -0.01 < verdict.high
    assert found.images_needed is not None
    assert found.images_needed > N
    text = words(found, runs)
    assert "**The 400 validation images cannot decide**" in text
    assert f"about {found.images_needed:,} would (80 % power)" in text
    text = words(found, runs, images_per_unit=10)
    assert "**The 40 validation units (400 images) cannot decide**" in text
    assert f"about {found.images_needed:,} images ({round(found.images_needed / 10):,} units) would" in text


def test_an_undecided_cheaper_one_leaves_a_decided_middle_one_open():
    runs = {"cheap": right_on(np.r_[0:300, 350:390]), "middle": right_on(ROWS[:350]), "dear": right_on(ROWS[:351])}
    found = recommend(runs, margin=0.02)
    assert (found.strategy, found.best, found.is_decided) == ("middle", "dear", False)
    assert "cheap (" in words(found, runs)
    assert "middle (" not in words(found, runs)


def test_no_number_of_images_decides_what_lies_on_the_margin():
    runs = {"cheap": right_on(np.r_[0:300, 350:396]), "dear": right_on(ROWS[:350])}
    found = recommend(runs)  # the difference is the margin
    assert (found.is_decided, found.images_needed) == (False, None)
    assert "no number of images would" in words(found, runs)


def test_of_equal_strategies_the_cheaper_one_is_best():
    runs = {"dear": right_on(ROWS[:350]), "cheap": right_on(ROWS[:350])}
    found = recommend(runs)
    assert (found.strategy, found.best, found.is_decided, found.verdicts) == ("cheap", "cheap", True, [])
    assert "and none is cheaper" in words(found, runs)


def test_the_only_strategy_is_recommended():
    runs = {"cheap": right_on(ROWS[:350])}
    found = recommend(runs)
    assert (found.strategy, found.is_decided, found.images_needed, found.n_val) == ("cheap", True, None, N)
    assert "nothing was compared with it" in words(found, runs)
    assert words(found, runs).endswith("; it is the baseline.")


def test_seeds_are_averaged_and_their_images_counted_once():
    first, second = right_on(ROWS[:300])[0], right_on(ROWS[:340])[0]
    found = recommend({"cheap": [first, second], "dear": [second, second]})
    assert found.n_val == N
    assert found.verdicts[0].difference == pytest.approx(-0.05)


def test_record_and_words_go_into_details_together():
    runs = {"cheap": right_on(ROWS[:350])}
    figure = {"value": 0.9, "low": 0.8, "high": 0.95, "sd": 0.01}
    metrics = {"metrics": {"accuracy": figure}}
    strategy = {"val": metrics, "test": metrics, "cost": {"train_flops": 1}, "vs_baseline": None, "seeds": [0, 1]}
    found = recommendation.as_json(recommend(runs), {"cheap": strategy})
    assert {"strategy", "is_decided", "text", "margin", "confidence", "images_needed"} <= found.keys()
    assert "90.0 ± 1.0 (80.0 to 95.0) %" in found["text"]
    assert "a result of these 2 runs of each strategy" in found["text"]
    five = recommendation.as_json(recommend(runs), {"cheap": strategy | {"seeds": [*range(5)]}})
    assert "of each strategy" not in five["text"]


def test_what_looks_best_by_chance_leaves_the_dearer_one_open():
    # cheap is half a point ahead, on 40 images for and 38 against
    runs = {"cheap": right_on(ROWS[:350]), "dear": right_on(np.r_[0:310, 350:388])}
    found = recommend(runs)
    assert (found.strategy, found.best, found.is_decided, found.verdicts) == ("cheap", "cheap", False, [])
    (rival,) = found.rivals
    assert rival.strategy == "dear"
    assert rival.high > 0.01
    assert found.images_needed is not None
    assert found.images_needed > N
    text = words(found, runs)
    assert "cannot decide** whether something dearer is better by more than 1 point: dear (up to +" in text
    assert "at most 1 point below the best" in text
    assert "cheaper is as good" not in text


def test_a_dearer_one_that_is_shown_no_better_leaves_nothing_open():
    runs = {"cheap": right_on(ROWS[:360]), "dear": right_on(ROWS[:352])}
    assert (recommend(runs).is_decided, recommend(runs).rivals) == (True, [])
