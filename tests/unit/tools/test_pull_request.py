"""The Markdown of a pull request, in a repository of two commits, and its guard."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from pipeline.comparison import tested_images
from pipeline.tools import pull_request
from pipeline.tools.pull_request import Side, is_higher_better, judge, parse, regression, say_other_images
from tests.factories import COMPARE, FORTY, REPOSITORY, forty_data, run_wrong_on

ACCURACY, NLL = "full_retrain.test.metrics.accuracy.value", "feature_extraction.test.metrics.nll.value"
GUARD = {ACCURACY: 0.01, NLL: 0.02}


def git(*arguments: str) -> None:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    subprocess.run(command, check=True, capture_output=True)


def details(accuracy: float, nll: float = 0.34, recommended: str = "feature_extraction") -> dict[str, Any]:
    head = {"accuracy": {"value": 0.85}, "nll": {"value": nll}, "auroc": {"value": None}}
    full = {"metrics": {"accuracy": {"value": accuracy}}, "classes": [{"class": "a", "recall": 0.8}]}
    test = {"difference": 0.02, "low": 0.01, "p_value": 0.03, "method": "exact McNemar"}
    return {
        "recommendation": {"text": f"**Recommendation: {recommended}** (a rule)."},
        "strategies": {
            "feature_extraction": {"test": {"metrics": head}},
            "full_retrain": {"test": full, "vs_baseline": {"test": test}, "distinct_runs": 1},
        },
    }


def write(content: Any, path: str = "reports/details.json") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content))


def write_reports(accuracy: float, train_flops: int = 20076, **others: Any) -> None:
    write(details(accuracy, **others))
    write({"test_accuracy": accuracy, "train_flops": train_flops}, "reports/metrics/full_retrain.json")


def set_params(guard: dict[str, float] | None = None, path: str = "data/raw/elpv", **changes: Any) -> None:
    yaml = YAML(typ="safe", pure=True)
    document = yaml.load(Path("params.yaml"))
    document["compare"]["guard"] = GUARD if guard is None else guard
    document["compare"]["guard_by"] = "difference"
    document["dataset"]["path"] = path
    document["fine_tune"]["defaults"] |= changes
    yaml.dump(document, Path("params.yaml"))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`main` with one commit, and a branch with another on top of it, which trains longer and is better."""
    folder = tmp_path_factory.mktemp("example")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        commit_both()
    return folder


