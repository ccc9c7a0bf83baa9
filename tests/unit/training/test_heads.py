"""Dense heads: standardisation, views, choosing on validation, the MLP, and the network's own dense layers."""

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from timm.models.vgg import ConvMlp
from torch import nn
from torch.nn import functional as F

from pipeline.params import HeadOptions
from pipeline.training import heads
from pipeline.training.heads import Examples, Fitted, Selection, Standardize
from tests.factories import LINEAR as PLAIN_HEAD

LINEAR = PLAIN_HEAD.model_copy(update={"learning_rate": 1e-2, "epochs": 20, "batch_size": 32})
MLP = LINEAR.model_copy(update={"kind": "mlp", "hidden": (16,), "dropout": 0.1, "regularization_strengths": (1e-4,)})
PRETRAINED = LINEAR.model_copy(
    update={
        "kind": "pretrained",
        "standardize": False,
        "dropout": 0.3,
        "regularization_strengths": (1e-4,),
        "epochs": 3,
    }
)
NOTHING = nn.Identity()  # the network has no layers behind its end


@dataclass(frozen=True)
class Held(Examples):
    """Examples in memory."""

    features: np.ndarray


def options(base: HeadOptions = LINEAR, strengths: tuple[float, ...] | None = None, **changes: Any) -> HeadOptions:
    return base.model_copy(update=changes | ({"regularization_strengths": strengths} if strengths else {}))


def examples(n: int = 90, n_views: int = 1, seed: int = 0, gap: float = 1.0) -> Held:
    """Three classes in eight dimensions, `gap` deviations apart."""
    random = np.random.default_rng(seed)
    label = random.integers(0, 3, n)
    features = random.normal(size=(n, n_views, 8)) + gap * np.eye(3, 8)[label][:, None]
    return Held(features.astype(np.float32), label, random.uniform(0.3, 2, n))


def fit(
    train: Examples, how: HeadOptions = LINEAR, seed: int = 0, val: Examples | None = None, dense: nn.Module = NOTHING
) -> Fitted:
    torch.manual_seed(seed)
    head = heads.build(train.features.shape[2:], 3, how, dense)
    return heads.fit(head, train, val or examples(seed=1), how)


def weight_of(fitted: Fitted) -> np.ndarray:
    return cast(nn.Linear, fitted.head[-1]).weight.detach().numpy()


def accuracy(fitted: Fitted, on: Examples) -> float:
    return float(np.mean(heads.predict(fitted.head, on.features).argmax(axis=1) == on.label))


# views


def test_the_mean_over_one_view_is_the_log_softmax():
    logits = torch.randn(5, 1, 4)
    assert torch.allclose(heads.mean_log_probability(logits), F.log_softmax(logits[:, 0], dim=-1))


def test_the_mean_over_views_is_of_probabilities():
    logits = torch.randn(5, 3, 4)
    found = heads.mean_log_probability(logits)
    assert found.dtype == torch.float32
    assert torch.allclose(found.exp(), logits.softmax(-1).mean(1))


def test_the_mean_over_views_stays_finite_for_logits_of_any_size():
    found = heads.mean_log_probability(torch.tensor([[[1e4, -1e4], [1e4, 0.0]]]))
    assert torch.isfinite(found).all()


def test_predictions_are_over_all_views_and_of_any_number_of_rows():
    head = heads.build((8,), 3, LINEAR, NOTHING)
    features = examples(n=2500, n_views=3).features
    found = heads.predict(head, features)
    with torch.no_grad():
        logits = torch.stack([head(torch.from_numpy(features[:, view])) for view in range(3)], dim=1)
    assert found.dtype == np.float32
    assert np.allclose(found, heads.mean_log_probability(logits).numpy(), atol=1e-6)
    assert len(heads.predict(head, features[:7])) == 7


def test_predictions_leave_dropout_out():
    head = heads.build((8,), 3, options(MLP, dropout=0.9), NOTHING).train()
    features = examples().features
    assert np.array_equal(heads.predict(head, features), heads.predict(head, features))


def test_every_view_of_a_training_image_is_a_row_of_its_weight():
    train = examples(n=40, n_views=3)
    rows = Examples(train.features.reshape(120, 1, 8), np.repeat(train.label, 3), np.repeat(train.weight, 3))
    assert np.allclose(weight_of(fit(train)), weight_of(fit(rows)), atol=1e-6)


