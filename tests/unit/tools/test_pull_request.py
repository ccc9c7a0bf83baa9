"""The Markdown of a pull request, in a repository of two commits, and its guard."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.stages import compare
from pipeline.tools.pull_request import State, Verdict, judge

REPOSITORY = Path(__file__).parents[2]
GUARD = {"full_retrain.test.accuracy": 0.01, "feature_extraction.test.nll": 0.02}


def git(*arguments: str) -> None:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    subprocess.run(command, check=True, capture_output=True)


def comparison(accuracy: float, nll: float = 0.34, passes: int = 20076) -> dict[str, Any]:
    return {
        "feature_extraction": {"test": {"accuracy": 0.85, "nll": nll, "auroc": None}, "seeds": 1},
        "full_retrain": {"test": {"accuracy": accuracy}, "cost": {"base_passes": passes}, "seeds": 1},
    }


def write(path: str, content: dict[str, Any]) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(json.dumps(content))


def set_params(**changes: Any) -> None:
    yaml = YAML(typ="safe", pure=True)
    document = yaml.load(Path("params.yaml"))
    document["compare"] |= changes.pop("compare", {})
    document["fine_tune"]["strategies"]["full_retrain"] |= changes
    yaml.dump(document, Path("params.yaml"))


@pytest.fixture
def branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` with one commit, and a branch with another on top of it, which trains longer and is better."""
    monkeypatch.chdir(tmp_path)
    git("init", "-b", "main")
    shutil.copyfile(REPOSITORY / "params.yaml", "params.yaml")
    set_params(compare={"guard": GUARD}, epochs=8, batch_size=16)
    write("reports/comparison.json", comparison(0.87))
    write("reports/details.json", {"recommendation": {"text": "**Recommendation: feature_extraction** (a rule)."}})
    git("add", ".")
    git("commit", "-m", "main")
    git("checkout", "-b", "longer")
    set_params(epochs=12)
    write("reports/comparison.json", comparison(0.8812, passes=26768))
    write("reports/details.json", {"recommendation": {"text": "**Recommendation: full_retrain** (a rule)."}})
    git("commit", "-am", "longer")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["compare", *arguments])
    compare.main()


@pytest.mark.usefixtures("branch")
def test_what_changed_is_recommended_and_is_guarded_stands_in_the_markdown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run(monkeypatch, "--against", "main")
    parts = capsys.readouterr().out.split("\n### ")
    assert parts[0].strip() == "## Compared with `main`"
    titles = [part.splitlines()[0] for part in parts[1:]]
    assert titles == ["Parameters", "Metrics", "Recommendation", "Guard"]
    params, metrics, recommendation, guard = (part.splitlines()[2:] for part in parts[1:])
    assert params == [
        "| parameter | main | here |",
        "| --- | --- | --- |",
        "| fine_tune.strategies.full_retrain.epochs | `8` | `12` |",
    ]
    assert metrics == [
        "| metric | main | here | change |",
        "| --- | --- | --- | --- |",
        "| full_retrain.test.accuracy | 0.8700 | 0.8812 | +0.0112 |",
        "| full_retrain.cost.base_passes | 20,076 | 26,768 | +6,692 |",
    ]
    assert recommendation == ["**Recommendation: full_retrain** (a rule)."]
    assert guard[2:4] == [
        "| feature_extraction.test.nll | 0.3400 | 0.3400 | 0.02 | holds |",
        "| full_retrain.test.accuracy | 0.8700 | 0.8812 | 0.01 | holds |",
    ]


@pytest.mark.usefixtures("branch")
def test_a_guarded_metric_that_is_worse_is_shown_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    write("reports/comparison.json", comparison(0.8599, nll=0.37))
    with pytest.raises(ValueError, match=r"^worse than in main: ") as error:
        run(monkeypatch, "--against", "main")
    assert "full_retrain.test.accuracy by 0.0101 (tolerance 0.01)" in str(error.value)
    assert "feature_extraction.test.nll by 0.03 (tolerance 0.02)" in str(error.value)
    assert "\n" not in str(error.value)
    shown = capsys.readouterr().out
    assert "| full_retrain.test.accuracy | 0.8700 | 0.8599 | 0.01 | **worse** |" in shown
    assert "| feature_extraction.test.nll | 0.3400 | 0.3700 | 0.02 | **worse** |" in shown


