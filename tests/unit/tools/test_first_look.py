"""first-look: a directory of its own, of params.yaml as it is now, that leaves this one alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.params import load_params
from pipeline.tools import first_look
from tests.factories import carry


def set_params(**dataset: Any) -> None:
    yaml = YAML()
    document = yaml.load(Path("params.yaml"))
    document["dataset"].update(dataset)
    document["compare"]["baseline"] = "full_retrain"
    yaml.dump(document, Path("params.yaml"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    carry(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("data/weights/ours.safetensors").write_bytes(b"weights")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fetch", "path", "expected"),
    [
        (["elpv"], "data/raw/elpv", "data/raw/elpv"),
        ([], "data/mine", "{root}/data/mine"),
        ([], "/mnt/images", "/mnt/images"),
        (["elpv"], "data/mine", "{root}/data/mine"),
    ],
)
def test_nothing_is_fine_tuned_there_and_images_are_found(root: Path, fetch: list[str], path: str, expected: str):
    set_params(fetch=fetch, path=path)
    before = Path("params.yaml").read_bytes()
    first_look.lay_out()
    assert Path("params.yaml").read_bytes() == before
    made = load_params(root / "first-look" / "params.yaml")
    assert made.fine_tune.run == ()
    assert made.compare.baseline == "feature_extraction"
    assert made.dataset.path == expected.format(root=root)
    assert made.model_copy(update=dict.fromkeys(("fine_tune", "compare", "dataset"))) == load_params().model_copy(
        update=dict.fromkeys(("fine_tune", "compare", "dataset"))
    )


def test_a_wrong_path_of_the_images_is_one_line_with_what_is_near(root: Path):
    Path("data/mine").mkdir()
    given = load_params().dataset
    for fetch, path in (((), "data/mine"), (("elpv",), "data/raw/elpv"), (("digits",), "data/raw/digits/part")):
        first_look.check_images(given.model_copy(update={"fetch": fetch, "path": path}))
    set_params(fetch=["elpv"], path="data/mien")
    expected = r"^params.yaml: dataset.path: data/mien is not there; expected a directory .*; near: data/mine$"
    with pytest.raises(FileNotFoundError, match=expected):
        first_look.make()
    assert not Path("first-look").exists()


def test_the_code_is_copied_anew_and_results_and_weights_stay(root: Path):
    first_look.lay_out()
    place = root / "first-look"
    assert (place / "data/weights/ours.safetensors").resolve() == root / "data/weights/ours.safetensors"
    assert (place / "data/weights/bundled").exists()
    assert str(root / ".dvc" / "cache") in (place / ".dvc/config").read_text()
    (place / "data/labels.csv").write_text("kept")
    (place / "pipeline/old.py").write_text("gone")
    Path("pipeline/new.py").write_text("new = 1\n")
    first_look.lay_out()
    assert (place / "data/labels.csv").read_text() == "kept"
    assert (place / "pipeline/new.py").read_text() == "new = 1\n"
    assert not (place / "pipeline/old.py").exists()
    shutil.rmtree(place)


def test_commands_run_there_with_the_caches_of_this_directory(root: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    class Done:
        returncode = 0

    def run(command: list[str], cwd: Path, env: dict[str, str]) -> Done:
        calls.append((command[2:], cwd, env["DVC_ROOT"]))
        return Done()

    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(first_look, "cache_directory", lambda: root)
    monkeypatch.setattr(first_look.subprocess, "run", run)
    first_look.make()
    assert [command for command, _, _ in calls] == [
        ["dvc", "repro", "plan"],
        ["pipeline", "advise", "--no-cost"],
        ["dvc", "repro"],
        ["pipeline", "report"],
    ]
    assert {(cwd, str(used)) for _, cwd, used in calls} == {(Path("first-look"), str(root))}
    Done.returncode = 1
    with pytest.raises(ValueError, match="first-look: dvc repro plan failed"):
        first_look.make()
