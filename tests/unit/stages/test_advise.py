"""The stage advise on tiny images: what it looks at, what it leaves alone, and networks that cannot be cut."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset import decoding, manifest
from pipeline.dataset.manifest import Images, Labels, Split
from pipeline.features.hdf5 import Row
from pipeline.network import backbones, cuts
from pipeline.params import BackboneChoice
from pipeline.stages import advise, plan
from tests import factories

N = 48
SPLIT = np.array(["train", "train", "train", "val", "test", "test"])[np.arange(N) // 2 % 6]
Run = Callable[[], bytes]


@pytest.fixture
def labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Labels:
    """48 pictures of two colours, split, and planned for a small network with weights of its own."""
    monkeypatch.chdir(tmp_path)
    Path("data/mine").mkdir(parents=True)
    random, names, digests = np.random.default_rng(0), [], []
    for row in range(N):
        names.append(f"{row:02}.png")
        pixels = random.normal((90, 140, 110) if row % 2 else (140, 90, 110), 40, (40, 40, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(Path("data/mine", names[-1]))
        digests.append(decoding.sha256(Path("data/mine", names[-1]).read_bytes()))
    manifest.write_images(Images(names, digests, [40] * N, [40] * N))
    made = factories.labels(N, image_id=names, sha256=digests)
    manifest.write_labels(made)
    manifest.write_split(Split(0, names, SPLIT))
    set_params()
    plan.main()
    monkeypatch.setattr("sys.argv", ["advise", "0"])
    return made


def set_params(**features: Any) -> None:
    document = factories.params_document()
    document["dataset"].update({"fetch": [], "path": "data/mine"})
    document["backbone"].update({"name": "timm/test_resnet", "weights": "random", "seed": 3})
    document["features"].update({"image_size": 64, "engine": "torch"} | features)
    document["fine_tune"].update({"run": []})
    document["compare"].update({"guard": {}})
    document["runtime"]["workers"] = 0
    document["threads"] = 1
    factories.write_params(document)


def run() -> bytes:
    advise.main()
    return advise.ADVICE.read_bytes()


def test_a_second_run_reads_the_store_and_gives_the_same_bytes(labels: Labels, computed: list[Row]):
    first = run()
    used = {labels.sha256[row] for row in np.flatnonzero(SPLIT != "test")}
    assert {name for name, _ in computed} == used, "no test image goes through the network"
    computed.clear()
    assert run() == first
    assert computed == []
    assert b'"layer2' in first


def test_labels_of_test_images_change_nothing(labels: Labels):
    before = run()
    label, test = labels.label.copy(), np.flatnonzero(SPLIT == "test")
    label[test] = 1 - label[test]
    manifest.write_labels(replace(labels, label=label))
    assert run() == before
    label[np.flatnonzero(SPLIT == "val")] = 0
    manifest.write_labels(replace(labels, label=label))
    assert run() != before


def test_weights_that_are_given_are_compared_with_random_ones(labels: Labels, monkeypatch: pytest.MonkeyPatch):
    base = plan.plans.read_backbone()
    given = base.model_copy(update={"choice": base.choice.model_copy(update={"weights": "default"})})
    load = backbones.load_planned
    monkeypatch.setattr(advise.backbones, "load_planned", lambda _, source: load(base, source))
    monkeypatch.setattr(advise.plans, "read_backbone", lambda: given)
    assert b'"errors_avoided"' in run()


def test_what_is_not_finite_is_a_remark(labels: Labels, monkeypatch: pytest.MonkeyPatch):
    fill = advise.extraction.fill
    calls = []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 1:
            raise ValueError("data/mine/1.png or a neighbour gives features that are not finite")
        return fill(*arguments)

    monkeypatch.setattr(advise.extraction, "fill", failing)
    base, prefix = plan.plans.read_backbone(), []
    backbone = backbones.load_planned(base, "")
    prefix = advise.prefix_of(backbone, advise.lay_out(backbone, base)[0])
    paths = {name: Path("data/mine", image) for image, name in zip(labels.image_id, labels.sha256, strict=True)}
    found, failure = advise.compute([prefix, prefix], labels.sha256[:4], paths, advise.load_params())
    assert len(found) == 1
    assert "not finite" in failure
    with pytest.raises(ValueError, match="not finite"):
        advise.compute([prefix], labels.sha256[:4], paths, advise.load_params())


@pytest.mark.parametrize(
    ("features", "n_own"),
    [
        ({"cut": "layer2", "pool": "avg"}, 1),
        ({"cut": ["layer1", "all"], "pool": "avg"}, 2),
        ({"cut": "every_block", "pool": "avg"}, 7),
        ({"cut": "layer3", "pool": "flatten"}, 1),
    ],
)
def test_the_cuts_of_the_plan_are_among_those_looked_at(labels: Labels, features: dict[str, Any], n_own: int):
    set_params(**features)
    plan.main()
    base = plan.plans.read_backbone()
    taps, own, remark = advise.lay_out(backbones.load_planned(base, ""), base)
    assert remark == ""
    assert own == ([tap.cut for tap in base.taps] or [base.cut])
    assert len(own) == n_own
    assert {*own} <= {tap.cut for tap in taps}
    assert b'"head"' in run()


@pytest.mark.parametrize("pool", ["avg", "cls", "cls+avg"])
def test_tokens_are_pooled_as_the_plan_says(pool: str):
    choice = BackboneChoice.of("timm/test_vit", "random", 0)
    backbone = backbones.load(choice, None)
    base = factories.backbone_plan(choice=choice, cut="all", pool=pool)
    taps, own, remark = advise.lay_out(backbone, base)
    assert own == ["all"]
    assert remark == ""
    assert {tap.pool for tap in taps[:-1]} == {pool}


def test_a_network_whose_blocks_cannot_be_cut_is_looked_at_at_its_end(monkeypatch: pytest.MonkeyPatch):
    backbone = backbones.load(factories.CHOICE, 64)

    def fails(*_: object) -> list[str]:
        raise ValueError("timm/test_resnet has no cut point")

    monkeypatch.setattr(cuts, "resolve_cuts", fails)
    taps, own, remark = advise.lay_out(backbone, factories.backbone_plan())
    assert ([tap.cut for tap in taps], own) == (["all"], ["all"])
    assert "has no cut point" in remark


def test_the_most_images_are_whole_units(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    group = [f"{row // 4}" for row in range(400)]
    labels = factories.labels(400, group=group)
    split = Split(0, labels.image_id, np.array(["train", "test"])[np.arange(400) // 200])
    rows = advise.choose_rows(labels, split, 50)
    assert len(rows) == 48
    assert (np.bincount(rows // 4)[np.unique(rows // 4)] == 4).all()
    assert (rows < 200).all()
    assert len(advise.choose_rows(labels, split, 5000)) == 200
    weightless = replace(labels, weight=np.zeros(400))
    assert len(advise.choose_rows(weightless, split, 50)) == 0
