"""The command advise: its tables, and a probe that times what training does."""

import contextlib
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.params import load_params
from pipeline.report import provenance
from pipeline.tools import advise, experiments
from pipeline.tools.advise import Clock, Estimate, Probe
from tests import factories

HEAD = {"value": 0.8, "low": 0.75, "high": 0.85}
ADVICE: dict[str, Any] = {
    "cannot_tell": "",
    "images": 1200,
    "head": HEAD,
    "data_sha256": "a",
    "blocks": [
        {"cut": "layer1", "width": 64, "linear": HEAD, "nearest": HEAD},
        {"cut": "all", "width": 512, "linear": HEAD, "nearest": HEAD},
    ],
    "together": HEAD,
    "random_weights": HEAD,
    "network": {
        "name": "timm/x",
        "weights": "default",
        "licence": "cc-by-nc-4.0",
        "image_size": 224,
        "cuts": ["all"],
        "parameters": 11_000_000,
        "flops_per_image": 3_600_000_000,
        "features": 512,
    },
}


def of(name: str, value: float, **changes: Any) -> dict[str, Any]:
    made = copy.deepcopy(ADVICE)
    made["head"]["value"] = value
    made["network"]["name"] = name
    return made | changes


def test_networks_are_listed_once_the_best_first():
    found = {"one": of("timm/a", 0.8), "two": of("timm/b", 0.9), "three": of("timm/a", 0.8)}
    found["two"]["network"]["licence"] = None
    lines = advise.as_networks(found, {name: {"features.resize": "crop"} for name in found}).splitlines()[4:]
    assert len(lines) == 2
    assert lines[1].endswith("| one, three |")
    assert lines[0].startswith(
        "| timm/b (default, 224 px) | all | 90.0 % (75.0 % to 85.0 %) | 3.60 | 11,000,000 | unknown"
    )
    assert "cc-by-nc-4.0, excludes commercial use" in lines[1]


