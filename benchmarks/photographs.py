"""Large photographs: `python -m benchmarks.photographs [--quick]`.

Whole runs of `index` and `extract` on JPEGs of 12 megapixels, with `dataset.jpeg_decoding` fast and exact; the seconds
of a run with few images are subtracted, so that start-up does not count; `runtime.pixel_cache` is off, because with it
the workers decode during start-up. The limit of `extract` is what decoding and the network take, each alone on all
cores. Then what decoding at reduced size does to features and to a head: on patches of scikit-learn's two photographs,
which are as large for a small network as photographs are for a large one.
"""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from benchmarks.common import LITE, Line, choose, on_all_cores, run, took, workspace
from pipeline.dataset.decoding import sha256
from pipeline.features import engine, pixels
from pipeline.features.views import make_views
from pipeline.network import backbones, cuts
from pipeline.network.cuts import Prefix
from pipeline.network.preprocessing import Preprocessing
from pipeline.params import JpegDecoding, load_params

WIDTH, HEIGHT = 4000, 3000
FEW, MANY, QUICK = 8, 208, 104  # photographs
SHOTS = 26  # of which the photographs are copies with other bytes at their ends
PATCH, SMALL = 320, 64  # px of a patch, and of the input of the small network
N_PATCHES = 400
N_BATCHES = 40
PARAMS = load_params()
CPU = torch.device("cpu")


def measure(*, is_quick: bool) -> Iterator[Line]:
    """Rates, then differences."""
    n, seconds = QUICK if is_quick else MANY, {}
    with tempfile.TemporaryDirectory() as folder:
        files = photographs(Path(folder), n)
        for decoding in ("exact", "fast"):
            few, many = (stage_seconds(files[:k], decoding) for k in (FEW, n))
            seconds[decoding] = {stage: (many[stage] - few[stage]) / (n - FEW) for stage in many}
            rates = ", ".join(f"{stage} {1 / value:.1f}" for stage, value in seconds[decoding].items())
            print(f"  {decoding}, images/s: {rates}", flush=True)
        index = sum(taken["index"] for taken in seconds.values()) / len(seconds)  # it does the same in both
        _, taken = on_all_cores(partial(decode_one, load(None, "fast").backbone.preprocessing), files)
        decode, forward = taken / n, forward_seconds()
    print(f"  alone, images/s: decoding {1 / decode:.1f}, network {1 / forward:.0f}", flush=True)
    fast, exact = (index + seconds[decoding]["extract"] for decoding in ("fast", "exact"))
    yield Line("12 megapixels, index and extract, fast / exact", exact / fast, "times", "at least", 2)
    limit = (decode + forward) / seconds["fast"]["extract"]
    yield Line("12 megapixels, extract / decoding and network alone", limit, "times", "at least", 0.9)
    change, agreement = differences()
    yield Line("JPEGs at reduced size, change of the features", 100 * change, "%", "at most", 10)
    yield Line("JPEGs at reduced size, same class by the head", 100 * agreement, "%", "at least", 98)


def originals() -> list[np.ndarray]:
    """Two photographs, uint8 (427, 640, 3)."""
    return [np.asarray(image) for image in sklearn.datasets.load_sample_images().images]


def photographs(directory: Path, n: int) -> list[Path]:
    """Write `n` JPEGs of two classes: the photographs, enlarged, shifted, and with the noise of a camera."""
    random, files = np.random.default_rng(0), []
    large = [np.asarray(Image.fromarray(each).resize((WIDTH, HEIGHT)), np.int16) for each in originals()]
    for number in range(min(n, SHOTS)):
        picture = np.roll(large[number % 2], 37 * number, axis=1)
        noisy = picture + random.integers(-8, 9, picture.shape, dtype=np.int16)
        files.append(directory / f"{number % 2}" / f"{number:03}.jpg")
        files[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    for number in range(SHOTS, n):
        shot = files[number % SHOTS]
        files.append(shot.with_name(f"{number:03}.jpg"))
        files[-1].write_bytes(shot.read_bytes() + f"{number}".encode())
    return files


def stage_seconds(files: Sequence[Path], jpeg_decoding: str) -> dict[str, float]:
    """Seconds of runs of `index` and `extract` on these files."""
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            link = Path(folder, file.parent.name, file.name)
            link.parent.mkdir(exist_ok=True)
            link.hardlink_to(file)
        options, runtime = {"jpeg_decoding": jpeg_decoding}, {"pixel_cache": "off"}
        with workspace(Path(folder), dataset=options, runtime=runtime) as place:
            index = place.run("pipeline.stages.index").seconds
            place.run("pipeline.stages.plan")
            return {"index": index, "extract": place.run("pipeline.stages.extract").seconds}


def load(image_size: int | None, jpeg_decoding: JpegDecoding) -> Prefix:
    """The default network as a whole."""
    backbone = backbones.load(choose(LITE), image_size).with_inputs("crop", jpeg_decoding)
    return cuts.prefix_and_suffix(backbone, cuts.ALL, {cuts.ALL: cuts.Pool("none", 0)})[0]


def decode_one(preprocessing: Preprocessing, path: Path) -> tuple[str, int]:
    """Digest of a file, and the size of its pixels."""
    content = path.read_bytes()
    return sha256(content), pixels.make(content, "crop", preprocessing, PARAMS.augmentation).size


def forward_seconds() -> float:
    """Seconds per image of the network alone."""
    network = load(None, "fast")
    batch = torch.randint(256, (8, *[network.backbone.preprocessing.crop] * 2, 3), dtype=torch.uint8)
    runner = engine.prepare("auto", network.module, batch, "fp32", CPU)
    list(runner.run([batch] * 4))
    return took(lambda: list(runner.run([batch] * N_BATCHES))) / (N_BATCHES * len(batch))


def differences() -> tuple[float, float]:
    """Root mean square change of the features over their own; share of held-out patches of the same class by a head."""
    random, contents = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "patch.jpg")
        for number in range(N_PATCHES):
            picture = originals()[number % 2]
            top, left = (int(random.integers(0, side - PATCH)) for side in picture.shape[:2])
            Image.fromarray(picture[top : top + PATCH, left : left + PATCH]).save(path, quality=90)
            contents.append(path.read_bytes())
    features, label = {}, np.arange(N_PATCHES) % 2
    for jpeg_decoding in ("exact", "fast"):
        network = load(SMALL, jpeg_decoding)
        given = network.backbone.preprocessing, PARAMS.augmentation
        batch = torch.from_numpy(np.concatenate([make_views(each, sha256(each), [0], *given) for each in contents]))
        with torch.inference_mode():
            features[jpeg_decoding] = network.module(batch).numpy()
    change = np.sqrt(np.square(features["fast"] - features["exact"]).mean() / np.square(features["exact"]).mean())
    half = N_PATCHES // 2
    exact, fast = (
        LogisticRegression(max_iter=1000).fit(values[:half], label[:half]).predict(values[half:])
        for values in features.values()
    )
    return float(change), float((fast == exact).mean())


if __name__ == "__main__":
    run(measure)
