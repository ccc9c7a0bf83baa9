"""The ELPV study: which stages run again, and what is reported of their logits."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from benchmarks import elpv
from pipeline.dataset.decoding import sha256
from pipeline.dataset.manifest import Labels
from pipeline.training.models import Cost, Run

N = 300


@pytest.fixture
def labels() -> Labels:
    random = np.random.default_rng(0)
    names = [f"{index:03}.png" for index in range(N)]
    kind = random.choice(["mono", "poly"], N).tolist()
    weight = random.choice([1 / 3, 2 / 3, 1.0], N)
    empty = [""] * N
    classes = ["defective", "functional"]
    return Labels(names, names, random.integers(0, 2, N), weight, empty, empty, empty, kind, empty, classes)


def trained(seed: int, labels: Labels) -> Run:
    """A run that is often right."""
    random = np.random.default_rng(seed)
    rows = np.sort(random.permutation(N))
    logits = random.normal(size=(N, 2)) + 1.2 * np.eye(2)[labels.label[rows]]
    val, test = slice(0, 100), slice(100, None)
    cost = Cost(trainable_params=1, train_flops=1, base_passes=1, cached_bytes=1)
    return Run("x", seed, cost, {}, {}, [], rows[val], logits[val], rows[test], logits[test])


def in_repository(monkeypatch: pytest.MonkeyPatch, line: list[str], work: Path, fails: str = "") -> list[str]:
    """The stages that a study with this command line runs."""
    ran = []

    def call(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        ran.append(" ".join(command[2:]).removeprefix("pipeline.stages."))
        return subprocess.CompletedProcess(command, int(ran[-1] == fails))

    monkeypatch.setattr(elpv.subprocess, "run", call)
    params = elpv.prepare(work, elpv.document(elpv.arguments(line)))
    for step in elpv.steps(params):
        elpv.complete(step, work)
    return ran


SHORT = ["--seeds", "2", "--strategies", "partial_freeze", "full_retrain"]
CELLS = [f"fine_tune {name} {seed}" for seed in (0, 1) for name in ("partial_freeze", "full_retrain")]


def test_the_parameters_of_the_study_are_valid(tmp_path: Path):
    params = elpv.prepare(tmp_path, elpv.document(elpv.arguments([])))
    assert params.dataset.fetch == ("elpv",)
    assert len(params.split.seeds) == 10
    assert len(params.fine_tune.seeds) == 3
    assert params.split.test_fraction == 0.25


def test_parameters_are_chosen_on_other_seeds(tmp_path: Path):
    params = elpv.prepare(
        tmp_path, elpv.document(elpv.arguments(["--validation", "--seeds", "2", "--head-seeds", "3"]))
    )
    assert params.fine_tune.seeds == (100, 101)
    assert params.split.seeds == (100, 101, 102)


def test_a_wish_replaces_one_parameter(tmp_path: Path):
    line = ["--set", "fine_tune.strategies.partial_freeze.views=0", "head.strengths=[1.0]"]
    params = elpv.prepare(tmp_path, elpv.document(elpv.arguments(line)))
    assert params.fine_tune.strategies["partial_freeze"].views == 0
    assert params.fine_tune.strategies["full_retrain"].views > 0
    assert params.head.strengths == (1.0,)


def test_an_unknown_parameter_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"features\.size: unknown key"):
        elpv.prepare(tmp_path, elpv.document(elpv.arguments(["--set", "features.size=3"])))


def test_a_study_runs_every_stage_and_seed_by_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    ran = in_repository(monkeypatch, SHORT, tmp_path)
    assert ran == ["fetch elpv", "index", "split", "extract", "train_head", *CELLS]


def test_a_study_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(SystemExit):
        in_repository(monkeypatch, SHORT, tmp_path, fails=CELLS[1])
    assert in_repository(monkeypatch, SHORT, tmp_path) == CELLS[1:]
    assert in_repository(monkeypatch, SHORT, tmp_path) == []


def test_a_seed_more_trains_only_what_is_new(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    line = ["--strategies", "partial_freeze", "--head-seeds", "3", "--seeds"]
    in_repository(monkeypatch, [*line, "1"], tmp_path)
    assert in_repository(monkeypatch, [*line, "2"], tmp_path) == ["fine_tune partial_freeze 1"]
    line[3] = "4"
    assert in_repository(monkeypatch, [*line, "2"], tmp_path) == ["split", "train_head"]


@pytest.mark.parametrize(
    ("wish", "again"),
    [
        ("fine_tune.strategies.full_retrain.learning_rate_base=1e-6", [CELLS[1], CELLS[3]]),
        ("head.strengths=[0.5]", ["train_head", *CELLS]),
        ("split.val_fraction=0.2", ["split", "train_head", *CELLS]),
        ("runtime.workers=1", []),
    ],
)
def test_other_parameters_run_again_what_reads_them(
    wish: str, again: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    in_repository(monkeypatch, SHORT, tmp_path)
    assert in_repository(monkeypatch, [*SHORT, "--set", wish], tmp_path) == again


def test_measures_are_those_of_scikit_learn(labels: Labels):
    one = trained(3, labels)
    rows, said = one.test_rows, one.test_logits
    label, weight, predicted = labels.label[rows], labels.weight[rows], said.argmax(1)
    found = elpv.score([one], labels, "test")
    assert found["weighted_accuracy"] == pytest.approx(accuracy_score(label, predicted, sample_weight=weight), abs=1e-6)
    assert found["unweighted_accuracy"] == pytest.approx(accuracy_score(label, predicted), abs=1e-6)
    f1 = [f1_score(label, predicted, pos_label=index, sample_weight=weight) for index in (0, 1)]
    shares = np.array([weight[label == 0].sum(), weight[label == 1].sum()]) / weight.sum()
    assert found["weighted_f1"] == pytest.approx(shares @ f1, abs=1e-6)
    auroc = roc_auc_score(label, said[:, 1] - said[:, 0], sample_weight=weight)
    assert found["auroc"] == pytest.approx(auroc, abs=1e-6)
    assert (found["n"], found["seeds"]) == (1, [3])
    assert "sd" not in found


def test_several_seeds_give_their_mean_and_deviation(labels: Labels):
    runs = [trained(seed, labels) for seed in (3, 4, 5)]
    accuracies = [elpv.score([one], labels, "test")["weighted_accuracy"] for one in runs]
    found = elpv.score(runs, labels, "test")
    assert found["weighted_accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-6)
    assert found["sd"] == pytest.approx(np.std(accuracies, ddof=1), abs=1e-6)
    assert found["low"] < found["weighted_accuracy"] < found["high"]
    assert found["n"] == 3


def test_rows_by_type_of_module_are_of_those_images(labels: Labels):
    one = trained(3, labels)
    is_mono = np.array(labels.subset)[one.test_rows] == "mono"
    rows, said = one.test_rows[is_mono], one.test_logits[is_mono]
    expected = accuracy_score(labels.label[rows], said.argmax(1), sample_weight=labels.weight[rows])
    found = elpv.score([one], labels, "test")["subsets"]
    assert found["monocrystalline"]["weighted_accuracy"] == pytest.approx(expected, abs=1e-6)
    assert found["polycrystalline"]["weighted_accuracy"] != pytest.approx(expected, abs=1e-6)


def test_validation_reads_nothing_of_the_test_images(labels: Labels):
    one = trained(3, labels)
    before = elpv.score([one], labels, "val")
    one.test_logits[:] = 0
    labels.label[one.test_rows] = 0
    assert elpv.score([one], labels, "val") == before


def test_the_table_stands_beside_the_published_figures(labels: Labels):
    results = {"full_retrain": elpv.score([trained(seed, labels) for seed in (3, 4)], labels, "test")}
    lines = elpv.as_markdown(results, elpv.PUBLISHED).splitlines()
    assert [line.split("|")[1:3] for line in lines[2:]] == [
        [" full_retrain ", " all "],
        ["  ", " monocrystalline "],
        ["  ", " polycrystalline "],
        [" SVM, published ", " all "],
        [" VGG19 fine-tuned, published ", " all "],
    ]
    assert f"{100 * results['full_retrain']['weighted_accuracy']:.2f} ± " in lines[2]
    assert "82.44" in lines[5]
    assert "88.42" in lines[6]


def test_other_code_runs_again_what_imports_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    in_repository(monkeypatch, SHORT, tmp_path)
    training = (elpv.REPOSITORY / "pipeline" / "training.py").read_bytes()
    monkeypatch.setattr(elpv, "sha256", lambda content: "other" if content == training else sha256(content))
    assert in_repository(monkeypatch, SHORT, tmp_path) == CELLS


def test_the_table_in_the_docs_is_that_of_the_committed_run():
    page = (elpv.REPOSITORY / "docs" / "benchmark.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- elpv -->\n(.*?)<!-- /elpv -->", page, re.DOTALL)
    results = json.loads(elpv.RESULTS.read_text(encoding="utf-8"))
    assert shown.strip() == elpv.as_markdown(results, elpv.PUBLISHED).strip()