# standardisation


def floored(deviation: np.ndarray) -> np.ndarray:
    """What standardisation divides by, where the features vary."""
    return np.maximum(deviation, heads.DEVIATION_FLOOR * np.sort(deviation)[(len(deviation) - 1) // 2])


def test_standardisation_is_carried_as_buffers_of_the_weighted_training_rows():
    train = examples(n_views=2)
    fitted = fit(train)
    state, rows, weight = fitted.head.state_dict(), train.features.reshape(-1, 8), np.repeat(train.weight, 2)
    mean = np.average(rows, axis=0, weights=weight)
    deviation = np.sqrt(np.average((rows - mean) ** 2, axis=0, weights=weight))
    assert np.allclose(state["0.mean"], mean, atol=1e-5)
    assert np.allclose(state["0.deviation"], floored(deviation), atol=1e-5)
    assert not {name for name, _ in fitted.head.named_parameters()} & {"0.mean", "0.deviation"}


def test_a_new_head_with_the_saved_tensors_predicts_the_same():
    train = examples()
    fitted = fit(train)
    head = heads.build((8,), 3, LINEAR, NOTHING)
    head.load_state_dict(fitted.head.state_dict())
    assert np.array_equal(heads.predict(head, train.features), heads.predict(fitted.head, train.features))


def test_without_standardisation_features_go_in_as_they_are():
    head = fit(examples(), options(standardize=False)).head
    x = torch.randn(4, 8)
    assert torch.equal(head[0](x), x)


def test_shifting_and_scaling_all_features_changes_no_prediction():
    train, val = examples(), examples(seed=1)
    moved = [Examples(100 * part.features - 7, part.label, part.weight) for part in (train, val)]
    expected = heads.predict(fit(train).head, val.features)
    assert np.allclose(heads.predict(fit(moved[0], val=moved[1]).head, moved[1].features), expected, atol=1e-3)


@pytest.mark.parametrize("how", [LINEAR, MLP], ids=["linear", "mlp"])
@pytest.mark.parametrize("value", [0.0, 3.3, -1e4])
def test_a_feature_that_is_constant_in_training_does_not_blow_up_elsewhere(value: float, how: HeadOptions):
    train = examples()
    train.features[..., 5] = value
    train.features[..., 6] = 1e-7 * np.random.default_rng(2).normal(size=(90, 1))
    fitted = fit(train, how)
    standardize = cast(Standardize, fitted.head[0])
    assert standardize.deviation.min() >= 0.99e-2 * standardize.deviation.square().mean().sqrt()
    jumped = train.features.copy()
    jumped[..., 5:7] += 0.01
    before, after = (heads.predict(fitted.head, features) for features in (train.features, jumped))
    assert np.isfinite(before).all()
    assert np.abs(after - before).max() < 1


@pytest.mark.parametrize("how", [LINEAR, options(MLP, epochs=5)], ids=["linear", "mlp"])
def test_a_feature_of_a_thousand_times_the_size_leaves_the_others_their_deviation(how: HeadOptions):
    train, val = examples(gap=2), examples(seed=1, gap=2)
    before = cast(Standardize, fit(train, how, val=val).head[0]).deviation[:7]
    scores = accuracy(fit(train, how, val=val), val)
    for part in (train, val):
        part.features[..., 7] *= 1000
    fitted = fit(train, how, val=val)
    assert torch.allclose(cast(Standardize, fitted.head[0]).deviation[:7], before, rtol=0.2)
    assert accuracy(fitted, val) == pytest.approx(scores, abs=0.02)


@pytest.mark.parametrize("value", [0.0, 3.3, -1e4])
def test_the_floor_of_the_deviation_goes_by_the_features_that_vary(value: float):
    train = examples(gap=2)
    train.features[..., 3:] = value
    standardize = cast(Standardize, fit(train).head[0])
    rows, weight = train.features[:, 0, :3], train.weight
    deviation = np.sqrt(np.average((rows - np.average(rows, axis=0, weights=weight)) ** 2, axis=0, weights=weight))
    assert np.allclose(standardize.deviation[:3], floored(deviation), atol=1e-5)
    assert np.allclose(standardize.deviation[3:], heads.DEVIATION_FLOOR * np.median(deviation), atol=1e-5)


def test_features_that_are_all_constant_give_the_frequencies_of_the_classes():
    train = examples()
    constant = Examples(np.full_like(train.features, 2.5), train.label, train.weight)
    found = np.exp(heads.predict(fit(constant, options(max_iterations=2000)).head, constant.features[:1])[0])
    assert np.allclose(found, np.bincount(train.label, train.weight) / train.weight.sum(), atol=1e-3)


# fitting


def test_only_ratios_of_weights_matter():
    train = examples()
    heavier = Examples(train.features, train.label, 50 * train.weight)
    assert np.allclose(weight_of(fit(heavier)), weight_of(fit(train)), atol=1e-4)


def test_a_weight_of_k_is_an_image_that_occurs_k_times():
    train = examples()
    times = 1 + np.arange(90) % 3
    weighted = Examples(train.features, train.label, times.astype(float))
    features, label = (np.repeat(column, times, axis=0) for column in (train.features, train.label))
    repeated = Examples(features, label, np.ones(180))
    assert np.allclose(weight_of(fit(weighted)), weight_of(fit(repeated)), atol=1e-4)


@pytest.mark.parametrize("how", [LINEAR, options(MLP, epochs=2)], ids=["linear", "mlp"])
def test_balanced_classes_count_alike_in_the_loss_and_change_neither_standardisation_nor_validation(how: HeadOptions):
    train = examples()
    train.weight[train.label == 0] *= 0.05
    plain, balanced = fit(train, how), fit(train, options(how, class_weights="balanced"))
    for name in ("0.mean", "0.deviation"):
        assert torch.equal(plain.head.state_dict()[name], balanced.head.state_dict()[name])
    share = [np.exp(heads.predict(fitted.head, train.features))[:, 0].mean() for fitted in (plain, balanced)]
    assert share[0] < 0.8 * share[1]
    val = examples(seed=1)
    nll = -heads.predict(balanced.head, val.features)[np.arange(90), val.label]
    assert np.isclose(min(balanced.path.val_nll.values()), np.average(nll, weights=val.weight), atol=1e-6)


def test_balanced_classes_that_are_balanced_change_nothing():
    train = examples()
    equal = Examples(train.features, np.arange(90) % 3, np.ones(90))
    found = [weight_of(fit(equal, options(class_weights=name))) for name in ("none", "balanced")]
    assert np.allclose(*found, atol=1e-7)


@pytest.mark.parametrize("how", [LINEAR, options(standardize=False), options(MLP, epochs=2)])
def test_the_weight_of_a_cut_is_that_of_what_its_features_add_to_the_variance(how: HeadOptions):
    train = examples(n_views=2)
    train.features[..., 5:] *= np.float32(100)  # does not matter
    chosen, widths = np.arange(0, 90, 2), {"early": 3, "middle": 2, "late": 3}
    head = fit(train, how).head
    first = next(layer for layer in head if isinstance(layer, nn.Linear))
    found = heads.weight_shares(head, Selection(train.features, chosen), widths)
    with torch.no_grad():
        rows = head[0](torch.from_numpy(train.features[chosen]).flatten(0, 1)).double()
        parts = (rows.var(0, correction=0) * first.weight.double().square().sum(0)).split([*widths.values()])
    expected = torch.stack([part.sum() for part in parts])
    np.testing.assert_allclose([*found.values()], expected / expected.sum(), rtol=1e-6)
    assert [*found] == [*widths]
    nn.init.zeros_(first.weight)
    assert heads.weight_shares(head, Selection(train.features, chosen), widths) == dict.fromkeys(widths, 0.0)


def test_a_stronger_penalty_gives_smaller_weights():
    norms = [np.linalg.norm(weight_of(fit(examples(), options(strengths=(s,))))) for s in (10.0, 1.0, 0.1)]
    assert norms == sorted(norms)


@pytest.mark.parametrize("how", [LINEAR, MLP, options(penalty="l1")], ids=["linear", "mlp", "l1"])
def test_the_strength_chosen_has_the_lowest_weighted_validation_nll(how: HeadOptions):
    how, val = options(how, strengths=(0.001, 0.03, 0.3)), examples(seed=1, gap=0.5)
    fitted = fit(examples(n=40, gap=0.5), how, val=val)
    assert set(fitted.path.val_nll) == {0.001, 0.03, 0.3}
    assert fitted.path.strength == min(fitted.path.val_nll, key=lambda strength: fitted.path.val_nll[strength])
    log_probability = heads.predict(fitted.head, val.features)
    nll = np.average(-log_probability[np.arange(90), val.label], weights=val.weight)
    assert nll == pytest.approx(fitted.path.val_nll[fitted.path.strength], abs=1e-6)


def test_the_order_of_strengths_changes_nothing():
    one, other = (fit(examples(), options(strengths=order)) for order in ((0.01, 1.0, 0.1), (1.0, 0.1, 0.01)))
    assert one.path.val_nll == other.path.val_nll
    assert np.array_equal(weight_of(one), weight_of(other))


def test_a_validation_loss_that_is_not_finite_is_one_line():
    val = examples(seed=1)
    val.features[0] = np.inf
    with pytest.raises(
        ValueError, match=r"params\.yaml: head: the validation NLL is .*; raise head\.regularization_strengths"
    ):
        fit(examples(), val=val)


def test_an_exploding_mlp_is_one_line_and_no_untrained_head():
    with pytest.raises(ValueError, match=r"params\.yaml: head: the validation NLL is .*; lower head\.learning_rate"):
        fit(examples(), options(MLP, learning_rate=1e30))


def test_a_linear_head_does_not_depend_on_the_seed():
    assert np.array_equal(weight_of(fit(examples(), seed=0)), weight_of(fit(examples(), seed=5)))


@pytest.mark.parametrize("penalty", ["l2", "l1", "elasticnet"])
def test_a_linear_heads_optimum_depends_on_the_other_strengths_within_the_solvers_tolerance(penalty: str):
    how, val = options(penalty=penalty, max_iterations=2000), examples(seed=1)
    alone = fit(examples(), options(how, strengths=(0.01,)), val=val).path.val_nll[0.01]
    on_a_path = fit(examples(), options(how, strengths=(1.0, 0.1, 0.01, 0.001)), val=val).path.val_nll[0.01]
    assert on_a_path == pytest.approx(alone, abs=1e-4)


# what validation chooses from


@pytest.mark.parametrize(
    ("how", "names"),
    [
        (options(strengths=(0.3, 0.01)), ["0.3", "0.01"]),
        (
            options(MLP, strengths=(0.01, 0.3), epochs=2),
            ["0.01, epoch 1", "0.01, epoch 2", "0.3, epoch 1", "0.3, epoch 2"],
        ),
    ],
    ids=["linear", "mlp"],
)
def test_every_strength_and_epoch_is_a_candidate_and_the_lowest_nll_is_kept(how: HeadOptions, names: list[str]):
    val = examples(n=60, n_views=2, seed=1)
    fitted = fit(examples(), how, val=val)
    candidates = fitted.candidates
    assert candidates.names == names
    nll = candidates.nll(val.weight)
    best = int(np.argmin(nll))
    assert float(names[best].split(",")[0]) == fitted.path.strength
    assert fitted.path.val_nll[fitted.path.strength] == nll[best]
    log_probability = heads.predict(fitted.head, val.features)
    assert np.array_equal(candidates.predicted[best], log_probability.argmax(1))
    assert np.array_equal(candidates.true_log_probability[best], log_probability[np.arange(60), val.label])
    assert candidates.positive_log_probability.shape == (len(names), 0)


@pytest.mark.parametrize(
    ("n", "strengths", "end"),
    [
        (40, (10.0, 1.0), "weakest"),
        (40, (1e-4, 1e-5), "strongest"),
        (40, (100.0, 0.05, 1e-5), None),
        (40, (0.1,), None),
        (400, (10.0, 0.0), None),
    ],
)
def test_the_end_of_the_path_is_named_where_the_best_lies_there(
    n: int, strengths: tuple[float, ...], end: str | None, caplog: pytest.LogCaptureFixture
):
    path = fit(examples(n=n), options(strengths=strengths)).path
    assert path.at_end == end
    heads.warn([path, path], "head")
    expected = {
        "weakest": ["head.regularization_strengths: the best is the weakest in 2 of 2 fits; add weaker ones"],
        "strongest": ["head.regularization_strengths: the best is the strongest in 2 of 2 fits; add stronger ones"],
        None: [],
    }
    assert caplog.messages == expected[end]


def test_the_cost_of_every_strength_counts_whichever_is_kept():
    strengths = (1.0, 0.1, 0.01)
    flops = [fit(examples(n_views=2), options(strengths=strengths[:n])).train_flops for n in (1, 2, 3)]
    assert flops[0] < flops[1] < flops[2]


def test_a_solver_that_stops_at_its_limit_is_reported_once(caplog: pytest.LogCaptureFixture):
    paths = [fit(examples(), options(strengths=(0.1, 0.01), max_iterations=limit)).path for limit in (2, 500)]
    assert [path.not_converged for path in paths] == [[0.1, 0.01], []]
    heads.warn([replace(path, at_end=None) for path in paths], "head")
    assert caplog.messages == [
        "head: the solver did not converge in 1 of 2 fits (strengths: 0.1, 0.01); raise head.max_iterations"
    ]
    assert caplog.records[0].levelno == logging.WARNING


def test_l1_gives_exact_zeros_and_more_of_them_where_it_is_stronger():
    zeros = [np.sum(weight_of(fit(examples(), options(penalty="l1", strengths=(s,)))) == 0) for s in (0.01, 0.1, 1.0)]
    assert 0 < zeros[1] < zeros[2] == 24
    assert zeros == sorted(zeros)


@pytest.mark.parametrize("how", [LINEAR, MLP], ids=["linear", "mlp"])
def test_a_head_learns_classes_that_can_be_told_apart(how: HeadOptions):
    val = examples(seed=1, gap=5)
    assert accuracy(fit(examples(gap=5), how, val=val), val) > 0.9


def test_an_mlp_learns_what_no_linear_head_can():
    random = np.random.default_rng(0)
    features = random.normal(size=(400, 1, 2)).astype(np.float32)
    label = (features[:, 0, 0] * features[:, 0, 1] > 0).astype(int)
    train, val = (Examples(features[rows], label[rows], np.ones(200)) for rows in (slice(200), slice(200, None)))
    assert accuracy(fit(train, LINEAR, val=val), val) < 0.7
    assert accuracy(fit(train, options(MLP, epochs=60), val=val), val) > 0.9


def test_an_mlp_is_the_same_for_one_seed_and_another_for_another():
    first, again, other = (fit(examples(), MLP, seed).head.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["2.weight"], other["2.weight"])


@pytest.mark.parametrize("how", [MLP, options(MLP, penalty="l1")], ids=["l2", "l1"])
def test_an_mlps_result_for_a_strength_does_not_depend_on_the_others(how: HeadOptions):
    lists = [(0.01,), (0.3, 0.01), (0.01, 0.3, 0.1)]
    fits = [fit(examples(), options(how, strengths=strengths, epochs=3)) for strengths in lists]
    assert len({fitted.path.val_nll[0.01] for fitted in fits}) == 1
    rows = [fitted.candidates.true_log_probability[fitted.candidates.names.index("0.01, epoch 3")] for fitted in fits]
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[0], rows[2])


def test_a_pretrained_heads_result_for_a_strength_does_not_depend_on_the_others():
    nll = [
        fit_pretrained(dense_layers(), options(PRETRAINED, strengths=strengths)).path.val_nll[0.01]
        for strengths in ((0.01,), (0.3, 0.01))
    ]
    assert nll[0] == nll[1]


def test_an_mlp_has_the_widths_that_were_asked_for():
    head = heads.build((8,), 3, options(MLP, hidden=(5, 4)), NOTHING)
    assert [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)] == [(8, 5), (5, 4), (4, 3)]
    assert sum(isinstance(m, nn.Dropout) for m in head) == 3


