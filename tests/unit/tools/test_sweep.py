"""sweep: strategies and depths, what an experiment is given, the table and the proposal. See also test_halving."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML
from safetensors.numpy import save
from torch import fx

from pipeline.comparison.outcomes import of_predictions
from pipeline.network import backbones, cuts
from pipeline.params import load_params
from pipeline.tools import sweep
from pipeline.tools.sweep import Depth, Result, Trainer
from pipeline.training.runs import Predictions, make_candidates
from tests.factories import CHOICE, ones_study, predictions, study_params

Edit = Callable[..., None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with nothing but params.yaml, of timm/test_resnet."""
    monkeypatch.chdir(tmp_path)
    study_params(Path("params.yaml"))
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "m")
    return tmp_path


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True)


@pytest.fixture
def edit(folder: Path) -> Edit:
    """Change values of params.yaml by dotted key; None deletes one."""

    def change(**values: Any) -> None:
        yaml = YAML()
        document = yaml.load(Path("params.yaml"))
        for key, value in values.items():
            section, last = document, key
            while "__" in last:
                first, _, last = last.partition("__")
                section = section[first]
            section.update({last: value}) if value is not None else section.pop(last)
        yaml.dump(document, Path("params.yaml"))

    return change


def freeze_untils(*at: str, n: int = 8) -> list[str | int]:
    return [depth.freeze_until for depth in sweep.find_depths(load_params(), at, n)]


# Depths


def test_depths_are_the_ends_of_blocks_from_the_one_that_trains_least(folder: Path) -> None:
    found = sweep.find_depths(load_params(), (), 8)
    names = ["layer3.0", "layer2.0", "layer1.0", "maxpool", "conv1.5", "conv1.2"]
    assert [depth.freeze_until for depth in found] == names
    behind = [depth.flops_behind for depth in found]
    assert behind == sorted(behind)
    assert len({depth.flops_before + depth.flops_behind for depth in found}) == 1
    assert behind[0] > 0, "layer4.0 leaves no layer to train"
    assert [depth.flops(2) for depth in found] == sorted(depth.flops(2) for depth in found)


def test_names_mean_the_last_cut_point_of_the_block(folder: Path) -> None:
    backbone = backbones.load(CHOICE, 64)
    points = {point.name: point for point in cuts.describe(backbone, 1)}
    for depth in sweep.find_depths(load_params(), (), 8):
        assert points[cuts.resolve(backbone, depth.freeze_until)].flops_before == depth.flops_before


def test_fewer_depths_are_spread(folder: Path) -> None:
    assert freeze_untils(n=3) == ["layer3.0", "layer1.0", "conv1.5"]


def test_depths_end_where_the_base_does(edit: Edit) -> None:
    edit(features__cut="layer3", features__pool="avg")
    assert freeze_untils() == ["layer2.0", "layer1.0", "maxpool", "conv1.5", "conv1.2"]
    with pytest.raises(ValueError, match=r"--at layer4: lies behind features\.cut, layer3, where the base ends"):
        freeze_untils("layer4")
    assert freeze_untils("all", "layer2") == ["all", "layer2"]
    edit(features__cut="conv1.1")
    with pytest.raises(ValueError, match="no cut point lies between two of its layers; name one with --at"):
        freeze_untils()


def test_given_depths_are_put_in_order_and_none_is_tried_if_asked(folder: Path) -> None:
    assert freeze_untils("none", "layer3", "5", "layer1.0.act2", n=2) == ["layer3", "layer1.0.act2", "none"]
    assert sweep.find_depths(load_params(), ["none"], 8)[0].flops_before == 0
    assert sweep.find_depths(load_params(), ["all"], 8)[0].flops_behind == 0


def test_unknown_depth_is_one_line_with_close_matches(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^--at layer9: 'layer9' holds no cut point of .*nearest: layer") as caught:
        freeze_untils("layer9")
    assert "\n" not in str(caught.value)


def test_network_that_cannot_be_traced_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(*_: object) -> None:
        raise TypeError("its forward looks at values")

    monkeypatch.setattr(fx.Tracer, "trace", trace)
    with pytest.raises(ValueError, match=r"^timm/test_resnet cannot be traced, so .* \(its forward looks at values\)$"):
        freeze_untils()


# Strategies


def test_default_strategy_is_partial_freeze_or_the_first_that_fits(edit: Edit) -> None:
    assert sweep.choose_strategy(load_params(), None) == "partial_freeze"
    edit(fine_tune__strategies__last={"freeze_until": "layer3"})
    assert sweep.choose_strategy(load_params(), None) == "partial_freeze"
    assert sweep.choose_strategy(load_params(), "last") == "last"
    edit(fine_tune__strategies__partial_freeze__boundary_cache="off")
    assert sweep.choose_strategy(load_params(), None) == "last"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("partial", "partial is not in fine_tune.strategies"),
        ("full_retrain", "fine_tune.strategies.full_retrain: found `freeze_until: none`"),
        ("from_scratch", "fine_tune.strategies.from_scratch: found `init: random`"),
        (None, "fine_tune.strategies"),
    ],
)
def test_strategy_without_a_cached_boundary_is_one_line(edit: Edit, name: str | None, words: str) -> None:
    expected = "partial_freeze"
    if name is None:
        edit(fine_tune__strategies__partial_freeze__freeze_until="none")
        expected = "none"
    with pytest.raises(ValueError, match=f"^{words}[;:] expected .* has a boundary cache: {expected}$"):
        sweep.show(name, (), (), 8, None)


