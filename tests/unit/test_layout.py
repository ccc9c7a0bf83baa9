"""Who imports whom, and what dvc.yaml says of it."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import pipeline

REPOSITORY = Path(__file__).parents[2]
ORDER = [
    name
    for line in re.findall(r"^    .+?   (.*)$", str(pipeline.__doc__), re.MULTILINE)
    for name in line.strip().split(", ")
]
STAGES = YAML(typ="safe", pure=True).load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def definition(stage: str) -> dict:
    return STAGES[stage].get("do", STAGES[stage])


def imports(module: str) -> set[str]:
    """Modules of the pipeline that a module (heads, stages.split) imports itself, wherever in the file."""
    tree = ast.parse((REPOSITORY / "pipeline" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    short = {name.removeprefix("pipeline.") for name in found if name.startswith("pipeline.")}
    return {name for name in short if (REPOSITORY / "pipeline" / f"{name.replace('.', '/')}.py").is_file()}


def all_imports(module: str) -> set[str]:
    direct = imports(module)
    return direct.union(*map(all_imports, direct))


def test_every_module_has_its_place_in_the_order():
    assert {path.stem for path in (REPOSITORY / "pipeline").glob("*.py")} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_listed_before_it(module: str):
    assert imports(module) - set(ORDER[: ORDER.index(module)]) == set()


@pytest.mark.parametrize("stage", STAGES)
def test_stages_never_import_each_other(stage: str):
    assert {name for name in all_imports(f"stages.{stage}") if name.startswith("stages")} == set()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_modules_it_imports(stage: str):
    files = {dep for dep in definition(stage)["deps"] if dep.startswith("pipeline/")}
    needed = (all_imports(f"stages.{stage}") | {f"stages.{stage}"}) - {"logs"}
    assert files == {f"pipeline/{name.replace('.', '/')}.py" for name in needed}


def test_every_stage_is_a_file_and_every_file_a_stage():
    assert {path.stem for path in (REPOSITORY / "pipeline/stages").glob("*.py")} - {"__init__"} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_says_what_it_does(stage: str):
    assert definition(stage)["desc"]


@pytest.mark.parametrize("stage", STAGES)
def test_what_dvc_caches_is_ignored_by_git_beforehand(stage: str):
    values = {"item": "elpv", "item.strategy": "full_retrain", "item.seed": "0"}
    for out in definition(stage).get("outs", []):
        name, options = (out, {}) if isinstance(out, str) else next(iter(out.items()))
        path = re.sub(r"\$\{(.+?)\}", lambda match: values[match[1]], name)
        # A directory that is not there yet is matched by a pattern with a slash at its end only with one itself
        shown = subprocess.run(
            ["git", "check-ignore", "--no-index", "-v", path, f"{path}/"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        is_ignored = shown.stdout.startswith(".gitignore:")
        assert is_ignored == options.get("cache", True), name
