"""sweep: the experiments that git has, and the selection by validation."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.tools import sweep


def details(boundary: str, trained: int, val_nll: float, val: float, test: float) -> dict[str, Any]:
    def figures(accuracy: float) -> dict[str, Any]:
        interval = {"value": accuracy, "low": accuracy - 0.03, "high": accuracy + 0.03}
        return {"metrics": {"accuracy": interval, "nll": {"value": val_nll}}}

    cost = {"trainable_params": trained, "train_flops": 10**12 * trained}
    network = {"params": 1000, "boundary": boundary, "largest_rounding": 0.0}
    runs = [{"cost": cost, "network": network}]
    return {"val": figures(val), "test": figures(test), "distinct_runs": 1, "cost": cost, "runs": runs}


def git(*arguments: str, text: str | None = None) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, input=text).stdout.strip()


def commit(run: dict[str, Any], strategy: str = "partial_freeze") -> str:
    """A commit whose reports/details.json has the head alone and `run`."""
    content = {"strategies": {"feature_extraction": details("all", 10, 0.35, 0.83, 0.84), strategy: run}}
    return commit_text(json.dumps(content))


def commit_text(text: str) -> str:
    blob = git("hash-object", "-w", "--stdin", text=text)
    reports = git("mktree", text=f"100644 blob {blob}\tdetails.json\n")
    tree = git("mktree", text=f"040000 tree {reports}\treports\n")
    for folder in reversed(Path.cwd().relative_to(Path(git("rev-parse", "--show-toplevel")).resolve()).parts):
        tree = git("mktree", text=f"040000 tree {tree}\t{folder}\n")
    return git("commit-tree", tree, "-m", "m")


@pytest.fixture(params=[".", "vision/study"])
def experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """HEAD at blocks.5, experiments at blocks.3 and blocks.4, and one of another commit.

    The project is the git repository, or a directory in it.
    """
    monkeypatch.chdir(tmp_path)
    git("init", "-b", "main")
    (tmp_path / request.param).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / request.param)
    head = commit(details("blocks.5.3.add", 300, 0.32, 0.85, 0.86))
    git("update-ref", "refs/heads/main", head)
    for name, boundary, trained, nll, test in (
        ("one-exp", "blocks.3.2.add", 900, 0.33, 0.99),
        ("two-exp", "blocks.4.2.add", 700, 0.30, 0.87),
        ("worse-exp", "blocks.4.2.add", 700, 0.31, 0.99),
    ):
        git(
            "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", commit(details(boundary, trained, nll, 0.86, test))
        )
    study = commit(details("features.12", 1, 0.1, 0.99, 0.99), strategy="another")
    git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/study", study)
    other = commit(details("blocks.1.1.add", 990, 0.1, 0.99, 0.99))
    git("update-ref", f"refs/exps/{other[:2]}/{other[2:]}/foreign", other)
    return head


def test_experiments_of_head_are_read_from_the_least_trained_to_the_most(experiments: str) -> None:
    found = sweep.read("partial_freeze")
    assert found["boundary"].tolist() == ["all", "blocks.5.3.add", "blocks.4.2.add", "blocks.3.2.add"]
    assert found["experiment"].tolist() == ["feature_extraction", "HEAD", "two-exp", "one-exp"]
    assert found["trained"].tolist() == [0.01, 0.3, 0.7, 0.9]


def test_selection_is_by_validation_and_the_table_has_no_test_figures(
    experiments: str, capsys: pytest.CaptureFixture
) -> None:
    sweep.show("partial_freeze")
    table, _, choice = capsys.readouterr().out.partition("lowest validation NLL")
    assert "blocks.4.2.add (two-exp)" in choice
    assert "87.0% (84.0% to 90.0%)" in choice
    assert "99.0%" not in table + choice
    assert table.count("\n") == 2 + 4 + 1
    picture = Path("reports/sweep.svg").read_text()
    assert picture.startswith("<svg")
    assert all(
        name in picture for name in ("blocks.3.2.add", "blocks.4.2.add", "validation accuracy", "training FLOPs")
    )


def test_strategy_that_no_experiment_has_is_one_line(experiments: str) -> None:
    with pytest.raises(ValueError, match=r"no reports/details\.json of HEAD.* has the strategy full_retrain"):
        sweep.show("full_retrain")


def test_experiment_with_damaged_details_is_left_out_with_its_name(
    experiments: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = sweep.read("partial_freeze")
    name = f"refs/exps/{experiments[:2]}/{experiments[2:]}/damaged-exp"
    git("update-ref", name, commit_text("<<<<<<< HEAD"))
    assert sweep.read("partial_freeze").equals(expected)
    (line,) = caplog.messages
    assert line.startswith(f"{name}: reports/details.json is damaged (")


def test_words_of_git_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ValueError, match="git rev-parse: fatal: not a git repository"):
        sweep.show("partial_freeze")