def test_seed_without_a_split_is_one_line(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^--seed 7: expected some of split\.seeds, \[0, 1\]$"):
        sweep.show(None, (), (0, 7), 8, None)


# The repository


def test_workspace_that_differs_from_head_is_one_line(folder: Path, edit: Edit) -> None:
    edit(threads=1)
    words = r"^the workspace differs from HEAD, where experiments start: params\.yaml; commit or stash that$"
    with pytest.raises(ValueError, match=words):
        sweep.show(None, (), (), 8, None)


def test_words_of_git_and_dvc_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
    with pytest.raises(ValueError, match="not inside of a DVC repository"):
        sweep.show(None, (), (), 8, None)
    (folder / ".git").rename(folder / "not_git")
    with pytest.raises(ValueError, match=r"^git rev-parse: fatal: not a git repository"):
        sweep.show(None, (), (), 8, None)


def test_an_experiment_changes_the_depth_and_the_epochs_and_no_run_of_the_matrix(edit: Edit) -> None:
    def changes(strategy: str, seed: int) -> dict[str, Any]:
        return Trainer(load_params(), strategy, [seed], "", set()).changes(Depth("layer2", 1, 1), 2, seed)

    edit(fine_tune__strategies__last={"freeze_until": "layer3"})
    own = {f"fine_tune.strategies.{{}}.{key}": value for key, value in (("freeze_until", "layer2"), ("epochs", 2))}
    assert changes("partial_freeze", 0) == {key.format("partial_freeze"): value for key, value in own.items()}
    added = {"fine_tune.run": ["partial_freeze", "last"], "fine_tune.seeds": [0, 1]}
    assert changes("last", 1) == {key.format("last"): value for key, value in own.items()} | added


def test_what_is_there_costs_nothing(folder: Path) -> None:
    depth = Depth("layer2", 10, 5)
    trainer = Trainer(load_params(), "partial_freeze", [0, 1], "", set())
    assert trainer.cost(depth, 2) == 2 * 2 * (10 + 3 * 5)
    trainer.existing.add("sweep-partial_freeze-layer2-epochs-2-seed-0")
    assert trainer.cost(depth, 2) == 2 * (10 + 3 * 5)
    trainer.existing.add("sweep-partial_freeze-layer2-epochs-2-seed-1")
    assert trainer.cost(depth, 2) == 0
    assert trainer.cost(depth, 4) > 0


# Table and proposal

N = 200


def result(freeze_until: str | int, quality: float, head: float = 1.0, n: int = N) -> Result:
    """Every image is predicted with about this logit for its class."""
    noise = np.random.default_rng(0).normal(0, 0.3, n)

    def outcomes(logit: float) -> Any:
        logits = np.stack([logit + noise, np.zeros(n)], axis=1)
        return of_predictions(Predictions(np.arange(n), logits), np.zeros(n, np.int64))

    names = [f"sweep-x-{freeze_until}"]
    study = ones_study(n, metric="nll")
    return Result(Depth(freeze_until, 1, 1), names, [outcomes(quality)], [outcomes(head)], study, 0.25, 3.2e12)


def test_table_has_a_line_for_each_depth_and_the_difference_from_the_lowest_nll() -> None:
    head, _, first, second = sweep.as_table([result("blocks.4", 1.5), result("blocks.2", 2.0)]).splitlines()
    assert "test" not in head
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, first, second)]
    assert [line[0] for line in cells] == ["frozen until", "blocks.4", "blocks.2"]
    assert cells[2][3] == "lowest"
    assert cells[1][3].startswith("+0.0")
    assert float(cells[1][2]) > float(cells[2][2])
    assert cells[1][1] == "25.0%"
    assert cells[1][5:] == ["3.2", "sweep-x-blocks.4"]


def test_deeper_one_is_proposed_if_the_cheaper_one_is_shown_to_be_worse() -> None:
    text = sweep.as_proposal("partial_freeze", [result("blocks.4", 1.5), result("blocks.2", 2.5)])
    assert "fine_tune.strategies.partial_freeze:\n\n      freeze_until: blocks.2\n" in text
    assert "minus that of blocks.4, the runner-up: -0." in text
    assert "minus that of the head alone: -0." in text
    assert "200 units" in text
    assert "cannot tell" not in text
    assert "not shown" not in text