@pytest.fixture
def branch(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the example, in which the test runs."""
    monkeypatch.chdir(shutil.copytree(example, tmp_path, dirs_exist_ok=True))


def commit_both() -> None:
    git("init", "-b", "main")
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text("[core]\n    analytics = false\n")
    Path(".dvc/.gitignore").write_text("/tmp\n/cache\n")
    Path("dvc.yaml").write_text("metrics: [reports/metrics]\n")
    Path("params.yaml").write_bytes((REPOSITORY / "params.yaml").read_bytes())
    set_params(epochs=8, batch_size=16)
    write_reports(0.87)
    git("add", ".")
    git("commit", "-m", "main")
    git("checkout", "-b", "longer")
    set_params(epochs=12, batch_size=16)
    write_reports(0.8812, train_flops=26768, recommended="full_retrain")
    git("commit", "-am", "longer")


@pytest.fixture
def without_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing differs as far as DVC is concerned; saves the seconds that it takes to start."""
    monkeypatch.setattr(pull_request, "_dvc", lambda *_: {})


@pytest.mark.slow
@pytest.mark.usefixtures("branch")
def test_what_changed_is_recommended_and_is_guarded_stands_in_the_markdown(capsys: pytest.CaptureFixture):
    pull_request.show("main", None)
    sections = capsys.readouterr().out.split("\n### ")
    unknown = "It is not known whether both sides tested the same images: main has no reports/outcomes.json."
    assert sections[0].split("\n\n") == ["## Compared with `main`", f"{unknown}\n"]
    titles = [section.splitlines()[0] for section in sections[1:]]
    assert titles == ["Parameters", "Metrics", "Recommendation", "Guard"]
    params, metrics, recommendation, guard = (section.splitlines()[2:] for section in sections[1:])
    assert params == [
        "| file | name | main | here | change |",
        "| --- | --- | --- | --- | --- |",
        "| params.yaml | fine_tune.defaults.epochs | 8 | 12 | 4 |",
    ]
    assert metrics == [
        "| file | name | main | here | change |",
        "| --- | --- | --- | --- | --- |",
        "| reports/metrics/full_retrain.json | test_accuracy | 0.87 | 0.8812 | 0.0112 |",
        "| reports/metrics/full_retrain.json | train_flops | 20,076 | 26,768 | 6,692 |",
    ]
    assert recommendation == ["**Recommendation: full_retrain** (a rule)."]
    assert sorted(guard[2:4]) == [
        f"| {NLL} | 0.34 | 0.34 | 0 | plain difference | 0.02 | holds |",
        f"| {ACCURACY} | 0.87 | 0.8812 | -0.0112 | plain difference | 0.01 | holds |",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("branch")
def test_a_new_strategy_and_one_that_is_gone_stand_in_the_metrics(capsys: pytest.CaptureFixture):
    Path("reports/metrics/full_retrain.json").unlink()
    write({"test_accuracy": 0.9}, "reports/metrics/last.json")
    pull_request.show("main", None)
    shown = capsys.readouterr().out
    assert "| reports/metrics/full_retrain.json | test_accuracy | 0.87 | - |  |" in shown
    assert "| reports/metrics/last.json | test_accuracy | - | 0.9 |  |" in shown


@pytest.mark.usefixtures("branch", "without_dvc")
def test_a_guarded_figure_that_is_worse_is_shown_and_fails(capsys: pytest.CaptureFixture):
    write(details(0.8599, nll=0.37))
    with pytest.raises(ValueError, match=r"^worse than in main: ") as error:
        pull_request.show("main", None)
    assert f"{ACCURACY} by at least 0.0101 (plain difference; tolerance 0.01)" in str(error.value)
    assert f"{NLL} by at least 0.03 (plain difference; tolerance 0.02)" in str(error.value)
    assert "\n" not in str(error.value)
    shown = capsys.readouterr().out
    assert f"| {ACCURACY} | 0.87 | 0.8599 | 0.0101 | plain difference | 0.01 | **worse** |" in shown
    assert f"| {NLL} | 0.34 | 0.37 | 0.03 | plain difference | 0.02 | **worse** |" in shown


@pytest.mark.usefixtures("branch", "without_dvc")
def test_what_is_within_its_tolerance_passes():
    write(details(0.86, nll=0.36))  # exactly the tolerances
    pull_request.show("main", None)


@pytest.mark.slow
@pytest.mark.usefixtures("branch")
def test_where_nothing_differs_and_nothing_is_guarded_the_markdown_says_so(capsys: pytest.CaptureFixture):
    set_params(guard={})
    git("commit", "-am", "no guard")
    pull_request.show("HEAD", None)
    shown = capsys.readouterr().out
    assert "No parameter differs." in shown
    assert "No metric differs." in shown
    assert "Nothing is guarded." in shown


@pytest.mark.usefixtures("branch")
def test_a_revision_that_does_not_exist_is_one_line():
    for revision in ("origin/main", "--upload-pack=x", "HEAD~7"):
        with pytest.raises(ValueError, match="no such commit here; expected a branch, tag or hash") as error:
            pull_request.show(revision, None)
        assert "\n" not in str(error.value)
        assert revision in str(error.value)


@pytest.mark.usefixtures("branch")
def test_a_revision_without_reports_is_one_line():
    git("rm", "-r", "--cached", "reports")
    git("commit", "-m", "no reports")
    with pytest.raises(ValueError, match=r"--against HEAD: that commit has no reports/details\.json; run `dvc repro`"):
        pull_request.show("HEAD", None)


@pytest.mark.usefixtures("branch")
def test_reports_of_here_that_are_missing_are_one_line():
    Path("reports/details.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"reports/details\.json: not found; run: dvc repro"):
        pull_request.show("main", None)


@pytest.mark.slow
@pytest.mark.usefixtures("branch")
def test_a_project_in_a_sub_directory_of_its_repository_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    inner = tmp_path / "inner"
    inner.mkdir()
    for name in ("params.yaml", "dvc.yaml", "reports", ".dvc"):
        Path(name).rename(inner / name)
    git("add", "--all")
    git("commit", "-m", "moved")
    monkeypatch.chdir(inner)
    write_reports(0.8912, train_flops=26768)
    pull_request.show("HEAD", None)
    shown = capsys.readouterr().out
    assert "No parameter differs." in shown
    assert "| reports/metrics/full_retrain.json | test_accuracy | 0.8812 | 0.8912 | 0.01 |" in shown


DAMAGED = [[], {}, "text", {"strategies": {}}, {"strategies": 1, "recommendation": {"text": ""}}, {"strategies": [1]}]


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("content", DAMAGED)
def test_details_of_another_shape_are_one_line_that_says_where(content: Any):
    write(content)
    with pytest.raises(
        ValueError, match=r"^reports/details\.json: damaged, or of another version \(.*\); run: dvc repro$"
    ):
        pull_request.show("main", None)
    git("commit", "-am", "damaged")
    write(details(0.9))
    with pytest.raises(ValueError, match=r"^--against HEAD: reports/details\.json: damaged, or of another version"):
        pull_request.show("HEAD", None)


@pytest.mark.parametrize(
    ("figure", "expected", "with_nll"),
    [
        ("test.metrics.accuracy.value", True, True),
        ("test.metrics.auroc.low", True, True),
        ("test.metrics.ece.value", False, False),
        ("test.metrics.accuracy.sd", False, False),
        ("test.subsets.cost.macro_f1.value", True, True),
        ("test.classes.0.recall", True, True),
        ("vs_baseline.test.difference", True, False),
        ("vs_baseline.test.low", True, False),
        ("vs_baseline.test.p_value", False, False),
        ("cost.train_flops", False, False),
    ],
)
def test_worse_is_lower_or_higher_by_the_name_of_the_figure(figure: str, expected: bool, with_nll: bool):
    assert is_higher_better(f"full.{figure}", "accuracy") == expected
    assert is_higher_better(f"full.{figure}", "nll") == with_nll


def side(accuracy: float = 0.87, **others: Any) -> Side:
    return parse(json.dumps(details(accuracy, **others)), None)


def options(guard: dict[str, float], by: str = "difference") -> Any:
    return COMPARE.model_copy(update={"guard": guard, "guard_by": by})


def test_any_number_of_details_can_be_guarded():
    guard = {"full_retrain.test.classes.0.recall": 0.0, "full_retrain.vs_baseline.test.low": 0.0, NLL: 0.0}
    assert [(verdict.before, verdict.holds) for verdict in judge(side(), side(), options(guard))] == [
        (0.8, True),
        (0.01, True),
        (0.34, True),
    ]


def test_a_guarded_figure_that_is_gone_is_worse_and_a_new_one_is_not():
    auroc = "feature_extraction.test.metrics.auroc.value"
    guard = {ACCURACY: 0.01, NLL: 0.01, auroc: 0.01, "not_run.test.metrics.nll.value": 0.0}
    before, after = side(), side()
    del after.figures[ACCURACY], before.figures[NLL]
    gone, new, undefined, not_run = judge(before, after, options(guard))
    assert not gone.holds
    assert str(gone) == f"{ACCURACY} is gone"
    assert new.holds
    assert undefined.holds
    assert not_run.holds
    before.figures[auroc] = 0.9
    assert not judge(before, after, options({auroc: 0.01}))[0].holds


# The guard as a statement with uncertainty

FULL = "full.test.metrics.accuracy.value"


def side_with(wrong: list[int], low: float | None = None, seed: int = 0) -> Side:
    """A side whose strategy `full` is wrong on these images of FORTY, of which 8 to 23 are test images of seed 0."""
    run = run_wrong_on("full", seed, wrong)
    found = json.loads(json.dumps(tested_images.encode({"full": [run]}, forty_data())))
    figure = {"value": 1 - len(wrong) / 16} | ({} if low is None else {"low": low, "high": 1.0})
    written = {"strategies": {"full": {"test": {"metrics": {"accuracy": figure}}}}, "recommendation": {"text": ""}}
    return parse(json.dumps(written), json.dumps(found))


def test_a_regression_is_bounded_in_pairs_on_the_images_that_both_sides_have():
    by_bound = options({FULL: 0.01}, "bound")
    few, many = side_with([8, 9, 10]), side_with([*range(8, 22)])
    shown, method = regression(FULL, side_with([]), few, by_bound)
    assert method == "paired on 16 images"
    assert shown < 3 / 16
    assert judge(side_with([]), few, by_bound)[0].holds, "three of sixteen images are no proof of a regression"
    assert not judge(side_with([]), few, options({FULL: 0.01}))[0].holds
    assert not judge(side_with([]), many, by_bound)[0].holds
    assert judge(many, side_with([]), by_bound)[0].shown < 0


def test_sides_that_tested_other_images_are_told_apart_first_with_both_counts():
    before, after = side_with([8]), side_with([17], seed=1)  # images 8 to 23, and 16 to 31
    text = say_other_images("main", before, after)
    assert text.startswith("**The two sides tested different images**: 16 in main, 16 here; 8 of them are the same.")
    assert say_other_images("main", before, side_with([9])) == ""
    # No seed is common, so no pair is: by the intervals, or the plain difference where there is none
    assert regression(FULL, before, after, options({}, "bound"))[1] == "plain difference"


def test_figures_without_pairs_are_compared_by_their_intervals():
    before, after = side_with([8], low=0.6), side_with([17, 18, 19, 20], low=0.5, seed=1)
    shown, method = regression(FULL, before, after, options({}, "bound"))
    assert method == "unpaired, by the intervals"
    standard_error = np.hypot(0.4, 0.5) / 2 / 1.959964
    assert shown == pytest.approx(3 / 16 - 1.644854 * standard_error)


def test_above_20_000_images_only_their_number_and_digest_are_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tested_images, "MAX_IMAGES", 15)
    before, after = side_with([8], low=0.6), side_with([9], low=0.6)
    assert before.tested is not None
    assert (before.tested.n, len(before.tested.image), before.tested.correct) == (16, 0, {})
    assert say_other_images("main", before, after) == ""
    assert "16 in main, 16 here. Figures" in say_other_images("main", before, side_with([17], seed=1))
    assert regression(FULL, before, after, options({}, "bound"))[1] == "unpaired, by the intervals"


def test_outcomes_take_a_bit_each_and_come_back_as_they_were():
    runs = [run_wrong_on("full", seed, [8, 17, 30]) for seed in (0, 1)]
    units = forty_data(replace(FORTY, group=[f"patient {i // 2}" for i in range(40)]))
    written = tested_images.encode({"full": runs}, units)
    assert len(written["tested"]["0"]) == 4  # 24 images in 3 bytes, in base64
    found = tested_images.decode(json.loads(json.dumps(written)))
    digests = sorted(FORTY.sha256[8:32])
    rows = [FORTY.sha256.index(digest) for digest in digests]
    assert found.n == 24
    for seed, run in enumerate(runs):
        tested = {row for row, flag in zip(rows, found.tested[str(seed)], strict=True) if flag}
        assert tested == set(run.test.rows.tolist())
        wrong = found.tested[str(seed)] & ~found.correct["full"][str(seed)]
        assert {row for row, flag in zip(rows, wrong, strict=True) if flag} == {8, 17, 30} & set(run.test.rows.tolist())
    assert found.weight.tolist() == FORTY.weight[rows].tolist()
    assert len(set(found.unit)) == 12
    assert len(set(zip(found.unit, [row // 2 for row in rows], strict=True))) == 12


@pytest.mark.parametrize(
    "change",
    [{"n": 23}, {"n": -1}, {"images": "AA=="}, {"images": 3}, {"units": "AAAA"}, {"correct": {"full": {"0": ""}}}],
)
def test_outcomes_of_another_shape_are_one_line(change: dict[str, Any]):
    written = tested_images.encode({"full": [run_wrong_on("full", 0, [8])]}, forty_data()) | change
    with pytest.raises(ValueError, match=r"^reports/outcomes\.json: damaged, or of another version \(.+\); run: dvc"):
        parse(json.dumps(details(0.9)), json.dumps(written))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("full_retrain.test.metrics.acuracy.value", "is higher or lower better? Expected a name with one of the keys "),
        ("full_retrain.distinct_runs", "is higher or lower better? Expected a name with one of the keys "),
        ("full_retrain.test.metric.accuracy.value", f"is not in reports/details.json; close matches: {ACCURACY}"),
        ("full_retrain.test.metrics.accuracy", f"close matches: {ACCURACY}"),
        ("full_retrain.vs_baseline.test.method", "is 'exact McNemar' in reports/details.json; expected a number"),
    ],
)
def test_a_guard_that_names_no_figure_is_one_line(name: str, message: str):
    with pytest.raises(ValueError, match=r"^compare\.guard: ") as error:
        judge(side(), side(), options({name: 0.01}))
    assert message in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.usefixtures("branch")
def test_text_that_would_break_a_table_does_not(capsys: pytest.CaptureFixture):
    set_params(path="data/`a|b`\nc", epochs=12, batch_size=16)
    pull_request.show("main", None)
    assert r"| params.yaml | dataset.path | data/raw/elpv | data/`a\|b` c |  |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("branch")
def test_a_failure_of_dvc_is_one_line_and_its_warnings_are_shown(capsys: pytest.CaptureFixture):
    Path("reports/metrics/full_retrain.json").write_text("{")
    pull_request.show("main", None)
    assert "DVC failed to load some metrics for following revisions: 'workspace'." in capsys.readouterr().err
    Path(".dvc/config").write_text("[")
    with pytest.raises(ValueError, match=r"^dvc plots diff main: .*config file error") as error:
        pull_request.draw("main", Path("pictures"))
    assert "\n" not in str(error.value)
