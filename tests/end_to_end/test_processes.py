"""The feature store under real processes: killed, out of disk, two at once, in ranks, on machines that are lost."""

import hashlib
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.features import hdf5
from pipeline.features.hdf5 import Row
from pipeline.features.views import AUGMENTED
from tests.factories import REPOSITORY

pytestmark = pytest.mark.end_to_end

N_IMAGES, VIEWS = 48, 2
# Forks a child for every line that it reads, which fills the store and writes features.h5 as the stage does
DRIVER = """
import json, math, os, resource, sys, time
from contextlib import suppress
from pathlib import Path
import torch
from torch import nn
from pipeline import logs
from pipeline.dataset.decoding import sha256
from pipeline.features import extraction
from pipeline.features.views import AUGMENTED
from pipeline.network.backbones import Backbone
from pipeline.network.cuts import Prefix
from pipeline.network.preprocessing import Normalize
from tests import factories

written = []  # files of this process

def is_held():  # once it has written as many files as the file `hold` says
    with suppress(FileNotFoundError):
        return len(written) >= int(Path(os.environ["DVC_ROOT"], "hold").read_text() or 0)

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 50))
    def forward(self, x):
        time.sleep(0.02)
        while is_held():
            time.sleep(0.02)
        return self.layers(x)

def main():
    options = json.loads(line)
    os.environ.update(options["environment"])
    extraction.SHARD_ROWS = 4
    if options["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["limit"],) * 2)
    fsync = os.fsync
    # Slow, so that some are killed between writing and renaming
    os.fsync = lambda file: time.sleep(0.01) or written.append(fsync(file))
    paths = {sha256(path.read_bytes()): path for path in sorted(Path(sys.argv[1]).iterdir())}
    augmentation = factories.FLIPS.model_copy(update={"noise_std": 3.0})
    network, geometry = Slow(), factories.PREPROCESSING
    backbone = Backbone("timm/slow", network, geometry, "0" * 64, 50, None)
    prefix = Prefix(nn.Sequential(Normalize(geometry), network), backbone, "all", "none", {})
    computation = extraction.prepare(prefix, augmentation, factories.feature_options(), torch.device("cpu"))
    share = extraction.share_of_environment()
    views = [0, AUGMENTED + 1]
    rows = [(name, view) for name in paths for view in views]
    loader = factories.loader(computation, paths, options["workers"])
    store = extraction.fill(computation, loader, rows, math.inf, share)
    if share.world_size == 1:
        extraction.assemble(store, list(paths), views, [0], factories.provenance(), Path(options["out"]))

torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if not child:
        log = os.open(json.loads(line)["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 2)
        logs.run(main)
        sys.exit()
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@dataclass(frozen=True)
class Process:
    """A run under way."""

    driver: "Driver"
    pid: int
    log: Path

    def wait_for(self, text: str) -> None:
        """Until its log holds `text`."""
        while text not in self.output:
            time.sleep(0.005)

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def status(self) -> int:
        """Exit code once it has ended; negative for the signal that ended it."""
        return os.waitstatus_to_exitcode(int(self.driver.read()))


@dataclass(frozen=True)
class Driver:
    """The process that forks runs; importing torch takes longer than a run."""

    process: subprocess.Popen[str]
    folder: Path

    def read(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def start(self, store: str, limit: int = 0, workers: int = 0, **environment: str) -> Process:
        assert self.process.stdin
        log, out = self.folder / f"{store}.log", self.folder / store / "features.h5"
        log.unlink(missing_ok=True)
        environment["DVC_ROOT"] = str(self.folder / store)
        options = {"environment": environment, "log": str(log), "out": str(out), "limit": limit, "workers": workers}
        self.process.stdin.write(f"{json.dumps(options)}\n")
        self.process.stdin.flush()
        return Process(self, int(self.read()), log)

    def run(self, store: str, limit: int = 0) -> tuple[int, str]:
        """Exit code and output of a run to its end."""
        process = self.start(store, limit)
        return process.status(), process.output

    def kept(self, store: str) -> dict[str, list[Row]]:
        """The rows of every finished shard, each of which must be whole."""
        return {path.name: hdf5.read_shard(path).rows for path in self.shards(store)}

    def shards(self, store: str) -> list[Path]:
        return sorted((self.folder / store).glob("data/.feature_store/*/*.h5"))

    def features(self, store: str) -> bytes:
        return (self.folder / store / "features.h5").read_bytes()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(N_IMAGES):
        Image.fromarray(noise.integers(0, 256, (10, 10, 3), np.uint8)).save(folder / f"{number:02}.png")
    return folder


def command(images: Path, *launcher: str) -> list[str]:
    return [sys.executable, *launcher, str(images)]


@pytest.fixture(scope="module")
def driver(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(REPOSITORY)}
    started = command(images, "-c", DRIVER)
    with subprocess.Popen(
        started, text=True, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        yield Driver(process, tmp_path_factory.mktemp("stores"))
        assert process.stdin
        process.stdin.close()


@pytest.fixture(scope="module")
def expected(driver: Driver) -> bytes:
    """The bytes of an uninterrupted run."""
    status, output = driver.run("whole")
    assert status == 0, output
    assert f"0 rows reused, {N_IMAGES * VIEWS} computed, 0 dropped" in output
    return driver.features("whole")


def test_run_that_is_killed_at_any_moment_keeps_its_shards_and_ends_with_the_same_bytes(
    driver: Driver, expected: bytes
) -> None:
    moments, n_kept = random.Random(0), []
    for trial in range(9):
        store, ending = f"killed-{trial}", (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[trial % 3]
        process = driver.start(store, workers=trial % 2)
        process.wait_for("rows to compute")
        n_shards = moments.randrange(20)  # of 24; what is done, and not our clock, says when on a busy machine, too
        while len(driver.shards(store)) < n_shards:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(process.pid, ending)
        status = process.status()
        assert status == (-signal.SIGKILL if ending == signal.SIGKILL else 1), process.output
        if ending != signal.SIGKILL:
            assert "interrupted" in process.output.splitlines()[-1]
            assert "rows are kept; the next run computes the rest" in process.output
            assert "Traceback" not in process.output
            assert not [*(driver.folder / store).rglob("*.tmp")]
        rows = {row for shard in driver.kept(store).values() for row in shard}
        n_kept.append(len(rows))
        before = driver.shards(store)
        status, output = driver.run(store)
        assert status == 0, output
        assert f"{len(rows)} rows reused, {N_IMAGES * VIEWS - len(rows)} computed" in output
        assert set(before) <= set(driver.shards(store))
        assert driver.features(store) == expected
    assert len(set(n_kept)) > 4, "the moments differ"


def test_full_disk_is_one_line_and_what_was_written_is_kept(driver: Driver, expected: bytes) -> None:
    largest = max(path.stat().st_size for path in driver.shards("whole"))
    status, output = driver.run("full", limit=largest - 1)
    assert status == 1
    assert [line for line in output.splitlines() if line.startswith("error: ")] == [output.splitlines()[-1]]
    assert "File too large" in output.splitlines()[-1]
    assert "Traceback" not in output
    assert not [*(driver.folder / "full").rglob("*.tmp")]
    n_kept = sum(map(len, driver.kept("full").values()))
    status, output = driver.run("full")
    assert status == 0, output
    assert f"{n_kept} rows reused" in output
    assert driver.features("full") == expected


def test_features_that_cannot_be_written_leave_the_old_ones(driver: Driver, expected: bytes) -> None:
    shard = max(path.stat().st_size for path in driver.shards("whole"))
    assert shard < len(expected)
    out = driver.folder / "no-room" / "features.h5"
    out.parent.mkdir()
    out.write_bytes(b"old")
    status, output = driver.run("no-room", limit=len(expected) - 1)
    assert status == 1
    assert output.splitlines()[-1].startswith("error: ")
    assert out.read_bytes() == b"old"
    assert not [*out.parent.rglob("*.tmp")]
    assert sum(map(len, driver.kept("no-room").values())) == N_IMAGES * VIEWS
    assert driver.run("no-room")[0] == 0
    assert driver.features("no-room") == expected


def test_decoder_that_is_killed_is_one_line_and_what_was_computed_is_kept(driver: Driver, expected: bytes) -> None:
    process = driver.start("decoder", workers=2)
    process.wait_for("rows to compute")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (decoders := children.read_text().split()):
        time.sleep(0.005)
    time.sleep(0.1)
    os.kill(int(decoders[0]), signal.SIGKILL)
    assert process.status() == 1
    assert process.output.splitlines()[-1].startswith("error: a process that decodes images was killed")
    assert "Traceback" not in process.output
    n_kept = sum(map(len, driver.kept("decoder").values()))
    assert f"{n_kept} of {N_IMAGES * VIEWS} rows are kept" in process.output
    assert driver.run("decoder")[0] == 0
    assert driver.features("decoder") == expected


def rows_in(store: Path) -> list[Row]:
    """Of every finished shard, each of which must be whole."""
    return [row for path in store.glob("data/.feature_store/*/*.h5") for row in hdf5.read_shard(path).rows]


def write_script(store: Path, script: Path) -> Path:
    """Code that fills `store` once."""
    options = {"environment": {}, "out": str(store / "features.h5"), "limit": 0, "workers": 0}
    code = f"{DRIVER.partition('torch.set_num_threads(1)')[0]}line = {json.dumps(options)!r}\nlogs.run(main)\n"
    script.write_text(code)
    return script


def once(images: Path, store: Path, log: Path, *launcher: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own that fills `store` once."""
    script = write_script(store, log.with_suffix(".py"))
    inherited = {
        **os.environ,
        "TQDM_DISABLE": "1",
        "PYTHONPATH": str(REPOSITORY),
        "DVC_ROOT": str(store),
        **environment,
    }
    return subprocess.Popen(command(images, *launcher, str(script)), env=inherited, stderr=subprocess.PIPE, text=True)


