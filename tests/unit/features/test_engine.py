"""engine: rows in order that do not depend on their neighbours, and errors for engines that cannot run."""

import logging
import subprocess
import sys
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.features import engine
from pipeline.network.cuts import Pool
from pipeline.network.device import choose_device
from pipeline.training.heads import Standardize

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
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
    outputs = list(engine.run(network, inputs(11).split(4), name, "fp32", CPU, 8))
    assert [output.shape for output in outputs] == [(4, 5), (4, 5), (3, 5)]
    assert all(output.dtype == np.float32 for output in outputs)


@pytest.mark.parametrize("name", ENGINES)
def test_row_does_not_depend_on_padding_or_neighbours(network: nn.Module, name: str) -> None:
    x = inputs(12)
    padded = np.concatenate(list(engine.run(network, x[:11].split(4), name, "fp32", CPU, 8)))
    full = np.concatenate(list(engine.run(network, x.split(4), name, "fp32", CPU, 8)))
    assert np.array_equal(padded, full[:11])
    reversed_ = np.concatenate(list(engine.run(network, x.flip(0).split(4), name, "fp32", CPU, 8)))
    assert np.array_equal(reversed_[::-1], full)


@pytest.mark.parametrize("name", ENGINES)
def test_single_short_batch_needs_no_padding(network: nn.Module, name: str) -> None:
    (output,) = engine.run(network, [inputs(3)], name, "fp32", CPU, 8)
    assert output.shape == (3, 5)


@pytest.mark.parametrize("lengths", [(8, 8), (7, 1, 8, 3), (1, 1, 1), (5,)])
def test_requests_are_smaller_than_pieces_and_change_no_row(network: nn.Module, lengths: tuple[int, ...]) -> None:
    assert engine.REQUEST < 8
    x = inputs(sum(lengths))
    found = list(engine.run(network, x.split(lengths), "openvino", "fp32", CPU, 8))
    assert [len(output) for output in found] == [*lengths]
    alone = [next(engine.run(network, [row[None]], "openvino", "fp32", CPU, 8)) for row in x]
    assert np.array_equal(np.concatenate(found), np.concatenate(alone))


@pytest.mark.parametrize("name", ENGINES)
def test_no_batches_give_no_outputs(network: nn.Module, name: str) -> None:
    assert list(engine.run(network, [], name, "fp32", CPU, 8)) == []


@pytest.mark.parametrize("name", ENGINES)
def test_outputs_come_in_the_order_of_the_batches(name: str) -> None:
    batches = [torch.full((2, 3, 4, 4), float(number)) for number in range(60)]
    outputs = list(engine.run(nn.Sequential(nn.Flatten()), batches, name, "fp32", CPU, 8))
    assert [output[0, 0] for output in outputs] == list(range(60))
    assert all((output == output[0, 0]).all() for output in outputs)


@pytest.mark.parametrize("name", ENGINES)
def test_outputs_are_the_callers_to_keep(network: nn.Module, name: str) -> None:
    x = inputs(40)
    kept = list(engine.run(network, x.split(2), name, "fp32", CPU, 8))
    with torch.no_grad():
        expected = network(x).numpy()
    np.testing.assert_allclose(np.concatenate(kept), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_batches_are_taken_as_they_are_needed(network: nn.Module, name: str) -> None:
    taken = []
    batches = (taken.append(number) or batch for number, batch in enumerate(inputs(400).split(2)))
    first = list(islice(engine.run(network, batches, name, "fp32", CPU, 8), 3))
    assert len(first) == 3
    assert len(taken) < 100


@pytest.mark.parametrize("name", ENGINES)
def test_network_runs_in_evaluation_mode(network: nn.Module, name: str) -> None:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    list(engine.run(network.train(), [inputs(4)], name, "fp32", CPU, 8))
    assert not network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ENGINES)
def test_bf16_is_close_to_fp32(network: nn.Module, name: str) -> None:
    x = inputs(4)
    (exact,) = engine.run(network, [x], name, "fp32", CPU, 8)
    (rough,) = engine.run(network, [x], name, "bf16", CPU, 8)
    assert rough.dtype == np.float32
    assert np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(("capabilities", "is_able"), [(["FP32", "INT8"], False), (["FP32", "BF16"], True)])
def test_bf16_is_refused_on_a_cpu_without_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[str], is_able: bool
) -> None:
    core = SimpleNamespace(get_property=lambda *_: capabilities)
    monkeypatch.setattr(engine, "openvino_core", lambda: core)
    engine.check_precision("features.precision", "fp32", CPU)
    if is_able:
        engine.check_precision("features.precision", "bf16", CPU)
    else:
        with pytest.raises(ValueError, match=r"params\.yaml: features\.precision: this CPU has no bf16; expected fp32"):
            engine.check_precision("features.precision", "bf16", CPU)


