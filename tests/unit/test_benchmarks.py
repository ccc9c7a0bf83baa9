"""Benchmarks run when they are called, and where what they need is not there, that is one line."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from benchmarks import __main__ as everything
from benchmarks import common, startup

REPOSITORY = Path(__file__).parents[2]
MEASURING = ["boundary", "busy", "extract", "head", "index", "photographs", "predict", "startup", "store"]
STUDIES = ["decisions", "defaults", "elpv", "error_rates", "learning_curves"]
BENCHMARKS = [*MEASURING, *STUDIES, "gpu", "near_duplicates", "plain_loop", "scale"]
RUN = 'if __name__ == "__main__":\n    {}\n'


@pytest.mark.parametrize("name", [*BENCHMARKS, "__main__"])
def test_a_benchmark_runs_when_it_is_called(name: str):
    text = Path(REPOSITORY, "benchmarks", f"{name}.py").read_text(encoding="utf-8")
    assert text.endswith(RUN.format("run(measure)" if name in (*MEASURING, "__main__") else "main()"))


def test_every_benchmark_is_listed_here():
    assert {path.stem for path in REPOSITORY.glob("benchmarks/*.py")} == {
        *BENCHMARKS,
        "__init__",
        "__main__",
        "common",
        "studies",
    }


def test_all_that_measure_stand_in_one_table():
    assert sorted(part.__name__.rpartition(".")[2] for part in everything.PARTS) == MEASURING


def test_start_up_is_measured_of_every_stage():
    stages = YAML(typ="safe", pure=True).load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert list(startup.NEEDED) == list(stages)


@pytest.mark.slow
def test_scale_is_measured_of_any_size_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    sizes = ["--images", "1500", "--views", "3", "--largest", "1000"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.scale", *sizes]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "4,500 rows in 18 shards" in ran.stdout
    assert sum(line.endswith(("holds", "MISSED")) for line in ran.stdout.splitlines()) == 8
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["boundary", "extract", "head", "store"])
def test_without_data_a_benchmark_ends_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    with pytest.raises(SystemExit) as caught:
        common.run(importlib.import_module(f"benchmarks.{name}").measure)
    line = str(caught.value.code)
    assert line.startswith("error: data/")
    assert "\n" not in line
    assert "run: dvc repro" in line


ABSENT = "import sys; sys.modules |= dict.fromkeys(('dvc', 'openvino', 'sklearn', 'statsmodels'))"
LINE = re.compile(r"^(\S.*?)  +[\d.e+-]+ (?:times)? +at (?:least|most) \S+ +(holds|MISSED)$", re.MULTILINE)


@pytest.mark.end_to_end
def test_the_benchmark_of_a_gpu_runs_to_its_end_on_a_cpu_without_dvc_and_openvino(tmp_path: Path):
    sizes = "--device cpu --images 40 --side 40 --size 32 --backbone timm/test_resnet --freeze-until layer2"
    Path(tmp_path, "sitecustomize.py").write_text(ABSENT)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", *sizes.split()]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    verdicts = dict(LINE.findall(ran.stdout))
    assert list(verdicts) == [
        "extraction / its limit, fp32",
        "two runs with the same bytes, fp32",
        "extraction / plain loop with as many workers, fp32",
        "1 and all workers with the same bytes",
        "full_retrain / bare eager loop",
        "partial_freeze / bare eager loop",
    ]
    assert {verdict for name, verdict in verdicts.items() if "same bytes" in name} == {"holds"}
    for words in ("paid once: imports: ", "paid once: first use of the device: ", "decoding ", "head: ", "bare loop "):
        assert words in ran.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["sitecustomize.py"], "nothing is left"