def test_settings_that_differ_are_columns_and_every_setting_has_a_row(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    found = {name: json.dumps(of("timm/a", value)).encode() for name, value in (("squash", 0.7), ("pad", 0.9))}
    Path("reports").mkdir()
    Path("reports/advice.json").write_text(json.dumps(of("timm/a", 0.8)))
    outs = [{"path": "reports/advice.json", "md5": provenance.digest(advise.ADVICE), "size": 1}]
    Path("dvc.lock").write_bytes(lock_of("crop", outs))
    monkeypatch.setattr(advise, "experiments", Experiments(found))
    advise.show_networks()
    title, _, *lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert title[1:4] == ["cut", "features.resize", "linear head (95 % interval)"]
    assert [(line[2], line[-1]) for line in lines] == [
        ("pad", "pad |"),
        ("crop", "(this directory) |"),
        ("squash", "squash |"),
    ]
    Path("dvc.lock").write_bytes(lock_of("crop", []))
    advise.show_networks()
    assert "| not known | 80.0 %" in capsys.readouterr().out
    assert "the settings of reports/advice.json are not known: reports/advice.json: not the output" in caplog.text


def lock_of(resize: str, outs: Sequence[dict] = ()) -> bytes:
    """dvc.lock of an advice."""
    params = {"advise": {"folds": 5}, "features": {"resize": resize, "cut": "all", "batch_size": {"cpu": 8}}}
    stages = {"advise": {"params": {"params.yaml": params | {"threads": 2}}, "outs": [*outs]}}
    return json.dumps({"schema": "2.0", "stages": stages}).encode()


class Experiments:
    """Experiments whose advice is at hand; one has none. They resize as their names say, else by cropping."""

    FINISHED = experiments.FINISHED

    def __init__(self, found: dict[str, bytes], **others: str) -> None:
        self.found, self.others = found, others

    def states(self) -> dict[str, str]:
        return dict.fromkeys(self.found, self.FINISHED) | self.others

    def reading(self, name: str) -> Any:
        def read(path: Path) -> bytes:
            if not self.found[name]:
                raise ValueError("reports/advice.json is not in DVC's cache")
            return self.found[name] if path == advise.ADVICE else lock_of(name if len(name) > 1 else "crop")

        return contextlib.nullcontext(read)


def test_experiments_on_other_images_or_without_advice_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    advices = {"a": of("timm/a", 0.8), "b": of("timm/b", 0.9), "c": of("timm/c", 0.9, data_sha256="other")}
    advices["d"] = of("timm/d", 0.9, cannot_tell="too few")
    found = {name: json.dumps(each).encode() for name, each in advices.items()} | {"e": b""}
    monkeypatch.setattr(advise, "experiments", Experiments(found, f="failed", q="queued", r="running", p="queued"))
    advise.show_networks()
    printed = capsys.readouterr().out
    failed, queued = "1 failed (f; why: dvc queue logs NAME)", "2 queued (p, q; to run: dvc exp run --run-all)"
    assert printed.endswith(f"Not in the table: {failed}, {queued}, 1 running (r).\n")
    assert "features." not in printed
    assert "timm/a" in printed
    assert "timm/b" in printed
    assert "timm/c" not in printed
    assert "left out: c." in printed
    monkeypatch.setattr(advise, "experiments", Experiments({"e": b""}, f="failed"))
    way_out = (
        r"\(1 failed \(f; why: dvc queue logs NAME\)\); run: dvc exp run --queue -S 'fine_tune.run=\[\]' -S backbone"
    )
    with pytest.raises(ValueError, match=way_out):
        advise.show_networks()


def test_tables_are_markdown_and_words_fit_a_terminal():
    text = advise.as_text(["**Where.** " + "word " * 60, "Next."])
    assert "**" not in text
    assert max(map(len, text.splitlines())) <= advise.WIDTH
    table = advise.as_table(ADVICE)
    assert "| layer1 | 64 | 80.0 % (75.0 % to 85.0 %) | 80.0 % |" in table
    assert "| all blocks together | 576 |" in table
    assert "| full | 2.0 | 0.5 |" in advise.as_costs({"full": Estimate(120.0, 500_000_000)})


@pytest.mark.parametrize(
    ("rates", "epochs"),
    [((), 8), (((1.0, 1.0), (2.0, 1.0)), 16), (tuple((float(i), 1.0) for i in range(1, 7)), 6 * 2 + 3 * 8)],
)
def test_all_learning_rates_are_trained(rates: tuple, epochs: int):
    recipe = factories.strategy(epochs=8, learning_rates=rates, halving_keeps=3, halving_epochs=2)
    assert advise.trained_epochs(recipe) == epochs


@pytest.mark.parametrize("changes", [{}, {"mixup": 0.2, "ema": 0.9, "batchnorm": "train"}])
def test_what_is_timed_is_training_and_prediction_of_any_recipe(changes: dict[str, Any]):
    params = load_params()
    labels = factories.labels(40)
    split: Any = None
    probe = Probe(params, factories.backbone_plan(), split, labels, split, split, torch.device("cpu"))
    recipe = factories.strategy(**changes)
    views = advise.evaluation_views(params.evaluation.views)
    values = {(row, view): torch.randn(1, 8) for row in range(16) for view in views}
    network = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 2))
    step, start_up, of_view = probe.time_training(network, recipe, values)
    assert min(step, of_view) > 0
    assert start_up >= 0


def test_the_clock_notes_every_batch_that_is_asked_for():
    clock = Clock({(0, 0): torch.zeros(1, 2), (1, 0): torch.ones(1, 2)}, torch.device("cpu"))
    loaded = [*clock.load([[(0, 0)], [(0, 0), (1, 0)]])]
    assert [tuple(batch.shape) for batch in loaded] == [(1, 2), (2, 2)]
    assert [len(times) for times in clock.asked] == [4]