def test_l1_gives_exact_zeros_in_an_mlp():
    how = options(MLP, penalty="l1", strengths=(0.01,), dropout=0.0, epochs=60)
    weight = cast(nn.Linear, fit(examples(gap=2), how, val=examples(seed=1, gap=2)).head[2]).weight
    assert (weight == 0).float().mean() > 0.25


def test_an_mlp_keeps_its_best_epoch():
    train, val = examples(n=30, gap=0.3), examples(seed=1, gap=0.3)
    short, long = (fit(train, options(MLP, learning_rate=0.05, epochs=epochs), val=val) for epochs in (2, 60))
    assert long.path.val_nll[1e-4] <= short.path.val_nll[1e-4]


def test_the_rows_that_an_mlp_has_seen_are_counted():
    flops = fit(examples(n=90, n_views=2), options(MLP, epochs=3, strengths=(0.1, 0.2))).train_flops
    assert flops == 90 * 2 * 3 * 2 * 2 * (2 * 8 * 16 + 3 * 16 * 3)


# pretrained


def dense_layers() -> nn.Sequential:
    """Dense layers as torchvision's VGG has them behind its maps (2, 2, 2), the last one taken away."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        layers = (nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(6, 5), nn.ReLU(), nn.Dropout())
        dense = nn.Sequential(nn.Flatten(), *layers, nn.Identity())
    return dense.requires_grad_(False)


def convolutions() -> nn.Sequential:
    """Dense layers as timm's VGG has them: a convolution over the whole map, and one over its one pixel."""
    return nn.Sequential(ConvMlp(2, 5, kernel_size=2, drop_rate=0.9), nn.Flatten()).requires_grad_(False)


