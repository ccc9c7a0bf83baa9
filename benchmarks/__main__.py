"""Everything in one table, and in reports/benchmarks.json: `python -m benchmarks [--quick]`."""

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import boundary, busy, extract, head, index, photographs, predict, startup, store
from benchmarks.common import Line, run
from pipeline.features.engine import openvino_core
from pipeline.files import write_json

RESULTS = Path("reports/benchmarks.json")
PARTS = (startup, index, extract, predict, photographs, store, head, boundary, busy)


def machine() -> str:
    """Processor, cores, memory, and the libraries that do the work."""
    core = openvino_core()
    cpu, abilities = (core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES"))
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    bf16 = "bf16" if "BF16" in abilities else "no bf16"
    versions = f"torch {torch.__version__}, OpenVINO {version('openvino')}"
    cores = len(os.sched_getaffinity(0))
    return f"{cpu}, {cores} cores, {bf16}, {gigabytes:.0f} GB, {gpu}, {platform.platform()}, {versions}"


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Measure everything."""
    print(machine(), flush=True)
    lines = []
    for part in PARTS:
        for line in part.measure(is_quick=is_quick):
            lines.append(line)
            yield line
    write_json(RESULTS, [asdict(line) | {"holds": line.holds} for line in lines])


if __name__ == "__main__":
    run(measure)
