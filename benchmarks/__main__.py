"""Everything in one table, and in reports/benchmarks.json: `python -m benchmarks [--quick]`."""

import json
import os
import platform
import sys
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"

import openvino
import torch

from benchmarks import boundary, compare, extract, head, index, label_suspects, store
from benchmarks.common import run, show
from pipeline.files import write_text

RESULTS = Path("reports/benchmarks.json")


def machine() -> str:
    """Processor, cores, memory, and the libraries that do the work."""
    core = openvino.Core()
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    parts = [
        core.get_property("CPU", "FULL_DEVICE_NAME"),
        f"{len(os.sched_getaffinity(0))} cores",
        "bf16" if has_bf16 else "no bf16",
        f"{gigabytes:.0f} GB",
        torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        platform.platform(),
        f"torch {torch.__version__}",
        f"OpenVINO {openvino.__version__}",
    ]
    return ", ".join(parts)


def main() -> None:
    """Measure everything."""
    is_quick = "--quick" in sys.argv
    print(machine(), flush=True)
    lines = []
    for part in (
        index.measure(is_quick=is_quick),
        extract.measure(is_quick=is_quick),
        store.measure(is_quick=is_quick),
        head.measure(),
        boundary.measure(is_quick=is_quick),
        compare.measure(is_quick=is_quick),
        label_suspects.measure(is_quick=is_quick),
    ):
        lines += show(part)
    missed = sum(not line.holds for line in lines)
    print(f"{len(lines)} lines, {missed} missed their target")
    keys = ("name", "value", "unit", "target", "holds")
    write_text(RESULTS, json.dumps([{key: getattr(line, key) for key in keys} for line in lines], indent=2) + "\n")


if __name__ == "__main__":
    run(main)