def maps(n: int = 90, seed: int = 0) -> Held:
    rows = examples(n, seed=seed, gap=2)
    return Held(rows.features.reshape(n, 1, 2, 2, 2), rows.label, rows.weight)


def fit_pretrained(dense: nn.Module, how: HeadOptions = PRETRAINED) -> Fitted:
    return fit(maps(), how, val=maps(seed=1), dense=dense)


@pytest.mark.parametrize("make", [dense_layers, convolutions])
def test_a_pretrained_head_starts_as_the_networks_own_dense_layers(make: Callable[[], nn.Sequential]):
    dense = make()
    head = heads.build((2, 2, 2), 3, PRETRAINED, dense)
    ours, theirs = head[0].state_dict(), dense.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not {value.data_ptr() for value in ours.values()} & {value.data_ptr() for value in theirs.values()}
    assert all(parameter.requires_grad for parameter in head.parameters())
    last = cast(nn.Linear, head[-1])
    assert (last.in_features, last.out_features) == (5, 3)
    x = torch.randn(4, 2, 2, 2)
    assert torch.equal(head.eval()(x.clone()), last(dense.eval()(x.clone())))


@pytest.mark.parametrize("make", [dense_layers, convolutions])
@pytest.mark.parametrize("dropout", [0.0, 0.7])
def test_dropout_of_a_pretrained_head_is_the_one_asked_for(make: Callable[[], nn.Sequential], dropout: float):
    dense = make()
    before = [module.p for module in dense.modules() if isinstance(module, nn.Dropout)]
    head = heads.build((2, 2, 2), 3, options(PRETRAINED, dropout=dropout), dense).train()
    found = [module.p for module in head.modules() if isinstance(module, nn.Dropout)]
    assert found
    assert {*found} == {dropout}
    assert [module.p for module in dense.modules() if isinstance(module, nn.Dropout)] == before
    x = torch.randn(50, 2, 2, 2)
    assert torch.equal(head(x.clone()), head(x.clone())) == (dropout == 0)


