"""A line of the table, and a directory in which stages run on chosen images with chosen parameters."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
from PIL import Image
from ruamel.yaml import YAML

from pipeline.dataset import manifest
from pipeline.dataset.decoding import sha256
from pipeline.dataset.manifest import Images
from pipeline.files import write_text
from pipeline.params import BackboneChoice, count_cores

S = TypeVar("S")
T = TypeVar("T")

# A process starts with the peak memory of the one that started it, so a small one has to
LAUNCH = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
with open("peak_kb", "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status)
"""
REPOSITORY = Path(__file__).parents[1]
LITE = "timm/tf_efficientnet_lite0"
N_WARM = 16  # items that start the processes of `on_all_cores`

yaml = YAML(typ="safe", pure=True)


@dataclass(frozen=True)
class Line:
    """One measured value, and the `limit` that it should keep: `bound` is "at least" or "at most"."""

    name: str
    value: float
    unit: str
    bound: str
    limit: float

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.value >= self.limit if self.bound == "at least" else self.value <= self.limit


@dataclass(frozen=True)
class Ran:
    """A process that ended well: seconds from its start to its end, peak memory (MB), and what it printed."""

    seconds: float
    peak_mb: float
    printed: str


@dataclass(frozen=True)
class Workspace:
    """A directory with params.yaml and data/images.csv; `python -m` in it runs code of this repository."""

    root: Path

    @property
    def store(self) -> Path:
        """The feature store."""
        return self.root / "data" / ".feature_store"

    def start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a module in a process group of its own."""
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(self.root), "TQDM_DISABLE": "1"}
        command = [sys.executable, "-S", "-c", LAUNCH, sys.executable, "-m", module, *arguments]
        options = {"cwd": self.root, "env": environment, "start_new_session": True}
        with (self.root / "log").open("a") as log:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, **options)

    def run(self, module: str, *arguments: str) -> Ran:
        """Run it to its end."""
        start, process = time.perf_counter(), self.start(module, *arguments)
        printed, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{module} failed:\n{(self.root / 'log').read_text()[-2000:]}")
        return Ran(time.perf_counter() - start, int((self.root / "peak_kb").read_text()) / 1024, printed)

    def list_images(self, images: Images, rows: slice = slice(None)) -> None:
        """Have data/images.csv hold these rows."""
        manifest.write_images(choose_rows(images, rows), self.root / "data" / "images.csv")


def choose_rows(images: Images, rows: slice) -> Images:
    """These rows of it."""
    return Images(**{column: values[rows] for column, values in vars(images).items()})


def choose(name: str) -> BackboneChoice:
    """A network whose weights are at hand: random ones are as fast."""
    return BackboneChoice.of(name, "bundled" if name == LITE else "random", 0)


@contextmanager
def workspace(directory: Path, name: str = LITE, **changes: dict[str, Any]) -> Iterator[Workspace]:
    """A workspace for one view of each image of the data set `directory`, and the network `name`.

    `changes`: keys of sections of params.yaml.
    """
    params = document(
        {
            "dataset": {"fetch": [], "path": str(directory), "jpeg_decoding": "fast"},
            "backbone": choose(name).model_dump(),
            "features": {"views": 1, "precision": "fp32"},
            "evaluation": {"views": ["identity"]},
            "fine_tune": {"run": []},
            "runtime": {"pixel_cache": "auto"},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        write_params(merged(params, changes), Path(folder))
        yield Workspace(Path(folder))


def read(path: Path) -> dict[str, Any]:
    """A YAML file."""
    return yaml.load(path.read_text(encoding="utf-8"))


def document(overrides: dict[str, Any], changes: Sequence[str] = ()) -> dict[str, Any]:
    """params.yaml, changed by `overrides` and by `changes`, each of which is section.key=value."""
    found = merged(read(REPOSITORY / "params.yaml"), overrides)
    for change in changes:
        key, _, text = change.partition("=")
        value = yaml.load(text)
        for name in reversed(key.split(".")):
            value = {name: value}
        found = merged(found, value)
    return found


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `changes` in it."""
    inner = {
        key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }
    return base | inner


def write_params(params: dict[str, Any], directory: Path = Path()) -> None:
    """Write params.yaml, as JSON, which is YAML."""
    write_text(directory / "params.yaml", json.dumps(params, indent=2) + "\n")


def call(main: Callable[[], None], *arguments: str) -> None:
    """Run a stage in this process as its command line would."""
    with mock.patch.object(sys, "argv", ["", *arguments]):
        main()


def took(work: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def on_all_cores(work: Callable[[S], T], items: Sequence[S]) -> tuple[list[T], float]:
    """What `work` gives of each item, in as many processes as cores; and the seconds, without those of their start."""
    n_cores = count_cores()
    with ProcessPoolExecutor(n_cores, get_context("fork")) as pool:
        list(pool.map(work, items[:N_WARM]))
        start = time.perf_counter()
        found = list(pool.map(work, items, chunksize=max(1, len(items) // (32 * n_cores))))
        return found, time.perf_counter() - start


def generate(n: int, directory: Path, side: int = 300) -> Images:
    """Write `n` grey PNG files of two classes, `side` px: smooth, with some noise, as the default data are."""
    names = [f"{('one', 'other')[number % 2]}/{number:06}.png" for number in range(n)]
    for name in names[:2]:
        (directory / name).parent.mkdir(parents=True)
    digests, _ = on_all_cores(partial(_draw, side), [directory / name for name in names])
    return Images(names, digests, [side] * n, [side] * n)


def _draw(side: int, path: Path) -> str:
    """Write one of them; its digest."""
    random, grid = np.random.default_rng(int(path.stem)), np.linspace(0, 6, side)
    wave = np.outer(np.sin(grid * random.uniform(1, 4)), np.cos(grid * random.uniform(1, 4)))
    pixels = 128 + 80 * wave + random.integers(-6, 7, (side, side))
    Image.fromarray(pixels.astype(np.uint8)).save(path, compress_level=1)
    return sha256(path.read_bytes())


def run(measure: Callable[..., Iterable[Line]]) -> None:
    """Print what `measure` yields, of fewer images with --quick; where what it needs is missing, that is one line."""
    start, verdicts = time.perf_counter(), []
    try:
        for line in measure(is_quick="--quick" in sys.argv):
            target, verdict = f"{line.bound} {line.limit:g}", "holds" if line.holds else "MISSED"
            print(f"{line.name:<58}{line.value:>10.3g} {line.unit:<24}{target:<16}{verdict}", flush=True)
            verdicts.append(line.holds)
        seconds = time.perf_counter() - start
        print(f"{len(verdicts)} lines, {verdicts.count(False)} missed their target; {seconds:.0f} s")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