def test_two_writers_on_one_store_both_end_with_the_right_bytes(
    images: Path, tmp_path: Path, driver: Driver, expected: bytes
) -> None:
    processes = [once(images, tmp_path, tmp_path / f"{name}.log") for name in ("one", "other")]
    for process in processes:
        output = process.communicate()[1]
        assert process.returncode == 0, output
        assert (tmp_path / "features.h5").read_bytes() == expected
    found = rows_in(tmp_path)
    assert len(set(found)) == N_IMAGES * VIEWS
    assert not [*tmp_path.rglob("*.tmp")]


def test_ranks_fill_the_store_side_by_side_and_one_process_assembles_it(
    images: Path, tmp_path: Path, driver: Driver, expected: bytes
) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = once(images, tmp_path, tmp_path / "ranks.log", *launcher)
    output = process.communicate()[1]
    assert process.returncode == 0, output
    assert not (tmp_path / "features.h5").exists()
    found = rows_in(tmp_path)
    assert len(found) == len(set(found)) == N_IMAGES * VIEWS, "no row is computed twice"
    alone = once(images, tmp_path, tmp_path / "alone.log")
    output = alone.communicate()[1]
    assert alone.returncode == 0, output
    assert f"{N_IMAGES * VIEWS} rows reused, 0 computed" in output
    assert (tmp_path / "features.h5").read_bytes() == expected


