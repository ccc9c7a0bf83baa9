"""export: a saved network as one ONNX file, which predicts what `predict` does, without torch and this repository.

The file holds everything from uint8 pixels to calibrated probabilities, and in its metadata the classes, the card, and
how an image becomes its input. Before it takes its place, onnxruntime runs it on images, and what it gives is compared
with torch.
"""

import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.dataset import decoding, manifest
from pipeline.features import pixels
from pipeline.features.views import SYMMETRIES, evaluation_views, view_of
from pipeline.files import replacing
from pipeline.logs import one_line, progress, raise_if_of_machine
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import PARAMS, load_params
from pipeline.tools import inference, model_card, predict
from pipeline.training import calibration, heads, saved_networks
from pipeline.training.saved_networks import Card

TOLERANCE = 1e-4  # of a probability; also, between two classes, a tie
N_CHECKED = 256  # images
# Of the classes from whole images; of fewer images, one may differ, of very few none
AGREEMENT, FEW, VERY_FEW = 0.995, 200, 20
LARGEST = 2**31 - 2**24  # bytes of weights: one file of protobuf holds 2 GiB
BATCH = 8  # images that are checked together, after a first one alone
RESIZE = {"bilinear": 'mode="linear"', "bicubic": 'mode="cubic", cubic_coeff_a=-0.5'}  # Pillow's bicubic has a = -0.5


class Shipped(nn.Module):
    """uint8 (n, crop, crop, 3) -> probabilities (n, n_classes) float32: averaged over views, at the temperature.

    As heads.mean_log_probability and calibration.scaled, but in float32, because not every runtime has float64.
    """

    def __init__(self, network: nn.Module, card: Card) -> None:
        super().__init__()
        self.network, self.views, self.temperature = network, card.evaluation_views, card.temperature

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """All views go through the network as one batch."""
        views = torch.cat([_turned(pixels, *SYMMETRIES[name]) for name in self.views])
        logits = self.network(views).unflatten(0, (len(self.views), -1))
        return (F.log_softmax(logits, dim=-1).logsumexp(0) / self.temperature).softmax(-1)


@dataclass(frozen=True)
class Check:
    """How far the file is from torch on `n` images: probability differences, and how many classes differ."""

    n: int
    n_unreadable: int
    largest: float
    mean: float
    n_other: int

    def in_words(self) -> str:
        """One line."""
        unread = f" ({self.n_unreadable} more cannot be read)" if self.n_unreadable else ""
        return (
            f"onnxruntime against predict on {self.n:,} images{unread}: largest probability difference "
            f"{self.largest:.1e}, mean {self.mean:.1e}; another class for {self.n_other:,}"
        )


def show(run: str, output: Path, images: Sequence[str], *, is_whole: bool, opset: int) -> None:
    """Write the file `output`, and a model card beside it if there is room; print how well it agrees with predict.

    `run` as in predict. `is_whole`: the input is a whole image of any size, not pixels as the crop leaves them.
    `images`: files, directories and patterns to check with; none: validation and test images of the run's repository.
    ValueError in one line, and no file, if the network cannot be exported or does not agree.
    """
    if output.suffix != ".onnx" or output.is_dir():
        raise ValueError(f"{output}: expected the name of a file that ends with .onnx")
    model_card.refuse_outputs(output.parent)
    _require_onnx()
    path = inference.path_of(run)
    card = saved_networks.read_card(path)
    preprocessing = card.backbone.preprocessing
    if is_whole and preprocessing.interpolation not in RESIZE:
        raise ValueError(
            f"{path}: ONNX has no resizing like Pillow's {preprocessing.interpolation} (only {', '.join(RESIZE)}); "
            "export without --full-image, and resize with Pillow"
        )
    files, source = _files(images, path, card)
    network, card = saved_networks.load_network(path)
    exported = _to_onnx(network, card, opset, is_whole=is_whole)
    with replacing(output) as temporary:
        temporary.write_bytes(exported)
        check = compare(temporary, network, card, files, is_whole=is_whole)
        _judge(check, is_whole=is_whole)
    print(f"{check.in_words()}; {source}")
    print(f"{output}: {len(exported) / 1e6:.1f} MB, opset {opset}, temperature {card.temperature:.4g}")
    code = example(output.name, preprocessing, is_whole=is_whole)
    model_card.write_beside(path, card, output, f"{check.in_words()}; {source}", code)


