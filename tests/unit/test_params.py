"""params.yaml is validated as a whole, and a mistake says which key, what was found and what is allowed."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline import params as module
from pipeline.features.views import training_views
from pipeline.params import PARAMS, Params, count_cores, load_params
from tests.factories import params_document

REPOSITORY = Path(__file__).parents[2]
SCRATCH = "fine_tune.strategies.from_scratch"
BOUNDARY = "expected none, all, a cut point, a module path, or a number (1 or more) of layers"
BOUNDARIES = ("features.cut", "fine_tune.strategies.partial_freeze.freeze_until")
NO_BOUNDARIES = [(value, json.dumps(value)) for value in (0, -3, True, 1.5, "", None)]
SEVERAL = "expected two or more different cuts, none of them none or every_block"
NOT_SEVERAL: list[list[Any]] = [[], ["layer3"], ["all", "all"], ["none", "all"], ["layer3", "every_block"]]


PRETRAINED = {"head.kind": "pretrained", "head.standardize": False, "features.cut": "features"}


def document_with(changes: dict[str, Any]) -> dict[str, Any]:
    document = params_document()
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = document
        for name in sections:
            section = section[name]
        section[last] = value
    return document


def load(document: Any, tmp_path: Path) -> Params:
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(document, stream)
    return load_text(stream.getvalue(), tmp_path)


def load_text(text: str, tmp_path: Path) -> Params:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return load_params(path)


def test_the_params_of_the_repository_are_valid():
    params = load_params(REPOSITORY / PARAMS)
    assert params.split.seeds
    assert set(params.fine_tune.run) <= params.fine_tune.strategies.keys()


def test_params_are_frozen(tmp_path: Path):
    params = load(document_with({}), tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        params.evaluation.views = ("identity",)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"dataset.columns": {"label": "breed", "image": "id"}},
            "dataset: columns: found ['image'], expected path, label, weight, group, stratum, subset, split, each with",
        ),
        ({"dataset.columns": {"label": ""}}, 'dataset.columns.label: found ""; expected a word'),
        (
            {"dataset.exclude": ["masks", "masks"]},
            'dataset.exclude: found ["masks", "masks"]; expected each entry once',
        ),
        ({"dataset.exclude": "masks"}, 'dataset.exclude: found "masks"; expected a list'),
        (
            {"dataset.min_class_size": 0},
            "dataset.min_class_size: found 0; expected it to be greater than or equal to 1",
        ),
        ({"head.dropuot": 0.1}, "head.dropuot: unknown key; expected dropout"),
        ({"head.zzz": 3}, "head.zzz: unknown key; expected only keys of the params.yaml in git"),
        ({"split.seeds": []}, "split.seeds: found []; expected at least one entry"),
        ({"dataset.path": ""}, 'dataset.path: found ""; expected a word'),
        ({"split.seeds": 3}, "split.seeds: found 3; expected a list"),
        ({"head": 3}, "head: found 3; expected a section with keys"),
        ({"backbone.name": "resnet50"}, 'backbone.name: found "resnet50"; expected torchvision/<name> or timm/<name>'),
        (
            {"backbone.mean": [123.7, 116.3, 103.5]},
            "backbone.mean: found [123.7, 116.3, 103.5]; expected three numbers, ",
        ),
        ({"backbone.mean": [0.5]}, "backbone.mean: found [0.5]; expected three numbers, of pixel values from 0 to 1"),
        ({"backbone.std": [0.2, 0.0, 0.2]}, "backbone.std: found [0.2, 0.0, 0.2]; expected three numbers above 0"),
        ({"backbone.interpolation": "cubic"}, "backbone.interpolation: found \"cubic\"; expected it to be 'nearest', "),
        ({"backbone.checkpoint_key": ""}, 'backbone.checkpoint_key: found ""; expected a word'),
        ({"extra": {}}, "extra: unknown key"),
        ({"features.views": "2"}, 'features.views: found "2"; expected it to be a valid integer'),
        ({"features.views": 2.5}, "features.views: found 2.5; expected it to be a valid integer"),
        ({"features.views": True}, "features.views: found true; expected it to be a valid integer"),
        ({"features.views": 0}, "features.views: found 0; expected it to be greater than or equal to 1"),
        ({"evaluation.views": 4}, "evaluation.views: found 4; expected auto, or a list"),
        ({"evaluation.views": "flips"}, 'evaluation.views: found "flips"; expected auto, or a list, e.g. [identity, '),
        ({"evaluation.views": []}, "evaluation.views: found []; expected at least one entry"),
        ({"evaluation.views": ["flip"]}, """evaluation.views.0: found "flip"; expected it to be 'identity', 'flip_h"""),
        (
            {"evaluation.views": ["identity"] * 2},
            'evaluation.views: found ["identity", "identity"]; expected each entry',
        ),
        ({"head.standardize": 1}, "head.standardize: found 1; expected it to be a valid boolean"),
        ({"dataset.path": None}, "dataset.path: found null; expected it to be a valid string"),
        ({"head": ["linear"]}, 'head: found ["linear"]; expected a section with keys'),
        ({"augmentation.noise_std": float("nan")}, "augmentation.noise_std: found NaN; expected it to be a finite"),
        ({"augmentation.noise_std": float("inf")}, "augmentation.noise_std: found Infinity; expected it to be a fin"),
        (
            {"head.regularization_strengths": [1.0, float("nan")]},
            "head.regularization_strengths.1: found NaN; expected it to be a finite number",
        ),
        ({"augmentation.hue": 0.7}, "augmentation.hue: found 0.7; expected it to be less than or equal to 0.5"),
        ({"augmentation.scale": [1.2, 0.8]}, "augmentation.scale: found [1.2, 0.8]; expected [low, high]"),
        ({"augmentation.crop_area": [0.0, 1.0]}, "augmentation.crop_area: found [0.0, 1.0]; expected [low, high]"),
        ({"features.engine": "onnx"}, "features.engine: found \"onnx\"; expected it to be 'auto', 'openvino' or 'tor"),
        ({"dataset.fetch": ["elpv", "elpv"]}, 'dataset.fetch: found ["elpv", "elpv"]; expected each entry once'),
        ({"split.seeds": [0, 0]}, "split.seeds: found [0, 0]; expected each entry once"),
        ({"split.seeds": [-1]}, "split.seeds.0: found -1; expected it to be greater than or equal to 0"),
        ({"split.seeds": [2**32]}, f"split.seeds.0: found {2**32}; expected it to be less than {2**32}"),
        ({"head.regularization_strengths": []}, "head.regularization_strengths: found []; "),
        ({"fine_tune.run": ["../up"]}, 'fine_tune.run.0: found "../up"; '),
        (
            {"features.pool": "max"},
            "features.pool: found \"max\"; expected it to be 'none', 'avg', 'flatten', 'cls' or 'cls+avg'",
        ),
        ({"features.store_dtype": "bf16"}, "features.store_dtype: found \"bf16\"; expected it to be 'fp32' or 'fp16'"),
        *(({key: value}, f"{key}: found {found}; {BOUNDARY}") for key in BOUNDARIES for value, found in NO_BOUNDARIES),
        *(({"features.cut": cut}, f"features.cut: found {json.dumps(cut)}; {SEVERAL}") for cut in NOT_SEVERAL),
        ({"features.cut": ["layer3", 0]}, f'features.cut: found ["layer3", 0]; {BOUNDARY}'),
        ({BOUNDARIES[1]: ["layer2", "layer3"]}, f'{BOUNDARIES[1]}: found ["layer2", "layer3"]; {BOUNDARY}'),
    ],
)
def test_a_value_that_no_key_allows_is_one_error_with_key_finding_and_range(
    changes: dict[str, Any], expected: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=r"params\.yaml") as error:
        load(document_with(changes), tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'params.yaml'}: {expected}")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head.kind": "mlp", "head.hidden": []}, ["head: ", "mlp", "at least one width"]),
        ({"head.kind": "linear", "head.hidden": [8]}, ["head: ", "linear", "`hidden: []`"]),
        ({"head.kind": "linear", "head.dropout": 0.5}, ["head: ", "linear", "`dropout: 0.0`"]),
        ({"features.cut": "none"}, ["features: ", "cut: found none", "expected all, a cut point"]),
        (PRETRAINED | {"head.hidden": [8]}, ["head: ", "pretrained", "`hidden: []`"]),
        (PRETRAINED | {"head.standardize": True}, ["head: ", "standardize: found true", "expected false"]),
        (PRETRAINED | {"features.cut": "all"}, ["features: ", "`cut: all`", "a cut before", "pipeline cuts NAME"]),
        (
            PRETRAINED | {"features.cut": ["features", "all"]},
            ["features: ", "`cut: ['features', 'all']`", "a cut before", "no list"],
        ),
        (PRETRAINED | {"features.cut": "every_block"}, ["features: ", "`cut: every_block`", "a cut before", "no list"]),
        (PRETRAINED | {"features.pool": "avg"}, ["features: ", "`pool: avg`", "needs a cut", "`pool: none`"]),
        (
            {f"{SCRATCH}.init": "random", f"{SCRATCH}.freeze_until": "all"},
            [f"{SCRATCH}: ", "`init: random` needs", "`freeze_until: none`"],
        ),
        (
            {f"{SCRATCH}.init": "random", f"{SCRATCH}.batchnorm": "frozen"},
            [f"{SCRATCH}: ", "`init: random` needs", "`batchnorm: train`"],
        ),
        (
            {f"{SCRATCH}.epochs": 3, f"{SCRATCH}.warmup_epochs": 4},
            [f"{SCRATCH}: ", "warmup_epochs: found 4", "at most epochs (3)"],
        ),
        (
            {"split.test_fraction": 0.5, "split.val_fraction": 0.5},
            ["split: ", "shares of test and validation", "found 1", "less than 1"],
        ),
        ({"fine_tune.run": ["nothing"]}, ["fine_tune.run: found ['nothing']", "full_retrain"]),
        ({"split.seeds": [0], "fine_tune.seeds": [7]}, ["fine_tune.seeds: found [7]", "some of split.seeds"]),
        ({"fine_tune.seeds": []}, ["fine_tune.seeds: found []", "a seed, or `run: []`"]),
        (
            {"fine_tune.run": ["full_retrain"], "compare.baseline": "partial_freeze"},
            ["compare.baseline: found partial_freeze", "feature_extraction or an entry of fine_tune.run"],
        ),
        (
            {"compare.guard": {"full_retrain": 0.01, "feature_extraction.test.metrics.nll.value": 0.1}},
            ["compare.guard: found ['full_retrain']", "a strategy of fine_tune.strategies", "keys of reports/details"],
        ),
        ({"compare.guard": {"layer9.test.nll": 0.1}}, ["found ['layer9.test.nll']", "of fine_tune.strategies"]),
    ],
)
def test_values_that_do_not_go_together_are_one_error_that_says_what_would(
    changes: dict[str, Any], words: list[str], tmp_path: Path
):
    with pytest.raises(ValueError, match=r"params\.yaml") as error:
        load(document_with(changes), tmp_path)
    assert [word for word in words if word not in str(error.value)] == []
    assert len(str(error.value).splitlines()) == 1