def test_a_dead_rank_costs_its_own_rows_only(driver: Driver, images: Path, expected: bytes) -> None:
    names = [hashlib.sha256(path.read_bytes()).hexdigest() for path in images.iterdir()]
    shares = [{name for name in names if int(name[:16], 16) % 2 == rank} for rank in (0, 1)]
    status = driver.start("ranks", RANK="0", WORLD_SIZE="2").status()
    assert status == 0
    dying = driver.start("ranks", RANK="1", WORLD_SIZE="2")
    dying.wait_for("rows to compute")
    time.sleep(0.2)
    os.kill(dying.pid, signal.SIGKILL)
    assert dying.status() == -signal.SIGKILL
    found = {row for rows in driver.kept("ranks").values() for row in rows}
    assert {(name, view) for name in shares[0] for view in (0, AUGMENTED + 1)} <= found
    assert len(found) < N_IMAGES * VIEWS
    assert driver.run("ranks")[0] == 0
    assert driver.features("ranks") == expected


@dataclass(frozen=True)
class Machine:
    """The launcher of one machine; its store is on a disk that all machines share."""

    launcher: subprocess.Popen[str]

    @property
    def ranks(self) -> list[int]:
        """The processes of the stage."""
        return [*map(int, Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text().split())]

    def is_running(self) -> bool:
        """True; if it has ended, the test fails with what it printed."""
        assert self.launcher.poll() is None, self.launcher.communicate()
        return True

    def lose(self) -> None:
        """Switch it off."""
        for process in (self.launcher.pid, *self.ranks):
            os.kill(process, signal.SIGKILL)
        self.launcher.communicate()

    def output(self) -> str:
        """What it has printed at its end, which must be a good one."""
        output = self.launcher.communicate()[1]
        assert self.launcher.returncode == 0, output
        return output


def documented(start: str, heading: str) -> list[str]:
    """The words of the command in docs/machines.md, below `heading`, that starts so."""
    text = (REPOSITORY / "docs" / "machines.md").read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    found = re.search(rf"^{start} (?:\\\n|.)*", text, re.MULTILINE)
    assert found, f"docs/machines.md: no {start} below {heading}"
    return shlex.split(found[0].replace("\\\n", ""))


