"""What stages import: the heavy libraries come only where they are used, each checked in a process of its own."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "sympy", "timm", "torchvision", "openvino", "sklearn", "statsmodels", "altair", "vl_convert"}
USE = """
import torch
from pipeline.features import extraction
from pipeline.network import backbones, cuts
from pipeline.params import BackboneChoice
from tests.factories import FLIPS, feature_options
backbone = backbones.load(BackboneChoice.of({name!r}, "random", 0), 64)
pools = {{"all": cuts.Pool("none", 0)}}
prefix, suffix = cuts.prefix_and_suffix(backbone, cuts.resolve(backbone, {boundary!r}), pools)
extraction.prepare(prefix, FLIPS, feature_options(engine={engine!r}), torch.device("cpu"))
"""


def loaded_after(code: str) -> set[str]:
    """The libraries, of those that take long to import, that a process has loaded after `code`."""
    code += f"\nimport sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {*found.stdout.split()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "libraries"),
    [
        (("fetch", "index", "split"), set()),
        (("compare",), {"sklearn", "statsmodels"}),
        pytest.param(("advise",), {"sklearn", "statsmodels", "torch"}, marks=pytest.mark.slow),
        pytest.param(
            ("plan", "extract", "train_head", "fine_tune", "label_suspects"), {"torch"}, marks=pytest.mark.slow
        ),
    ],
)
def test_stages_import_no_library_before_they_use_it(stages: tuple[str, ...], libraries: set[str]) -> None:
    assert loaded_after(f"import {', '.join(f'pipeline.stages.{stage}' for stage in stages)}") == libraries


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "boundary", "engine", "libraries"),
    [
        ("torchvision/squeezenet1_1", "features.5", "torch", {"torchvision"}),
        ("timm/test_resnet", "layer2", "auto", {"torchvision", "timm", "openvino"}),  # timm imports torchvision
    ],
)
def test_a_network_loads_its_own_library_and_openvino_only_where_it_runs(
    name: str, boundary: str, engine: str, libraries: set[str]
) -> None:
    found = loaded_after(USE.format(name=name, boundary=boundary, engine=engine))
    assert found & {"openvino", "timm", "torchvision"} == libraries