@pytest.mark.parametrize("make", [dense_layers, convolutions])
def test_training_moves_every_layer_of_a_pretrained_head_and_not_the_network(make: Callable[[], nn.Sequential]):
    dense = make()
    before = copy.deepcopy(dense.state_dict())
    fitted = fit_pretrained(dense)
    after = fitted.head[0].state_dict()
    assert not [name for name in before if torch.equal(after[name], before[name])]
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert not fitted.head.training
    found = heads.predict(fitted.head, maps(seed=1).features)
    assert found.shape == (90, 3)


def test_a_pretrained_head_learns_and_is_the_same_for_one_seed():
    how = options(PRETRAINED, epochs=60, dropout=0.0)
    first, again = (fit_pretrained(dense_layers(), how) for _ in range(2))
    state = again.head.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.head.state_dict().items())
    assert accuracy(first, maps(seed=1)) > 0.75


def test_the_penalty_is_on_the_matrices_and_filters_of_a_pretrained_head():
    norms = []
    for strength in (1e-4, 1.0):
        head = fit_pretrained(convolutions(), options(PRETRAINED, strengths=(strength,), epochs=20)).head
        matrices = [parameter for parameter in head.parameters() if parameter.ndim > 1]
        assert len(matrices) == 3
        norms.append([parameter.norm().item() for parameter in matrices])
    assert all(strong < weak for weak, strong in zip(*norms, strict=True))


