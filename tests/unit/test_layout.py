"""The layers of pipeline/, and what dvc.yaml says of the files that a stage loads."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import pipeline
from benchmarks.studies import USED

REPOSITORY = Path(__file__).parents[2]
ROWS = re.findall(r"^    (\S+(?:, \S+)*)   ", str(pipeline.__doc__), re.MULTILINE)
LAYER = {name: number for number, row in enumerate(ROWS) for name in row.split(", ")}
MODULES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in (REPOSITORY / "pipeline").rglob("*.py")
    if path.name != "__init__.py"
)
IN_NO_DEPS = {"pipeline/params.py", "pipeline/logs.py"}  # DVC tracks the values of the first; the second only prints
STAGES = YAML(typ="safe", pure=True).load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
COMPUTING = ("extract", "train_head", "fine_tune")


def definition(stage: str) -> dict:
    return STAGES[stage].get("do", STAGES[stage])


def deps(stage: str) -> set[str]:
    return {dep for dep in definition(stage)["deps"] if dep.startswith("pipeline/")}


def covers(dep: str, module: str) -> bool:
    return module == dep or module.startswith(f"{dep}/")


@cache
def imported_names(module: str) -> frozenset[str]:
    """What the file `module` imports, wherever in it, by its full name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((REPOSITORY / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return frozenset(names)


def imports(module: str) -> set[str]:
    """Modules of the pipeline among them."""
    names = imported_names(module)
    return {path for name in names if (path := f"{name.replace('.', '/')}.py") in MODULES}


def loaded(module: str) -> set[str]:
    """The file `module`, and the modules of the pipeline that it imports, directly or not."""
    found, new = {module}, {module}
    while new := set().union(*map(imports, new)) - found:
        found |= new
    return found


def layer(module: str) -> str:
    return Path(module).relative_to("pipeline").parts[0].removesuffix(".py")


def test_what_is_installed_is_every_package_and_the_files_of_the_page():
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "pipeline").rglob("__init__.py")}
    assert set(setuptools["packages"]) == {path.as_posix().replace("/", ".") for path in packages}
    others = {path for path in (REPOSITORY / "pipeline").rglob("*.*") if path.suffix not in (".py", ".pyc")}
    data = {
        REPOSITORY / name.replace(".", "/") / file
        for name, files in setuptools["package-data"].items()
        for file in files
    }
    assert data == others


def test_every_package_is_listed_and_says_only_what_lives_there():
    packages = {path.parent for path in (REPOSITORY / "pipeline").rglob("__init__.py")}
    assert {path.name for path in packages} - {"pipeline"} <= LAYER.keys()
    assert {layer(module) for module in MODULES} - {"__main__"} == LAYER.keys()
    for package in packages:
        tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), package
        # `pipeline` also sets what must be set before torch is loaded
        assert len(tree.body) == (7 if package.name == "pipeline" else 1), package


def test_garbage_is_looked_for_seldom_while_libraries_load_and_not_at_the_end():
    # What is registered before it runs after it
    code = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); import pipeline; "
    code += "print(gc.isenabled() and gc.get_threshold()[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["100000", "True"]


@pytest.mark.parametrize("package", ["pipeline", "benchmarks"])
@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, ["PASSIVE", "1000"]),
        ({"GOMP_SPINCOUNT": "7"}, ["PASSIVE", "7"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "None"]),
    ],
)
def test_waiting_threads_soon_sleep_unless_the_user_says_otherwise(
    package: str, given: dict[str, str], found: list[str]
):
    code = f"import {package}, os, sys; assert 'torch' not in sys.modules; "
    code += "print(*map(os.environ.get, ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')))"
    environment = {key: value for key, value in os.environ.items() if "OMP_" not in key} | given
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.split() == found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_packages_above_its_own(module: str):
    if module == "pipeline/__main__.py":  # the command line
        return
    names = {layer(name) for name in imports(module)}
    assert {name for name in names if LAYER[name] > LAYER[layer(module)]} == set()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_other_stage_and_nothing_that_draws_or_serves_the_command_line(stage: str):
    own = f"pipeline/stages/{stage}.py"
    others = ("pipeline/report/", "pipeline/tools/", "pipeline/stages/", "pipeline/__main__.py")
    assert {module for module in loaded(own) - {own} if module.startswith(others)} == set()


@pytest.mark.parametrize("stage", STAGES)
def test_every_file_that_a_stage_loads_is_among_its_deps(stage: str):
    needed = loaded(f"pipeline/stages/{stage}.py") - IN_NO_DEPS
    assert {module for module in needed if not any(covers(dep, module) for dep in deps(stage))} == set()


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_there_and_of_use(stage: str):
    needed = loaded(f"pipeline/stages/{stage}.py")
    for dep in deps(stage):
        assert (REPOSITORY / dep).exists(), dep
        assert any(covers(dep, module) for module in needed), dep
        assert not any(covers(other, dep) for other in deps(stage) - {dep}), dep
    assert not any(covers(dep, module) for dep in deps(stage) for module in IN_NO_DEPS)


@pytest.mark.parametrize("stage", COMPUTING)
def test_a_study_of_the_benchmarks_is_run_again_after_a_change_of_any_file_that_its_stages_load(stage: str):
    digested = {
        path.relative_to(REPOSITORY).as_posix() for name in USED for path in (REPOSITORY / "pipeline").glob(name)
    }
    assert loaded(f"pipeline/stages/{stage}.py") - IN_NO_DEPS - digested == set()


@pytest.mark.parametrize("stage", COMPUTING)
def test_touching_a_file_that_a_stage_does_not_load_does_not_run_what_computes_features_or_trains(stage: str):
    needed = loaded(f"pipeline/stages/{stage}.py")
    covered = {module for module in MODULES if any(covers(dep, module) for dep in deps(stage))}
    assert covered - needed == set()


@pytest.mark.parametrize("stage", STAGES)
def test_new_versions_of_libraries_run_again_what_they_can_change(stage: str):
    names = set().union(*map(imported_names, loaded(f"pipeline/stages/{stage}.py")))
    libraries = {name.partition(".")[0] for name in names}
    locks = {dep for dep in definition(stage)["deps"] if dep.startswith("requirements")}
    assert ("requirements-compare.lock" in locks) == bool(libraries & {"sklearn", "statsmodels"})
    assert locks <= {"requirements.lock", "requirements-compare.lock"}
    assert locks
    assert libraries & {"altair", "click", "huggingface_hub", "jinja2", "markupsafe", "onnx", "vl_convert"} == set()


def test_a_package_has_one_version_in_all_locks_and_those_below_scikit_learn_are_in_its_lock():
    pins: dict[str, dict[str, str]] = {}
    for path in REPOSITORY.glob("requirements*.lock"):
        found = re.findall(r"^([a-z0-9-]+)==([^ \n]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        pins[path.stem] = dict(found)
    assert set(pins) == {"requirements", *(f"requirements-{group}" for group in ("compare", "report", "export", "dev"))}
    assert {"numpy", "pandas", "scikit-learn", "scipy", "statsmodels"} <= pins["requirements-compare"].keys()
    versions = {(name, version) for lock in pins.values() for name, version in lock.items()}
    assert len(versions) == len({name for name, _ in versions})


def test_dvc_yaml_names_little_code():
    assert sum(len(deps(stage)) for stage in STAGES) <= 69


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