# fine_tune.defaults


def test_a_strategy_has_the_defaults_that_it_does_not_override(tmp_path: Path):
    changes = {"fine_tune.defaults.epochs": 11, "fine_tune.strategies": {"last": {"views": 2}, "whole": {}}}
    changes |= {"fine_tune.run": ["last"], "compare.guard": {}}
    strategies = load(document_with(changes), tmp_path).fine_tune.strategies
    assert (strategies["last"].views, strategies["last"].epochs) == (2, 11)
    assert (strategies["whole"].views, strategies["whole"].epochs) == (4, 11)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"momentum": 1.5}, "fine_tune.defaults.momentum: found 1.5; expected it to be less than 1"),
        ({"momentun": 0.5}, "fine_tune.defaults.momentun: unknown key; expected momentum"),
        ({"learning_rate": 0.1}, "fine_tune.defaults.learning_rate: unknown key; expected learning_rates"),
        ({"momentum": "DELETE"}, "fine_tune.defaults.momentum: is missing"),
        (
            {"learning_rates": ["fast"]},
            'fine_tune.defaults.learning_rates.0: found "fast"; expected a number above 0, or [base, head]',
        ),
        (
            {"learning_rates": [[0.1, 0.2, 0.3]]},
            "fine_tune.defaults.learning_rates.0: found [0.1, 0.2, 0.3]; expected a number above 0, or [base, head]",
        ),
        (
            {"learning_rates": [0.1, 0.1]},
            "fine_tune.defaults.learning_rates: found [0.1, 0.1]; expected each entry once",
        ),
        ({"views": -1}, "fine_tune.defaults.views: found -1; expected a whole number, 0 or more, or every_epoch"),
    ],
)
def test_a_mistake_in_the_defaults_is_reported_once_and_not_for_every_strategy(
    changes: dict[str, Any], expected: str, tmp_path: Path
):
    document = document_with({f"fine_tune.defaults.{key}": value for key, value in changes.items()})
    defaults = document["fine_tune"]["defaults"]
    document["fine_tune"]["defaults"] = {key: value for key, value in defaults.items() if value != "DELETE"}
    assert len(document["fine_tune"]["strategies"]) > 1
    with pytest.raises(ValueError, match="params") as error:
        load(document, tmp_path)
    assert str(error.value) == f"{tmp_path / 'params.yaml'}: {expected}"


