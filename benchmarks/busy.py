"""Training beside a busy neighbour: `python -m benchmarks.busy [--quick]`.

Steps of EfficientNet-Lite0 (torch, fp32, two threads on two cores), alone and beside a process that keeps a core
busy: with OpenMP threads that wait as pipeline/__init__.py says, most of the time asleep, and with OpenMP's default,
where they keep a core busy. All four take turns; medians of eleven steps (--quick: five, of smaller batches).
"""

import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.common import LITE, REPOSITORY, Line, run

# A line read is a step made, and its time printed; after the last one, the digest of the weights
STEPS = """
import hashlib, os, sys, time
if sys.argv[3] == "default":
    import torch  # before the pipeline, which says how threads wait
from benchmarks.common import choose
from pipeline.network import backbones
import torch

torch.set_num_threads(2)
torch.manual_seed(0)
network = backbones.load(choose(sys.argv[1]), None).module.requires_grad_(True)
optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
images = torch.rand(int(sys.argv[2]), 3, 224, 224)
for _ in sys.stdin:
    start = time.perf_counter()
    optimizer.zero_grad()
    network(images).square().mean().backward()
    optimizer.step()
    print(time.perf_counter() - start, flush=True)
weights = b"".join(value.detach().numpy().tobytes() for value in network.state_dict().values())
print(hashlib.sha256(weights).hexdigest())
"""
WAITING = ("ours", "default")


def measure(*, is_quick: bool) -> Iterator[Line]:
    """The rate beside a neighbour over the rate alone, and whether that one and the weights stay as they are."""
    cores = sorted(os.sched_getaffinity(0))
    seconds = {(waiting, is_busy): [] for is_busy in (False, True) for waiting in WAITING}
    try:
        os.sched_setaffinity(0, cores[:2])  # which processes inherit
        with ExitStack() as stack:
            neighbour = stack.enter_context(subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]))
            stack.callback(neighbour.kill)
            training = {waiting: stack.enter_context(start(waiting, 4 if is_quick else 16)) for waiting in WAITING}
            for number in range(6 if is_quick else 12):
                for (waiting, is_busy), found in seconds.items():
                    neighbour.send_signal(signal.SIGCONT if is_busy else signal.SIGSTOP)
                    value = step(training[waiting])
                    if number:  # the first is slower
                        found.append(value)
            weights = {process.communicate()[0] for process in training.values()}
    finally:
        os.sched_setaffinity(0, cores)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    ratio = {waiting: median[waiting, False] / median[waiting, True] for waiting in WAITING}
    print(f"  {ratio['default']:.2f} of the rate alone with OpenMP's default", flush=True)
    yield Line("training beside a busy process / alone, two cores", ratio["ours"], "times", "at least", 0.35)
    alone = median["default", False] / median["ours", False]
    yield Line("training alone, threads that soon sleep / OpenMP's default", alone, "times", "at least", 0.95)
    yield Line("... networks that differ after it", len(weights) - 1, "", "at most", 0)


def start(waiting: str, n_images: int) -> subprocess.Popen[str]:
    """A process that makes a training step on `n_images` for each line that it reads."""
    environment = {key: value for key, value in os.environ.items() if "OMP_" not in key}
    environment |= {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", STEPS, LITE, str(n_images), waiting]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def step(process: subprocess.Popen[str]) -> float:
    """Have it make a step; the seconds that it took."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


if __name__ == "__main__":
    run(measure)
