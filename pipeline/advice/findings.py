"""Frozen features of several cuts -> what they say, as JSON: probes by depth, similarity, learning curve.

Only the images that are given are looked at; the caller leaves the test images out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from pipeline.advice import curve, probes
from pipeline.advice.probes import Sample
from pipeline.comparison.intervals import CONFIDENCE, Interval
from pipeline.comparison.paired import Difference
from pipeline.dataset.units import FEW_UNITS
from pipeline.params import AdviseOptions

Json = dict[str, Any]
TIMES = (1, 2, 4)  # as many images as there are for training


def find(
    blocks: Mapping[str, np.ndarray],
    own: Sequence[str],
    random: np.ndarray | None,
    sample: Sample,
    n_train: int,
    options: AdviseOptions,
) -> Json:
    """What features of each cut (n, d), in order of depth, say of these images.

    `own`: the cuts that `features.cut` stands for; `random`: features (n, d) at the end of a network of the same kind
    with random weights, None if there is none; `n_train`: images in train. `cannot_tell` says why nothing was found.
    """
    n_units, counts = len(np.unique(sample.unit)), np.bincount(sample.label, minlength=sample.n_classes)
    in_class = np.bincount(np.unique(np.stack([sample.label, sample.unit]), axis=1)[0])  # units of each class
    found: Json = {
        "images": len(sample.label),
        "units": n_units,
        "classes": sample.n_classes,
        "smallest_class": int(counts.min()) if len(counts) else 0,
        "classes_of_one_unit": int((in_class == 1).sum()),
        "few_units": n_units < FEW_UNITS,
        "n_train": n_train,
        "cannot_tell": "",
    }
    if sample.n_classes < 2 or n_units < 2 * sample.n_classes:
        expected = "at least two classes, and two per class that need not stay together"
        given = f"{len(counts)} class{'es' * (len(counts) != 1)}, {n_units} independent images"
        return found | {"cannot_tell": f"train and validation have {given}; advice needs {expected}"}
    fold = probes.assign_folds(sample, options.folds)
    scaled = {cut: probes.standardize(x) for cut, x in blocks.items()}
    last = [*scaled][-1]
    inputs = scaled | {"together": np.concatenate([*scaled.values()], axis=1)} if len(scaled) > 1 else scaled
    head_input = scaled[own[0]] if len(own) == 1 else np.concatenate([scaled[cut] for cut in own], axis=1)
    strengths = options.regularization_strengths
    linear = {cut: probes.linear(x, sample, fold, strengths) for cut, x in inputs.items()}
    same = own[0] if len(own) == 1 else "together" if [*own] == [*scaled] else ""
    head = linear[same] if same else probes.linear(head_input, sample, fold, strengths)
    majority = np.full(len(sample.label), np.bincount(sample.label, sample.weight).argmax())

    def judged(predicted: np.ndarray) -> Json:
        return as_json(sample.interval(predicted == sample.label))

    found["majority_class"] = judged(majority)
    found["head"] = judged(head)
    found["blocks"] = []
    for cut, x in scaled.items():
        near = probes.nearest(x, sample, fold, options.neighbours)
        found["blocks"].append(
            {"cut": cut, "width": x.shape[1], "linear": judged(linear[cut]), "nearest": judged(near)}
            | {"minus_last": None if cut == last else as_json(sample.difference(linear[cut], linear[last]))}
        )
    if len(scaled) > 1:
        before = [*scaled][-2]
        found["last_minus_before"] = as_json(sample.difference(linear[last], linear[before]))
        found["together"] = judged(linear["together"])
        found["together_minus_last"] = as_json(sample.difference(linear["together"], linear[last]))
    if random is not None:
        blind = probes.linear(probes.standardize(random), sample, fold, strengths)
        found["random_weights"] = judged(blind)
        found["errors_avoided"] = errors_avoided(linear[last], blind, sample)
    measured = curve.measure(head_input, sample, fold, strengths, options.draws)
    found["curve"] = describe_curve(measured, sample, n_train) if measured else None
    return found


def errors_avoided(predicted: np.ndarray, other: np.ndarray, sample: Sample) -> Json | None:
    """The share of the errors of classes `other` (n,) that `predicted` (n,) avoids, with its interval over units.

    A ratio estimator, linearised; None if the other makes no error.
    """
    share = sample.weight / sample.weight.sum()
    wrong, wrong_other = predicted != sample.label, other != sample.label
    if not wrong_other.any():
        return None
    ratio = (share @ wrong) / (share @ wrong_other)
    moved = np.bincount(sample.unit, share * (wrong - ratio * wrong_other)) / (share @ wrong_other)
    n = len(np.unique(sample.unit))
    reach = special.stdtrit(n - 1, (1 + CONFIDENCE) / 2) * np.sqrt((moved**2).sum() * n / (n - 1))
    return as_json(Interval(1 - ratio, 1 - ratio - reach, 1 - ratio + reach))


def describe_curve(measured: curve.Curve, sample: Sample, n_train: int) -> Json:
    """The accuracy at each size, and what the fitted curves say of 1, 2 and 4 times `n_train` images."""
    fitted = curve.fit(measured, sample)
    sizes = [
        {"images": round(float(n)), **as_json(sample.interval(1 - wrong))}
        for n, wrong in zip(measured.sizes, measured.wrong, strict=True)
    ]
    expected = [{"times": k, "images": k * n_train, **as_json(fitted.accuracy(k * n_train))} for k in TIMES]
    return {"sizes": sizes, "expected": expected}


def as_json(value: Interval | Difference) -> Json:
    """The value, or difference, its interval, as rounded fractions, and of a difference the p-value."""
    middle, p = (value.value, {}) if isinstance(value, Interval) else (value.difference, {"p": value.p_value})
    numbers = {"value": middle, "low": value.low, "high": value.high} | p
    return {name: round(float(each), 6) for name, each in numbers.items()}