def test_a_mistake_in_a_strategy_is_its_own_even_if_the_defaults_have_the_key(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"yaml: fine_tune\.strategies\.from_scratch\.epochs: found 0; expected it to "
    ):
        load(document_with({f"{SCRATCH}.epochs": 0}), tmp_path)
    with pytest.raises(
        ValueError, match=r"yaml: fine_tune\.strategies\.from_scratch\.epoch: unknown key; expected epo"
    ):
        load(document_with({f"{SCRATCH}.epoch": 3}), tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("defaults", 3, "fine_tune.defaults: found 3; expected a section with keys"),
        ("defaults", None, "fine_tune.defaults: found null; expected a section with keys"),
        ("strategies", [1], "fine_tune.strategies: found [1]; expected a section with keys"),
        ("strategies", {"a b": {}}, 'fine_tune.strategies.a b.[key]: found "a b"; expected letters, digits and _ only'),
        ("strategies", {"last": None}, "fine_tune.strategies.last: found null; expected a section with keys"),
    ],
)
def test_a_section_of_fine_tune_that_is_none_is_one_line(key: str, value: Any, expected: str, tmp_path: Path):
    with pytest.raises(ValueError, match="params") as error:
        load(document_with({f"fine_tune.{key}": value}), tmp_path)
    assert str(error.value) == f"{tmp_path / 'params.yaml'}: {expected}"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"fine_tune.defaults.augmentation": "lihgt"},
            'fine_tune.defaults.augmentation: found "lihgt"; expected the name of an entry of fine_tune.augmentations, '
            "or keys of the section augmentation",
        ),
        ({"fine_tune.defaults.augmentation": {"hue": 2.0}}, "fine_tune.defaults.augmentation.hue: found 2.0; expected"),
        ({"fine_tune.augmentations.light": {"hue": 2.0}}, "fine_tune.augmentations.light.hue: found 2.0; expected"),
        (
            {"fine_tune.defaults.augmentation": "light", "fine_tune.augmentations.light": {"huh": 0.1}},
            "fine_tune.augmentations.light.huh: unknown key; expected hue",
        ),
        ({"augmentation.hue": 2.0}, "augmentation.hue: found 2.0; expected"),
        ({"augmentation": 3}, "augmentation: found 3; expected a section with keys"),
        ({"augmentation.scale": [1.0, "x"]}, 'augmentation.scale.1: found "x"; expected'),
    ],
)
def test_a_mistake_in_an_augmentation_is_one_line_where_it_was_made(
    changes: dict[str, Any], expected: str, tmp_path: Path
):
    with pytest.raises(ValueError, match="params") as error:
        load(document_with(changes), tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'params.yaml'}: {expected}")
    assert "\n" not in str(error.value)


