"""`dvc repro` in a temporary repository on 60 tiny images: what a user would do, and look at."""

import csv
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file

from pipeline import logs
from pipeline.stages import extract, fine_tune, index, split, train_head
from tests.common import carry

pytestmark = pytest.mark.end_to_end

SOURCE = Path(__file__).parents[2]
COLOURS = {"blue": (90, 110, 150), "green": (100, 150, 95), "red": (150, 105, 90)}
METRICS = {"accuracy", "accuracy_low", "accuracy_high", "balanced_accuracy", "macro_f1", "auroc", "nll", "brier", "ece"}
COST = {"trainable_params", "train_flops", "base_passes", "cached_bytes"}
GAIN = {"baseline_accuracy", "accuracy_gain", "gain_low", "gain_high", "p_value", "seeds"}
EVERY_STAGE = {
    "index",
    "split",
    "extract",
    "train_head",
    "fine_tune@partial_freeze-0",
    "fine_tune@full_retrain-0",
    "label_suspects",
    "compare",
}
TUNED = ("partial_freeze", "full_retrain")
MINE = Path("data/mine")


@dataclass(frozen=True)
class Repository:
    """A git and DVC repository; commands run in it as a user types them."""

    root: Path
    environment: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None, is_checked: bool = True) -> str:
        done = subprocess.run(command, cwd=cwd or self.root, env=self.environment, capture_output=True, text=True)
        if is_checked and done.returncode:
            pytest.fail(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        if not is_checked:
            assert done.returncode, f"{' '.join(command)} was expected to fail"
            return done.stdout + done.stderr
        return done.stdout

    def git(self, *arguments: str) -> str:
        return self.run("git", *arguments)

    def dvc(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments)

    def repro(self) -> set[str]:
        """Run `dvc repro`; the names of the stages that it ran."""
        return set(re.findall(r"^Running stage '([^']+)'", self.dvc("repro"), re.MULTILINE))

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "Work")

    def read_json(self, path: str) -> Any:
        return json.loads((self.root / path).read_text())

    def digests(self, *patterns: str) -> dict[str, str]:
        """SHA-256 of the files that match, by path."""
        files = sorted(path for pattern in patterns for path in self.root.glob(pattern) if path.is_file())
        assert files, f"nothing matches {patterns}"
        return {path.relative_to(self.root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    @contextmanager
    def params(self) -> Iterator[Any]:
        """Edit params.yaml as a person does: comments and order stay."""
        yaml, path = YAML(), self.root / "params.yaml"
        yaml.width = 200
        document = yaml.load(path)
        yield document
        yaml.dump(document, path)

    @contextmanager
    def table(self, path: Path) -> Iterator[list[dict[str, str]]]:
        """Edit the rows of a CSV file."""
        with (self.root / path).open(newline="") as file:
            rows = list(csv.DictReader(file))
        yield rows
        with (self.root / path).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def make_dataset(directory: Path) -> None:
    """20 images of each class, 40 px: noise around a colour; a labels.csv names their classes."""
    random = np.random.default_rng(0)
    lines = ["path,label"]
    (directory / "images").mkdir(parents=True)
    for number in range(60):
        label = sorted(COLOURS)[number % 3]
        pixels = random.normal(COLOURS[label], 45, (40, 40, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(directory / "images" / f"{number:02}.png")
        lines.append(f"images/{number:02}.png,{label}")
    (directory / "labels.csv").write_text("\n".join(lines) + "\n")


def set_up(params: Any) -> None:
    """Sizes with which the whole pipeline takes seconds."""
    params["dataset"].update({"fetch": [], "path": MINE.as_posix()})
    params["split"]["seeds"] = [0, 1]
    params["backbone"].update({"name": "timm/test_resnet", "weights": "random"})
    params["features"].update({"views": 2, "image_size": 64})
    params["evaluation"]["views"] = 2
    params["head"]["threads"] = params["label_suspects"]["threads"] = 1
    params["fine_tune"].update({"run": ["partial_freeze", "full_retrain"], "seeds": [0]})
    for name, strategy in params["fine_tune"]["strategies"].items():
        strategy.update({"epochs": 2 if name == "partial_freeze" else 1, "views": 1, "warmup_epochs": 0, "threads": 1})
    params["fine_tune"]["strategies"]["partial_freeze"]["freeze_until"] = "layer3"
    params["runtime"]["workers"] = 0


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository in which `dvc repro` has run and everything is committed; tests copy it."""
    folder = tmp_path_factory.mktemp("end_to_end")
    root = folder / "base"
    carry(root)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("DVC", "GIT", "PYTHON"))}
    person = {"NAME": "Test", "EMAIL": "test@example.org"}
    environment = inherited | {f"GIT_{who}_{key}": person[key] for who in ("AUTHOR", "COMMITTER") for key in person}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",  # several wait for each other on a busy machine
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(folder / "site"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    repository = at(root, environment)
    imported = repository.run("python", "-c", "import pipeline.params; print(pipeline.params.__file__)", cwd=folder)
    assert Path(imported.strip()) == root / "pipeline" / "params.py", "the tests would run other code than the copy"

    make_dataset(root / MINE)
    with repository.params() as params:
        set_up(params)
    repository.git("init", "--quiet")
    repository.dvc("add", "--quiet", MINE.as_posix())
    ran = repository.repro()
    assert ran == EVERY_STAGE
    repository.commit()
    return repository


def at(root: Path, environment: dict[str, str]) -> Repository:
    return Repository(root, environment | {"PYTHONPATH": str(root)})


@pytest.fixture
def repository(base: Repository, tmp_path: Path) -> Repository:
    """A copy of `base`, with its caches."""
    shutil.copytree(base.root, tmp_path / "copy", symlinks=True)
    return at(tmp_path / "copy", base.environment)


def clone(repository: Repository, root: Path, *, is_cache_shared: bool) -> Repository:
    """Clone with git, put the images in place and, if asked, DVC's cache."""
    repository.run("git", "clone", "--quiet", str(repository.root), str(root))
    shutil.copytree(repository.root / MINE, root / MINE)
    if is_cache_shared:
        shutil.copytree(repository.root / ".dvc" / "cache", root / ".dvc" / "cache")
    return at(root, repository.environment)


Call = Callable[..., None]


@pytest.fixture
def call(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a stage's main in `repository`, in this process: importing torch again takes longer than the stage."""
    monkeypatch.chdir(repository.root)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)

    def call_stage(main: Callable[[], None], *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["stage", *arguments])
        logs.run(main)

    return call_stage


def mistake(call: Call, main: Callable[[], None], *arguments: str) -> str:
    """The one line with which a stage refuses its input."""
    with pytest.raises(SystemExit) as caught:
        call(main, *arguments)
    line = str(caught.value.code)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def test_repro_reports_metrics_and_cost_of_every_strategy(base: Repository) -> None:
    comparison = base.read_json("reports/comparison.json")
    seeds = {"feature_extraction": 1, "partial_freeze": 1, "full_retrain": 1, "feature_extraction_all_seeds": 2}
    assert {name: entry["seeds"] for name, entry in comparison.items()} == seeds
    for name, entry in comparison.items():
        is_compared = name in ("partial_freeze", "full_retrain")
        assert entry.keys() == {"test", "cost", "seeds"} | ({"vs_baseline"} if is_compared else set())
        assert entry["test"].keys() == METRICS
        assert entry["cost"].keys() == COST
        assert 0 <= entry["test"]["accuracy_low"] <= entry["test"]["accuracy"] <= entry["test"]["accuracy_high"] <= 1
        if is_compared:
            gain, baseline = entry["vs_baseline"], comparison["feature_extraction"]["test"]["accuracy"]
            assert gain.keys() == GAIN
            assert gain["baseline_accuracy"] == baseline
            assert gain["accuracy_gain"] == pytest.approx(entry["test"]["accuracy"] - baseline, abs=2e-6)
            assert gain["gain_low"] <= gain["accuracy_gain"] <= gain["gain_high"]
            assert 0 < gain["p_value"] <= 1
    trained = {name: comparison[name]["cost"]["trainable_params"] for name in seeds}
    assert trained["feature_extraction"] < trained["partial_freeze"] < trained["full_retrain"]
    assert comparison["feature_extraction"]["test"]["accuracy"] > 0.5, "the classes are told apart by colour"


def test_repro_leaves_nothing_that_git_should_not_see(base: Repository) -> None:
    assert base.git("status", "--porcelain") == ""
    tracked = base.git("ls-files").splitlines()
    assert not [path for path in tracked if path.startswith(("models/", "reports/runs/", "data/splits", "data/mine/"))]
    assert "reports/comparison.json" in tracked


def test_plots_are_drawn_without_a_network(repository: Repository) -> None:
    repository.dvc("plots", "show")
    page = (repository.root / "dvc_plots" / "index.html").read_text()
    drawn = re.findall(r"vegaEmbed\('#(\w+)'", page)
    names = ("curves", "cost", "reliability", *(f"confusion_{name}" for name in ("feature_extraction", *TUNED)))
    assert sorted(drawn) == sorted(f"reports_{name}_json" for name in names)
    assert not re.findall(r"<script[^>]+src=", page)
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--enable-logging=stderr")
    network = "--host-resolver-rules=MAP * ~NOTFOUND"
    where = (repository.root / "dvc_plots" / "index.html").as_uri()
    shown = subprocess.run([chromium, *options, network, "--dump-dom", where], capture_output=True, text=True)
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert shown.stdout.count('class="marks"') == len(names)


def test_pull_request_is_written_and_its_guard_fails(repository: Repository) -> None:
    compare = ("python", "-m", "pipeline.stages.compare", "--against", "HEAD")
    written = repository.run(*compare, "--pictures", "pictures")
    assert "No metric differs." in written
    assert "**Recommendation: " in written
    pictures = re.findall(r"!\[\w+\]\((.+)\)", written)
    confusions = [f"confusion_{path.stem}" for path in (repository.root / "reports" / "confusion").iterdir()]
    assert confusions
    assert sorted(pictures) == sorted(f"pictures/{name}.png" for name in ("cost", "curves", "reliability", *confusions))
    assert all((repository.root / path).read_bytes().startswith(b"\x89PNG") for path in pictures)
    path = repository.root / "reports" / "comparison.json"
    comparison = json.loads(path.read_text())
    comparison["full_retrain"]["test"]["accuracy"] -= 0.02
    path.write_text(json.dumps(comparison))
    said = repository.run(*compare, is_checked=False)
    assert "error: worse than in HEAD: full_retrain.test.accuracy by 0.02 (tolerance 0.01)\n" in said
    assert "Traceback" not in said


def test_clone_without_any_data_can_tell_whether_the_lock_is_fresh(base: Repository, tmp_path: Path) -> None:
    base.run("git", "clone", "--quiet", str(base.root), str(tmp_path / "clone"))
    cloned = at(tmp_path / "clone", base.environment)
    assert "Running stage" not in cloned.dvc("repro", "--dry", "--allow-missing")
    with cloned.params() as params:
        params["compare"]["confidence"] = 0.9
    said = cloned.run(sys.executable, "-m", "dvc", "repro", "--dry", "--allow-missing", is_checked=False)
    assert "failed to reproduce 'compare'" in said  # it would run, and what it reads is not there


def test_second_repro_runs_no_stage(repository: Repository) -> None:
    assert repository.repro() == set()


def test_editing_a_comment_runs_no_stage(repository: Repository) -> None:
    path = repository.root / "params.yaml"
    path.write_text(f"# Other words.\n{path.read_text()}")
    assert repository.git("status", "--porcelain") == " M params.yaml\n"
    assert repository.repro() == set()


def test_clone_computes_the_same_bytes_and_leaves_git_status_empty(base: Repository, tmp_path: Path) -> None:
    cloned = clone(base, tmp_path / "clone", is_cache_shared=False)
    ran = cloned.repro()
    assert ran == EVERY_STAGE - {"compare", "label_suspects"}, (
        "their inputs were the same, and their reports came with git"
    )
    assert cloned.git("status", "--porcelain") == ""
    assert (cloned.root / "dvc.lock").read_bytes() == (base.root / "dvc.lock").read_bytes()
    patterns = ("models/**/*", "reports/runs/**/*", "data/*.*", "data/splits/*")
    assert cloned.digests(*patterns) == base.digests(*patterns)


def test_changed_learning_rate_runs_its_strategy_and_compare_only(repository: Repository) -> None:
    with repository.params() as params:
        params["fine_tune"]["strategies"]["full_retrain"]["learning_rate_base"] = 1e-3
    assert repository.repro() == {"fine_tune@full_retrain-0", "compare"}


def test_corrected_label_runs_no_forward_pass_of_the_frozen_backbone(repository: Repository) -> None:
    with repository.table(MINE / "labels.csv") as rows:
        rows[0]["label"] = next(label for label in COLOURS if label != rows[0]["label"])
    repository.dvc("add", "--quiet", MINE.as_posix())
    assert repository.repro() == EVERY_STAGE - {"extract"}


Extracted = Callable[[], tuple[str, bytes]]


@pytest.fixture
def extracted(repository: Repository, call: Call, caplog: pytest.LogCaptureFixture) -> Extracted:
    """Index and extract; what was said of the rows, and the bytes of features.h5."""
    caplog.set_level(logging.INFO, "pipeline")

    def run() -> tuple[str, bytes]:
        caplog.clear()
        call(index.main)
        call(extract.main)
        (said,) = (line.partition(": ")[2] for line in caplog.messages if "reused" in line)
        return said, (repository.root / "data" / "features.h5").read_bytes()

    return run


def test_images_that_come_cost_their_own_rows_and_those_that_go_or_move_cost_nothing(
    repository: Repository, extracted: Extracted
) -> None:
    labels, images = MINE / "labels.csv", repository.root / MINE / "images"

    def as_from_nothing() -> bytes:
        shutil.rmtree(repository.root / "data" / ".feature_store")
        return extracted()[1]

    said, whole = extracted()
    assert said == "120 rows reused, 0 computed, 0 dropped"
    Image.new("RGB", (40, 40), COLOURS["red"]).save(images / "new.png")
    with repository.table(labels) as rows:
        rows.insert(7, {"path": "images/new.png", "label": "red"})
    said, added = extracted()
    assert said == "120 rows reused, 2 computed, 0 dropped"
    assert added != whole
    (images / "07.png").rename(images / "moved.png")
    with repository.table(labels) as rows:
        rows[:] = [rows[-1], *rows[:-2]]
        for row in rows:
            row["path"] = row["path"].replace("07", "moved")
    said, changed = extracted()
    assert said == "120 rows reused, 0 computed, 2 dropped"
    assert changed == as_from_nothing()
    with repository.table(labels) as rows:
        rows.append({"path": "images/58.png", "label": sorted(COLOURS)[58 % 3]})
    assert extracted()[0] == "120 rows reused, 2 computed, 0 dropped"


def test_ranks_fill_the_store_and_the_stage_then_computes_nothing(repository: Repository, extracted: Extracted) -> None:
    features = repository.root / "data" / "features.h5"
    before = features.read_bytes()
    features.unlink()
    shutil.rmtree(repository.root / "data" / ".feature_store")
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    repository.run(sys.executable, *ranks, "-m", "pipeline.stages.extract")
    assert not features.exists(), "no rank has all"
    assert extracted() == ("120 rows reused, 0 computed, 0 dropped", before)


def test_added_seed_trains_the_new_runs_only(repository: Repository) -> None:
    before = repository.digests("models/**/seed_0.*", "models/**/seed_1.*", "data/splits/*")
    with repository.params() as params:
        params["split"]["seeds"] = [0, 1, 2]
        params["fine_tune"]["seeds"] = [0, 2]
    new = {"fine_tune@partial_freeze-2", "fine_tune@full_retrain-2"}
    assert repository.repro() == {"split", "train_head", "compare", *new}
    after = repository.digests("models/**/*", "data/splits/*")
    assert {path: after[path] for path in before} == before
    seeds = {name: entry["seeds"] for name, entry in repository.read_json("reports/comparison.json").items()}
    assert seeds == {"feature_extraction": 2, "partial_freeze": 2, "full_retrain": 2, "feature_extraction_all_seeds": 3}


def test_a_growing_data_set_split_by_hash_moves_no_image_and_computes_the_new_ones_only(repository: Repository) -> None:
    growing = Path("data/growing")

    def add(rows: list[dict[str, str]], **split: Any) -> tuple[set[str], str]:
        """Have the data set hold these digits, and repro: the stages that ran, and what they said."""
        for row in rows:
            target = repository.root / growing / row["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(digits / row["path"], target)
        with (repository.root / growing / "labels.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        repository.dvc("add", "--quiet", growing.as_posix())
        with repository.params() as params:
            params["dataset"].update({"path": growing.as_posix()})
            params["split"].update(split)
            params["fine_tune"]["run"] = []
        command = [sys.executable, "-m", "dvc", "repro"]
        done = subprocess.run(command, cwd=repository.root, env=repository.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        said = done.stdout + done.stderr
        return set(re.findall(r"^Running stage '([^']+)'", done.stdout, re.MULTILINE)), said

    def parts(seed: int) -> dict[str, str]:
        with (repository.root / "data" / "splits" / f"seed_{seed}.csv").open(newline="") as file:
            return {row["image_id"]: row["split"] for row in csv.DictReader(file)}

    with repository.params() as params:
        params["dataset"]["fetch"] = ["digits"]
    repository.dvc("repro", "--quiet", "fetch@digits")
    digits = repository.root / "data" / "raw" / "digits"
    with (digits / "labels.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: Path(row["path"]).name)[:330]
    _, said = add(rows[:300], method="hash", test_fraction=0.3, val_fraction=0.2)
    assert "0 rows reused, 600 computed" in said
    before = {seed: parts(seed) for seed in (0, 1)}
    ran, said = add(rows)
    assert "600 rows reused, 60 computed" in said
    assert {"index", "split", "extract", "train_head", "compare"} <= ran
    for seed, old in before.items():
        now = parts(seed)
        assert len(now) == 330
        assert {image: now[image] for image in old} == old
    assert before[0] != before[1]

    given = [row | {"split": ("train", "train", "test", "val")[number % 4]} for number, row in enumerate(rows)]
    ran, said = add(given, method="given")
    assert "extract" not in ran
    assert parts(0) == parts(1) == {row["path"]: row["split"] for row in given}
    assert repository.read_json("reports/splits.json")["sizes"]["0"] == {
        "train": 166,
        "val": 82,
        "test": 82,
        "unused": 0,
    }


def test_removed_strategy_leaves_no_trace_here_or_in_a_clone(repository: Repository, tmp_path: Path) -> None:
    with repository.params() as params:
        params["fine_tune"]["run"] = ["partial_freeze"]
    assert repository.repro() == {"compare"}
    assert "full_retrain" not in repository.read_json("reports/comparison.json")
    assert "full_retrain" not in (repository.root / "reports" / "comparison.md").read_text()
    for left in ("models/full_retrain", "reports/runs/full_retrain", "reports/confusion/full_retrain.json"):
        assert not (repository.root / left).exists()
    repository.commit()
    cloned = clone(repository, tmp_path / "clone", is_cache_shared=True)
    cloned.repro()
    assert cloned.git("status", "--porcelain") == ""
    assert not (cloned.root / "models" / "full_retrain").exists()


def test_restored_strategy_comes_back_without_training(repository: Repository) -> None:
    before = repository.digests("models/**/*", "reports/comparison.*")
    for run in (["partial_freeze"], ["partial_freeze", "full_retrain"]):
        with repository.params() as params:
            params["fine_tune"]["run"] = run
        assert repository.repro() <= {"compare"}
    assert repository.digests("models/**/*", "reports/comparison.*") == before


def test_test_labels_change_nothing_that_training_writes(repository: Repository, call: Call) -> None:
    patterns = ("models/**/seed_0.*", "reports/runs/*/seed_0/*")
    before = repository.digests(*patterns)
    assert len(before) == 3 * 4
    shutil.rmtree(repository.root / "models")
    shutil.rmtree(repository.root / "reports" / "runs")
    (repository.root / "data" / "splits" / "seed_1.csv").unlink()  # there, other images are test
    with (repository.root / "data" / "splits" / "seed_0.csv").open(newline="") as file:
        is_test = {row["image_id"] for row in csv.DictReader(file) if row["split"] == "test"}
    with repository.table(Path("data/labels.csv")) as rows:
        tested = [row for row in rows if row["image_id"] in is_test]
        labels = [row["label"] for row in tested]
        permuted = labels[1:] + labels[:1]
        assert permuted != labels
        for row, label in zip(tested, permuted, strict=True):
            row["label"] = label
    call(train_head.main)
    for strategy in ("partial_freeze", "full_retrain"):
        call(fine_tune.main, strategy, "0")
    assert repository.digests(*patterns) == before


@pytest.mark.parametrize("run", ["feature_extraction", "full_retrain"])
def test_saved_run_predicts_new_images_from_another_directory(base: Repository, tmp_path: Path, run: str) -> None:
    images = [str(base.root / MINE / "images" / f"{number:02}.png") for number in range(12)]
    saved = str(base.root / "models" / run / "seed_0")
    command = ("python", "-m", "pipeline.tools.predict", saved, *images)
    if run == "full_retrain":
        predicted = json.loads(base.run(*command, "--json", cwd=tmp_path))
        assert all(entry.keys() == {"class", "probability", "path"} for entry in predicted)
    else:
        lines = [line.split() for line in base.run(*command, cwd=tmp_path).splitlines()]
        predicted = [{"class": name, "probability": float(text), "path": path} for name, text, path in lines]
    assert [entry["path"] for entry in predicted] == images
    assert {entry["class"] for entry in predicted} <= {*COLOURS}
    assert all(1 / 3 <= entry["probability"] <= 1 for entry in predicted)
    is_right = [entry["class"] == sorted(COLOURS)[number % 3] for number, entry in enumerate(predicted)]
    assert sum(is_right) > 6


def test_mistake_is_one_line_without_a_traceback_under_dvc(repository: Repository) -> None:
    with repository.table(MINE / "labels.csv") as rows:
        rows[7]["path"] = "images/nowhere.png"
    said = repository.run(sys.executable, "-m", "dvc", "repro", "index", is_checked=False)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: 1 of 60 images cannot be read, first data/mine/images/nowhere.png (does not exist); all are in "
        "reports/data/rejected.csv; mend or remove them, or raise dataset.max_rejected_fraction"
    ]
    assert "Traceback" not in said


def test_unreadable_images_are_listed_and_skipped_up_to_the_allowed_fraction(
    repository: Repository, call: Call
) -> None:
    broken = repository.root / MINE / "images" / "05.png"
    broken.write_bytes(broken.read_bytes()[:300])
    line = mistake(call, index.main)
    assert "1 of 60 images cannot be read" in line
    assert "images/05.png" in line
    with repository.params() as params:
        params["dataset"]["max_rejected_fraction"] = 0.02
    call(index.main)
    assert repository.read_json("reports/data/summary.json")["n_rejected"] == 1
    assert repository.read_json("reports/data/summary.json")["n_images"] == 59
    rejected = (repository.root / "reports" / "data" / "rejected.csv").read_text().splitlines()
    assert len(rejected) == 2
    assert rejected[1].startswith("images/05.png,")
    assert "images/05.png" not in (repository.root / "data" / "images.csv").read_text()


def as_class_directories(repository: Repository) -> Path:
    """The same data set with a directory for each class in place of labels.csv."""
    directory = repository.root / MINE
    with repository.table(MINE / "labels.csv") as rows:
        for row in rows:
            target = directory / row["label"] / Path(row["path"]).name
            target.parent.mkdir(exist_ok=True)
            (directory / row["path"]).rename(target)
    (directory / "labels.csv").unlink()
    (directory / "images").rmdir()
    return directory


def test_class_directories_say_the_same_as_a_labels_file(repository: Repository, call: Call) -> None:
    before = {digest: label for digest, label in labels_by_digest(repository)}
    as_class_directories(repository)
    call(index.main)
    assert {digest: label for digest, label in labels_by_digest(repository)} == before


def labels_by_digest(repository: Repository) -> list[tuple[str, str]]:
    with (repository.root / "data" / "labels.csv").open(newline="") as file:
        return [(row["sha256"], row["label"]) for row in csv.DictReader(file)]


def test_empty_class_directory_is_refused(repository: Repository, call: Call) -> None:
    (as_class_directories(repository) / "purple").mkdir()
    assert "data/mine/purple: class without an image" in mistake(call, index.main)


def test_class_too_small_to_split_is_refused(repository: Repository, call: Call) -> None:
    directory = as_class_directories(repository)
    (directory / "purple").mkdir()
    shutil.copyfile(directory / "red" / "02.png", directory / "purple" / "new.png")
    (directory / "red" / "02.png").unlink()
    call(index.main)
    line = mistake(call, split.main)
    assert "class 'purple' has 1 images, none of them in" in line


def test_labels_file_without_a_column_is_refused(repository: Repository, call: Call) -> None:
    path = repository.root / MINE / "labels.csv"
    path.write_text(path.read_text().replace("path,label", "path,klass"))
    assert "labels.csv: column 'label' is missing; found path, klass" in mistake(call, index.main)


def test_path_that_leads_out_of_the_data_set_is_refused(repository: Repository, call: Call) -> None:
    with repository.table(MINE / "labels.csv") as rows:
        rows[0]["path"] = "../features.h5"
    assert "1 of 60 images cannot be read, first data/mine/../features.h5 (" in mistake(call, index.main)
    with repository.params() as params:
        params["dataset"]["max_rejected_fraction"] = 0.02
    call(index.main)
    assert "../features.h5" not in (repository.root / "data" / "images.csv").read_text()
    assert "../features.h5" in (repository.root / "reports" / "data" / "rejected.csv").read_text()


def test_wrong_freeze_until_names_what_would_do(repository: Repository, call: Call) -> None:
    with repository.params() as params:
        params["fine_tune"]["strategies"]["partial_freeze"]["freeze_until"] = "layer9"
    line = mistake(call, fine_tune.main, "partial_freeze", "0")
    assert "params.yaml: fine_tune.strategies.partial_freeze.freeze_until: 'layer9'" in line
    assert "timm/test_resnet" in line
    assert "layer4" in line


def test_weights_of_another_network_are_refused(repository: Repository, call: Call) -> None:
    other = torchvision.models.squeezenet1_1()
    save_file(other.state_dict(), repository.root / "data" / "weights" / "other.safetensors")
    with repository.params() as params:
        params["backbone"]["weights"] = "other.safetensors"
    line = mistake(call, extract.main)
    assert "data/weights/other.safetensors: weights of another network" in line
    assert "missing: bn1.bias" in line
    assert "unexpected: classifier.1.bias" in line


def test_image_changed_after_indexing_is_refused(repository: Repository, call: Call) -> None:
    path = repository.root / MINE / "images" / "00.png"
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path)
    shutil.rmtree(repository.root / "data" / ".feature_store")
    line = mistake(call, extract.main)
    assert "data/mine/images/00.png: other bytes than were indexed" in line


def test_head_of_other_weights_is_refused_by_fine_tuning(repository: Repository, call: Call) -> None:
    with repository.params() as params:
        params["backbone"]["seed"] = 1
    line = mistake(call, fine_tune.main, "full_retrain", "0")
    assert "models/feature_extraction/seed_0.json: fitted on features of other weights" in line


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
