"""How long a stage takes to start: `python -m benchmarks.startup [--quick]`.

CPU seconds of a process until `main` begins, over those of a process that imports just the third-party libraries that
the stage needs before it knows which network, engine or data set it works with. Medians of several runs, which take
turns. timm, torchvision.models and OpenVINO are in no list: a stage imports them where it builds or runs a network.
"""

import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.common import REPOSITORY, Line, run

COMMON = ("numpy", "pydantic", "ruamel.yaml", "tqdm")
TORCH = ("torch.fx", "torch.utils.flop_counter", "safetensors.torch")
HEAD = ("scipy.optimize", "threadpoolctl")
NEEDED = {
    "fetch": ("pandas", "PIL.Image"),
    "index": ("pandas", "PIL.Image", "scipy.fft", "scipy.sparse.csgraph", "scipy.spatial"),
    "split": ("pandas", "scipy.sparse.csgraph"),
    "plan": (*TORCH, *HEAD),
    "extract": (*TORCH, "pandas", "h5py", "PIL.Image"),
    "train_head": (*TORCH, *HEAD, "pandas", "h5py"),
    "references": ("torch", "pandas", "h5py", "safetensors.numpy", "scipy.special", "sklearn.neighbors"),
    "fine_tune": (*TORCH, *HEAD, "pandas", "h5py", "PIL.Image"),
    "label_suspects": ("torch", *HEAD, "pandas", "h5py", "scipy.sparse.csgraph"),
    "advise": (*TORCH, "pandas", "h5py", "PIL.Image", "scipy.linalg", "scipy.sparse.csgraph", "sklearn.metrics"),
    "compare": (
        *("pandas", "scipy.optimize", "sklearn.metrics", "safetensors.numpy"),
        *("statsmodels.stats.contingency_tables", "statsmodels.stats.multitest", "statsmodels.stats.proportion"),
    ),
}


def measure(*, is_quick: bool) -> Iterator[Line]:
    """A line for each stage."""
    for stage, libraries in NEEDED.items():
        modules = {"stage": [f"pipeline.stages.{stage}"], "libraries": [*COMMON, *libraries]}
        seconds = {name: [] for name in modules}
        for _ in range(3 if is_quick else 7):
            for name, imported in modules.items():
                seconds[name].append(cpu_seconds(f"import {', '.join(imported)}"))
        ours, theirs = (statistics.median(values) for values in seconds.values())
        print(f"  {stage}: {ours:.2f} s; {theirs:.2f} s for {', '.join(modules['libraries'])}", flush=True)
        yield Line(f"start of {stage} / of the libraries it needs", ours / theirs, "times", "at most", 1.3)


def cpu_seconds(code: str) -> float:
    """CPU seconds, of the user and the system, of a Python process that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    run(measure)