def test_an_augmentation_of_fine_tuning_is_the_section_with_its_own_keys(tmp_path: Path):
    base = {"augmentation.flips": "vertical", "augmentation.hue": 0.1, "augmentation.rotation_degrees": 20.0}
    given = {"light": "light", "none": "none", "own": {"noise_std": 2.0}, "default": None}
    strategies = {name: {} if value is None else {"augmentation": value} for name, value in given.items()}
    changes = {**base, "fine_tune.strategies": strategies, "fine_tune.run": [*given], "compare.guard": {}}
    params = load(document_with(changes), tmp_path)
    found = {name: strategy.augmentation for name, strategy in params.fine_tune.strategies.items()}
    assert found["default"] == params.augmentation
    assert found["own"] == params.augmentation.model_copy(update={"noise_std": 2.0})
    light = {key: getattr(found["light"], key) for key in ("flips", "hue", "rotation_degrees", "scale")}
    assert light == {"flips": "vertical", "hue": 0.0, "rotation_degrees": 5.0, "scale": (0.92, 1.08)}
    assert found["none"].flips == "none"
    assert training_views(found["none"], 4) == [0] * 4, "every view is view 0"


def test_learning_rates_are_pairs_of_base_and_head(tmp_path: Path):
    changes = {"fine_tune.defaults.learning_rates": [1, [1e-5, 1e-3]]}
    strategy = load(document_with(changes), tmp_path).fine_tune.strategies["full_retrain"]
    assert strategy.learning_rates == ((1.0, 1.0), (1e-5, 1e-3))
    one = strategy.with_rates(*strategy.learning_rates[1])
    assert (one.learning_rate_base, one.learning_rate_head, one.learning_rates) == (1e-5, 1e-3, ())