@pytest.fixture
def join(images: Path, tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    """Starts the launcher of a machine with one rank as docs/machines.md says; `nodes` replaces its number there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options, _, module = " ".join(documented("torchrun", "Several machines")[1:]).partition(" -m ")
    assert module == "pipeline.stages.extract"
    options = options.replace("first-machine:29500", f"127.0.0.1:{port}").replace("--nproc-per-node 4", "")
    (tmp_path / "hold").write_text("12")  # of about 24 that each has to write
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launchers = []

    def start(nodes: str) -> Machine:
        # All have one address here: the store of the rendezvous must be with the machine that is never lost
        host = f"--rdzv-conf is_host={int(not launchers)}"
        launcher = (
            "-m",
            "torch.distributed.run",
            *host.split(),
            *options.replace("--nnodes 1:3", f"--nnodes {nodes}").split(),
        )
        log = tmp_path / f"{len(launchers)}.log"
        launchers.append(once(images, tmp_path, log, *launcher, **environment))
        return Machine(launchers[-1])

    yield start
    for launcher in launchers:
        if launcher.poll() is None:
            launcher.terminate()
            launcher.communicate()


def stop_at_a_third(store: Path, *machines: Machine) -> list[int]:
    """Let the ranks run until a third of the rows is there, and hold them; their processes."""
    while len(rows_in(store)) < N_IMAGES * VIEWS / 3 and all(machine.is_running() for machine in machines):
        time.sleep(0.02)
    (store / "hold").write_text("0")
    return [rank for machine in machines for rank in machine.ranks]


def go_on(store: Path, ended: Sequence[int], *machines: Machine) -> list[str]:
    """Let the ranks run to their end, once those that ended are replaced; what the launchers have printed."""
    while not all(machine.is_running() and machine.ranks and not {*machine.ranks} & {*ended} for machine in machines):
        time.sleep(0.02)
    (store / "hold").unlink()
    return [machine.output() for machine in machines]


def test_a_rank_that_is_killed_starts_again_and_so_do_the_others(
    join: Callable[[str], Machine], images: Path, tmp_path: Path, expected: bytes
) -> None:
    machines = [join("2"), join("2")]
    before = stop_at_a_third(tmp_path, *machines)
    os.kill(before[1], signal.SIGKILL)
    outputs = go_on(tmp_path, before, *machines)
    assert "interrupted" in outputs[0], "its rank was ended by its launcher"
    for output in outputs:
        assert int(re.findall(r"(\d+) rows reused", output)[-1]) >= N_IMAGES * VIEWS / 3
        assert "too little memory" not in output
        assert "memory is probably full" not in output
    assemble(images, tmp_path, expected)


def test_a_machine_that_is_lost_may_come_back(
    join: Callable[[str], Machine], images: Path, tmp_path: Path, expected: bytes
) -> None:
    first, lost = join("1:2"), join("1:2")
    before = stop_at_a_third(tmp_path, first, lost)
    lost.lose()
    outputs = go_on(tmp_path, before, first, join("1:2"))
    reused, computed = zip(
        *(re.findall(r"(\d+) rows reused, (\d+) computed", text)[-1] for text in outputs), strict=True
    )
    assert all(int(number) >= N_IMAGES * VIEWS / 3 for number in reused)
    assert all(int(number) > 0 for number in computed), "they share what is missing"
    assemble(images, tmp_path, expected)


SRUN = """#!{python}
# Starts tasks as srun does, of SLURM 23.11, on two nodes
import os, subprocess, sys
arguments = sys.argv[1:]
n = 0
while arguments[0].startswith("-"):
    option, value = arguments.pop(0), arguments.pop(0)
    n = int(value) if option == "--ntasks" else n
tasks = []
for task in range(n):
    of_slurm = {{"SLURM_PROCID": task, "SLURM_NTASKS": n, "SLURM_LOCALID": task // 2, "SLURM_NODEID": task % 2}}
    of_slurm |= {{"SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": n, "SLURM_JOB_ID": 7}}
    environment = os.environ | {{name: str(value) for name, value in of_slurm.items()}}
    tasks.append(subprocess.Popen(arguments, env=environment))
sys.exit(max(task.wait() for task in tasks))
"""


def test_ranks_under_srun(images: Path, tmp_path: Path, expected: bytes) -> None:
    (tmp_path / "srun").write_text(SRUN.format(python=sys.executable))
    (tmp_path / "srun").chmod(0o755)
    words = documented("srun", "SLURM")
    script = shlex.join(command(images, str(write_script(tmp_path, tmp_path / "rank.py"))))
    assert "python -m pipeline.stages.extract" in words[-1]
    words[-1] = words[-1].replace("python -m pipeline.stages.extract", script)
    words[words.index("--ntasks") + 1] = "3"
    environment = {**os.environ, "DVC_ROOT": str(tmp_path), "PYTHONPATH": str(REPOSITORY), "TQDM_DISABLE": "1"}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(map(int, re.findall(r"(\d+) computed", done.stderr))) == N_IMAGES * VIEWS
    found = rows_in(tmp_path)
    assert len(found) == len(set(found)) == N_IMAGES * VIEWS, "no row is computed twice"
    assemble(images, tmp_path, expected)


def assemble(images: Path, store: Path, expected: bytes) -> None:
    """One process finds every row, as dvc repro does afterwards, and writes features.h5."""
    alone = once(images, store, store / "alone.log")
    output = alone.communicate()[1]
    assert alone.returncode == 0, output
    assert f"{N_IMAGES * VIEWS} rows reused, 0 computed" in output
    assert (store / "features.h5").read_bytes() == expected