@pytest.mark.usefixtures("branch")
def test_what_is_within_its_tolerance_passes(monkeypatch: pytest.MonkeyPatch):
    write("reports/comparison.json", comparison(0.86, nll=0.36))  # just the tolerances
    run(monkeypatch, "--against", "main")


@pytest.mark.usefixtures("branch")
def test_nothing_that_differs_and_nothing_that_is_guarded_is_said_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    set_params(compare={"guard": {}})
    git("commit", "-am", "no guard")
    run(monkeypatch, "--against", "HEAD")
    shown = capsys.readouterr().out
    assert "No parameter differs." in shown
    assert "No metric differs." in shown
    assert "Nothing is guarded." in shown


@pytest.mark.usefixtures("branch")
def test_a_revision_that_does_not_exist_is_one_line(monkeypatch: pytest.MonkeyPatch):
    for revision in ("origin/main", "--upload-pack=x", "HEAD~7"):
        with pytest.raises(ValueError, match="no such commit here; expected a branch, tag or hash") as error:
            run(monkeypatch, f"--against={revision}")
        assert "\n" not in str(error.value)
        assert revision in str(error.value)


@pytest.mark.usefixtures("branch")
def test_a_revision_without_reports_is_one_line(monkeypatch: pytest.MonkeyPatch):
    git("rm", "-r", "--cached", "reports")
    git("commit", "-m", "no reports")
    with pytest.raises(
        ValueError, match=r"--against HEAD: that commit has no reports/comparison\.json; run `dvc repro`"
    ):
        run(monkeypatch, "--against", "HEAD")


@pytest.mark.usefixtures("branch")
def test_reports_of_here_that_are_missing_are_one_line(monkeypatch: pytest.MonkeyPatch):
    Path("reports/details.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"reports/details\.json: not found; run: dvc repro"):
        run(monkeypatch, "--against", "main")


@pytest.mark.usefixtures("branch")
def test_a_project_in_a_sub_directory_of_its_repository_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    inner = tmp_path / "inner"
    inner.mkdir()
    for name in ("params.yaml", "reports"):
        Path(name).rename(inner / name)
    git("add", "--all")
    git("commit", "-m", "moved")
    monkeypatch.chdir(inner)
    run(monkeypatch, "--against", "HEAD")
    assert "No metric differs." in capsys.readouterr().out


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("content", [[], {}, "text", {"a": {"b": "c"}}, {"a": {"test": {}}}, {"a": [1]}])
def test_a_comparison_of_another_shape_is_one_line(monkeypatch: pytest.MonkeyPatch, content: Any):
    write("reports/comparison.json", content)
    with pytest.raises(ValueError, match=r"reports/comparison\.json: .+ is no number; expected what dvc repro writes"):
        run(monkeypatch, "--against", "main")


def state(**metrics: float | None) -> State:
    return State({}, {name.replace("__", "."): value for name, value in metrics.items()})


@pytest.mark.parametrize(
    ("metric", "is_higher_better"),
    [("test.accuracy", True), ("test.auroc", True), ("test.ece", False), ("cost.train_flops", False)],
)
def test_worse_is_lower_or_higher_by_metric(metric: str, is_higher_better: bool):
    verdict = Verdict(f"full.{metric}", 0.1, 0.5, 0.7)
    assert verdict.worse_by == pytest.approx(-0.2 if is_higher_better else 0.2)
    assert verdict.holds == is_higher_better


def test_a_guarded_metric_that_is_gone_is_worse_and_a_new_one_is_not():
    guard = {"full.test.accuracy": 0.01, "head.test.accuracy": 0.01, "neither.test.nll": 0.0}
    gone, new, neither = judge(state(full__test__accuracy=0.9), state(head__test__accuracy=0.8), guard)
    assert not gone.holds
    assert str(gone) == "full.test.accuracy is gone"
    assert new.holds
    assert neither.holds


@pytest.mark.usefixtures("branch")
def test_text_that_would_break_a_table_does_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    yaml = YAML(typ="safe", pure=True)
    document = yaml.load(Path("params.yaml"))
    document["dataset"]["path"] = "data/`a|b`"
    yaml.dump(document, Path("params.yaml"))
    run(monkeypatch, "--against", "main")
    assert r'| dataset.path | `"data/raw/elpv"` | `"data/ a\|b "` |' in capsys.readouterr().out