def test_absent_defaults_are_one_line(tmp_path: Path):
    document = document_with({})
    del document["fine_tune"]["defaults"]
    with pytest.raises(ValueError, match=r"params\.yaml: fine_tune\.defaults: is missing$"):
        load(document, tmp_path)


@pytest.mark.parametrize("where", ["none", "all", "layer3", "features.16", "layer3.0.add", 1, 8])
def test_a_boundary_is_a_name_or_a_number_of_layers(where: str | int, tmp_path: Path):
    params = load(document_with({BOUNDARIES[1]: where}), tmp_path)
    assert params.fine_tune.strategies["partial_freeze"].freeze_until == where
    if where != "none":
        assert load(document_with({"features.cut": where}), tmp_path).features.cut == where


@pytest.mark.parametrize("where", ["every_block", ["layer3", "all"], ["layer3.0.add", 8, "all"]])
def test_features_may_come_from_several_cuts(where: str | list[str | int], tmp_path: Path):
    features = load(document_with({"features.cut": where}), tmp_path).features
    assert features.has_several_cuts
    assert features.cut == (where if isinstance(where, str) else tuple(where))
    assert not load(document_with({}), tmp_path).features.has_several_cuts


@pytest.mark.parametrize(
    ("flips", "expected"),
    [
        ("none", ["identity"]),
        ("horizontal", ["identity", "flip_horizontal"]),
        ("vertical", ["identity", "flip_vertical"]),
        ("both", ["identity", "flip_horizontal", "flip_vertical", "rotate_180"]),
    ],
)
def test_what_is_predicted_is_averaged_over_the_flips_that_training_sees(
    flips: str, expected: list[str], tmp_path: Path
):
    changes = {"augmentation.flips": flips, "evaluation.views": "auto"}
    assert load(document_with(changes), tmp_path).evaluation.views == tuple(expected)
    chosen = load(document_with(changes | {"evaluation.views": ["transpose"]}), tmp_path)
    assert chosen.evaluation.views == ("transpose",)


def test_auto_hides_no_mistake(tmp_path: Path):
    for flips in ("all", 3, None):
        with pytest.raises(ValueError, match=r"augmentation\.flips: found [^\n]*$") as caught:
            load(document_with({"augmentation.flips": flips, "evaluation.views": "auto"}), tmp_path)
        assert "evaluation" not in str(caught.value)


def test_a_number_of_layers_in_quotes_is_a_name(tmp_path: Path):
    assert load(document_with({"features.cut": "8"}), tmp_path).features.cut == "8"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_pretrained_head_may_have_dropout(dropout: float, tmp_path: Path):
    params = load(document_with(PRETRAINED | {"head.dropout": dropout}), tmp_path)
    assert (params.head.kind, params.head.dropout) == ("pretrained", dropout)


@pytest.mark.parametrize("name", ["feature_extraction", "feature_extraction_all_seeds", "majority_class", "backbone"])
def test_no_fine_tuned_strategy_may_have_a_reserved_name(tmp_path: Path, name: str):
    document = document_with({})
    strategies = document["fine_tune"]["strategies"]
    strategies[name] = strategies["full_retrain"]
    with pytest.raises(ValueError, match=f"strategies: the names .*{name}.* are reserved"):
        load(document, tmp_path)


def test_folds_are_numbered_from_0_and_all_of_them_are_fine_tuned(tmp_path: Path):
    folds = {"split.method": "folds", "split.seeds": [0, 1, 2]}
    load(document_with({**folds, "fine_tune.seeds": [2, 0, 1]}), tmp_path)
    load(document_with({**folds, "fine_tune.seeds": [], "fine_tune.run": []}), tmp_path)
    for seeds, fine_tuned, val_fraction, message in (
        ([0, 1, 2], [0, 1], 0.1, r"fine_tune.seeds: found \[0, 1\]; .* expected all of split.seeds"),
        ([0], [0], 0.1, "expected the K folds, 0 to K - 1"),
        ([1], [1], 0.1, "expected the K folds, 0 to K - 1"),
        ([1, 2], [1, 2], 0.1, "expected the K folds, 0 to K - 1"),
        ([0, 1], [0, 1], 0.5, "found 1 in all, expected less than 1"),
    ):
        change = {"split.seeds": seeds, "fine_tune.seeds": fine_tuned, "split.val_fraction": val_fraction}
        with pytest.raises(ValueError, match=message):
            load(document_with({**folds, **change}), tmp_path)