def geometry(preprocessing: Preprocessing) -> dict[str, Any]:
    """How an upright image becomes a square of `crop` px, in numbers, for programs that have Pillow alone.

    It is resized to `size` (width, height), or so that its shorter (crop) or longer side (pad) has `side` px, and
    pasted with its centre on that of a square of the colour `fill`. A JPEG may be decoded at reduced size, of at least
    `jpeg_draft` (width, height).
    """
    p, is_crop = preprocessing, preprocessing.geometry == "crop"
    fixed = [*p.resize[::-1]] if is_crop and len(p.resize) == 2 else None
    draft = pixels.MARGIN * max((p.crop, *p.resize) if is_crop else (p.crop,))
    return {
        "geometry": p.geometry,
        "size": [p.crop, p.crop] if p.geometry == "squash" else fixed,
        "side": p.resize[0] if is_crop else p.crop,
        "crop": p.crop,
        "interpolation": p.interpolation,
        "fill": [*p.mean_colour] if p.geometry == "pad" else [0, 0, 0],
        "jpeg_draft": [draft, draft] if p.jpeg_decoding == "fast" else None,
    }


def in_words(preprocessing: Preprocessing, *, is_whole: bool) -> str:
    """What the input of the file is."""
    how = geometry(preprocessing)
    side = how["crop"]
    if how["size"]:
        size = f"to {how['size'][0]} x {how['size'][1]} px (width x height)"
    elif how["geometry"] == "crop":
        size = f"so that its shorter side has {how['side']} px, the longer one rounded down"
    else:
        size = f"so that its longer side has {side} px, the shorter one rounded"
    resized = f"resized ({how['interpolation']}) {size}"
    placed = {
        "crop": f"of which the middle {side} x {side} px are cut out",
        "pad": f"in the middle of a square of {side} px of the colour {tuple(how['fill'])}",
        "squash": "whatever its aspect was",
    }[how["geometry"]]
    image = "an upright RGB image (EXIF orientation applied), values 0 to 255"
    if is_whole:
        return f"image: uint8 (height, width, 3), {image}, of any size. Inside, it is {resized}, {placed}."
    return f"pixels: uint8 (n, {side}, {side}, 3), rows from the top. Each is {image}, {resized} by Pillow, {placed}."


def example(name: str, preprocessing: Preprocessing, *, is_whole: bool) -> str:
    """Python that predicts photo.jpg with the exported file `name`, with numpy, Pillow and onnxruntime alone."""
    name = json.dumps(name, ensure_ascii=False)
    return model_card.render("example.py.jinja", name=name, how=geometry(preprocessing), is_whole=is_whole)


def compare(file: Path, network: nn.Module, card: Card, images: Sequence[Path], *, is_whole: bool) -> Check:
    """Run the exported `file` and `network` on `images`, the first one alone, the others in batches.

    ValueError if none can be read, or onnxruntime cannot run the file.
    """
    session = _session(file, card)
    preprocessing, views = card.backbone.preprocessing, evaluation_views(card.evaluation_views)
    given, expected, unread = [], [], []
    batches = [images[:1], *(images[start : start + BATCH] for start in range(1, len(images), BATCH))]
    for batch in progress(batches, len(batches), "batches", "check"):
        rows, wholes = [], []
        for path in batch:
            try:
                content = path.read_bytes()
                rows.append(pixels.make(content, "crop", preprocessing, card.augmentation))
            except (OSError, ValueError) as error:
                unread.append(f"{path}: {one_line(error)}")
                continue
            if is_whole:
                wholes.append(np.asarray(decoding.decode(content).convert("RGB")))
        if not rows:
            continue
        turned = [[view_of(row, "", code, preprocessing, card.augmentation) for code in views] for row in rows]
        with torch.inference_mode():
            logits = network(torch.from_numpy(np.array(turned)).flatten(0, 1)).unflatten(0, (len(rows), len(views)))
        expected.append(calibration.scaled(heads.mean_log_probability(logits).numpy(), card.temperature))
        given += [_run(session, card, one) for one in (wholes if is_whole else [np.stack(rows)])]
    if not given:
        raise ValueError(f"none of {len(images):,} images can be read, first {unread[0]}; name others by --images")
    found, right = np.concatenate(given), np.concatenate(expected)
    every, apart = np.arange(len(right)), np.abs(found - right)
    is_other = right.max(axis=1) - right[every, found.argmax(axis=1)] > TOLERANCE  # else the same class, or a tie
    return Check(len(right), len(unread), float(apart.max()), float(apart.mean()), int(is_other.sum()))


