"""engine: rows in order that do not depend on their neighbours, and refusals of what is not there."""

import logging
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import engine

CPU = torch.device("cpu")
ENGINES = ["torch", "openvino"]


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def inputs(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ENGINES)
def test_last_batch_gives_its_own_rows_only(network: nn.Module, name: str) -> None:
    outputs = list(engine.run(network, inputs(11).split(4), name, "fp32", CPU))
    assert [output.shape for output in outputs] == [(4, 5), (4, 5), (3, 5)]
    assert all(output.dtype == np.float32 for output in outputs)


@pytest.mark.parametrize("name", ENGINES)
def test_row_does_not_depend_on_padding_or_neighbours(network: nn.Module, name: str) -> None:
    x = inputs(12)
    padded = np.concatenate(list(engine.run(network, x[:11].split(4), name, "fp32", CPU)))
    full = np.concatenate(list(engine.run(network, x.split(4), name, "fp32", CPU)))
    assert np.array_equal(padded, full[:11])
    reversed_ = np.concatenate(list(engine.run(network, x.flip(0).split(4), name, "fp32", CPU)))
    assert np.array_equal(reversed_[::-1], full)


@pytest.mark.parametrize("name", ENGINES)
def test_single_short_batch_needs_no_padding(network: nn.Module, name: str) -> None:
    (output,) = engine.run(network, [inputs(3)], name, "fp32", CPU)
    assert output.shape == (3, 5)


@pytest.mark.parametrize("name", ENGINES)
def test_no_batches_give_no_outputs(network: nn.Module, name: str) -> None:
    assert list(engine.run(network, [], name, "fp32", CPU)) == []


@pytest.mark.parametrize("name", ENGINES)
def test_outputs_come_in_the_order_of_the_batches(name: str) -> None:
    batches = [torch.full((2, 3, 4, 4), float(number)) for number in range(60)]
    outputs = list(engine.run(nn.Sequential(nn.Flatten()), batches, name, "fp32", CPU))
    assert [output[0, 0] for output in outputs] == list(range(60))
    assert all((output == output[0, 0]).all() for output in outputs)


@pytest.mark.parametrize("name", ENGINES)
def test_outputs_are_the_callers_to_keep(network: nn.Module, name: str) -> None:
    x = inputs(40)
    kept = list(engine.run(network, x.split(2), name, "fp32", CPU))
    with torch.no_grad():
        expected = network(x).numpy()
    np.testing.assert_allclose(np.concatenate(kept), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_batches_are_taken_as_they_are_needed(network: nn.Module, name: str) -> None:
    taken = []
    batches = (taken.append(number) or batch for number, batch in enumerate(inputs(400).split(2)))
    first = list(islice(engine.run(network, batches, name, "fp32", CPU), 3))
    assert len(first) == 3
    assert len(taken) < 100


@pytest.mark.parametrize("name", ENGINES)
def test_network_runs_in_evaluation_mode(network: nn.Module, name: str) -> None:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    list(engine.run(network.train(), [inputs(4)], name, "fp32", CPU))
    assert not network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ENGINES)
def test_bf16_is_close_to_fp32(network: nn.Module, name: str) -> None:
    x = inputs(4)
    (exact,) = engine.run(network, [x], name, "fp32", CPU)
    (rough,) = engine.run(network, [x], name, "bf16", CPU)
    assert rough.dtype == np.float32
    assert np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(("capabilities", "is_able"), [(["FP32", "INT8"], False), (["FP32", "BF16"], True)])
def test_bf16_is_refused_on_a_cpu_without_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[str], is_able: bool
) -> None:
    core = SimpleNamespace(get_property=lambda *_: capabilities)
    monkeypatch.setattr("openvino.Core", lambda: core)
    engine.check_precision("features.precision", "fp32", CPU)
    engine.check_precision("features.precision", "bf16", torch.device("cuda"))
    if is_able:
        engine.check_precision("features.precision", "bf16", CPU)
    else:
        with pytest.raises(ValueError, match=r"params\.yaml: features\.precision: this CPU has no bf16; expected fp32"):
            engine.check_precision("features.precision", "bf16", CPU)


def test_cuda_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert engine.choose_device("auto") == CPU
    assert engine.choose_device("cpu") == CPU
    with pytest.raises(ValueError, match=r"runtime\.device: cuda, but torch finds no GPU; expected auto or cpu"):
        engine.choose_device("cuda")


def test_auto_takes_openvino_on_a_cpu_and_torch_elsewhere(network: nn.Module) -> None:
    example = inputs(2).numpy()
    assert engine.choose_engine("auto", network, example, CPU) == "openvino"
    assert engine.choose_engine("auto", network, example, torch.device("cuda")) == "torch"
    assert engine.choose_engine("torch", network, example, CPU) == "torch"
    with pytest.raises(ValueError, match=r"features\.engine: openvino runs on a CPU; expected auto or torch"):
        engine.choose_engine("openvino", network, example, torch.device("cuda"))


def test_network_that_openvino_cannot_convert_runs_in_torch_with_a_warning(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such\noperation")

    monkeypatch.setattr(engine, "_convert", fail)
    with caplog.at_level(logging.WARNING, "pipeline"):
        assert engine.choose_engine("auto", network, inputs(2).numpy(), CPU) == "torch"
    assert "OpenVINO cannot convert this network, torch runs it (no such operation)" in caplog.text
    with pytest.raises(
        ValueError, match=r"features\.engine: openvino cannot convert this network \(no such operation\)"
    ):
        engine.choose_engine("openvino", network, inputs(2).numpy(), CPU)


def test_filters_are_channels_last_also_those_of_one_pixel() -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3))
    module.register_buffer("constant", torch.zeros(1, 2, 3, 4, 5))
    engine.place(module, CPU)
    strides = [parameter.stride() for parameter in module.parameters() if parameter.ndim == 4]
    assert strides == [(4, 1, 4, 4), (72, 1, 24, 8)]  # what decides which kernels run, and so which bits come out
