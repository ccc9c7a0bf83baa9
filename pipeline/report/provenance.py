"""Where a result comes from: the commit, library versions, and the outputs that dvc.lock lists; how long stages took.

Reads dvc.lock and reports/timings/.
"""

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.logs import TIMINGS, one_line

LOCK = Path("dvc.lock")
LIBRARIES = (
    *("torch", "torchvision", "timm", "openvino"),
    *("scikit-learn", "scipy", "statsmodels", "numpy", "pillow", "h5py"),
)


class Output(BaseModel):
    """A file or directory that a stage wrote, or read; `md5` as DVC computes it, see `digest`; `size` in bytes."""

    path: str
    md5: str
    size: int


class Stage(BaseModel):
    """What dvc.lock says of a stage; `params`: by file, values by dotted name."""

    outs: list[Output] = []
    deps: list[Output] = []
    params: dict[str, dict[str, Any]] = {}


class Timing(BaseModel):
    """What a stage took when it last ran here; the peak is of its main process, None where the system gives none."""

    stage: str
    wall_seconds: float
    peak_memory_bytes: int | None


def read_lock(path: Path = LOCK) -> dict[str, Stage]:
    """Read the stages of dvc.lock; ValueError if it is not there, or damaged."""
    try:
        lock = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        return TypeAdapter(dict[str, Stage]).validate_python(lock["stages"])
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; the page shows what `dvc repro` computed, so run that first") from None
    except (YAMLError, ValidationError, UnicodeDecodeError, LookupError, TypeError) as error:
        problem = f"damaged, or a merge conflict ({one_line(error)}); take one side of it with git"
        raise ValueError(f"{path}: {problem}; run: dvc repro") from None


def check(stages: dict[str, Stage], paths: Iterable[str]) -> None:
    """ValueError for an output that is missing, or is not the one that dvc.lock lists: damaged, or out of date."""
    listed = {out.path: out.md5 for stage in stages.values() for out in stage.outs}
    for path in paths:
        if not Path(path).exists():
            raise ValueError(f"{path}: not found; run: dvc repro")
        if listed.get(path) != digest(Path(path)):
            raise ValueError(f"{path}: not the output that {LOCK} lists, so damaged or out of date; run: dvc repro")


def check_inputs(stages: dict[str, Stage], output: str, paths: Iterable[str]) -> None:
    """ValueError if the stage that wrote `output` read others of these files and directories than are there now."""
    read = {
        dep.path: dep.md5
        for stage in stages.values()
        if output in {out.path for out in stage.outs}
        for dep in stage.deps
    }
    for path in paths:
        if read.get(path) != digest(Path(path)):
            raise ValueError(f"{path}: changed since {output} was made; run: dvc repro")


def digest(path: Path) -> str:
    """MD5 (hex) of a file; of a directory that of the list of its files, with the suffix .dir, as in dvc.lock."""
    if path.is_file():
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    files = {file.relative_to(path).as_posix(): digest(file) for file in path.rglob("*") if file.is_file()}
    entries = [{"md5": md5, "relpath": name} for name, md5 in sorted(files.items())]
    return hashlib.md5(json.dumps(entries).encode(), usedforsecurity=False).hexdigest() + ".dir"


def commit() -> dict[str, Any]:
    """The commit of the checkout, its date, and how many files below this directory differ from it.

    Where git gives none, `hash` is empty and `missing` says why.
    """
    try:
        found, date = git("show", "--no-patch", "--format=%H %cs", "HEAD").split()
        # Of a directory that git ignores, such as first-look/, the files around it count
        is_ignored = subprocess.run(["git", "check-ignore", "--quiet", "."], capture_output=True).returncode == 0
        n_changed = len(git("status", "--porcelain", "--", ":/" if is_ignored else ".").splitlines())
    except ValueError as error:
        return {"hash": "", "date": "", "n_changed": 0, "missing": str(error)}
    return {"hash": found, "date": date, "n_changed": n_changed, "missing": ""}


def versions() -> dict[str, str]:
    """Python, and the libraries whose versions change results."""
    return {"Python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES}


def timings(directory: Path = TIMINGS) -> list[Timing]:
    """What each stage took, the longest first; ValueError if a file is damaged."""
    found = []
    for path in directory.glob("*.json"):
        try:
            found.append(Timing(stage=path.stem, **json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: damaged ({one_line(error)}); delete it") from None
    return sorted(found, key=lambda timing: -timing.wall_seconds)


def git(*arguments: str) -> str:
    """Output of a git command in this directory; ValueError with git's own words if it fails or is not there."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise ValueError(f"git {arguments[0]}: git is not installed, or not on the PATH") from None
    if done.returncode:
        raise ValueError(f"git {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


def file_at(revision: str, path: str) -> str | None:
    """The text of a file of this directory at a revision; None if it is not in that commit.

    The directory may lie below the top of the git repository.
    """
    return git("show", f"{revision}:./{path}") if git("ls-tree", revision, "--", path) else None