def test_cheapest_is_proposed_if_they_cannot_be_told_apart_and_the_text_says_so() -> None:
    text = sweep.as_proposal("last", [result("blocks.4", 1.5, 1.5), result("blocks.2", 1.5001, 1.5)])
    assert "freeze_until: blocks.4\n" in text
    assert "Validation cannot tell it from blocks.2; the cheapest of them is proposed." in text
    assert "It is not shown to be better than the head alone" in text


def test_single_depth_has_no_runner_up_and_few_units_are_said() -> None:
    text = sweep.as_proposal("last", [result(5, 1.5, n=7)])
    assert "freeze_until: 5\n" in text
    assert "runner-up" not in text
    assert "With fewer than 10 units" in text


def test_a_proposal_that_is_worse_than_the_head_says_so() -> None:
    text = sweep.as_proposal("last", [result("blocks.4", 1.5, 2.5)])
    assert "It is worse than the head alone, which needs no fine-tuning." in text
    assert "not shown" not in text


def test_the_network_before_training_is_no_candidate() -> None:
    """Here it is the best one, so that all depths would look the same."""
    study, random = ones_study(40, metric="nll"), np.random.default_rng(0)
    quality = {"epoch 0": 3.0, "epoch 1": 0.5, "epoch 10": 1.0}
    logits = {
        name: np.stack([logit + random.normal(0, 0.1, 40), np.zeros(40)], axis=1) for name, logit in quality.items()
    }
    probabilities = {name: predictions(range(40), each).log_probability for name, each in logits.items()}
    found = make_candidates(probabilities, study.label)
    fields = ("predicted", "true_log_probability", "positive_log_probability")
    arrays = {f"candidates_{name}": np.ascontiguousarray(getattr(found, name)) for name in fields}
    arrays["val_rows"] = np.arange(40)
    files = {"run.json": json.dumps({"candidates": found.names}).encode(), "predictions.safetensors": save(arrays)}
    read = sweep.read_validation(lambda path: files[path.name], "partial_freeze", 0, study)
    assert np.allclose(read.true_log_probability, found.true_log_probability[2])


@pytest.mark.parametrize(
    ("freeze_until", "line"), [("0.5", "'0.5'"), ("blocks.4", "blocks.4"), (12, "12"), ("none", "none")]
)
def test_proposed_line_means_the_same_in_yaml(freeze_until: str | int, line: str) -> None:
    text = sweep.as_proposal("last", [result(freeze_until, 1.5)])
    assert f"freeze_until: {line}\n" in text
    assert YAML(typ="safe", pure=True).load(f"freeze_until: {line}")["freeze_until"] == freeze_until


# Budget


@pytest.fixture
def trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | int, int]]:
    """Grows by the depths that a sweep trains, and their epochs. Each takes a minute, and one for every epoch."""
    monkeypatch.setattr(sweep.experiments, "check_images", lambda *_: None)
    monkeypatch.setattr(sweep.experiments, "names", lambda: {"sweep-partial_freeze-layer3.0-epochs-2-seed-0"})
    found: list[tuple[str | int, int]] = []
    clock = SimpleNamespace(seconds=0.0)

    def train(self: Trainer, depth: Depth, epochs: int) -> Result:
        if cost := self.cost(depth, epochs):
            clock.seconds += 60 * (1 + epochs)
            self.timed.append((cost, 60.0 * (1 + epochs)))
            found.append((depth.freeze_until, epochs))
        return result(depth.freeze_until, 1 + depth.flops_behind / 1e9)

    monkeypatch.setattr(Trainer, "train", train)
    monkeypatch.setattr(sweep, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    return found


@pytest.mark.slow
def test_minutes_leave_depths_out_and_train_the_others_as_without_them(
    trained: list[tuple[str | int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    depths = freeze_untils()
    assert len(depths) == 6
    sweep.show(None, (), (), 8, None)
    unlimited = trained.copy()
    assert sorted(epochs for _, epochs in unlimited) == [2] * 5 + [4] * 3 + [8] * 2, "the sixth was there"
    assert "Not tried" not in capsys.readouterr().out
    n_entered = []
    for minutes in (0.1, 30, 60, 90, 120, 1000):
        trained.clear()
        sweep.show(None, (), (), 8, minutes)
        entered = [depths[0], *(depth for depth, epochs in trained if epochs == 2)]
        n_entered.append(len(entered))
        assert {epochs for _, epochs in trained} <= {2, 4, 8}
        assert all(depth in entered for depth, _ in trained)
        assert [epochs for _, epochs in trained].count(8) == 2
        said = re.search(rf"^Not tried, because of --minutes {minutes}: (.+)\.$", capsys.readouterr().out, re.MULTILINE)
        assert (said[1].split(", ") if said else []) == [depth for depth in depths if depth not in entered]
    assert n_entered == sorted(n_entered)
    assert n_entered[0] == 2
    assert n_entered[-1] == 6
    assert any(2 < n < 6 for n in n_entered), n_entered
    assert trained == unlimited
