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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file

from pipeline import logs
from pipeline.__main__ import cli
from pipeline.network import backbones
from pipeline.params import BackboneChoice
from pipeline.stages import (
    compare,
    extract,
    fetch,
    fine_tune,
    index,
    label_suspects,
    plan,
    references,
    split,
    train_head,
)
from tests.factories import REPOSITORY, carry

pytestmark = pytest.mark.end_to_end

COLOURS = {"blue": (90, 110, 150), "green": (100, 150, 95), "red": (150, 105, 90)}
METRICS = {
    *("test_accuracy", "test_accuracy_low", "test_accuracy_high", "test_balanced_accuracy", "test_nll"),
    *("val_accuracy", "train_flops", "seeds"),
}
DIFFERENCE = {"difference", "difference_low", "difference_high", "difference_p_value"}
COST = {"trainable_params", "train_flops", "base_passes", "cached_bytes"}
EVERY_STAGE = {
    "index",
    "split",
    "plan",
    "extract",
    "train_head",
    "references",
    "fine_tune@partial_freeze-0",
    "fine_tune@full_retrain-0",
    "label_suspects",
    "advise",
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
    params["evaluation"]["views"] = ["identity", "flip_horizontal"]
    params["threads"] = 1
    params["fine_tune"].update({"run": ["partial_freeze", "full_retrain"], "seeds": [0]})
    params["fine_tune"]["defaults"].update({"epochs": 1, "views": 1, "warmup_epochs": 0})
    params["fine_tune"]["strategies"]["partial_freeze"].update({"freeze_until": "layer3", "epochs": 2, "patience": 2})
    params["fine_tune"]["strategies"]["full_retrain"]["patience"] = 2
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
        "OMP_WAIT_POLICY": "PASSIVE",
        "WORLD_SIZE": "2",  # of a cluster around it, which is not ours
        "RANK": "1",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(folder / "site"),
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    repository = at(root, environment)
    imported = repository.run("python", "-c", "import pipeline.params; print(pipeline.params.__file__)", cwd=folder)
    assert Path(imported.strip()) == root / "pipeline" / "params.py", "the tests would run other code than the copy"

    repository.run("python", "-m", "pipeline", "plots-page")  # as `make venv` does
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


def call_what_follows(call: Call, seeds: Sequence[int] = (0,)) -> None:
    """Run every stage that needs the cached features, in the order of dvc.yaml."""
    for main in (train_head.main, references.main):
        call(main)
    for name in TUNED:
        for seed in seeds:
            call(fine_tune.main, name, str(seed))
    for main in (label_suspects.main, compare.main):
        call(main)


def mistake(call: Call, main: Callable[[], None], *arguments: str) -> str:
    """The one line with which a stage refuses its input."""
    with pytest.raises(SystemExit) as caught:
        call(main, *arguments)
    line = str(caught.value.code)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def read_metrics(repository: Repository) -> dict[str, dict[str, float]]:
    """What `dvc metrics show` shows, by strategy."""
    return {path.stem: json.loads(path.read_text()) for path in (repository.root / "reports" / "metrics").iterdir()}


def test_repro_reports_metrics_and_cost_of_every_strategy(base: Repository) -> None:
    metrics, details = read_metrics(base), base.read_json("reports/details.json")["strategies"]
    seeds = {"feature_extraction": 1, "partial_freeze": 1, "full_retrain": 1, "feature_extraction_all_seeds": 2}
    assert {name: entry["seeds"] for name, entry in metrics.items()} == seeds
    for name, entry in metrics.items():
        is_compared = name in TUNED
        assert entry.keys() == METRICS | (DIFFERENCE if is_compared else set())
        assert 0 <= entry["test_accuracy_low"] <= entry["test_accuracy"] <= entry["test_accuracy_high"] <= 1
        if is_compared:
            baseline = metrics["feature_extraction"]["test_accuracy"]
            assert details[name]["vs_baseline"]["test"]["baseline_value"] == baseline
            assert entry["difference"] == pytest.approx(entry["test_accuracy"] - baseline, abs=2e-6)
            assert entry["difference_low"] <= entry["difference"] <= entry["difference_high"]
            assert 0 < entry["difference_p_value"] <= 1
    assert all(entry["cost"].keys() == COST for entry in details.values())
    trained = {name: details[name]["cost"]["trainable_params"] for name in seeds}
    assert trained["feature_extraction"] < trained["partial_freeze"] < trained["full_retrain"]
    assert metrics["feature_extraction"]["test_accuracy"] > 0.5, "the classes differ in colour"


def test_metrics_are_a_table_with_a_row_for_each_strategy(base: Repository) -> None:
    head, _, *rows = base.dvc("metrics", "show", "--md").strip().splitlines()
    assert {cell.strip() for cell in head.split("|")} >= METRICS
    assert {Path(row.split("|")[1].strip()).stem for row in rows} == {*read_metrics(base)}


def test_the_plan_says_where_strategies_freeze_and_what_they_train(base: Repository) -> None:
    backbone, partial, full = (base.read_json(f"data/plan/{name}.json") for name in ("backbone", *TUNED))
    assert backbone["choice"]["name"] == "timm/test_resnet"
    assert (partial["boundary"].startswith("layer3"), full["boundary"]) == (True, "none")
    assert 0 < partial["trained_parameters"] < full["trained_parameters"] == backbone["parameters"]


def test_repro_leaves_nothing_that_git_should_not_see(base: Repository) -> None:
    assert base.git("status", "--porcelain") == ""
    tracked = base.git("ls-files").splitlines()
    assert not [path for path in tracked if path.startswith(("models/", "reports/runs/", "data/splits", "data/mine/"))]
    assert "reports/metrics/partial_freeze.json" in tracked
    assert ".dvc/plots/page.html" not in tracked


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
    compare = ("python", "-m", "pipeline", "compare", "--against", "HEAD")
    written = repository.run(*compare, "--pictures", "pictures")
    assert "No metric differs." in written
    assert "**Recommendation: " in written
    pictures = re.findall(r"!\[\w+\]\((.+)\)", written)
    confusions = [f"confusion_{path.stem}" for path in (repository.root / "reports" / "confusion").iterdir()]
    assert confusions
    assert sorted(pictures) == sorted(f"pictures/{name}.png" for name in ("cost", "curves", "reliability", *confusions))
    assert all((repository.root / path).read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert "tested different images" not in written
    assert re.search(
        r"\| full_retrain\.test\.metrics\.accuracy\.value \|.*\| paired on 15 images \| 0\.01 \| holds \|", written
    )
    path = repository.root / "reports" / "details.json"
    details = json.loads(path.read_text())
    details["strategies"]["full_retrain"]["test"]["metrics"]["accuracy"]["value"] -= 0.02
    path.write_text(json.dumps(details))
    repository.run(*compare)  # the images that are predicted correctly are the same
    with repository.params() as params:
        params["compare"]["guard_by"] = "difference"
    printed = repository.run(*compare, is_checked=False)
    name = "full_retrain.test.metrics.accuracy.value"
    assert f"error: worse than in HEAD: {name} by at least 0.02 (plain difference; tolerance 0.01)\n" in printed
    assert "Traceback" not in printed


def test_near_duplicates_across_splits_are_reported_and_a_new_threshold_trains_nothing(repository: Repository) -> None:
    with repository.table(MINE / "labels.csv") as rows:
        for row in rows[:15]:
            image = Image.open(repository.root / MINE / row["path"]).resize((50, 50), Image.Resampling.BICUBIC)
            copy = Path(row["path"]).with_suffix(".jpg").as_posix()
            image.save(repository.root / MINE / copy, quality=90)
            rows.append(row | {"path": copy})
    repository.dvc("add", "--quiet", MINE.as_posix())
    repository.repro()
    splits, summary = repository.read_json("reports/splits.json"), repository.read_json("reports/data/summary.json")
    n = summary["n_near_duplicates"]
    assert 12 <= n == splits["n_near_duplicates"] <= 15  # resizing changes what little these pictures of noise have
    assert splits["n_straddling"][0] == len(splits["straddling"]) > 0
    assert (repository.root / "reports/data/near_duplicates.csv").read_text().count("\n") == n + 1
    details = repository.read_json("reports/details.json")
    clean = details["strategies"]["full_retrain"]["test"]["without_twins"]
    assert clean["n"] + clean["n_twins"] == details["strategies"]["full_retrain"]["test"]["n"][0]
    assert clean["n_twins"] > 0
    assert "have a near-duplicate in train or validation" in (repository.root / "reports/comparison.md").read_text()
    with repository.params() as params:
        params["dataset"]["near_duplicate_correlation"] = 1.0
    assert repository.repro() == {"index", "split", "compare"}
    assert repository.read_json("reports/splits.json")["n_straddling"] == [0, 0]


def test_folds_test_every_image_once_and_are_compared_together(repository: Repository, call: Call) -> None:
    with repository.params() as params:
        params["split"].update({"method": "folds", "seeds": [0, 1, 2], "val_fraction": 0.2})
        params["fine_tune"]["seeds"] = [0, 1, 2]
    call(split.main)
    call_what_follows(call, seeds=[0, 1, 2])
    details = repository.read_json("reports/details.json")
    assert (details["folds"], details["common_seeds"]) == (3, [0, 1, 2])
    for strategy in (*details["strategies"].values(), *details["references"].values()):
        assert strategy["test"]["n"] == [60]
        assert sum(sum(row) for row in strategy["test"]["confusion"]) == 60
    assert details["recommendation"]["n_units"] > 20
    text = (repository.root / "reports/comparison.md").read_text()
    assert "on 60 test images, with its 95 % interval over images" in text
    assert "The 3 folds of one partition: each unit is tested once, by a run that never saw it." in text
    with repository.params() as params:
        params["fine_tune"]["seeds"] = [0, 1]
    assert "with `split.method: folds` expected all of split.seeds" in mistake(call, compare.main)


def test_clone_without_any_data_can_tell_whether_the_lock_is_fresh(base: Repository, tmp_path: Path) -> None:
    base.run("git", "clone", "--quiet", str(base.root), str(tmp_path / "clone"))
    cloned = at(tmp_path / "clone", base.environment)
    assert "Running stage" not in cloned.dvc("repro", "--dry", "--allow-missing")
    with cloned.params() as params:
        params["compare"]["confidence"] = 0.9
    output = cloned.run(sys.executable, "-m", "dvc", "repro", "--dry", "--allow-missing", is_checked=False)
    assert "failed to reproduce 'compare'" in output  # it would run, and what it reads is not there


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
    assert ran == EVERY_STAGE - {"advise", "compare", "label_suspects"}, "their reports came with git"
    assert cloned.git("status", "--porcelain") == ""
    assert (cloned.root / "dvc.lock").read_bytes() == (base.root / "dvc.lock").read_bytes()
    patterns = ("models/**/*", "reports/runs/**/*", "data/*.*", "data/splits/*")
    assert cloned.digests(*patterns) == base.digests(*patterns)


def test_changed_learning_rate_runs_its_strategy_and_compare_only(repository: Repository) -> None:
    with repository.params() as params:
        params["fine_tune"]["strategies"]["full_retrain"]["learning_rate_base"] = 1e-3
    assert repository.repro() == {"plan", "fine_tune@full_retrain-0", "compare"}


def test_corrected_label_runs_no_forward_pass_of_the_frozen_backbone(repository: Repository) -> None:
    with repository.table(MINE / "labels.csv") as rows:
        rows[0]["label"] = next(label for label in COLOURS if label != rows[0]["label"])
    repository.dvc("add", "--quiet", MINE.as_posix())
    assert repository.repro() == EVERY_STAGE - {"plan", "extract"}


def test_an_unrelated_weights_file_runs_no_stage(repository: Repository) -> None:
    save_file({"a": torch.zeros(1)}, repository.root / "data" / "weights" / "unrelated.safetensors")
    assert repository.repro() == set()


def test_a_default_that_every_strategy_that_runs_overrides_trains_nothing(repository: Repository) -> None:
    with repository.params() as params:
        params["fine_tune"]["defaults"]["patience"] = 4
    assert repository.repro() == {"plan"}


def test_what_draws_or_serves_the_command_line_runs_no_training(repository: Repository) -> None:
    for package in ("report", "tools", "comparison"):
        for path in (repository.root / "pipeline" / package).iterdir():
            if path.suffix == ".py":
                path.write_text(f"{path.read_text()}# other bytes\n")
    for name in ("__main__.py", "logs.py", "params.py"):
        with (repository.root / "pipeline" / name).open("a") as file:
            file.write("# other bytes\n")
    for name in ("requirements-report.lock", "requirements-dev.lock", "README.md"):
        (repository.root / name).write_text("other bytes\n")
    assert repository.repro() == {"advise", "compare"}


def test_a_new_strategy_is_one_experiment(repository: Repository) -> None:
    before = (repository.root / "params.yaml").read_text()
    strategy = "+fine_tune.strategies.last={freeze_until: layer4.0}"
    repository.dvc("exp", "run", "--quiet", "-S", strategy, "-S", "fine_tune.run=[last]")
    assert read_metrics(repository).keys() == {"feature_extraction", "last", "feature_extraction_all_seeds"}
    assert repository.read_json("data/plan/last.json")["recipe"]["epochs"] == 1, "from the defaults"
    assert "last:" in (repository.root / "params.yaml").read_text() != before


Extracted = Callable[[], tuple[str, bytes]]


@pytest.fixture
def extracted(repository: Repository, call: Call, caplog: pytest.LogCaptureFixture) -> Extracted:
    """Index and extract; what was logged of the rows, and the bytes of features.h5."""
    caplog.set_level(logging.INFO, "pipeline")

    def run() -> tuple[str, bytes]:
        caplog.clear()
        call(index.main)
        call(extract.main)
        (output,) = (line.partition(": ")[2] for line in caplog.messages if "reused" in line)
        return output, (repository.root / "data" / "features.h5").read_bytes()

    return run


def test_features_of_several_cuts_go_through_every_stage_report_and_prediction(
    repository: Repository, call: Call, in_torch: None
) -> None:
    with repository.params() as params:
        params["features"].update({"cut": ["layer3", "layer1", "all"], "pool": "avg"})
        params["fine_tune"]["strategies"]["partial_freeze"]["freeze_until"] = "layer2"
    for main in (plan.main, extract.main):
        call(main)
    call_what_follows(call)
    layout = repository.read_json("data/plan/backbone.json")["taps"]
    assert [tap["cut"] for tap in layout] == ["layer1.0.act2", "layer3.0.act3", "all"]
    details = repository.read_json("reports/details.json")["strategies"]
    for run in details["feature_extraction_all_seeds"]["runs"]:
        assert run["network"]["widths"] == {tap["cut"]: tap["width"] for tap in layout}
        assert sum(run["network"]["weight_shares"].values()) == pytest.approx(1, abs=1e-5)
    repository.dvc("commit", "--quiet", "--force")  # the page refuses outputs that DVC did not see
    run = partial(CliRunner().invoke, cli, catch_exceptions=False)
    run(["report"])
    for report in ("comparison.md", "report.html"):
        assert "Which cuts carry the weight of the head" in (repository.root / "reports" / report).read_text()
    assert "layer1.0.act2" in run(["store", "status"]).stdout
    image = next((repository.root / MINE / "images").iterdir())
    for name in ("feature_extraction", *TUNED):
        found = json.loads(run(["predict", f"models/{name}/seed_0", str(image), "--json"]).stdout)
        assert found[0]["class"] in COLOURS


def test_images_that_come_cost_their_own_rows_and_those_that_go_or_move_cost_nothing(
    repository: Repository, extracted: Extracted
) -> None:
    labels, images = MINE / "labels.csv", repository.root / MINE / "images"

    def as_from_nothing() -> bytes:
        shutil.rmtree(repository.root / "data" / ".feature_store")
        return extracted()[1]

    output, whole = extracted()
    assert output == "120 rows reused, 0 computed, 0 dropped"
    Image.new("RGB", (40, 40), COLOURS["red"]).save(images / "new.png")
    with repository.table(labels) as rows:
        rows.insert(7, {"path": "images/new.png", "label": "red"})
    output, added = extracted()
    assert output == "120 rows reused, 2 computed, 0 dropped"
    assert added != whole
    (images / "07.png").rename(images / "moved.png")
    with repository.table(labels) as rows:
        rows[:] = [rows[-1], *rows[:-2]]
        for row in rows:
            row["path"] = row["path"].replace("07", "moved")
    output, changed = extracted()
    assert output == "120 rows reused, 0 computed, 2 dropped"
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
    assert repository.repro() == {"split", "train_head", "references", "compare", *new}
    after = repository.digests("models/**/*", "data/splits/*")
    assert {path: after[path] for path in before} == before
    seeds = {name: entry["seeds"] for name, entry in read_metrics(repository).items()}
    assert seeds == {"feature_extraction": 2, "partial_freeze": 2, "full_retrain": 2, "feature_extraction_all_seeds": 3}


def test_a_growing_data_set_split_by_hash_moves_no_image_and_computes_the_new_ones_only(
    repository: Repository, call: Call, extracted: Extracted
) -> None:
    growing = Path("data/growing")

    def split_with(rows: list[dict[str, str]], **options: Any) -> str:
        """Have the data set hold these digits, extract and split; what was logged of the rows of features."""
        for row in rows:
            target = repository.root / growing / row["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(digits / row["path"], target)
        with (repository.root / growing / "labels.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        with repository.params() as params:
            params["dataset"].update({"path": growing.as_posix()})
            params["split"].update(options)
        output, _ = extracted()
        call(split.main)
        return output

    def parts(seed: int) -> dict[str, str]:
        with (repository.root / "data" / "splits" / f"seed_{seed}.csv").open(newline="") as file:
            return {row["image_id"]: row["split"] for row in csv.DictReader(file)}

    call(fetch.main, "digits")
    digits = repository.root / "data" / "raw" / "digits"
    with (digits / "labels.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: Path(row["path"]).name)[:330]
    output = split_with(rows[:300], method="hash", test_fraction=0.3, val_fraction=0.2)
    assert output.startswith("0 rows reused, 600 computed, ")
    before = {seed: parts(seed) for seed in (0, 1)}
    assert split_with(rows).startswith("600 rows reused, 60 computed, ")
    for seed, old in before.items():
        now = parts(seed)
        assert len(now) == 330
        assert {image: now[image] for image in old} == old
    assert before[0] != before[1]

    given = [row | {"split": ("train", "train", "test", "val")[number % 4]} for number, row in enumerate(rows)]
    assert split_with(given, method="given").startswith("660 rows reused, 0 computed, ")
    assert parts(0) == parts(1) == {row["path"]: row["split"] for row in given}
    sizes = {"train": 166, "val": 82, "test": 82, "unused": 0}
    assert repository.read_json("reports/splits.json")["sizes"]["0"] == sizes
    call(train_head.main)


def test_removed_strategy_leaves_no_trace_here_or_in_a_clone_and_comes_back_without_training(
    repository: Repository, tmp_path: Path
) -> None:
    patterns = ("models/**/*", "reports/comparison.md", "reports/metrics/*", "data/plan/*")
    before = repository.digests(*patterns)
    with repository.params() as params:
        params["fine_tune"]["run"] = ["partial_freeze"]
    assert repository.repro() == {"plan", "compare"}
    assert read_metrics(repository).keys() == {"feature_extraction", "partial_freeze", "feature_extraction_all_seeds"}
    assert "full_retrain" not in (repository.root / "reports" / "comparison.md").read_text()
    for left in (
        *("models/full_retrain", "reports/runs/full_retrain", "data/plan/full_retrain.json"),
        "reports/confusion/full_retrain.json",
    ):
        assert not (repository.root / left).exists()
    repository.commit()
    cloned = clone(repository, tmp_path / "clone", is_cache_shared=True)
    cloned.repro()
    assert cloned.git("status", "--porcelain") == ""
    assert not (cloned.root / "models" / "full_retrain").exists()

    with repository.params() as params:
        params["fine_tune"]["run"] = ["partial_freeze", "full_retrain"]
    assert repository.repro() <= {"plan", "compare"}
    assert repository.digests(*patterns) == before


def test_test_labels_change_nothing_that_training_writes(repository: Repository, call: Call) -> None:
    patterns = ("models/**/seed_0.*", "reports/runs/*/seed_0/*")
    before = repository.digests(*patterns)
    assert len(before) == 3 * 4 + 3 * 2, "the reference classifiers have no model"
    shutil.rmtree(repository.root / "models")
    shutil.rmtree(repository.root / "reports" / "runs")
    with repository.params() as params:
        params["split"]["seeds"] = [0]  # of another seed, other images are test
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
    call(references.main)
    for strategy in ("partial_freeze", "full_retrain"):
        call(fine_tune.main, strategy, "0")
    assert repository.digests(*patterns) == before


@pytest.mark.parametrize("run", ["feature_extraction", "full_retrain"])
def test_saved_run_predicts_new_images_from_another_directory(base: Repository, tmp_path: Path, run: str) -> None:
    images = [str(base.root / MINE / "images" / f"{number:02}.png") for number in range(12)]
    saved = str(base.root / "models" / run / "seed_0")
    command = ("python", "-m", "pipeline", "predict", saved, *images)
    if run == "full_retrain":
        predicted = json.loads(base.run(*command, "--json", cwd=tmp_path))
        assert all(entry.keys() == {"class", "probability", "probabilities", "path"} for entry in predicted)
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
    output = repository.run(sys.executable, "-m", "dvc", "repro", "index", is_checked=False)
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: 1 of 60 images cannot be read, first data/mine/images/nowhere.png (does not exist); all are in "
        "reports/data/rejected.csv; repair, convert or remove them, leave them out (dataset.exclude), or raise "
        "dataset.max_rejected_fraction"
    ]
    assert "Traceback" not in output


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


def test_wrong_freeze_until_fails_in_plan_and_names_what_would_do(repository: Repository, call: Call) -> None:
    with repository.params() as params:
        params["fine_tune"]["strategies"]["partial_freeze"]["freeze_until"] = "layer9"
    line = mistake(call, plan.main)
    assert "params.yaml: fine_tune.strategies.partial_freeze.freeze_until: 'layer9'" in line
    assert "timm/test_resnet" in line
    assert "layer4" in line


def test_weights_of_another_network_are_refused(repository: Repository, call: Call) -> None:
    other = torchvision.models.squeezenet1_1()
    save_file(other.state_dict(), repository.root / "data" / "weights" / "other.safetensors")
    with repository.params() as params:
        params["backbone"]["weights"] = "other.safetensors"
    line = mistake(call, plan.main)
    assert "data/weights/other.safetensors: weights of another network" in line
    assert "missing: bn1.bias" in line
    assert "unexpected: classifier.1.bias" in line


def test_own_weights_are_shared_with_dvc_and_a_clone_is_fresh(repository: Repository, tmp_path: Path) -> None:
    ours = "data/weights/ours.safetensors"
    network = backbones.load(BackboneChoice.of("timm/test_resnet", "random", 7), 64).module
    save_file(network.state_dict(), repository.root / ours)
    with repository.params() as params:
        params["backbone"]["weights"] = "ours.safetensors"
        params["fine_tune"]["run"] = []
        params["compare"]["guard"] = {}
    assert repository.repro() == {"plan", "extract", "train_head", "references", "label_suspects", "advise", "compare"}
    repository.dvc("add", "--quiet", ours)
    assert repository.repro() == set(), "the weights are the same, tracked or not"
    repository.dvc("remote", "add", "--quiet", "--default", "team", str(tmp_path / "remote"))
    repository.commit()
    repository.dvc("push", "--quiet")
    assert repository.git("ls-files", "--", "data/weights").split() == [
        *("data/weights/README.md", "data/weights/bundled", "data/weights/default"),
        *(f"{ours}.dvc", "data/weights/random"),
    ]

    repository.run("git", "clone", "--quiet", str(repository.root), str(tmp_path / "colleague"))
    colleague = at(tmp_path / "colleague", repository.environment)
    assert "Running stage" not in colleague.dvc("repro", "--dry", "--allow-missing"), "make fresh"
    assert f"run: dvc pull {ours}.dvc" in colleague.run("python", "-m", "pipeline.stages.plan", is_checked=False)
    colleague.dvc("pull", "--quiet")
    assert colleague.repro() == set()
    assert colleague.git("status", "--porcelain") == ""

    (colleague.root / "data/weights/team").mkdir()
    for name in ("other.pth", "team/other.pth"):
        (colleague.root / "data/weights" / name).write_bytes(name.encode())
    assert colleague.repro() == set(), "no stage reads the other file"
    colleague.dvc("add", "--quiet", "data/weights/other.pth", "data/weights/team")
    assert colleague.repro() == set()
    colleague.commit()
    tracked = colleague.git("ls-files", "--", "data/weights")
    assert "data/weights/team.dvc" in tracked
    assert "data/weights/.gitignore" in tracked
    assert "other.pth\n" not in tracked


def test_image_changed_after_indexing_is_refused(repository: Repository, call: Call) -> None:
    path = repository.root / MINE / "images" / "00.png"
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path)
    shutil.rmtree(repository.root / "data" / ".feature_store")
    line = mistake(call, extract.main)
    assert "data/mine/images/00.png: " in line
    assert "dvc repro" in line


def test_head_of_other_weights_is_refused_by_fine_tuning(repository: Repository, call: Call) -> None:
    with repository.params() as params:
        params["backbone"]["seed"] = 1
    call(plan.main)
    line = mistake(call, fine_tune.main, "full_retrain", "0")
    assert "models/feature_extraction/seed_0.json: fitted on features of another backbone" in line


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_runs_of_the_matrix_side_by_side_are_taken_from_the_cache(repository: Repository) -> None:
    """Two by `dvc queue`, as with a GPU each, and two by the array job of docs/machines.md, as sbatch starts it."""
    with repository.params() as params:
        params["fine_tune"]["seeds"] = [0, 1]
        params["fine_tune"]["defaults"]["weight_decay"] = 0.03
    repository.dvc("repro", "train_head")
    cells = [f"{strategy}-{seed}" for seed in (0, 1) for strategy in TUNED]
    page = (REPOSITORY / "docs" / "machines.md").read_text(encoding="utf-8").partition("## SLURM")[2]
    script, n_changed = re.subn(r"^cells=.*", f"cells=({' '.join(cells[2:])})", page, flags=re.MULTILINE)
    assert n_changed == 1
    (repository.root / "cells.sh").write_text(f"#!/bin/bash{script.partition('#!/bin/bash')[2].partition('```')[0]}")
    repository.commit()

    for cell in cells[:2]:
        repository.dvc("exp", "run", "--queue", f"fine_tune@{cell}")
    repository.dvc("queue", "start", "--jobs", "2")
    slurm = repository.environment | {"SLURM_SUBMIT_DIR": str(repository.root)}
    tasks = [
        subprocess.Popen(["bash", "cells.sh"], cwd=repository.root, env=slurm | {"SLURM_ARRAY_TASK_ID": str(number)})
        for number in range(2)
    ]
    assert [task.wait() for task in tasks] == [0, 0]
    status = repository.dvc("queue", "status")
    for _ in range(600):
        if not re.search("Queued|Running", status):
            break
        time.sleep(1)
        status = repository.dvc("queue", "status")
    assert status.count("Success") == 2, status

    ran = repository.repro()
    assert "compare" in ran
    assert not {name for name in ran if name.startswith("fine_tune")}
    assert all((repository.root / "reports/runs" / cell.replace("-", "/seed_")).is_dir() for cell in cells)


SWEEP = ("python", "-m", "pipeline", "sweep")


@dataclass(frozen=True)
class Untouched:
    """What a sweep must leave as it is."""

    status: str
    branch: str
    files: dict[str, str]

    @classmethod
    def of(cls, repository: Repository) -> "Untouched":
        files = repository.digests("params.yaml", "dvc.lock", "data/plan/*", "models/**/*", "reports/**/*")
        return cls(repository.git("status", "--porcelain"), repository.git("symbolic-ref", "HEAD"), files)


def experiments_of(repository: Repository) -> set[str]:
    """The names that `dvc exp show` lists."""
    table = repository.dvc("exp", "show", "--csv")
    return {row["Experiment"] for row in csv.DictReader(table.splitlines()) if row["Experiment"]}


def test_sweep_trains_experiments_once_and_leaves_the_workspace_as_it_is(repository: Repository) -> None:
    before = Untouched.of(repository)
    command = [*SWEEP, "--at", "layer2", "--at", "layer3"]
    text = repository.run(*command)
    assert Untouched.of(repository) == before
    names = re.findall(r"sweep-partial_freeze-\S+", text)
    assert names == [f"sweep-partial_freeze-layer{number}-epochs-2-seed-0" for number in (3, 2)]
    assert re.search(r"^ +freeze_until: layer[23]$", text, re.MULTILINE)
    assert "test" not in text
    assert experiments_of(repository) == {*names}
    folder = "/".join(split_in_two(repository))
    trained, committed = (
        YAML(typ="safe").load(repository.git("show", f"{revision}:dvc.lock"))["stages"]
        for revision in (f"refs/exps/{folder}/{names[1]}", "HEAD")
    )
    assert trained.keys() == committed.keys()
    changed = {stage for stage, entry in trained.items() if entry != committed[stage]}
    assert changed == {"plan", "fine_tune@partial_freeze-0"}, "it trains one strategy with one seed"

    done = subprocess.run(command, cwd=repository.root, env=repository.environment, capture_output=True, text=True)
    assert done.stdout == text
    assert "dvc exp run" not in done.stderr
    assert experiments_of(repository) == {*names}

    with repository.params() as params:
        params["fine_tune"]["strategies"]["partial_freeze"]["freeze_until"] = "layer2"
    assert "fine_tune@partial_freeze-0" not in repository.repro(), "it is taken from DVC's cache"
    assert repository.read_json("reports/runs/partial_freeze/seed_0/run.json")["network"]["boundary"] == "layer2.0.act2"


def split_in_two(repository: Repository) -> tuple[str, str]:
    """The commit of HEAD, as DVC names the directory of its experiments."""
    commit = repository.git("rev-parse", "HEAD").strip()
    return commit[:2], commit[2:]


def test_sweep_that_fails_in_between_leaves_the_workspace_as_it_is_and_goes_on_later(repository: Repository) -> None:
    with repository.params() as params:
        params["runtime"]["store_max_gb"] = 0.0015  # room for the activations at layer3, not for those at layer1
    repository.commit()
    before = Untouched.of(repository)
    output = repository.run(*SWEEP, "--at", "layer1", "--at", "layer3", is_checked=False)
    assert "runtime.store_max_gb" in output
    assert output.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in output
    assert Untouched.of(repository) == before
    assert experiments_of(repository) == {"sweep-partial_freeze-layer3-epochs-2-seed-0"}
    assert not [*(repository.root / ".dvc/tmp/exps/standalone").glob("tmp*")]

    text = repository.run(*SWEEP, "--at", "layer3")
    assert experiments_of(repository) == {"sweep-partial_freeze-layer3-epochs-2-seed-0"}
    assert "freeze_until: layer3\n" in text