def _judge(check: Check, *, is_whole: bool) -> None:
    allowed = max(int((1 - AGREEMENT) * check.n), VERY_FEW <= check.n < FEW) if is_whole else 0
    if check.n_other > allowed or not check.largest <= (1 if is_whole else TOLERANCE):  # true for NaN, too
        limit = f"at most {allowed} of another class" if is_whole else f"at most {TOLERANCE:g} and the same classes"
        raise ValueError(
            f"the exported network differs from predict: {check.in_words()}; expected {limit}; nothing was written"
        )


def _require_onnx() -> None:
    try:
        for name in ("onnx", "onnxruntime", "onnxscript"):
            import_module(name)
    except ImportError as error:
        raise ValueError(f"{error}; run: pip install --requirement requirements-export.lock") from None


def _files(images: Sequence[str], run: Path, card: Card) -> tuple[list[Path], str]:
    """The files to check with, a sample if there are many, and what they are."""
    if images:
        files, source = predict.find(images), "named by --images"
        if not files:
            raise ValueError(f"--images: no image in {', '.join(images)}; expected files with the extensions of images")
    else:
        root = inference.repository_of(run)
        try:
            directory = root / load_params(root / PARAMS).dataset.path
            names = manifest.read_images(root / manifest.IMAGES).image_id
            split = manifest.read_split(card.seed, names, root / manifest.SPLITS)
        except (OSError, ValueError, IndexError) as error:
            lacks = f"no images to check the file with ({one_line(error)})"
            raise ValueError(f"{lacks}; name some: --images FILE, DIRECTORY or PATTERN") from None
        files = [directory / names[row] for row in (*split.rows("val"), *split.rows("test"))]
        source = f"validation and test images of {directory.name}"
    if not any(path.is_file() for path in files):
        raise ValueError(f"{files[0]}: not there, nor another of {len(files):,} images; name others by --images")
    if len(files) > N_CHECKED:
        chosen = np.random.default_rng(0).choice(len(files), N_CHECKED, replace=False)
        files, source = [files[i] for i in sorted(chosen)], f"a sample of {len(files):,} {source}"
    return files, source


def _turned(pixels: torch.Tensor, is_flipped: bool, turns: int) -> torch.Tensor:
    """As views.view_of does it to one view, (n, crop, crop, 3)."""
    return torch.rot90(pixels.flip(2) if is_flipped else pixels, turns, (1, 2))


def _to_onnx(network: nn.Module, card: Card, opset: int, *, is_whole: bool) -> bytes:
    """The file; ValueError in one line if ONNX cannot hold the network."""
    import onnx

    name, preprocessing = card.backbone.choice.name, card.backbone.preprocessing
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if size_bytes > LARGEST:
        raise ValueError(f"{name}: {size_bytes / 1e9:.1f} GB of weights; expected at most 2, which one ONNX file holds")
    black = torch.zeros(2, preprocessing.crop, preprocessing.crop, 3, dtype=torch.uint8)
    with _explained(f"{name} cannot be exported to ONNX"), _silence(), torch.no_grad():
        program = torch.onnx.export(
            Shipped(network, card).eval(),
            (black,),
            input_names=["pixels"],
            output_names=["probabilities"],
            opset_version=opset,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            dynamo=True,
        )
        assert program is not None  # as it is with dynamo
        _forget_sources(program.model)
        model = program.model_proto
        if is_whole:
            front = onnx.parser.parse_model(_whole_image(preprocessing, model.ir_version, opset))
            model = onnx.compose.merge_models(front, model, io_map=[("front_pixels", "pixels")])
        described = {
            "class_names": json.dumps(card.class_names, ensure_ascii=False),
            "geometry": json.dumps(geometry(preprocessing)),
            "input": in_words(preprocessing, is_whole=is_whole),
            "output": f"probabilities: float32 (n, {len(card.class_names)}), of the classes in class_names",
            "card": card.model_dump_json(),
        }
        onnx.helper.set_model_props(model, described)
        onnx.checker.check_model(model)
    found = {one.domain: one.version for one in model.opset_import}[""]
    if found != opset:
        raise ValueError(f"{name}: the exporter cannot write opset {opset} for it, only {found}; use --opset {found}")
    return model.SerializeToString()


