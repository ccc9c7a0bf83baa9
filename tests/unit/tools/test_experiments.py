"""experiments: how DVC is called and interrupted. What it then does is in tests/end_to_end."""

import json
import os
import signal
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
