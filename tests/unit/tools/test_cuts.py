"""cuts: the table and the JSON of where a network can be cut."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

from pipeline import logs
from pipeline.__main__ import cli
from tests import factories

REPOSITORY = Path(__file__).parents[3]
KEYS = {"name", "shape", "params_before", "weight_layers_before", "flops_before", "bytes_per_image"}
TINY = "timm/test_resnet"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    return tmp_path


@pytest.fixture
def command(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        logs.run(lambda: cli(["cuts", *arguments], standalone_mode=False))
        return capsys.readouterr().out

    return run


def configure(folder: Path, size: int) -> None:
    """A repository that wants images of `size` pixels for TINY, stored in fp16."""
    params = factories.params_document()
    params["backbone"].update({"name": TINY, "weights": "random"})
    params["features"].update({"image_size": size, "store_dtype": "fp16"})
    factories.write_params(params, folder / "params.yaml")


def test_json_lists_every_cut_point_with_these_keys(command: Callable[..., str]) -> None:
    points: list[dict[str, Any]] = json.loads(command(TINY, "--all", "--json"))
    assert all(point.keys() == KEYS for point in points)
    assert [point["name"] for point in points][:3] == ["conv1.0", "conv1.1", "conv1.2"]
    assert all(point["bytes_per_image"] == 4 * prod(point["shape"]) for point in points)


def test_default_is_the_last_cut_point_of_each_block(command: Callable[..., str]) -> None:
    every = json.loads(command(TINY, "--all", "--json"))
    blocks = json.loads(command(TINY, "--json"))
    assert [point for point in every if point in blocks] == blocks
    names = [point["name"] for point in blocks]
    of_block = {name.split(".")[0] + "." + name.split(".")[1] for name in names if name.startswith("layer")}
    assert of_block == {f"layer{i}.0" for i in range(1, 5)}
    for name in names:
        if name.startswith("layer"):
            inside = [point["name"] for point in every if point["name"].startswith(".".join(name.split(".")[:2]))]
            assert name == inside[-1]


def test_table_has_a_line_for_each_cut_point(command: Callable[..., str]) -> None:
    title, _, header, *lines = command(TINY).splitlines()
    assert title.startswith(f"{TINY}: share of parameters and of FLOPs")
    assert header.split("  ")[0] == "cut point"
    assert "minutes" not in header
    points = json.loads(command(TINY, "--json"))
    assert [line.split()[0] for line in lines] == [point["name"] for point in points]
    first, last = lines[0].split(), lines[-1].split()
    assert first[1] == "x".join(map(str, points[0]["shape"]))
    assert last[2:4] == ["100.0%", "100.0%"]


def test_configured_network_is_described_as_it_is_configured(folder: Path, command: Callable[..., str]) -> None:
    configure(folder, size=64)
    points = json.loads(command(TINY, "--json", "--all"))
    assert all(point["bytes_per_image"] == 2 * prod(point["shape"]) for point in points)
    assert points[0]["shape"][1:] == [32, 32]


@pytest.mark.slow
def test_table_for_a_data_set_forecasts_gigabytes_and_minutes(folder: Path, command: Callable[..., str]) -> None:
    configure(folder, size=64)
    lines = [f"{number:05}.png,{number:064x},64,64" for number in range(30_000)]
    (folder / "data").mkdir()
    (folder / "data" / "images.csv").write_text("\n".join(["image_id,sha256,width,height", *lines]) + "\n")
    title, _, header, *table = command(TINY).splitlines()
    assert title.endswith("one view of 30,000 images, decoding not counted")
    assert header.split()[-2:] == ["GB", "minutes"]
    points = json.loads(command(TINY, "--json"))
    for line, point in zip(table, points, strict=True):
        assert float(line.split()[-2]) == pytest.approx(30_000 * point["bytes_per_image"] / 1e9, abs=6e-4)
    minutes = [float(line.split()[-1]) for line in table]
    assert minutes == sorted(minutes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "error: resnet18: expected torchvision/<name> or timm/<name>"),
        ("timm/resnet1", "timm/resnet1 is not in timm; nearest: timm/resnet18"),
        ("torchvision/nothing", "torchvision/nothing is not in torchvision; nearest: torchvision/"),
    ],
)
def test_unknown_name_is_one_line(name: str, expected: str, command: Callable[..., str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command(name)
    assert expected in str(caught.value.code)
    assert "\n" not in str(caught.value.code)


@pytest.mark.slow
def test_module_runs_and_fails_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "cuts", "timm/nothing_like_it", "--json"]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: ")
    assert len(ran.stderr.splitlines()) == 1
