"""plan: what params.yaml means for the network, and one line for whatever does not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.network import backbones, cuts, plans
from pipeline.params import BackboneChoice
from pipeline.stages import plan
from tests import factories
from tests.factories import PREPROCESSING, backbone_plan

SIZE = 32
TINY, MOBILENET = "timm/test_resnet", "torchvision/mobilenet_v3_small"
PRETRAINED = {"kind": "pretrained", "standardize": False}


@pytest.fixture(autouse=True)
def _empty_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def configure(strategies: dict[str, dict[str, Any]], name: str = TINY, **changes: dict[str, Any]) -> None:
    """params.yaml of the repository with a small network, these strategies, and sections changed."""
    params = factories.params_document()
    sections: dict[str, dict[str, Any]] = {
        "backbone": {"name": name, "weights": "random"},
        "features": {"image_size": SIZE},
        "fine_tune": {"run": [*strategies], "seeds": [0], "strategies": strategies},
        "compare": {"guard": {}},
        "runtime": {"device": "cpu"},
    }
    for section, values in sections.items():
        params[section].update(values)
    for section, values in changes.items():
        params[section].update(values)
    factories.write_params(params)


def write_weights(seed: int) -> backbones.Backbone:
    backbone = backbones.load(BackboneChoice.of(TINY, "random", seed), SIZE)
    Path("data/weights").mkdir(parents=True, exist_ok=True)
    save_file(backbone.module.state_dict(), "data/weights/own.safetensors")
    return backbone


def written() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("data/plan").glob("*")}


def test_plan_of_the_backbone_is_what_one_measures() -> None:
    backbone = write_weights(seed=5)
    configure({}, backbone={"weights": "own.safetensors"}, features={"cut": "layer3", "pool": "avg"})
    plan.main()
    found = plans.read_backbone()
    assert [*written()] == ["backbone.json"]
    base, _ = cuts.split(backbone, cuts.resolve(backbone, "layer3"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        maps = base(torch.zeros(1, 3, SIZE, SIZE))
    assert (found.choice.name, found.choice.weights, found.image_size) == (TINY, "own.safetensors", SIZE)
    assert (found.weights_sha256, found.feature_dim) == (backbone.weights_sha256, backbone.feature_dim)
    assert (found.cut, found.pool, found.feature_shape) == (cuts.resolve(backbone, "layer3"), "avg", (maps.shape[1],))
    assert found.preprocessing == backbone.with_inputs("pad", "fast").preprocessing
    assert found.parameters == sum(parameter.numel() for parameter in base.parameters())
    assert found.flops_per_image == counter.get_total_flops()
    assert found.licence is None, "nobody states the licence of a file"


def test_what_is_given_of_the_preprocessing_and_the_key_are_in_the_plan() -> None:
    backbone = backbones.load(BackboneChoice.of(TINY, "random", 5), SIZE)
    Path("data/weights").mkdir(parents=True)
    torch.save({"teacher": backbone.module.state_dict(), "state_dict": {}}, "data/weights/own.ckpt")
    given = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "interpolation": "nearest"}
    configure({}, backbone={"weights": "own.ckpt", "checkpoint_key": "teacher", **given})
    plan.main()
    found = plans.read_backbone()
    assert found.weights_sha256 == backbone.weights_sha256
    assert found.choice.checkpoint_key == "teacher"
    assert found.preprocessing.model_dump(mode="json", include={*given}) == given
    again = backbones.load_planned(found, "here")
    assert (again.preprocessing, again.weights_sha256) == (found.preprocessing, found.weights_sha256)


def test_the_log_states_the_licence_of_published_weights_and_warns_where_it_is_non_commercial(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)  # there is no network
    for name, licence, n_warnings in ((TINY, "apache-2.0", 0), ("timm/convnextv2_atto.fcmae", "cc-by-nc-4.0", 1)):
        caplog.clear()
        configure({}, name, backbone={"weights": "default"})
        with caplog.at_level("INFO"):
            plan.main()
        assert plans.read_backbone().licence == licence
        assert f"licence of the weights: {licence}" in caplog.text
        assert caplog.text.count(f"warning: the licence of the weights ({licence}) excludes commercial") == n_warnings


@pytest.mark.parametrize(("size", "image_size", "is_told"), [(384, None, False), (385, None, True), (518, 518, False)])
def test_the_log_states_what_an_image_costs_where_the_published_size_is_large(
    caplog: pytest.LogCaptureFixture, size: int, image_size: int | None, is_told: bool
) -> None:
    geometry = PREPROCESSING.model_copy(update={"crop": size})
    with caplog.at_level("INFO"):
        plan.remark(backbone_plan(preprocessing=geometry, image_size=image_size, flops_per_image=31 * 10**9))
    assert (f"takes images of {size} px: 31.0 GFLOPs a view; features.image_size can be set" in caplog.text) == is_told


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_plan_of_a_transformer_holds_its_tokens_and_how_images_become_squares(resize: str) -> None:
    configure({}, "timm/test_vit", features={"cut": "norm", "pool": "cls+avg", "resize": resize})
    plan.main()
    found = plans.read_backbone()
    assert (found.pool, found.prefix_tokens, found.feature_shape) == ("cls+avg", 1, (2 * found.feature_dim,))
    loaded = backbones.load_planned(found, "here")
    assert loaded.preprocessing == found.preprocessing
    assert loaded.preprocessing.geometry == resize


def test_plan_of_several_cuts_holds_their_layout_and_that_of_one_cut_does_not() -> None:
    configure({}, features={"cut": ["all", "layer1", "layer3"], "pool": "avg"})
    plan.main()
    found, backbone = plans.read_backbone(), backbones.load(BackboneChoice.of(TINY, "random", 0), SIZE)
    shapes = [
        cuts.split(backbone, cuts.resolve(backbone, cut))[0](torch.zeros(1, 3, SIZE, SIZE)).shape[1:]
        for cut in ("layer1", "layer3", "all")
    ]
    assert [tap.model_dump() for tap in found.taps] == [
        {"cut": "layer1.0.act2", "pool": "avg", "prefix_tokens": 0, "width": shapes[0][0]},
        {"cut": "layer3.0.act3", "pool": "avg", "prefix_tokens": 0, "width": shapes[1][0]},
        {"cut": "all", "pool": "none", "prefix_tokens": 0, "width": shapes[2][0]},
    ]
    assert (found.cut, found.pool, found.prefix_tokens) == ("all", "none", 0)
    assert found.feature_shape == (sum(shape[0] for shape in shapes),)
    assert found.parameters == sum(parameter.numel() for parameter in backbone.module.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.module(torch.zeros(1, 3, SIZE, SIZE))
    assert found.flops_per_image == counter.get_total_flops(), "one pass gives all of them"
    configure({})
    plan.main()
    assert "taps" not in json.loads(written()["backbone.json"])
    assert plans.read_backbone().taps == ()


def measured(backbone: backbones.Backbone, boundary: str, end: str) -> tuple[torch.Tensor, dict[str, int]]:
    """The activation at `boundary`, and what torch counts of the network before and behind it, up to `end`."""
    prefix, suffix, _ = cuts.split(backbone, boundary, end)
    with torch.no_grad(), FlopCounterMode(display=False) as before:
        activation = prefix(torch.zeros(1, 3, SIZE, SIZE))
    with FlopCounterMode(display=False) as behind:
        output = suffix.eval().requires_grad_(True)(activation)
        if boundary != end:
            output.sum().backward()
    counted = {"trained_parameters": sum(parameter.numel() for parameter in suffix.parameters())}
    counted |= {"prefix_flops": before.get_total_flops(), "suffix_training_flops": behind.get_total_flops()}
    return activation, counted


@pytest.mark.parametrize("freeze_until", ["none", "conv1", "layer1", "layer2", "layer3", "all"])
def test_plan_of_a_strategy_on_several_cuts_is_what_one_counts(freeze_until: str) -> None:
    configure({"tuned": {"freeze_until": freeze_until}}, features={"cut": ["layer1", "layer3"], "pool": "avg"})
    plan.main()
    found, backbone = plans.read_strategy("tuned"), backbones.load(BackboneChoice.of(TINY, "random", 0), SIZE)
    first, end = (cuts.resolve(backbone, cut) for cut in ("layer1", "layer3"))
    boundary = end if freeze_until == "all" else cuts.resolve(backbone, freeze_until)
    activation, counted = measured(backbone, boundary, end)
    widths = {tap.cut: tap.width for tap in plans.read_backbone().taps}
    n_before = widths[first] if freeze_until in ("layer1", "layer2") else 0
    n_values = sum(widths.values()) if boundary == end else n_before + activation.numel()
    assert found.boundary == boundary
    assert {name: getattr(found, name) for name in counted} == counted
    assert found.cached_bytes_per_image == (0 if freeze_until == "none" else 4 * n_values)


@pytest.mark.parametrize("boundary_cache", ["on", "off"])
@pytest.mark.parametrize("store_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("freeze_until", ["none", "layer2", 3, "all"])
def test_plan_of_a_strategy_is_what_one_counts(freeze_until: str | int, store_dtype: str, boundary_cache: str) -> None:
    configure(
        {"tuned": {"freeze_until": freeze_until, "boundary_cache": boundary_cache}},
        features={"store_dtype": store_dtype, "cut": "layer4", "pool": "avg"},
    )
    plan.main()
    found = plans.read_strategy("tuned")
    backbone = backbones.load(BackboneChoice.of(TINY, "random", 0), SIZE)
    end = cuts.resolve(backbone, "layer4")
    boundary = end if freeze_until == "all" else cuts.resolve(backbone, freeze_until)
    activation, counted = measured(backbone, boundary, end)
    n_values = activation[0].numel() if freeze_until != "all" else activation.shape[1]  # pooled
    is_cached = boundary_cache == "on" and freeze_until != "none"
    assert found.boundary == boundary
    assert {name: getattr(found, name) for name in counted} == counted
    assert found.cached_bytes_per_image == (n_values * np.dtype(plan.STORE_DTYPES[store_dtype]).itemsize * is_cached)
    assert found.is_cached == is_cached
    assert found.recipe.freeze_until == freeze_until


def test_flops_of_a_suffix_of_one_convolution_are_three_products_without_the_one_for_its_input() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 5, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)).mean((2, 3))

    configure({"tuned": {"freeze_until": "first"}, "whole": {}})
    params = plan.load_params()
    tiny = backbones.load(params.backbone, SIZE)
    backbone = backbones.Backbone("torchvision/toy", Network(), tiny.preprocessing, "", 5, None)
    base = plan.plan_backbone(backbone, params)
    tuned, whole = (
        plan.plan_strategy(backbone, base, params.fine_tune.strategies[name], 4, "key") for name in ("tuned", "whole")
    )
    first, second = 2 * 3 * 4 * SIZE**2, 2 * 4 * 5 * SIZE**2  # two per multiply-add
    assert base.flops_per_image == first + second
    assert (tuned.prefix_flops, tuned.suffix_training_flops) == (first, 2 * second)  # forward, gradient of the weights
    assert (whole.prefix_flops, whole.suffix_training_flops) == (0, 2 * first + 3 * second)
    assert (tuned.trained_parameters, whole.trained_parameters) == (20, 32)
    assert tuned.cached_bytes_per_image == 4 * 4 * SIZE**2


@pytest.mark.parametrize(
    ("strategy", "changes", "expected"),
    [
        (
            {"freeze_until": "layer9"},
            {},
            "fine_tune.strategies.tuned.freeze_until: 'layer9' holds no cut point of timm/test_resnet; nearest: ",
        ),
        ({"freeze_until": 4}, {}, "fine_tune.strategies.tuned.freeze_until: no cut point of timm/test_resnet has "),
        (
            {"freeze_until": "layer3"},
            {"features": {"cut": "layer2", "pool": "avg"}},
            "fine_tune.strategies.tuned.freeze_until: layer3",
        ),
        (
            {"drop_path": 0.1},
            {"backbone": {"name": "timm/dla46_c"}},
            "fine_tune.strategies.tuned.drop_path: timm/dla46_c has no stochastic depth; expected null",
        ),
        (
            {"drop_path": 0.1},
            {"backbone": {"name": "torchvision/squeezenet1_1"}},
            "fine_tune.strategies.tuned.drop_path: torchvision/squeezenet1_1 has no stochastic depth; expected null",
        ),
        (
            {"drop_path": 0.1, "freeze_until": "all"},
            {},
            "fine_tune.strategies.tuned.drop_path: timm/test_resnet has no stochastic depth behind the freeze boundary",
        ),
        ({}, {"features": {"cut": "layer9"}}, "features.cut: 'layer9' holds no cut point"),
        ({}, {"features": {"cut": "layer3"}}, "features.pool: the features at features.cut have the shape"),
        (
            {},
            {"features": {"pool": "avg"}},
            "features.pool: avg, but features.cut gives vectors; expected none, or an earlier cut, such as layer3.",
        ),
        (
            {},
            {"features": {"cut": "layer3", "pool": "cls+avg"}},
            "features.pool: cls+avg, but features.cut gives features of 192x2x2 without a class token; expected none, ",
        ),
        (
            {},
            {"features": {"cut": ["layer2", "all"]}},
            "features.pool: none, but features.cut has several cuts, and layer2.0.act2 gives features of 48x4x4, ",
        ),
        (
            {},
            {"features": {"cut": ["layer2", "layer2.0", "all"], "pool": "avg"}},
            "features.cut: layer2 and layer2.0 are the same cut point of timm/test_resnet, layer2.0.act2",
        ),
        (
            {},
            {"features": {"cut": "every_block", "pool": "cls"}},
            "features.cut: every_block: `pool: cls` makes vectors of no block",
        ),
        (
            {"freeze_until": "layer4"},
            {"features": {"cut": ["layer1", "layer3"], "pool": "avg"}},
            "fine_tune.strategies.tuned.freeze_until: layer4.0.act2 lies behind layer3.0.act3, where the backbone ends",
        ),
        ({}, {"features": {"cut": "layer4"}, "head": PRETRAINED}, "head.kind: pretrained: the network has no dense"),
        ({}, {"features": {"cut": "layer2"}, "head": PRETRAINED}, "head.kind: pretrained: behind features.cut there"),
        ({}, {"backbone": {"name": "timm/resnet1"}}, "backbone.name: timm/resnet1 is not in timm; nearest: "),
        ({}, {"backbone": {"weights": "none.pth"}}, "backbone.weights: 'none.pth' is no file below data/weights/"),
    ],
)
def test_what_does_not_fit_is_one_line_with_its_key_and_nothing_is_written(
    strategy: dict[str, Any], changes: dict[str, dict[str, Any]], expected: str
) -> None:
    configure({"good": {}, "tuned": strategy}, TINY, **changes)
    with pytest.raises(ValueError, match=r"^params\.yaml: ") as caught:
        plan.main()
    assert str(caught.value).startswith(f"params.yaml: {expected}")
    assert "\n" not in str(caught.value)
    assert written() == {}


def test_a_weights_file_of_another_network_is_one_line_and_leaves_the_plan_as_it_was() -> None:
    write_weights(seed=5)
    configure({"tuned": {}}, backbone={"weights": "own.safetensors"})
    plan.main()
    before = written()
    other = backbones.load(BackboneChoice.of(MOBILENET, "random", 0), SIZE)
    save_file(other.module.state_dict(), "data/weights/own.safetensors")
    with pytest.raises(ValueError, match=r"^data/weights/own\.safetensors: weights of another network; ") as caught:
        plan.main()
    assert "\n" not in str(caught.value)
    assert written() == before


def test_pretrained_dense_layers_are_found_behind_an_earlier_cut() -> None:
    configure({"tuned": {}}, MOBILENET, features={"cut": "flatten"}, head=PRETRAINED)
    plan.main()
    assert sorted(written()) == ["backbone.json", "tuned.json"]


def test_other_files_in_the_weights_directory_change_no_plan() -> None:
    write_weights(seed=5)
    configure({"tuned": {"freeze_until": "layer2"}}, backbone={"weights": "own.safetensors"})
    plan.main()
    before = written()
    Path("data/weights/other.pth").write_bytes(b"anything")
    plan.main()
    assert written() == before


def test_other_weights_change_the_plan_of_the_backbone_alone() -> None:
    write_weights(seed=5)
    configure({"tuned": {"freeze_until": "layer2"}}, backbone={"weights": "own.safetensors"})
    plan.main()
    before = written()
    write_weights(seed=6)
    plan.main()
    assert written()["backbone.json"] != before["backbone.json"]
    assert written()["tuned.json"] == before["tuned.json"]


def test_a_default_changes_the_plans_of_the_strategies_that_do_not_set_it_themselves() -> None:
    configure({"own": {"learning_rate_base": 1e-3}, "plain": {}})
    plan.main()
    before = written()
    params = json.loads(Path("params.yaml").read_text())
    params["fine_tune"]["defaults"]["learning_rate_base"] = 7e-5
    factories.write_params(params)
    plan.main()
    after = written()
    assert {name: after[name] == before[name] for name in after} == {
        "backbone.json": True,
        "own.json": True,
        "plain.json": False,
    }
    assert json.loads(after["plain.json"])["recipe"]["learning_rate_base"] == 7e-5


def test_a_strategy_that_does_not_run_has_no_plan_and_changes_none() -> None:
    configure({"tuned": {}, "other": {"freeze_until": "layer9"}}, fine_tune={"run": ["tuned"]})
    plan.main()
    assert sorted(written()) == ["backbone.json", "tuned.json"]
