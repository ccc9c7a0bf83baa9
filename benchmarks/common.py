"""A line of the table, and a directory in which stages run on chosen images with chosen parameters."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from ruamel.yaml import YAML

from pipeline.dataset import manifest
from pipeline.dataset.decoding import sha256
from pipeline.dataset.manifest import Images
from pipeline.params import BackboneChoice

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
        chosen = {column: values[rows] for column, values in vars(images).items()}
        manifest.write_images(Images(**chosen), self.root / "data" / "images.csv")


def choose(name: str) -> BackboneChoice:
    """A network whose weights are at hand: random ones are as fast."""
    return BackboneChoice.of(name, "bundled" if name == LITE else "random", 0)


@contextmanager
def workspace(
    directory: Path, name: str = LITE, precision: str = "fp32", jpeg_decoding: str = "fast", pixel_cache: str = "auto"
) -> Iterator[Workspace]:
    """A workspace for one view of each image of the data set `directory`, and the network `name`."""
    yaml = YAML()
    params = yaml.load(REPOSITORY / "params.yaml")
    params["dataset"].update({"fetch": [], "path": str(directory), "jpeg_decoding": jpeg_decoding})
    params["backbone"] = choose(name).model_dump()
    params["features"].update({"views": 1, "precision": precision})
    params["evaluation"]["views"] = ["identity"]
    params["fine_tune"]["run"] = []
    params["runtime"]["pixel_cache"] = pixel_cache
    with tempfile.TemporaryDirectory() as folder:
        made = Workspace(Path(folder))
        yaml.dump(params, made.root / "params.yaml")
        yield made


def generate(n: int, directory: Path, side: int = 300) -> Images:
    """Write `n` grey PNG files of two classes, `side` px: smooth, with some noise, as the default data are."""
    random, grid, digests = np.random.default_rng(0), np.linspace(0, 6, side), []
    names = [f"{('one', 'other')[number % 2]}/{number:06}.png" for number in range(n)]
    for name in names:
        wave = np.outer(np.sin(grid * random.uniform(1, 4)), np.cos(grid * random.uniform(1, 4)))
        pixels = 128 + 80 * wave + random.integers(-6, 7, (side, side))
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path, compress_level=1)
        digests.append(sha256(path.read_bytes()))
    return Images(names, digests, [side] * n, [side] * n)


def show(line: Line) -> None:
    """Print it, with what it should keep."""
    target, verdict = f"{line.bound} {line.limit:g}", "holds" if line.holds else "MISSED"
    print(f"{line.name:<58}{line.value:>10.3g} {line.unit:<24}{target:<16}{verdict}", flush=True)


def run(measure: Callable[..., Iterable[Line]]) -> None:
    """Print what `measure` yields, of fewer images with --quick; where what it needs is missing, that is one line."""
    try:
        for line in measure(is_quick="--quick" in sys.argv):
            show(line)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