def _whole_image(preprocessing: Preprocessing, ir_version: int, opset: int) -> str:
    """A graph from an image, uint8 (height, width, 3), to pixels as the crop leaves them, as pixels.crop makes them.

    Sizes are computed in integers, or in float64 and rounded half to even, as Python does. Resizing uint8 gives what
    Pillow gives up to one grey level; Pillow leaves out what lies outside, too. Where the image is smaller than the
    square, it is moved up by one grey level and padded with zeros, which then become the colour of the border.
    """
    how = geometry(preprocessing)
    scaled = {
        "crop": "front_least = ReduceMin (front_sides) front_size = Div (front_products, front_least)",
        "pad": """front_most = ReduceMax (front_sides) front_most_ = Cast <to = 11> (front_most)
            front_products_ = Cast <to = 11> (front_products) front_exact = Div (front_products_, front_most_)
            front_round = Round (front_exact) front_round_ = Cast <to = 7> (front_round)
            front_size = Max (front_round_, front_one)""",
    }
    size = f"front_size = Constant <value = int64[2] {{{how['size'][1]}, {how['size'][0]}}}> ()" if how["size"] else ""
    one = "int64[1] front_one = {1}, " if how["geometry"] == "pad" else ""  # onnxruntime warns of what is not used
    fill, crop = ", ".join(str(value + 1) for value in how["fill"]), how["crop"]
    return f"""<ir_version: {ir_version}, opset_import: ["": {opset}]>
    front (uint8[height, width, 3] image) => (uint8[1, {crop}, {crop}, 3] front_pixels)
    <int64[1] front_zero = {{0}}, {one}int64[1] front_two = {{2}},
     int64[1] front_crop = {{{crop}}},
     int64[2] front_axes = {{2, 3}}, int64[2] front_none = {{0, 0}}, int64[2] front_rgb = {{1, 3}},
     int64[1] front_side = {{{how["side"]}}}, double[1] front_half = {{0.5}}, int32[1] front_level = {{1}},
     int32[1] front_outside = {{0}}, int32[1, 3, 1, 1] front_fill = {{{fill}}}>
    {{
        front_shape = Shape (image)
        front_sides = Slice (front_shape, front_zero, front_two, front_zero)
        front_products = Mul (front_sides, front_side)
        {size or scaled[how["geometry"]]}
        front_channels = Transpose <perm = [2, 0, 1]> (image)
        front_image = Unsqueeze (front_channels, front_zero)
        front_sizes = Concat <axis = 0> (front_rgb, front_size)
        front_small = Resize <{RESIZE[how["interpolation"]]}, antialias = 1, exclude_outside = 1,
            coordinate_transformation_mode = "half_pixel"> (front_image, , , front_sizes)
        front_gap = Sub (front_size, front_crop)
        front_gap_ = Cast <to = 11> (front_gap)
        front_middle = Mul (front_gap_, front_half)
        front_corner = Round (front_middle)
        front_corner_ = Cast <to = 7> (front_corner)
        front_start = Max (front_corner_, front_zero)
        front_end = Add (front_start, front_crop)
        front_cut = Slice (front_small, front_start, front_end, front_axes)
        front_lack = Neg (front_gap)
        front_lacks = Max (front_lack, front_zero)
        front_before = Div (front_lacks, front_two)
        front_after = Sub (front_lacks, front_before)
        front_pads = Concat <axis = 0> (front_none, front_before, front_none, front_after)
        front_levels = Cast <to = 6> (front_cut)
        front_above = Add (front_levels, front_level)
        front_padded = Pad (front_above, front_pads)
        front_is_outside = Equal (front_padded, front_outside)
        front_filled = Where (front_is_outside, front_fill, front_padded)
        front_square = Sub (front_filled, front_level)
        front_bytes = Cast <to = 2> (front_square)
        front_rows = Squeeze (front_bytes, front_zero)
        front_last = Transpose <perm = [1, 2, 0]> (front_rows)
        front_pixels = Unsqueeze (front_last, front_zero)
    }}"""


def _forget_sources(model: Any) -> None:  # noqa: ANN401
    """Remove what the exporter notes of the code: paths of this machine, and traces that are longer than the graph."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


@contextmanager
def _silence() -> Iterator[None]:
    """Without the exporter's warnings, logs and prints."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
    finally:
        logging.disable(before)


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    """Errors of the exporter and of onnxruntime, which are of many types, as a ValueError of one line.

    It ends with the start of the message of what was raised first.
    """
    try:
        yield
    except Exception as error:
        raise_if_of_machine(error)
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        raise ValueError(f"{problem} ({type(first).__name__}: {one_line(first)[:200]})") from None


def _session(file: Path, card: Card) -> Any:  # noqa: ANN401
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised anyway
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves torch the cores between batches
    with _explained(_cannot_run(card)):
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _run(session: Any, card: Card, given: np.ndarray) -> np.ndarray:  # noqa: ANN401
    with _explained(_cannot_run(card)):
        return session.run(None, {session.get_inputs()[0].name: given})[0]


def _cannot_run(card: Card) -> str:
    return f"{card.backbone.choice.name}: onnxruntime cannot run the exported file"
