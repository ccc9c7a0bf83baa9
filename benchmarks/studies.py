"""A study: all stages in one process, without DVC, with changed parameters; goes on where an earlier call ended."""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY, call, merged, took, write_params
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Labels
from pipeline.features import extraction
from pipeline.features.code_digest import digest_of_code
from pipeline.files import digest, write_text
from pipeline.network.device import choose_device
from pipeline.params import HEAD_ONLY, Params, load_params
from pipeline.stages import extract, fetch, fine_tune, index, plan, split, train_head
from pipeline.training.runs import Run, read_run

STUDIES = REPOSITORY / "data" / ".studies"
FIRST_VALIDATION_SEED = 100  # seeds from here on choose parameters; those below judge them
USED = (
    "files.py",
    *(
        f"{package}/*.py"
        for package in ("dataset", "ingest", "network", "features", "training", "fine_tuning", "stages")
    ),
)
Step = Callable[[], None]


def run(found: dict[str, Any]) -> tuple[Labels, dict[str, list[Run]]]:
    """Run what is missing of the study with these parameters; its labels, and the runs of each strategy by seed."""
    work = locate(found)
    params = prepare(work, found)
    os.environ.setdefault("DVC_ROOT", str(REPOSITORY))  # of the feature store, which all studies share
    with contextlib.chdir(work):
        for name, step in steps(params):
            do_once(name, step)
        seeds = {HEAD_ONLY: params.split.seeds, **dict.fromkeys(params.fine_tune.run, params.fine_tune.seeds)}
        runs = {name: [read_run(name, seed) for seed in chosen] for name, chosen in seeds.items()}
        return manifest.read_labels(), runs


def locate(found: dict[str, Any]) -> Path:
    """The directory of the study: one for all that can change a run, but for how many there are."""
    fixed = merged(found, {"runtime": None, "fine_tune": {"run": None, "seeds": None}})
    if found["split"]["method"] != "folds":  # whose number makes them other splits
        fixed = merged(fixed, {"split": {"seeds": None}})
    device = choose_device(found["runtime"]["device"]).type
    code = digest_of_code(modules=USED)
    return STUDIES / digest({"params": fixed, "device": device, "code": code, "versions": extraction.versions()})[:16]


def steps(params: Params) -> Iterator[tuple[str, Step]]:
    """What is done, in order: fine-tuning seed by seed, so that an early stop leaves whole seeds."""
    for name in params.dataset.fetch:
        yield f"fetch {name}", partial(call, fetch.main, name)
    yield "index", partial(call, index.main)
    seeds, run = digest(params.split.seeds)[:16], digest(params.fine_tune.run)[:16]
    yield f"split {seeds}", partial(call, split.main)
    yield f"plan {run}", partial(call, plan.main)
    yield "extract", partial(call, extract.main)
    yield f"train_head {seeds}", partial(call, train_head.main)
    for seed in params.fine_tune.seeds:
        for name in params.fine_tune.run:
            yield f"fine_tune {name} {seed}", partial(call, fine_tune.main, name, str(seed))


def do_once(name: str, step: Step) -> None:
    """Do a step of the study in the working directory, unless an earlier call has done it, and print its time."""
    mark = Path("done", name)
    if not mark.exists():
        seconds = took(step)
        write_text(mark, "")
        print(f"{name}: {seconds:.0f} s", flush=True)


def prepare(work: Path, found: dict[str, Any]) -> Params:
    """Make `work` a directory in which stages run with these parameters; ValueError where they make no sense."""
    for name in ("data/weights", "data/raw"):
        link = work / name
        for directory in (link.parent, REPOSITORY / name):
            directory.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(REPOSITORY / name)
    write_params(found, work)
    return load_params(work / "params.yaml")