def test_auto_workers_are_as_many_as_the_cores_and_numbers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "count_cores", lambda: 16)
    for given, expected in (("auto", 16), (0, 0), (3, 3)):
        assert load(document_with({"runtime.workers": given}), tmp_path).runtime.workers == expected
    for wrong in ("all", -1, 2.5, None):
        with pytest.raises(ValueError, match=r"runtime\.workers: found .*; expected auto, or a whole number"):
            load(document_with({"runtime.workers": wrong}), tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 6),
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "300000\n"}, 6),
        ({"cpu.max": "what\n"}, 6),
    ],
)
def test_cores_are_those_that_this_process_and_its_container_may_use(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {*range(6)})
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert count_cores() == expected


@pytest.mark.parametrize("batch_size", [{"cpu": 8}, {"cpu": 0, "cuda": 1}, 8, {"cpu": 8, "cuda": 1, "mps": 1}])
def test_a_batch_size_names_every_device(batch_size: object, tmp_path: Path):
    with pytest.raises(ValueError, match=r"params\.yaml: features\.batch_size"):
        load(document_with({"features.batch_size": batch_size}), tmp_path)
    assert load(document_with({}), tmp_path).features.batch_size.on("cpu") == 8


def test_a_missing_key_is_named(tmp_path: Path):
    document = document_with({})
    del document["runtime"]["workers"]
    with pytest.raises(ValueError, match=r"params\.yaml: runtime\.workers: is missing$"):
        load(document, tmp_path)


def test_the_place_of_the_store_is_a_directory_as_it_is(tmp_path: Path):
    assert load(document_with({"runtime.store": "/mnt/team store/ü"}), tmp_path).runtime.store == "/mnt/team store/ü"
    for wrong, expected in (
        ("~/store", "expected a directory; ~ is not expanded"),
        ("", "expected a word"),
        (3, "a valid string"),
    ):
        with pytest.raises(ValueError, match=rf"runtime\.store: found {json.dumps(wrong)}; .*{expected}"):
            load(document_with({"runtime.store": wrong}), tmp_path)


def test_every_mistake_has_its_line(tmp_path: Path):
    with pytest.raises(ValueError, match=r"params\.yaml") as error:
        load(document_with({"features.views": 0, "runtime.device": "tpu"}), tmp_path)
    first, second = str(error.value).splitlines()
    assert "features.views: found 0" in first
    assert 'runtime.device: found "tpu"' in second


def test_no_strategy_needs_no_seed_to_fine_tune(tmp_path: Path):
    changes = {"fine_tune.run": [], "fine_tune.seeds": [], "compare.baseline": "feature_extraction"}
    assert load(document_with(changes), tmp_path).fine_tune.run == ()


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("1E-5", 1e-5), ("1", 1.0), ("2.5e+1", 25.0)])
def test_a_number_is_a_number_however_it_is_written(text: str, value: float, tmp_path: Path):
    document = json.dumps(document_with({"head.learning_rate": "HERE"}))
    params = load_text(document.replace('"HERE"', text), tmp_path)
    assert params.head.learning_rate == value


def test_on_and_off_are_words(tmp_path: Path):
    document = json.dumps(document_with({f"{SCRATCH}.boundary_cache": "HERE"}))
    params = load_text(document.replace('"HERE"', "off"), tmp_path)
    assert params.fine_tune.strategies["from_scratch"].boundary_cache == "off"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("head: {}\nsplit: {}\nhead: {}\n", 'found duplicate key "head"'),
        ("- head\n- split\n", 'found ["head", "split"]; expected a section with keys'),
        ("", "found null; expected a section with keys"),
        ("head\n", 'found "head"; expected a section with keys'),
        ("head: [1", "not a YAML mapping: while parsing"),
        ("head: 2020-01-01\n", "not a YAML mapping: Object of type date"),
    ],
)
def test_a_file_that_is_no_mapping_is_one_error(text: str, expected: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"params\.yaml") as error:
        load_text(text, tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'params.yaml'}: ")
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_in_another_encoding_is_one_error(tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_bytes("größe: 1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"params\.yaml: not a YAML mapping: 'utf-8' codec"):
        load_params(path)


def test_where_there_is_no_file_the_error_says_where_to_run(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="not found; run from the top of the repository"):
        load_params(tmp_path / "params.yaml")