@pytest.mark.parametrize(
    ("dense", "reason"),
    [
        (nn.Identity(), "has no dense layers of its own behind features.cut but the last; expected linear or mlp"),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), "has no dense layers of its own behind features.cut but the last"),
        (nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 4)), "there is more than dense layers"),
        (nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4)), "there is more than dense layers"),
    ],
    ids=["nothing", "no layer", "a convolution over pixels", "normalisation"],
)
def test_what_is_not_dense_is_no_pretrained_head(dense: nn.Module, reason: str):
    shape = (8,) if isinstance(dense, nn.Identity) else (2, 2, 2)
    with pytest.raises(ValueError, match=rf"^params\.yaml: head\.kind: pretrained: .*{re.escape(reason)}") as caught:
        heads.build(shape, 3, PRETRAINED, dense)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", [LINEAR, MLP], ids=["linear", "mlp"])
def test_a_new_head_wants_vectors(how: HeadOptions):
    with pytest.raises(ValueError, match=rf"features\.pool: .* \(2, 2, 2\), and `head.kind: {how.kind}` needs vectors"):
        heads.build((2, 2, 2), 3, how, NOTHING)


def test_features_of_half_precision_give_the_head_of_their_values():
    train, val = examples(), examples(seed=1)
    half = [Held(part.features.astype(np.float16), part.label, part.weight) for part in (train, val)]
    full = [Examples(part.features.astype(np.float32), part.label, part.weight) for part in half]
    found, expected = (fit(parts[0], val=parts[1]) for parts in (half, full))
    assert found.path.val_nll == expected.path.val_nll
    assert np.array_equal(weight_of(found), weight_of(expected))


