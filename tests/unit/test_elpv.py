"""The ELPV study: what it asks DVC to run, and what is reported of the predictions."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from benchmarks import elpv, studies
from pipeline.dataset.manifest import Labels
from pipeline.params import Params
from pipeline.training.runs import Run
from tests import factories

N = 300


@pytest.fixture
def labels() -> Labels:
    random = np.random.default_rng(0)
    kind = random.choice(["mono", "poly"], N).tolist()
    weight = random.choice([1 / 3, 2 / 3, 1.0], N)
    label = random.integers(0, 2, N)
    return factories.labels(N, subset=kind, weight=weight, label=label, class_names=["defective", "functional"])


def trained(seed: int, labels: Labels) -> Run:
    """A run that is often right."""
    random = np.random.default_rng(seed)
    rows = np.sort(random.permutation(N))
    logits = random.normal(size=(N, 2)) + 1.2 * np.eye(2)[labels.label[rows]]
    val, test = (factories.predictions(rows[part], logits[part]) for part in (slice(0, 100), slice(100, None)))
    return factories.run("x", seed, val, test, labels.label)


def prepared(work: Path, *changes: str, is_validation: bool = False) -> Params:
    return studies.prepare(work, elpv.document(changes, is_validation=is_validation))


def test_the_parameters_of_the_study_are_valid(tmp_path: Path):
    params = prepared(tmp_path)
    assert params.dataset.fetch == ("elpv",)
    assert len(params.split.seeds) == 10
    assert len(params.fine_tune.seeds) == 5
    assert params.split.test_fraction == 0.25


def test_parameters_are_chosen_on_other_seeds(tmp_path: Path):
    params = prepared(tmp_path, "fine_tune.seeds=[0,1]", "split.seeds=[0,1,2]", is_validation=True)
    assert params.fine_tune.seeds == (100, 101)
    assert params.split.seeds == (100, 101, 102)


def test_set_replaces_one_parameter(tmp_path: Path):
    changes = "fine_tune.strategies.partial_freeze.views=0", "head.regularization_strengths=[1.0]"
    params = prepared(tmp_path, *changes)
    assert params.fine_tune.strategies["partial_freeze"].views == 0
    assert params.fine_tune.strategies["full_retrain"].views != 0
    assert params.head.regularization_strengths == (1.0,)


def test_an_unknown_parameter_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"features\.size: unknown key"):
        prepared(tmp_path, "features.size=3")


SEEDS = "split.seeds=[0,1,2]"
STAGES = ("fetch", "index", "split", "plan", "extract", "train_head", "fine_tune")


def test_a_study_goes_on_where_it_was_stopped_with_whole_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    ran: list[list[str]] = []
    is_stopped = True

    def run(stage: str) -> None:
        if is_stopped and [*sys.argv[1:]] == ["full_retrain", "0"]:
            raise KeyboardInterrupt
        ran.append([stage, *sys.argv[1:]])

    for stage in STAGES:
        monkeypatch.setattr(getattr(studies, stage), "main", partial(run, stage))
    before = [*sys.argv]
    monkeypatch.chdir(tmp_path)
    params = prepared(tmp_path, SEEDS, "fine_tune.seeds=[0,1]", "fine_tune.run=[partial_freeze,full_retrain]")
    with pytest.raises(KeyboardInterrupt):
        [studies.do_once(*step) for step in studies.steps(params)]
    first = [["fetch", "elpv"], ["index"], ["split"], ["plan"], ["extract"], ["train_head"]]
    assert ran == [*first, ["fine_tune", "partial_freeze", "0"]]
    ran.clear()
    is_stopped = False
    [studies.do_once(*step) for step in studies.steps(params)]
    runs = [("full_retrain", "0"), ("partial_freeze", "1"), ("full_retrain", "1")]
    assert ran == [["fine_tune", *run] for run in runs]
    assert sys.argv == before
    ran.clear()
    params = prepared(tmp_path, SEEDS, "fine_tune.seeds=[0,1,2]", "fine_tune.run=[partial_freeze]")
    [studies.do_once(*step) for step in studies.steps(params)]
    assert ran == [["plan"], ["fine_tune", "partial_freeze", "2"]]


def test_more_seeds_go_on_in_the_same_study_and_other_parameters_do_not():
    def where(*changes: str, is_validation: bool = False) -> Path:
        return studies.locate(elpv.document(changes, is_validation=is_validation))

    assert where("fine_tune.seeds=[0]") == where("fine_tune.seeds=[0,1]", "fine_tune.run=[]", "split.seeds=[3]")
    assert where("runtime.workers=0") == where()
    assert where(is_validation=True) == where()
    assert where("fine_tune.strategies.full_retrain.epochs=9") != where()
    assert where("threads=2") != where("threads=1")
    folds = "split.method=folds"  # five folds are other splits than three
    assert where(folds, "split.seeds=[0,1,2]") != where(folds, "split.seeds=[0,1,2,3,4]")


def test_the_interval_over_splits_is_that_of_nadeau_and_bengio():
    one = {"weighted_accuracy": 0.9, "sd": 0.02, "n": 5}
    wide = 2.7764451 * 0.02 * (1 / 5 + 1 / 3) ** 0.5  # Student's t with 4 degrees of freedom
    assert elpv.over_splits(one, 1 / 3) == f"{100 * (0.9 - wide):.1f} to {100 * (0.9 + wide):.1f}"
    assert elpv.over_splits({"weighted_accuracy": 0.9, "n": 1}, 1 / 3) == ""


def test_a_study_may_be_prepared_again_with_other_parameters(tmp_path: Path):
    for n in (1, 2):
        params = prepared(tmp_path, SEEDS, f"fine_tune.seeds={[*range(n)]}")
        assert params.fine_tune.seeds == tuple(range(n))


def test_measures_are_those_of_scikit_learn(labels: Labels):
    one = trained(3, labels)
    rows, log_probability = one.test.rows, one.test.log_probability
    label, weight, predicted = labels.label[rows], labels.weight[rows], log_probability.argmax(1)
    found = elpv.score([one], labels, "test")
    assert found["weighted_accuracy"] == pytest.approx(accuracy_score(label, predicted, sample_weight=weight), abs=1e-6)
    assert found["unweighted_accuracy"] == pytest.approx(accuracy_score(label, predicted), abs=1e-6)
    f1 = [f1_score(label, predicted, pos_label=index, sample_weight=weight) for index in (0, 1)]
    shares = np.array([weight[label == 0].sum(), weight[label == 1].sum()]) / weight.sum()
    assert found["weighted_f1"] == pytest.approx(shares @ f1, abs=1e-6)
    auroc = roc_auc_score(label, log_probability[:, 1] - log_probability[:, 0], sample_weight=weight)
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
    is_mono = np.array(labels.subset)[one.test.rows] == "mono"
    rows, predicted = one.test.rows[is_mono], one.test.log_probability[is_mono].argmax(1)
    expected = accuracy_score(labels.label[rows], predicted, sample_weight=labels.weight[rows])
    found = elpv.score([one], labels, "test")["subsets"]
    assert found["monocrystalline"]["weighted_accuracy"] == pytest.approx(expected, abs=1e-6)
    assert found["polycrystalline"]["weighted_accuracy"] != pytest.approx(expected, abs=1e-6)


def test_validation_reads_nothing_of_the_test_images(labels: Labels):
    one = trained(3, labels)
    before = elpv.score([one], labels, "val")
    one.test.log_probability[:] = 0
    labels.label[one.test.rows] = 0
    assert elpv.score([one], labels, "val") == before


def test_the_table_stands_beside_the_published_figures(labels: Labels):
    results = {"full_retrain": elpv.score([trained(seed, labels) for seed in (3, 4)], labels, "test")}
    lines = elpv.as_markdown(results, elpv.PUBLISHED, 1 / 3).splitlines()
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


def test_the_table_in_the_docs_is_that_of_the_committed_run():
    page = (elpv.REPOSITORY / "docs" / "benchmark.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- elpv -->\n(.*?)<!-- /elpv -->", page, re.DOTALL)
    results = json.loads(elpv.RESULTS.read_text(encoding="utf-8"))
    assert shown.strip() == elpv.as_markdown(results, elpv.PUBLISHED, 1 / 3).strip()
