"""experiments: how DVC is called and interrupted. What it then does is in tests/end_to_end."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from pipeline.tools import experiments

DVC = """
import json, signal, subprocess, sys
from pathlib import Path
Path("called").write_text(json.dumps(sys.argv[1:]))
"""
RUNS_A_STAGE = """
signal.signal(signal.SIGINT, lambda *_: Path("interrupted").touch())
code = "from pathlib import Path; import time; Path('started').touch(); time.sleep(60)"
stage = subprocess.run([sys.executable, "-c", code, "pipeline.stages.fine_tune"], stderr=subprocess.DEVNULL)
Path("cleaned").write_text(str(stage.returncode))
sys.exit(1)
"""


@pytest.fixture(scope="module", params=[".", "vision/study"])
def example(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A git repository, and the directory in it that is a DVC repository, which may be the same.

    It holds two images that DVC tracks, and a file that git tracks.
    """
    top = tmp_path_factory.mktemp("example")
    folder = top / request.param
    (folder / "data/mine").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("a.png", "b.png"):
            Path("data/mine", name).write_text(name)
        Path("params.yaml").write_text("threads: 2\n")
        patch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.mktemp("site")))
        patch.setenv("DVC_NO_ANALYTICS", "1")
        git("init", "--quiet", str(top))
        experiments.dvc("init", "--quiet", *(["--subdir"] if request.param != "." else []), is_quiet=True)
        experiments.dvc("add", "--quiet", "data/mine", is_quiet=True)
        git("add", "--all")
        git("commit", "--quiet", "--message", "m")
    return top, request.param


@pytest.fixture
def project(example: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the example, in which the test runs."""
    top, folder = example
    shutil.copytree(top, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy" / folder)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    return tmp_path / "copy" / folder


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True)


@pytest.mark.slow
def test_files_of_git_and_of_dvc_are_read_at_a_revision(project: Path) -> None:
    Path("params.yaml").write_text("threads: 3\n")
    with experiments.reading("HEAD") as read:
        assert read(Path("params.yaml")) == b"threads: 2\n"
        assert read(Path("data/mine/a.png")) == b"a.png"
        with pytest.raises(ValueError, match=r"^HEAD: reports/x is not in DVC's cache; run: dvc pull, or dvc exp"):
            read(Path("reports/x"))
    assert experiments.has("data/mine")
    assert experiments.has("params.yaml")
    assert not experiments.has("data/weights/ours.safetensors")
    with (
        pytest.raises(ValueError, match=r"^dvc: .*no-such-experiment"),
        experiments.reading("no-such-experiment") as read,
    ):
        read(Path("params.yaml"))
    assert experiments.names() == set()
    experiments.dvc("exp", "run", "--queue", "--name", "waits", "--set-param", "threads=4", is_quiet=True)
    assert experiments.states() == {"waits": "queued"}
    assert experiments.names() == set()


def test_an_experiment_that_failed_once_and_then_finished_has_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [("", None), ("a", "Success"), ("a", "Failed"), ("b", "Failed"), ("c", "Running"), ("d", None)]
    rows = [{"Experiment": name, "State": state} for name, state in found]
    monkeypatch.setattr("dvc.api.exp_show", lambda: rows)
    assert experiments.states() == {"a": "finished", "b": "failed", "c": "running", "d": "finished"}
    assert experiments.names() == {"a", "d"}


@pytest.mark.slow
def test_images_that_a_copy_of_the_repository_lacks_are_one_line(project: Path) -> None:
    experiments.check_images("data/mine", [])
    Path("data/raw/digits").mkdir(parents=True)
    Path("../photos").mkdir()
    experiments.check_images("data/raw/digits", ["data/raw/digits"])
    experiments.check_images(str(Path("../photos").absolute()), [])
    for path in ("data/raw/digits", "../photos"):
        with pytest.raises(ValueError, match=f"^dataset.path: {path} is tracked by neither DVC nor git, .*$"):
            experiments.check_images(path, [])
    Path("data/mine/c.png").write_text("c")
    for path in ("data/mine", "data/mine/a"):
        with pytest.raises(ValueError, match=rf"^dataset\.path: {path} differs from what DVC tracks; run: dvc add"):
            experiments.check_images(path, [])


def test_commit_that_has_moved_is_one_line(project: Path) -> None:
    head = experiments.check_workspace()
    assert experiments.check_workspace(head) == head
    Path("note.txt").write_text("an untracked file is no change")
    assert experiments.check_workspace(head) == head
    git("commit", "--quiet", "--allow-empty", "--message", "m")
    with pytest.raises(ValueError, match=rf"^HEAD was {head[:7]} and is now "):
        experiments.check_workspace(head)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which `python -m dvc` runs what is written to dvc.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def test_run_is_one_experiment_of_one_stage_and_text_stays_text(folder: Path) -> None:
    (folder / "dvc.py").write_text(DVC)
    changes = {"a.freeze_until": "0.5", "a.epochs": 2, "fine_tune.run": ["a", "b"]}
    experiments.run("name", changes, ["data/weights/ours.safetensors"], "fine_tune@a-0")
    expected = ["exp", "run", "--temp", "--name", "name", "--set-param", "++a.freeze_until='0.5'", "--set-param"]
    expected += ["++a.epochs=2", "--set-param", "++fine_tune.run=['a', 'b']"]
    expected += ["--copy-paths", "data/weights/ours.safetensors", "fine_tune@a-0"]
    assert json.loads((folder / "called").read_text()) == expected


def test_failure_is_one_line(folder: Path) -> None:
    (folder / "dvc.py").write_text(f"{DVC}sys.exit('ERROR: two\\nlines')")
    with pytest.raises(ValueError, match=r"^dvc exp run: see above$"):
        experiments.run("name", {}, [], "fine_tune@a-0")
    with pytest.raises(ValueError, match=r"^dvc data status: ERROR: two lines$"):
        experiments.dvc("data", "status", is_quiet=True)


def test_ctrl_c_reaches_the_stage_but_not_dvc_which_is_waited_for(folder: Path) -> None:
    """DVC would leave a lock behind if it were interrupted while it prepares the next experiment."""
    (folder / "dvc.py").write_text(f"{DVC}{RUNS_A_STAGE}")

    def press_ctrl_c() -> None:
        while not (folder / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press_ctrl_c).start()
    with pytest.raises(KeyboardInterrupt):
        experiments.run("name", {}, [], "fine_tune@a-0")
    assert (folder / "cleaned").read_text() == str(-signal.SIGINT)
    assert not (folder / "interrupted").exists()
