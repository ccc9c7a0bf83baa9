"""What a result hangs on: the commit, library versions, digests of what DVC keeps; and how long stages took."""

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.logs import TIMINGS

LOCK = Path("dvc.lock")
LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "openvino",
    "scikit-learn",
    "scipy",
    "statsmodels",
    "numpy",
    "pillow",
    "h5py",
)


def commit() -> dict[str, Any] | None:
    """The commit of the checkout, its date, and how many files differ from it; None without git."""
    try:
        shown = _git("show", "--no-patch", "--format=%H %cs", "HEAD").split()
        changed = _git("status", "--porcelain").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"hash": shown[0], "date": shown[1], "n_changed": len(changed)}


def versions() -> dict[str, str]:
    """Python, and the libraries whose versions change results."""
    found = {"Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def digests(path: Path = LOCK) -> list[dict[str, Any]]:
    """Stage, path, MD5 and size (bytes) of every output in dvc.lock; empty where there is none."""
    try:
        stages = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))["stages"]
        return [
            {"stage": stage, "path": out["path"], "md5": out["md5"], "size_bytes": out.get("size")}
            for stage, done in stages.items()
            for out in done.get("outs", [])
        ]
    except (OSError, YAMLError, LookupError, TypeError, AttributeError):
        return []


def timings(directory: Path = TIMINGS) -> list[dict[str, Any]]:
    """What each stage took when it last ran here: stage, wall_seconds, peak_memory_bytes; the longest first."""
    found = []
    for path in directory.glob("*.json"):
        try:
            timing = json.loads(path.read_text(encoding="utf-8"))
            seconds, peak = float(timing["wall_seconds"]), timing["peak_memory_bytes"]
            found.append({"stage": path.stem, "wall_seconds": seconds, "peak_memory_bytes": peak and int(peak)})
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return sorted(found, key=lambda timing: -timing["wall_seconds"])


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout
