"""DVC experiments of HEAD: run one in a copy of the repository, list them, and read their files, through DVC's API.

Needs the commands `git` and `dvc`. DVC is imported where it is used.
"""

import contextlib
import json
import logging
import os
import posixpath
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from pipeline.logs import STAGES, one_line
from pipeline.report.provenance import git

Read = Callable[[Path], bytes]
FINISHED = "finished"
log = logging.getLogger("pipeline")


def check_workspace(head: str | None = None) -> str:
    """The commit of HEAD; ValueError if a tracked file differs from it, or if it is not the commit `head`."""
    found = git("rev-parse", "HEAD").strip()
    if head not in (None, found):
        raise ValueError(f"HEAD was {head[:7]} and is now {found[:7]}; experiments of one sweep start from one commit")
    if changed := git("status", "--porcelain", "--untracked-files=no").splitlines():
        listed = ", ".join(line[3:] for line in changed[:3]) + (", …" if len(changed) > 3 else "")
        raise ValueError(f"the workspace differs from HEAD, where experiments start: {listed}; commit or stash that")
    return found


def check_images(path: str, made: Sequence[str]) -> None:
    """ValueError if the images below `path` are not in a copy of HEAD, or are not those that DVC tracks.

    `made`: directories that a stage writes.
    """
    if os.path.isabs(path) or path in made:
        return
    status = dvc("data", "status", "--json", is_quiet=True)
    changed = [name.rstrip("/") for names in json.loads(status).get("uncommitted", {}).values() for name in names]
    if any(Path(name) in (Path(path), *Path(path).parents) or Path(path) in Path(name).parents for name in changed):
        raise ValueError(f"dataset.path: {path} differs from what DVC tracks; run: dvc add {path}, and commit")
    if Path(path).exists() and not has(path):
        raise ValueError(
            f"dataset.path: {path} is tracked by neither DVC nor git, so a copy of the repository lacks it; "
            f"give an absolute path, or run: dvc add {path}, and commit"
        )


def has(path: str) -> bool:
    """Whether DVC or git has `path`, which is relative to this directory, at HEAD."""
    with _files("HEAD") as (system, prefix):
        return system.exists(posixpath.normpath(prefix + path))


def names() -> set[str]:
    """The names of the finished experiments that started from HEAD."""
    return {name for name, state in states().items() if state == FINISHED}


def states() -> dict[str, str]:
    """By name, whether an experiment that started from HEAD is finished, running, queued or failed."""
    from dvc.api import exp_show

    with _dvc_errors():
        rows = exp_show()
    found = {row["Experiment"]: str(row.get("State") or FINISHED).lower() for row in rows if row.get("Experiment")}
    # A name of which one run failed and another one finished has a result; DVC's word for the latter is "Success"
    done = {row["Experiment"] for row in rows if row.get("State") in (None, "Success")}
    return {name: FINISHED if name in done else state for name, state in found.items()}


@contextlib.contextmanager
def reading(name: str) -> Iterator[Read]:
    """What reads files of an experiment or another revision; ValueError for a file that is not there."""

    def read(path: Path) -> bytes:
        try:
            return system.read_bytes(f"{prefix}{path.as_posix()}")
        except FileNotFoundError:
            raise ValueError(
                f"{name}: {path} is not in DVC's cache; run: dvc pull, or dvc exp remove {name} to run it again"
            ) from None

    with _files(name) as (system, prefix):
        yield read


@contextlib.contextmanager
def _files(revision: str) -> Iterator[tuple[Any, str]]:
    """The files that git and DVC have at a revision, and where this directory is among them: they start at git's top.

    DVC's errors become a ValueError.
    """
    from dvc.api import DVCFileSystem

    with _dvc_errors():
        yield DVCFileSystem(rev=revision, subrepos=True), git("rev-parse", "--show-prefix").strip()


def run(name: str, changes: Mapping[str, Any], copied: Sequence[str], target: str) -> None:
    """Run the stage `target` and those before it in a temporary copy of the repository, as the experiment `name`.

    `changes`: values of params.yaml by dotted key; `copied`: files that neither git nor DVC tracks. What DVC and the
    stages print goes to stderr. Raises ValueError if the experiment fails.
    """
    settings = [part for key, value in changes.items() for part in ("--set-param", f"++{key}={_as_override(value)}")]
    copies = [part for path in copied for part in ("--copy-paths", path)]
    dvc("exp", "run", "--temp", "--name", name, *settings, *copies, target)


def dvc(*arguments: str, is_quiet: bool = False) -> str:
    """Run a command of DVC; its output if `is_quiet`, else "". Its warnings go to stderr. ValueError if it fails.

    It runs in a session of its own, which Ctrl-C in a terminal does not reach: see _interrupt.
    """
    command, environment = [sys.executable, "-m", "dvc", *arguments], os.environ | {"PYTHONIOENCODING": "utf-8"}
    stdout, stderr = (subprocess.PIPE, subprocess.PIPE) if is_quiet else (2, None)  # 2 is stderr
    with subprocess.Popen(
        command, stdout=stdout, stderr=stderr, env=environment, encoding="utf-8", start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate()
        except KeyboardInterrupt:
            _interrupt(process)
            raise
    if process.returncode:
        command_words = " ".join(takewhile(lambda word: not word.startswith("-"), arguments))
        raise ValueError(f"dvc {command_words}: {' '.join(errors.split()) if errors else 'see above'}")
    print(errors or "", end="", file=sys.stderr)
    return output or ""


def _interrupt(process: subprocess.Popen) -> None:
    """Interrupt the stage that DVC runs, and wait until DVC has cleaned up behind it; a second Ctrl-C interrupts DVC.

    Interrupted while it prepares an experiment, DVC can leave a lock in .git/refs/exps that blocks all later ones.
    """
    import psutil

    log.info("waiting for DVC to end the experiment")
    asked: set[int] = set()
    try:
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):  # of a process that has just ended
                for child in psutil.Process(process.pid).children(recursive=True):
                    if child.pid not in asked and STAGES in " ".join(child.cmdline()):
                        child.send_signal(signal.SIGINT)
                        asked.add(child.pid)
            time.sleep(0.1)
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()


def _as_override(value: Any) -> str:  # noqa: ANN401
    """A value as Hydra reads it: text is quoted, so that it stays text."""
    return json.dumps(value).replace('"', "'")


@contextlib.contextmanager
def _dvc_errors() -> Iterator[None]:
    """DVC's own errors (no repository, an unknown revision) as a ValueError of one line."""
    from dvc.exceptions import DvcException

    try:
        yield
    except DvcException as error:
        raise ValueError(f"dvc: {one_line(error)}") from None