def test_tf32_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"^params\.yaml: fine_tune\.x\.precision: tf32 needs a GPU.*expected fp32"):
        engine.check_precision("fine_tune.x.precision", "tf32", CPU)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("is_able", [True, False])
def test_a_gpu_that_only_emulates_a_precision_is_named(
    monkeypatch: pytest.MonkeyPatch, precision: str, *, is_able: bool
) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation or is_able)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Tesla T4")
    if is_able or precision == "fp32":
        engine.check_precision("features.precision", precision, GPU)
    else:
        line = rf"^params\.yaml: features\.precision: this GPU \(Tesla T4\) has no {precision}; expected fp32$"
        with pytest.raises(ValueError, match=line):
            engine.check_precision("features.precision", precision, GPU)


@pytest.mark.parametrize(("size", "on_gpu"), [(8, 8), (32, 32), (100, 33), (256, 32), (1, 1)])
def test_a_batch_of_a_gpu_is_loaded_in_equal_pieces(size: int, on_gpu: int) -> None:
    assert engine.piece_size(size, CPU) == size
    assert engine.piece_size(size, GPU) == on_gpu


@pytest.mark.parametrize(
    ("lengths", "n_batches"), [([8] * 3, 3), ([4] * 6, 3), ([3] * 8, 4), ([4, 4, 4, 2], 2), ([5], 1)]
)
def test_pieces_are_put_together_to_batches_and_come_back_as_they_were(
    network: nn.Module, lengths: list[int], n_batches: int
) -> None:
    shapes: list[int] = []
    network.register_forward_pre_hook(lambda _, given: shapes.append(len(given[0])))
    x = inputs(24)
    expected = np.concatenate(list(engine.run(network, x.split(8), "torch", "fp32", CPU, 8)))
    shapes.clear()
    n = sum(lengths)
    found = list(engine.run(network, x[:n].split(lengths), "torch", "fp32", CPU, 8))
    assert [len(output) for output in found] == lengths
    assert np.array_equal(np.concatenate(found), expected[:n])
    assert shapes == [8] * n_batches


class Slow:
    """A stand-in for the link to a GPU: an output is there only once it was waited for."""

    is_asynchronous = True
    n_running = most_running = 0

    def __init__(self, _: torch.device) -> None:
        pass

    def send(self, pieces: list[torch.Tensor], size: int) -> torch.Tensor:
        return engine._padded(torch.cat(pieces), size)

    def receive(self, output: torch.Tensor) -> tuple[torch.Tensor, SimpleNamespace]:
        arriving, values = torch.full(output.shape, torch.nan).numpy(), output.numpy().copy()
        Slow.n_running += 1
        Slow.most_running = max(Slow.n_running, Slow.most_running)

        def synchronize() -> None:
            Slow.n_running -= 1
            arriving[:] = values

        return torch.from_numpy(arriving), SimpleNamespace(synchronize=synchronize)


