"""What stages import: the heavy libraries come only where they are used, each checked in a process of its own."""

import subprocess
import sys

import pytest

NETWORKS = {"timm", "torchvision", "openvino"}
STAGES = {  # and what may not be loaded when `main` begins
    "index": {"torch", *NETWORKS},
    "split": {"torch", *NETWORKS},
    "compare": {"torch", *NETWORKS},
    "train_head": {"sympy", *NETWORKS},
    "label_suspects": {"sympy", *NETWORKS},
    "plan": {"sympy", *NETWORKS},
    "extract": {"sympy", *NETWORKS},
    "fine_tune": {"sympy", *NETWORKS},
}
USE = """
import torch
from pipeline.features import extraction
from pipeline.network import backbones, cuts
from pipeline.params import BackboneChoice
from tests.factories import FLIPS, feature_options
backbone = backbones.load(BackboneChoice(name={name!r}, weights="random", seed=0), 64)
prefix, suffix = cuts.prefix_and_suffix(backbone, cuts.resolve(backbone, {boundary!r}), "all", "none")
extraction.prepare(prefix, FLIPS, feature_options(engine={engine!r}), torch.device("cpu"))
"""


def loaded_after(code: str) -> set[str]:
    """The libraries, of those that take long to import, that a process has loaded after `code`."""
    named = sorted({"torch", "sympy", *NETWORKS})
    code += f"\nimport sys; print(*(name for name in {named} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {*found.stdout.split()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_library_before_it_uses_it(stage: str) -> None:
    assert not loaded_after(f"import pipeline.stages.{stage}") & STAGES[stage]


@pytest.mark.parametrize(("engine", "others"), [("torch", set()), ("auto", {"openvino"})])
@pytest.mark.parametrize(
    ("name", "boundary", "libraries"),
    [
        ("torchvision/squeezenet1_1", "features.5", {"torchvision"}),
        ("timm/test_resnet", "layer2", {"torchvision", "timm"}),  # timm imports torchvision
    ],
)
def test_a_network_loads_its_own_library_and_openvino_only_where_it_runs(
    name: str, boundary: str, libraries: set[str], engine: str, others: set[str]
) -> None:
    found = loaded_after(USE.format(name=name, boundary=boundary, engine=engine))
    assert found - {"sympy"} == {"torch", *libraries, *others}
