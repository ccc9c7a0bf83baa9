"""Benchmarks run when they are called, and where what they need is not there, that is one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = [
    "boundary",
    "compare",
    "elpv",
    "error_rates",
    "extract",
    "head",
    "index",
    "label_suspects",
    "plain_loop",
    "store",
]
RUN = 'if __name__ == "__main__":\n    {}\n'


@pytest.mark.parametrize("name", [*BENCHMARKS, "__main__"])
def test_a_benchmark_runs_when_it_is_called(name: str):
    text = Path(REPOSITORY, "benchmarks", f"{name}.py").read_text(encoding="utf-8")
    assert text.endswith((RUN.format("main()"), RUN.format("run(main)")))


def test_every_benchmark_is_listed_here():
    assert {path.stem for path in REPOSITORY.glob("benchmarks/*.py")} == {*BENCHMARKS, "__init__", "__main__", "common"}


@pytest.mark.parametrize("name", ["boundary", "extract", "head", "store"])
def test_without_data_a_benchmark_ends_in_one_line(name: str, tmp_path: Path):
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: data/")
    assert ran.stderr.count("\n") == 1
    assert "run: dvc repro" in ran.stderr