def test_several_batches_are_on_their_way_and_each_row_is_waited_for(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = inputs(43)
    expected = [output.copy() for output in engine.run(network, x.split(4), "torch", "fp32", CPU, 8)]
    monkeypatch.setattr(engine, "_Link", Slow)
    found = list(engine.run(network, x.split(4), "torch", "fp32", CPU, 8))
    assert len(found) == len(expected)
    assert all(map(np.array_equal, found, expected))
    assert (Slow.n_running, Slow.most_running) == (0, 1 + engine.IN_FLIGHT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_rows_of_a_gpu_do_not_depend_on_pieces_or_on_where_they_come_from(network: nn.Module, precision: str) -> None:
    gpu, x = choose_device("cuda"), inputs(100)
    expected = list(engine.run(network, x.split(16), "torch", precision, gpu, 32))
    again, pageable, resident = (
        list(engine.run(network, pieces, "torch", precision, gpu, 32))
        for pieces in (x.pin_memory().split(16), x.split(8), x.to(gpu).split(32))
    )
    for found in (again, pageable, resident):
        assert np.array_equal(np.concatenate(found), np.concatenate(expected))
    (on_cpu,) = engine.run(network.cpu(), [x], "torch", "fp32", CPU, 100)
    assert np.abs(on_cpu - np.concatenate(expected)).max() < 0.05 * np.abs(on_cpu).max()


def test_auto_takes_openvino_on_a_cpu_and_torch_is_taken_where_it_is_asked_for(network: nn.Module) -> None:
    assert engine.prepare("auto", network, inputs(2), "fp32", CPU).engine == "openvino"
    assert engine.prepare("torch", network, inputs(2), "fp32", CPU).engine == "torch"
    with pytest.raises(ValueError, match=r"features\.engine: openvino runs on a CPU; expected auto or torch"):
        engine.prepare("openvino", network, inputs(2), "fp32", GPU)


@pytest.mark.parametrize("failing", ["openvino.convert_model", "pipeline.features.engine.openvino_core"])
def test_network_that_openvino_cannot_run_runs_in_torch_with_a_warning(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such\noperation")

    monkeypatch.setattr(failing, fail)
    with caplog.at_level(logging.WARNING, "pipeline"):
        assert engine.prepare("auto", network, inputs(2), "fp32", CPU).engine == "torch"
    assert "OpenVINO cannot convert this network, torch runs it (no such operation)" in caplog.text
    with pytest.raises(
        ValueError, match=r"features\.engine: openvino cannot convert this network \(no such operation\)"
    ):
        engine.prepare("openvino", network, inputs(2), "fp32", CPU)


def test_openvino_is_taken_only_where_it_gives_what_torch_gives(
    network: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    x = inputs(4)
    with torch.no_grad():
        expected = network.eval()(x[:1]).numpy()
    assert engine.prepare("auto", network, x, "fp32", CPU, expected).engine == "openvino"
    other = expected + 2e-4 * np.abs(expected).max()
    assert engine.prepare("auto", network, x, "bf16", CPU, other).engine == "openvino", "bf16 differs anyway"
    assert engine.prepare("auto", network, x, "bf16", CPU, 9 * expected).engine == "torch", "but not so much"
    assert engine.prepare("auto", network, x, "fp32", CPU, other, engine.LOGITS).engine == "openvino"
    assert engine.prepare("auto", network, x, "fp32", CPU, 1.1 * expected, engine.LOGITS).engine == "torch"
    assert engine.prepare("auto", network, x, "fp32", CPU, other).engine == "torch"
    assert "torch runs it (it differs from torch by 0.0002 of the largest value)" in caplog.text
    assert engine.prepare("auto", network, x, "fp32", CPU, np.full_like(expected, np.nan)).engine == "torch"
    with pytest.raises(ValueError, match=r"features\.engine: openvino cannot .* differs from torch"):
        engine.prepare("openvino", network, x, "fp32", CPU, other)


class ChannelsLast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize("kind", ["avg", "flatten"])
@pytest.mark.parametrize("layout", [nn.Identity(), ChannelsLast()])
def test_openvino_gives_the_logits_of_a_standardised_head_on_a_map(kind: str, layout: nn.Module) -> None:
    """Of the mean of flattened pixels, OpenVINO 2026.4 gives others."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), layout, Pool(kind, 0))
    with torch.no_grad():
        width = base(inputs(1)).shape[1]
    standardize = Standardize(width)
    standardize.mean.uniform_()
    standardize.deviation.uniform_(0.5, 2)
    module = nn.Sequential(base, standardize, nn.Dropout(0.0), nn.Linear(width, 3)).eval()
    with torch.no_grad():
        expected = module(inputs(4)).numpy()
    (found,) = engine.run(module, [inputs(4)], "openvino", "fp32", CPU, 4)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ENGINES)
def test_a_prepared_network_runs_as_often_as_is_asked(network: nn.Module, name: str) -> None:
    x = inputs(12)
    runner = engine.prepare(name, network, x[:4], "fp32", CPU)
    first, again = (np.concatenate(list(runner.run(x.split(4)))) for _ in range(2))
    assert np.array_equal(first, again)
    (alone,) = runner.run([x[:1]])
    assert np.array_equal(alone, first[:1])


@pytest.mark.slow
@pytest.mark.parametrize("first", ["features.engine", "features.extraction"])
def test_openvino_sends_nothing_whichever_module_comes_first(first: str) -> None:
    code = f"import sys, pipeline.{first}; print(*(n for n in sys.modules if n.startswith('openvino_telemetry.')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_signals_find_their_stack_after_networks_have_come_and_gone() -> None:
    code = """
import faulthandler, signal, time, torch
from torch import nn
from pipeline.features import engine
from pipeline.network.device import choose_device
cpu, x = torch.device("cpu"), torch.zeros(2, 3, 8, 8)
faulthandler.enable()  # which gives signals a stack
signal.signal(signal.SIGALRM, lambda *_: None)  # Python's handlers run on it
first = engine.prepare("openvino", nn.Conv2d(3, 8, 3), x, "fp32", cpu)
second = engine.prepare("openvino", nn.Conv2d(3, 4, 3), x, "fp32", cpu)
del first
del second
signal.setitimer(signal.ITIMER_REAL, 0.01)
time.sleep(0.1)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("Cannot allocate memory")]
)
def test_too_little_memory_does_not_change_the_engine(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_network(*_: object) -> None:
        raise error

    monkeypatch.setattr(engine, "_compile", compile_network)
    for requested in ("auto", "openvino"):
        with pytest.raises(type(error)) as caught:
            engine.prepare(requested, nn.Flatten(), torch.zeros(8, 4, 4, 3), "fp32", torch.device("cpu"))
        assert caught.value is error
