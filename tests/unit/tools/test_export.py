"""export: the ONNX file predicts what predict does, with what its metadata say, or there is no file."""

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.__main__ import cli
from pipeline.dataset import manifest
from pipeline.dataset.decoding import decode, sha256
from pipeline.dataset.manifest import Images, Split
from pipeline.features import pixels
from pipeline.features.views import SYMMETRIES, evaluation_views, make_views
from pipeline.network import backbones, cuts
from pipeline.network.plans import BackbonePlan
from pipeline.network.preprocessing import Normalize, Preprocessing
from pipeline.params import BackboneChoice
from pipeline.tools import export
from pipeline.training import calibration, heads, saved_networks
from pipeline.training.saved_networks import Card
from tests import factories
from tests.factories import HOSTILE, LINEAR, PLAIN, PREPROCESSING, backbone_plan

REPOSITORY = Path(__file__).parents[3]
TO_ONNX = export._to_onnx
SIZE, N_IMAGES = 32, 24
CLASSES = tuple(sorted(HOSTILE))
RUN = Path("models/full_retrain/seed_0.json")
PADDED = PREPROCESSING.model_copy(update={"geometry": "pad"})


def photographs(directory: Path, n: int, first: int = 0) -> list[Path]:
    """Pictures of many sizes, with soft edges; every third a JPEG that is decoded at reduced size."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(first, first + n):
        random = np.random.default_rng(number)
        width, height = random.integers(36, 90, 2).tolist() if number % 3 else (400, 8 * (30 + number % 20))
        small = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8))
        paths.append(directory / f"{number:02}.{'png' if number % 3 else 'jpg'}")
        small.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def plan_of(choice: BackboneChoice, size: int | None, names: tuple[str, ...] = ("all",)) -> BackbonePlan:
    """The plan of a network, whose features are taken at several cuts if there are several `names`."""
    backbone = backbones.load(choice, size).with_inputs("pad", "fast")
    taps = cuts.lay_out(backbone, names, "avg") if len(names) > 1 else ()
    return backbone_plan(
        choice=choice,
        image_size=size,
        preprocessing=backbone.preprocessing,
        weights_sha256=backbone.weights_sha256,
        feature_dim=backbone.feature_dim,
        taps=taps,
        feature_shape=(sum(tap.width for tap in taps) or backbone.feature_dim,),
    )


def save(plan: BackbonePlan, **changes: Any) -> None:
    """A run of this plan below the current directory, whose predictions differ from image to image."""
    backbone = backbones.load(plan.choice, plan.image_size)
    card = factories.card(strategy="full_retrain", class_names=CLASSES, backbone=plan, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = heads.build(plan.feature_shape, len(CLASSES), card.head, nn.Identity())
        _, *behind = head
        for layer in behind:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=2 / layer.in_features**0.5)
        base, _ = cuts.split(backbone, plan.cut)
        prefix, _ = cuts.prefix_and_suffix(backbone, plan.cut, cuts.pools(plan))
        contents = [path.read_bytes() for path in photographs(Path("data/standard"), 12, first=50)]
        rows = np.stack([pixels.make(content, "crop", plan.preprocessing, PLAIN) for content in contents])
        with torch.no_grad():
            features = prefix.module(torch.from_numpy(rows))
        head[0].mean.copy_(features.mean(0))  # pyright: ignore[reportCallIssue]
        head[0].deviation.copy_(features.std(0) + 1e-6)  # pyright: ignore[reportCallIssue]
    saved_networks.save_model(card, head, base)


def expected(run: Path, paths: list[Path]) -> tuple[np.ndarray, Card]:
    """The probabilities that predict gives, (n, n_classes)."""
    network, card = saved_networks.load_network(run)
    views, found = evaluation_views(card.evaluation_views), []
    for content in (path.read_bytes() for path in paths):
        made = make_views(content, sha256(content), views, card.backbone.preprocessing, card.augmentation)
        with torch.inference_mode():
            found.append(heads.mean_log_probability(network(torch.from_numpy(made))[None])[0].numpy())
    return calibration.scaled(np.stack(found), card.temperature), card


def session(file: Path) -> Any:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with images, a split and a run whose views tell all symmetries apart."""
    root = tmp_path_factory.mktemp("repository")
    paths = photographs(root / "data/mine", N_IMAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        factories.study_params(Path("params.yaml"))
        digests = [sha256(path.read_bytes()) for path in paths]
        manifest.write_images(Images([path.name for path in paths], digests, [1] * N_IMAGES, [1] * N_IMAGES))
        split = np.array(["train", "val", "test"])[np.arange(N_IMAGES) % 3]
        manifest.write_split(Split(0, [path.name for path in paths], split))
        plan = plan_of(BackboneChoice.of("timm/test_resnet", "random", 3), SIZE)
        save(plan, evaluation_views=(*SYMMETRIES,), temperature=1.7)
    (root / "dvc.yaml").write_text("stages: {}\n")
    return root


@pytest.fixture(scope="module")
def files(repository: Path) -> Callable[..., tuple[Path, str]]:
    """Exports once per kind of file: the file, and what was printed."""
    made: dict[tuple[str, ...], tuple[Path, str]] = {}

    def make(*options: str) -> tuple[Path, str]:
        if options not in made:
            output = repository.parent / f"exported{len(made)}" / ("whole.onnx" if options else "model.onnx")
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
                cli(["export", str(repository / RUN), str(output), *options], standalone_mode=False)
            made[options] = output, out.getvalue()
        return made[options]

    return make


@pytest.mark.slow
def test_the_file_gives_what_predict_gives_for_any_number_of_images(
    repository: Path, files: Callable[..., tuple[Path, str]], tmp_path: Path
) -> None:
    file, printed = files()
    paths = photographs(tmp_path, 6, first=100)
    right, card = expected(repository / RUN, paths)
    raw = card.backbone.preprocessing
    rows = np.stack([pixels.make(path.read_bytes(), "crop", raw, card.augmentation) for path in paths])
    runner = session(file)
    for n in (1, 2, 6):
        (found,) = runner.run(None, {"pixels": rows[:n]})
        assert found.dtype == np.float32
        assert np.abs(found - right[:n]).max() < 1e-5
    assert len(set(right.argmax(axis=1))) > 1
    assert np.ptp(right[:, 0]) > 0.05, "images differ by more than the tolerance"
    assert "against predict on 16 images: largest probability difference" in printed
    assert "; another class for 0; validation and test images of mine\n" in printed
    assert len([line for line in printed.splitlines() if line.strip()]) == 3, "the exporter is silent"


def test_views_and_temperature_are_inside(repository: Path, files: Callable[..., tuple[Path, str]]) -> None:
    file, _ = files()
    random = np.random.default_rng(5).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
    network, card = saved_networks.load_network(repository / RUN)
    turned = np.stack([np.rot90(random[0][:, ::-1] if flip else random[0], k) for flip, k in SYMMETRIES.values()])
    with torch.inference_mode():
        probability = network(torch.from_numpy(turned)).double().softmax(1)
    assert probability.std(0).max() > 1e-3, "the views differ"
    powered = probability.mean(0) ** (1 / 1.7)
    assert card.temperature == 1.7
    (found,) = session(file).run(None, {"pixels": random})
    assert np.allclose(found[0], powered / powered.sum(), atol=1e-5)
    assert not np.allclose(found[0], probability.mean(0), atol=1e-2)


@pytest.mark.slow
def test_metadata_hold_classes_card_and_geometry_and_no_path_of_this_machine(
    repository: Path, files: Callable[..., tuple[Path, str]]
) -> None:
    file, _ = files()
    meta = session(file).get_modelmeta().custom_metadata_map
    assert json.loads(meta["class_names"]) == [*CLASSES]
    assert Card.model_validate_json(meta["card"]) == saved_networks.read_card(repository / RUN)
    assert json.loads(meta["geometry"])["crop"] == SIZE
    assert f"uint8 (n, {SIZE}, {SIZE}, 3)" in meta["input"]
    (given,), (made,) = session(file).get_inputs(), session(file).get_outputs()
    assert (given.name, given.type, given.shape) == ("pixels", "tensor(uint8)", ["n", SIZE, SIZE, 3])
    assert (made.name, made.type, made.shape) == ("probabilities", "tensor(float)", ["n", 3])
    content = file.read_bytes()
    assert not [path for path in (str(REPOSITORY), str(repository), "site-packages") if path.encode() in content]


@pytest.mark.slow
def test_a_whole_image_of_any_size_gives_nearly_what_predict_gives(
    repository: Path, files: Callable[..., tuple[Path, str]], tmp_path: Path
) -> None:
    file, printed = files("--full-image", "--opset", "20")
    paths = photographs(tmp_path, 8, first=200)
    right, _ = expected(repository / RUN, paths)
    runner = session(file)
    images = [np.asarray(decode(path.read_bytes()).convert("RGB")) for path in paths]
    found = np.concatenate([runner.run(None, {"image": image})[0] for image in images])
    exact = [i for i, path in enumerate(paths) if path.suffix == ".png"]  # no JPEG at reduced size
    assert np.abs(found - right)[exact].max() < 5e-3
    assert np.abs(found - right).max() < 5e-2
    assert "on 16 images: largest probability difference" in printed
    assert {one.domain: one.version for one in onnx.load(file).opset_import}[""] == 20


@pytest.mark.parametrize(
    ("number", "is_transparent"),
    [(0, False), (0, True), *(pytest.param(1, here, marks=pytest.mark.slow) for here in (False, True))],
)
def test_the_example_of_the_docs_predicts_a_file_with_three_libraries_alone(
    number: int,
    is_transparent: bool,
    repository: Path,
    files: Callable[..., tuple[Path, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (REPOSITORY / "docs/export.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[number]
    file, _ = files(*[[], ["--full-image", "--opset", "20"]][number])
    (tmp_path / file.name).write_bytes(file.read_bytes())
    photo = photographs(tmp_path / "photos", 1)[0]  # a JPEG that is decoded at reduced size
    lying = Image.Exif()
    lying[0x0112] = 6
    shown = Image.open(photo)
    if is_transparent:  # by a palette; the name says nothing of the format
        shown.quantize(8).save(tmp_path / "photo.jpg", "PNG", transparency=3)
    else:
        shown.save(tmp_path / "photo.jpg", exif=lying, quality=95)
    capsys.readouterr()
    cli(["predict", str(repository / RUN), str(tmp_path / "photo.jpg"), "--json"], standalone_mode=False)
    (predicted,) = json.loads(capsys.readouterr().out)
    alone = code + "import sys; assert not {'torch', 'timm', 'pipeline'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", alone], cwd=tmp_path, capture_output=True, text=True, check=True)
    name, _, probability = done.stdout.strip().rpartition(" ")
    assert name == predicted["class"]
    assert float(probability) == pytest.approx(predicted["probability"], abs=[5e-5, 2e-2][number])
    assert code == export.example(file.name, PADDED, is_whole=number == 1)


GEOMETRIES = [
    *(("crop", (resize,), crop) for resize, crop in ((8, 8), (24, 21), (25, 22), (40, 32), (20, 31))),
    *(("crop", (37, 50), 32), ("squash", (40,), 31), ("pad", (40,), 31), ("pad", (40,), 32)),
]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("kind", "resize", "crop"), GEOMETRIES)
def test_a_whole_image_becomes_the_pixels_that_pillow_makes_and_so_does_the_example(
    kind: Any, resize: tuple[int, ...], crop: int, interpolation: str, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {"geometry": kind, "resize": resize, "crop": crop, "interpolation": interpolation, "mean": (0.1, 0.5, 1)}
    preprocessing = PREPROCESSING.model_copy(update=changes)
    model = onnx.parser.parse_model(export._whole_image(preprocessing, 10, 18))
    runner: Any = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert capfd.readouterr().err == "", "onnxruntime finds nothing that is not used"
    example = export.example("", preprocessing, is_whole=False)
    made = example[example.index("image = image.convert") : example.index("(probabilities,)")]
    for number, (width, height) in enumerate(
        [(30, 30), (31, 47), (48, 31), (90, 61), (61, 90), (200, 33), (7, 9), (333, 250)]
    ):
        small = Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 9, 3), np.uint8))
        image = small.resize((width, height), Image.Resampling.BICUBIC)
        right = pixels.crop(image, preprocessing)
        (found,) = runner.run(None, {"image": np.asarray(image)})
        assert found.shape == (1, crop, crop, 3)
        apart = np.abs(found[0].astype(int) - right)
        assert apart.max() <= 1, (width, height)
        assert (apart > 0).mean() < (0.06 if len(resize) == 1 else 0.3), (width, height)
        names: dict[str, Any] = {"Image": Image, "image": image, "how": export.geometry(preprocessing)}
        exec(made, names)
        assert np.array_equal(np.asarray(names["square"]), right), (width, height)


