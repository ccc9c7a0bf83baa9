"""Digests as DVC computes them, and the timings of stages."""

import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import logs
from pipeline.report import provenance
from tests.factories import REPOSITORY


def test_digests_are_those_of_dvc(tmp_path: Path):
    """DVC 3.67.1 wrote these into dvc.lock for these files."""
    files = {"a.txt": "1\n", "b/c.txt": "2\n", "b.txt": "3\n"}
    for name, content in files.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content.encode())
    assert provenance.digest(tmp_path / "data/a.txt") == "b026324c6904b2a9cb4b88d6d61c81d1"
    assert provenance.digest(tmp_path / "data") == "cd5f9d857a441e5e114e7cb63c4823cd.dir"


def test_the_lock_of_the_repository_can_be_read():
    stages = provenance.read_lock(REPOSITORY / "dvc.lock")
    assert "reports/details.json" in {out.path for out in stages["compare"].outs}


@pytest.mark.parametrize(
    "text", ["a: [", "<<<<<<< HEAD\n  - a\n=======\n", "stages: 3", "stages: {index: {outs: [{path: x}]}}"]
)
def test_a_damaged_lock_is_refused(tmp_path: Path, text: str):
    (tmp_path / "dvc.lock").write_text(text)
    with pytest.raises(ValueError, match=r"dvc\.lock: damaged, or a merge conflict \(.+\); take .*; run: dvc repro$"):
        provenance.read_lock(tmp_path / "dvc.lock")


@pytest.mark.parametrize("text", ["[1, {", "[]", '{"wall_seconds": "long"}'])
def test_a_damaged_timing_is_named(tmp_path: Path, text: str):
    (tmp_path / "extract.json").write_text(text)
    with pytest.raises(ValueError, match=r"extract\.json: damaged \(.+\); delete it$"):
        provenance.timings(tmp_path)


def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = provenance.commit()
    assert found["hash"] == ""
    assert "not a git repository" in found["missing"]
    monkeypatch.setenv("PATH", "")
    assert provenance.commit()["missing"] == "git show: git is not installed, or not on the PATH"


def test_in_a_directory_of_a_larger_repository_only_its_own_files_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    study = tmp_path / "vision/study"
    study.mkdir(parents=True)
    monkeypatch.chdir(study)
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "a@b")
    provenance.git("init", str(tmp_path))
    (study / "a.txt").write_text("1")
    provenance.git("add", ".")
    provenance.git("commit", "--message", "m")
    for path in (tmp_path / "of another team.txt", study / "b.txt"):
        path.write_text("2")
    found = provenance.commit()
    assert (len(found["hash"]), found["n_changed"], found["missing"]) == (40, 1, "")
    assert provenance.file_at("HEAD", "a.txt") == "1"
    assert provenance.file_at("HEAD", "b.txt") is None
    with pytest.raises(ValueError, match=r"^git ls-tree: fatal: "):
        provenance.file_at("nowhere", "a.txt")


def test_timing_of_a_stage_is_noted_beside_the_outs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", _module("pipeline.stages.fine_tune"))
    monkeypatch.setattr("sys.argv", ["fine_tune.py", "partial_freeze", "../0"])
    logs.note_timing(1.234)
    assert [path.name for path in logs.TIMINGS.iterdir()] == ["fine_tune-partial_freeze-_0.json"]
    (timing,) = provenance.timings()
    assert timing.stage == "fine_tune-partial_freeze-_0"
    assert timing.wall_seconds == 1.23
    assert timing.peak_memory_bytes
    assert timing.peak_memory_bytes > 10**6
    assert f"/{logs.TIMINGS.as_posix()}/" in (REPOSITORY / ".gitignore").read_text()


def test_only_stages_note_their_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", _module("pipeline.tools.cuts"))
    logs.note_timing(1.0)
    monkeypatch.setitem(sys.modules, "__main__", _module("pipeline.stages.compare"))
    monkeypatch.setattr("sys.argv", ["compare.py", "--against", "main"])
    logs.note_timing(1.0)
    assert not logs.TIMINGS.exists()


def _module(name: str) -> Any:
    return type("Main", (), {"__spec__": type("Spec", (), {"name": name})})
