"""Everything in one table, and in reports/benchmarks.json: `python -m benchmarks [--quick]`."""

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import openvino
import torch

from benchmarks import boundary, extract, head, index, startup, store
from benchmarks.common import Line, run
from pipeline.files import write_text

RESULTS = Path("reports/benchmarks.json")
PARTS = (startup, index, extract, store, head, boundary)


def machine() -> str:
    """Processor, cores, memory, and the libraries that do the work."""
    core = openvino.Core()
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return (
        f"{core.get_property('CPU', 'FULL_DEVICE_NAME')}, {len(os.sched_getaffinity(0))} cores, "
        f"{'bf16' if has_bf16 else 'no bf16'}, {gigabytes:.0f} GB, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}, {platform.platform()}, "
        f"torch {torch.__version__}, OpenVINO {openvino.__version__}"
    )


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Measure everything."""
    print(machine(), flush=True)
    lines = []
    for part in PARTS:
        for line in part.measure(is_quick=is_quick):
            lines.append(line)
            yield line
    print(f"{len(lines)} lines, {sum(not line.holds for line in lines)} missed their target")
    keys = ("name", "value", "unit", "target", "holds")
    write_text(RESULTS, json.dumps([{key: getattr(line, key) for key in keys} for line in lines], indent=2) + "\n")


if __name__ == "__main__":
    run(measure)