def small(preprocessing: Preprocessing = PREPROCESSING, **changes: Any) -> tuple[nn.Sequential, Card]:
    """A network that is exported in a moment; the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(Normalize(preprocessing), nn.Flatten(), nn.Linear(3 * preprocessing.crop**2, 2)).eval()
    card = factories.card(backbone=backbone_plan(preprocessing=preprocessing), **changes)
    return network, card.model_copy(update={"evaluation_views": ("identity", "rotate_90")})


@cache
def small_file(interpolation: str, is_whole: bool) -> bytes:
    network, card = small(PREPROCESSING.model_copy(update={"interpolation": interpolation}))
    return TO_ONNX(network, card, 18, is_whole=is_whole)


def fake_run(monkeypatch: pytest.MonkeyPatch, preprocessing: Preprocessing = PREPROCESSING) -> nn.Sequential:
    """Whatever the run, it is `small`; its file is made once."""
    network, card = small(preprocessing)
    monkeypatch.setattr(saved_networks, "read_card", lambda _: card)
    monkeypatch.setattr(saved_networks, "load_network", lambda _: (network, card))
    monkeypatch.setattr(export, "_to_onnx", lambda *_, is_whole: small_file(preprocessing.interpolation, is_whole))
    return network


@pytest.mark.slow
def test_a_file_that_differs_from_predict_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = photographs(tmp_path / "images", 3)
    network = fake_run(monkeypatch)
    with torch.no_grad():
        network[-1].bias[0] += 1e-3  # pyright: ignore[reportIndexIssue, reportOperatorIssue]
    with pytest.raises(ValueError, match=r"differs from predict: .*; expected at most 0\.0001") as caught:
        export.show("run", tmp_path / "out/model.onnx", [str(paths[0].parent)], is_whole=False, opset=18)
    assert "\n" not in str(caught.value)
    assert [*(tmp_path / "out").iterdir()] == []


@pytest.mark.parametrize(
    ("n", "n_other", "largest", "is_whole", "is_right"),
    [
        (100, 0, 9e-5, False, True),
        (100, 0, 2e-4, False, False),
        (100, 1, 9e-5, False, False),
        (100, 0, float("nan"), False, False),
        (100, 0, float("nan"), True, False),
        (199, 1, 0.3, True, True),
        (199, 2, 0.3, True, False),
        (200, 1, 0.3, True, True),
        (200, 2, 0.3, True, False),
        (1000, 5, 0.3, True, True),
        (1000, 6, 0.3, True, False),
    ],
)
def test_how_much_a_file_may_differ(n: int, n_other: int, largest: float, is_whole: bool, is_right: bool) -> None:
    check = export.Check(n, 0, largest, largest, n_other)
    if is_right:
        export._judge(check, is_whole=is_whole)
        return
    with pytest.raises(ValueError, match="nothing was written"):
        export._judge(check, is_whole=is_whole)


def test_classes_within_the_tolerance_of_each_other_are_a_tie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = photographs(tmp_path, 4)
    network, card = small(temperature=1.0)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    outputs = iter([[[0.5, 0.5]], [[0.49996, 0.50004], [0.4, 0.6], [0.6, 0.4]]])
    monkeypatch.setattr(export, "_session", lambda *_: None)
    monkeypatch.setattr(export, "_run", lambda *_: np.array(next(outputs)))
    check = export.compare(tmp_path, network, card, paths, is_whole=False)
    assert (check.n, check.n_other) == (4, 0)
    with torch.no_grad():
        network[-1].bias[0] = 0.5  # pyright: ignore[reportIndexIssue]
    outputs = iter([[[0.6, 0.4]], [[0.4, 0.6]] * 3])
    assert export.compare(tmp_path, network, card, paths, is_whole=False).n_other == 3


@pytest.mark.slow
def test_without_images_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    fake_run(monkeypatch)
    output = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match=r"no images to check the file with .* name some: --images") as caught:
        export.show(str(tmp_path / "models/a/seed_0"), output, [], is_whole=False, opset=18)
    assert "\n" not in str(caught.value)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(
        ValueError, match=r"none of 1 images can be read, first .*notes\.txt: .*name others by --images"
    ):
        export.show("run", output, [str(tmp_path / "notes.txt")], is_whole=False, opset=18)
    with pytest.raises(ValueError, match=r"absent\.png: not there, nor another of 2 images; name others by --images"):
        export.show(
            "run", output, [str(tmp_path / name) for name in ("absent.png", "too.png")], is_whole=False, opset=18
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--images: no image in .*empty; expected files with the extensions"):
        export.show("run", output, [str(tmp_path / "empty")], is_whole=False, opset=18)
    assert not output.exists()


@pytest.mark.slow
def test_images_that_cannot_be_read_are_counted_and_many_are_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = photographs(tmp_path / "images", 12)
    paths[0].write_bytes(b"broken")
    fake_run(monkeypatch)
    monkeypatch.setattr(export, "N_CHECKED", 11)
    export.show("run", tmp_path / "model.onnx", [str(paths[0].parent)], is_whole=False, opset=18)
    printed = capsys.readouterr().out
    assert re.search(r"on (10|11) images.*; a sample of 12 named by --images", printed)
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    export.show("run", tmp_path / "model.onnx", [*map(str, paths[:3]), str(paths[1])], is_whole=True, opset=18)
    printed = capsys.readouterr().out
    assert "on 2 images (1 more cannot be read): " in printed
    beside = tmp_path / "model.md"
    assert f"{beside}: the model card; README.md there is not of this file" in printed
    assert "SHA-256 of model.onnx: " in beside.read_text(encoding="utf-8")
    (tmp_path / "README.md").unlink()
    export.show("run", tmp_path / "model.onnx", [str(paths[1])], is_whole=True, opset=18)
    assert f"{beside}: the model card\n" in capsys.readouterr().out, "not a second card"
    for path in (tmp_path / "README.md", beside):
        path.write_text("mine", encoding="utf-8")
    export.show("run", tmp_path / "model.onnx", [str(paths[1])], is_whole=True, opset=18)
    way_out = "are there already and stay as they are; for a model card of this file, export it into another directory"
    assert f"{tmp_path / 'README.md'} and model.md: {way_out}" in capsys.readouterr().out
    assert beside.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("interpolation", ["nearest", "lanczos", "box", "hamming"])
def test_what_onnx_cannot_resize_is_one_line(
    interpolation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_run(monkeypatch, PREPROCESSING.model_copy(update={"interpolation": interpolation}))
    with pytest.raises(ValueError, match=f"no resizing like Pillow's {interpolation} .*without --full-image"):
        export.show("run", tmp_path / "model.onnx", [str(tmp_path)], is_whole=True, opset=18)


def test_what_the_exporter_cannot_say_is_one_short_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """An operation that ONNX does not have."""
            return torch.linalg.eigvalsh(x[:, 0, :3, :3])[:, :2]

    _, card = small()
    network = nn.Sequential(Normalize(PREPROCESSING), Counting())
    with pytest.raises(ValueError, match=r"^timm/test_resnet cannot be exported to ONNX \(.*\)$") as caught:
        export._to_onnx(network, card, 18, is_whole=False)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "linalg_eigh" in str(caught.value)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(export, "LARGEST", 100)
    with pytest.raises(ValueError, match=r"timm/test_resnet: 0\.0 GB of weights; expected at most 2"):
        export._to_onnx(small()[0], card, 18, is_whole=False)


@pytest.mark.parametrize("name", ["model.pt", "model", "model.onnx"])
def test_an_output_that_is_no_onnx_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(ValueError, match=r"expected the name of a file that ends with \.onnx"):
        export.show("run", tmp_path / name, [], is_whole=False, opset=18)


@pytest.mark.parametrize("place", ["models", "models/new", "reports", "data/mine"])
def test_nothing_is_written_where_dvc_keeps_outputs(place: str, repository: Path) -> None:
    before = sorted(repository.rglob("*"))
    with pytest.raises(ValueError, match="holds what the stages write; expected a directory outside data, models"):
        cli(["export", str(repository / RUN), str(repository / place / "a.onnx")], standalone_mode=False)
    assert sorted(repository.rglob("*")) == before


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"onnxruntime.*; run: pip install --requirement requirements-export\.lock"):
        export.show("run", tmp_path / "a.onnx", [], is_whole=False, opset=18)


MLP = LINEAR.model_copy(update={"kind": "mlp", "hidden": (6,), "dropout": 0.5})


@pytest.mark.slow
def test_an_mlp_on_several_cuts_of_a_transformer_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = backbones.load(choice := BackboneChoice.of("timm/test_vit", "random", 0), 64)
    plan = plan_of(choice, 64, (cuts.resolve(backbone, "blocks.2"), "all"))
    assert len(plan.taps) == 2
    save(plan, head=MLP, evaluation_views=("identity", "flip_horizontal"), temperature=0.8)
    paths = photographs(tmp_path / "images", 5)
    export.show(str(RUN), tmp_path / "model.onnx", [str(paths[0].parent)], is_whole=False, opset=18)
    assert "another class for 0; named by --images" in capsys.readouterr().out
    assert np.ptp(expected(RUN, paths)[0][:, 0]) > 0.01


@pytest.mark.architectures
@pytest.mark.parametrize(
    "name",
    ["torchvision/squeezenet1_1", "timm/mobilenetv3_small_100", "timm/test_convnext", "timm/vit_tiny_patch16_224"],
)
def test_networks_of_many_families_are_exported(name: str, tmp_path: Path) -> None:
    backbone = backbones.load(BackboneChoice.of(name, "random", 0), None)
    network = nn.Sequential(Normalize(backbone.preprocessing), backbone.module, nn.Linear(backbone.feature_dim, 2))
    _, card = small(backbone.preprocessing, temperature=1.5)
    file = tmp_path / "model.onnx"
    file.write_bytes(export._to_onnx(network.eval(), card, 18, is_whole=False))
    paths = photographs(tmp_path / "images", 3)
    check = export.compare(file, network, card, paths, is_whole=False)
    assert check.n == 3
    assert check.largest < 1e-4