# features that do not fit into memory


def on_disk(whole: Held, images: np.ndarray, path: Path) -> Examples:
    """`images` of examples whose features lie in a file."""
    np.save(path, whole.features)
    return Examples(Selection(np.load(path, mmap_mode="r"), images), whole.label[images], whole.weight[images])


@pytest.mark.parametrize("how", [LINEAR, options(penalty="l1"), options(MLP, epochs=3)], ids=["linear", "l1", "mlp"])
@pytest.mark.parametrize("chunk_bytes", [1, 700, 2**20])
def test_streamed_features_give_the_bytes_of_resident_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: HeadOptions, chunk_bytes: int
):
    monkeypatch.setattr(heads, "CHUNK_BYTES", chunk_bytes)
    whole, images = examples(n=120, n_views=3), np.random.default_rng(3).permutation(120)[:90]
    train = on_disk(whole, images, tmp_path / "features.npy")
    resident, reads = fit(train, how), []
    read = Selection.__getitem__
    monkeypatch.setattr(Selection, "__getitem__", lambda *at: reads.append(at) or read(*at))
    monkeypatch.setattr(heads, "RESIDENT_BYTES", 0)
    streamed = fit(train, how)
    assert len(reads) > 3, "they are read in each pass"
    assert streamed.path.val_nll == resident.path.val_nll
    state = streamed.head.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resident.head.state_dict().items())


def test_a_pretrained_head_streams_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train = on_disk(maps(), np.arange(90), tmp_path / "features.npy")
    resident = fit(train, PRETRAINED, val=maps(seed=1), dense=dense_layers())
    monkeypatch.setattr(heads, "RESIDENT_BYTES", 0)
    streamed = fit(train, PRETRAINED, val=maps(seed=1), dense=dense_layers())
    assert streamed.path.val_nll == resident.path.val_nll


def test_small_chunks_change_a_linear_head_by_rounding_only(monkeypatch: pytest.MonkeyPatch):
    train = examples(n_views=2)
    whole = weight_of(fit(train))
    monkeypatch.setattr(heads, "CHUNK_BYTES", 1)
    assert np.allclose(weight_of(fit(train)), whole, atol=1e-4)


def test_fitting_leaves_the_features_as_they_were():
    train = examples()
    before = train.features[:].copy()
    fit(train)
    assert np.array_equal(train.features[:], before)


def test_a_selection_is_indexed_as_the_array_of_its_images():
    values, images = np.arange(60.0).reshape(5, 3, 4), np.array([4, 0, 2])
    selection, array = Selection(values, images), values[images]
    assert selection.shape == array.shape
    assert np.array_equal(selection[1:], array[1:])
    assert np.array_equal(selection[:2, :1], array[:2, :1])
    which = np.array([2, 0, 2]), np.array([1, 1, 0])
    assert np.array_equal(selection[which], array[which])
    head = nn.Linear(4, 2)
    features = values.astype(np.float32)
    found = heads.predict(head, Selection(features, images))
    assert np.array_equal(found, heads.predict(head, features[images]))
