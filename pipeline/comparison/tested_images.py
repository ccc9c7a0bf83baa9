"""reports/outcomes.json: which test images each run predicts correctly, so that two commits can be compared in pairs.

Images are in the order of their digests. A flag of all images takes a bit each, in base64. An image is known by the
first 5 bytes of its SHA-256; above 20,000 images the file says only how many there are, and a
digest of which seed tests which.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.comparison import paired
from pipeline.comparison.details import Data
from pipeline.comparison.outcomes import Outcomes, of_classes
from pipeline.comparison.paired import Study
from pipeline.files import digest
from pipeline.training.runs import Run

MAX_IMAGES = 20_000
ID_BYTES = 5
Json = dict[str, Any]


@dataclass(frozen=True)
class Tested:
    """The content of outcomes.json.

    `n` test images over all seeds, `digest` of those of each seed. The rest is empty above 20,000 images: `image` (n,)
    bytes, `weight` (n,), `unit` (n,); `tested` bool (n,) by seed; `correct` bool (n,) by strategy and seed.
    """

    n: int
    digest: str
    n_folds: int
    image: np.ndarray
    weight: np.ndarray
    unit: np.ndarray
    tested: dict[str, np.ndarray]
    correct: dict[str, dict[str, np.ndarray]]


def encode(runs: Mapping[str, Sequence[Run]], data: Data) -> Json:
    """outcomes.json of the runs of each strategy."""
    labels = data.labels
    used = np.unique(np.concatenate([run.test.rows for these in runs.values() for run in these]))
    order = used[np.lexsort((used, np.array(labels.sha256)[used]))]
    digests = [labels.sha256[row] for row in order]
    by_seed = {
        run.seed: sorted(labels.sha256[row] for row in run.test.rows) for these in runs.values() for run in these
    }
    found: Json = {"n": len(order), "digest": digest(by_seed), "folds": data.n_folds}
    if len(order) > MAX_IMAGES:
        return found
    place = np.zeros(len(labels.label), np.int64)
    place[order] = np.arange(len(order))
    weight, (_, unit) = labels.weight[order], np.unique(data.unit[order], return_inverse=True)
    tested: dict[str, str] = {}
    correct: dict[str, dict[str, str]] = {name: {} for name in runs}
    for name, these in runs.items():
        for run in these:
            rows, flags = run.test.rows, np.zeros((2, len(order)), bool)
            flags[0, place[rows]] = True
            flags[1, place[rows]] = run.test.log_probability.argmax(axis=1) == labels.label[rows]
            tested[f"{run.seed}"], correct[name][f"{run.seed}"] = (_text(np.packbits(flag)) for flag in flags)
    return found | {
        "images": _text(np.frombuffer(b"".join(bytes.fromhex(sha256)[:ID_BYTES] for sha256 in digests), np.uint8)),
        "weights": None if np.ptp(weight) == 0 else _text(weight.astype("<f4")),
        "units": None if len(np.unique(unit)) == len(unit) else _text(unit.astype("<u4")),
        "tested": tested,
        "correct": correct,
    }


def decode(found: Json) -> Tested:
    """What encode made; ValueError, LookupError or TypeError for anything else."""
    n = int(found["n"])
    image = np.frombuffer(_bytes(found.get("images", "")), f"V{ID_BYTES}")
    weight, unit = np.ones(len(image)), np.arange(len(image))
    if found.get("weights"):
        weight = np.frombuffer(_bytes(found["weights"]), "<f4").astype(np.float64)
    if found.get("units"):
        unit = np.frombuffer(_bytes(found["units"]), "<u4").astype(np.int64)
    tested = {seed: _flags(text, n) for seed, text in found.get("tested", {}).items()}
    correct = {
        name: {seed: _flags(text, n) for seed, text in by_seed.items()}
        for name, by_seed in found.get("correct", {}).items()
    }
    if not len(image) == len(weight) == len(unit) == (n if "images" in found else 0):
        raise ValueError("arrays of different lengths")
    if not (np.isfinite(weight) & (weight > 0)).all() or any(by_seed.keys() - tested for by_seed in correct.values()):
        raise ValueError("weights that are not above 0, or runs of unknown seeds")
    unit = np.unique(unit, return_inverse=True)[1]
    return Tested(n, str(found["digest"]), int(found["folds"]), image, weight, unit, tested, correct)


def count_shared(before: Tested, after: Tested) -> int | None:
    """The number of images that both sides tested with some seed; None where a side does not list its images."""
    if not len(before.image) or not len(after.image):
        return None
    return len(np.intersect1d(before.image, after.image))


def regression_bound(before: Tested, after: Tested, strategy: str, confidence: float) -> tuple[float, int] | None:
    """Lower bound, at this confidence, of the accuracy lost on the test images that both sides share; and their number.

    The strategy's runs are paired by seed; folds are pooled before. None where no image is shared, or a side does not
    list its images. Weights and units are those of `after`.
    """
    _, at_before, at_after = np.intersect1d(before.image, after.image, return_indices=True)
    study = Study(np.ones(len(at_after), np.int64), after.weight[at_after], after.unit[at_after])
    ours, theirs = (_flags_of(side, strategy, at) for side, at in ((before, at_before), (after, at_after)))
    runs: list[tuple[Outcomes, ...]] = []
    for seed in sorted(ours.keys() & theirs.keys()):
        rows = np.flatnonzero(ours[seed][0] & theirs[seed][0])
        if len(rows):
            # Of accuracy, the label of every image is 1
            runs.append(tuple(of_classes(side[seed][1][rows].astype(np.int64), rows) for side in (ours, theirs)))
    if not runs:
        return None
    n_shared = len(np.unique(np.concatenate([one.rows for one, _ in runs])))
    return paired.lower_bound([one for one, _ in runs], [one for _, one in runs], study, confidence), n_shared


def _flags_of(side: Tested, strategy: str, at: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By seed, which of the images `at` are tested, and predicted correctly; all folds together."""
    by_seed = side.correct.get(strategy, {}).items()
    flags = {seed: (side.tested[seed][at], is_correct[at]) for seed, is_correct in by_seed}
    if side.n_folds and flags:
        tested, correct = (np.logical_or.reduce([*columns]) for columns in zip(*flags.values(), strict=True))
        return {"folds": (tested, correct)}
    return flags


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _flags(text: str, n: int) -> np.ndarray:
    packed = np.frombuffer(_bytes(text), np.uint8)
    if len(packed) != -(-n // 8):
        raise ValueError("flags of another number of images")
    return np.unpackbits(packed, count=n).astype(bool)
