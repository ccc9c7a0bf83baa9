"""first-look: a first answer in minutes, in the directory first-look/, which git and DVC ignore.

It is a DVC repository of its own, with a copy of the code and of params.yaml as it is now, in which nothing is
fine-tuned. It shares DVC's cache, the feature store and the image files with this directory, where nothing changes but
these caches.
"""

import difflib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.params import HEAD_ONLY, PARAMS, Dataset, load_params
from pipeline.tools import experiments

PLACE = Path("first-look")
COPIED = ("dvc.yaml", ".dvcignore", "pipeline", ".dvc/plots", "data/weights")
CONFIG = "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n[cache]\n    dir = {}\n"


def make() -> None:
    """Run every stage but fine-tuning there, write the page, print the advice, and say what to run next."""
    check_images(load_params().dataset)
    lay_out()
    print(f"Everything is made in {PLACE}/, and the paths in the next lines are relative to it.", flush=True)
    for arguments in (
        ("dvc", "repro", "plan"),
        ("pipeline", "advise", "--no-cost"),
        ("dvc", "repro"),
        ("pipeline", "report"),
    ):
        run(arguments)
    print(
        f"\nThe page: {PLACE / 'reports' / 'report.html'}\nNext: make repro, which also fine-tunes "
        f"{', '.join(load_params().fine_tune.run) or 'what fine_tune.run lists (nothing now)'}; what is computed is "
        "not computed again. python -m pipeline advise says how long that takes. params.yaml is where to change things."
    )


def lay_out() -> None:
    """Make the directory, or bring it up to date; what its stages wrote stays."""
    params = load_params()
    for source in (*map(Path, COPIED), *Path().glob("requirements*.lock")):
        target = PLACE / source
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            ignored = shutil.ignore_patterns("__pycache__", "*.dvc", ".gitignore")
            shutil.copytree(source, target, copy_function=link, ignore=ignored)
        elif source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    (PLACE / ".dvc").mkdir(exist_ok=True)
    (PLACE / ".dvc" / "config").write_text(CONFIG.format(cache_directory()), encoding="utf-8")
    yaml = YAML()
    yaml.width = 200
    document = yaml.load(PARAMS.read_text(encoding="utf-8"))
    document["fine_tune"]["run"] = []
    document["compare"]["baseline"] = HEAD_ONLY
    if not is_fetched(params.dataset):  # else it is fetched there, too
        document["dataset"]["path"] = str(Path(params.dataset.path).absolute())
    with (PLACE / PARAMS).open("w", encoding="utf-8") as file:
        yaml.dump(document, file)


def is_fetched(dataset: Dataset) -> bool:
    """Whether the stage `fetch` makes the images."""
    path = Path(dataset.path)
    return any(Path("data/raw", name) in (path, *path.parents) for name in dataset.fetch)


def check_images(dataset: Dataset) -> None:
    """Raise FileNotFoundError, before DVC does in fewer words, if the images are neither there nor fetched."""
    path = Path(dataset.path)
    if path.exists() or is_fetched(dataset):
        return
    beside = [one.name for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, beside)]
    raise FileNotFoundError(
        f"params.yaml: dataset.path: {path} is not there; expected a directory of images, or one below data/raw/ that "
        f"dataset.fetch names" + (f"; near: {', '.join(near)}" if near else "")
    )


def cache_directory() -> Path:
    """DVC's cache, which may lie elsewhere (`dvc cache dir`)."""
    return Path(experiments.dvc("cache", "dir", is_quiet=True).strip()).resolve()


def link(source: str, target: str) -> None:
    """A copy; of a weights file, which may be large, a link."""
    if Path(source).is_relative_to("data/weights"):
        Path(target).symlink_to(Path(source).resolve())
    else:
        shutil.copyfile(source, target)


def run(arguments: tuple[str, ...]) -> None:
    """Run a command there, with the caches of this directory; ValueError if it fails."""
    environment = os.environ | {"DVC_ROOT": str(Path(os.environ.get("DVC_ROOT", ".")).resolve())}
    environment["PYTHONPATH"] = str(PLACE.resolve())
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=PLACE, env=environment)
    if done.returncode:
        raise ValueError(f"{PLACE}: {' '.join(arguments)} failed; see above, where paths are relative to {PLACE}/")
