"""Take stock of a data set: which images are kept or rejected, which occur twice, and a summary for reports."""

from base64 import b64decode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from pipeline.dataset.decoding import EXTENSIONS
from pipeline.ingest import duplicates
from pipeline.ingest.directory import IMAGE_EXTENSIONS, counted, printable, shorten
from pipeline.ingest.indexing import NO_IMAGE, Inspected
from pipeline.ingest.listing import Listing

SHOWN_GROUPS, SHOWN_MEMBERS, SHOWN_NAMES = 20, 20, 20  # at most, in the summary
SHOWN_POOR = 100  # images of each kind, at most, in the summary
TINY_SIDE, TINY_SHARE = 8, 6  # px of the shorter side below which an image is tiny, and below 1 / so much of the median
# An image is blurred if its sharpness is below BLURRED and BLURRED_SHARE of the upper quartile of all, or below
# FAR_BLURRED_SHARE of it
BLURRED, BLURRED_SHARE, FAR_BLURRED_SHARE = 0.02, 1 / 12, 1 / 100
POOR = {  # what may be wrong with images, as it is reported
    "flat": "of one colour",
    "few levels": "with few of the grey levels of their 16 bits (scale them to the full range)",
    "tiny": "of a few pixels, or far smaller than the others",
    "dark": "almost black",
    "blurred": "far less sharp than the others",
}


@dataclass(frozen=True)
class Inventory:
    """The content of a data set.

    `kept`: a row per usable image, with the columns of Listing.images and Inspected, and `near_duplicate_group`, a name
    that is empty for an image without near-duplicates. `near_duplicates`: pairs of kept images a and b with their
    correlation, the most similar first; of images with the same bytes, the first stands for all. `unreadable`,
    `conflicts` (images with the same bytes but different labels) and `few` (images of classes that are too small):
    (path, reason) of the images that are rejected. `small`: these classes and their sizes. `other_files`: of each
    class, the number of files that are no images, by extension.
    """

    kept: pd.DataFrame
    near_duplicates: pd.DataFrame
    unreadable: list[tuple[str, str]]
    conflicts: list[tuple[str, str]]
    few: list[tuple[str, str]]
    small: dict[str, int]
    other_files: dict[str, dict[str, int]]
    summary: dict[str, Any]


def take(
    listing: Listing, inspected: Sequence[Inspected], near_duplicate_correlation: float, min_class_size: int
) -> Inventory:
    """Combine what was listed with what was found in the files.

    Images with conflicting labels, and those of classes with fewer than `min_class_size` images, are rejected. Files
    that claim no image format by their first bytes or their extension are left out, unless labels.csv lists them.
    """
    found = listing.images.join(pd.DataFrame(inspected))
    is_other = _is_other(found) & (not listing.is_table)
    other, found = found[is_other], found[~is_other]
    extensions = Counter(map(_extension, other["path"]))
    skipped = listing.skipped | ({"no images": len(other)} if len(other) else {})
    is_readable = found["reason"] == ""
    unreadable = [*listing.rejected, *found.loc[~is_readable, ["path", "reason"]].itertuples(index=False, name=None)]
    readable = found[is_readable]
    is_disputed = readable.groupby("sha256")["label"].transform("nunique") > 1
    disputed = _equal_images(readable[is_disputed])
    conflicts = [(path, _conflict(label, group)) for group in disputed for path, label in group.items()]
    agreed = readable[~is_disputed]
    small = {name: n for name, n in _counts(agreed["label"]).items() if n < min_class_size}
    is_small = agreed["label"].isin(small)
    few = [
        (path, f"of class {label!r}, which has {small[label]} images")
        for path, label in agreed.loc[is_small, ["path", "label"]].itertuples(index=False, name=None)
    ]
    kept = agreed[~is_small].reset_index(drop=True)
    poor = _poor(kept)
    same = _equal_images(kept)[:SHOWN_GROUPS]
    warnings = _misnamed(kept)
    if extensions:
        warnings.append(f"{len(other)} files that are no images were left out: {counted(extensions)}")
    if small:
        found = f"classes with fewer images than dataset.min_class_size ({min_class_size}) were left out"
        warnings.append(f"{len(small)} {found}: {counted(small, SHOWN_NAMES)}")
    warnings += _told_apart(kept)
    warnings += [f"{len(paths)} images are {what}, first {paths[0]}" for what, paths in poor.items()]
    kept["near_duplicate_group"], pairs = _near_duplicates(kept, near_duplicate_correlation)
    summary = {
        "n_images": len(kept),
        "n_rejected": len(unreadable) + len(conflicts) + len(few),
        "n_skipped": sum(skipped.values()),
        "skipped": skipped,
        "n_distinct": kept["sha256"].nunique(),
        "classes": _counts(kept["label"]),
        "width": _range(kept["width"]),
        "height": _range(kept["height"]),
        "formats": _counts(kept["format"]),
        "modes": _counts(kept["mode"]),
        "orientations": _counts(kept["orientation"]),
        "exact_duplicates": [[*group][:SHOWN_MEMBERS] for group in same],
        "n_exact_duplicates": len(kept) - kept["sha256"].nunique(),
        "conflicts": [[*group][:SHOWN_MEMBERS] for group in disputed[:SHOWN_GROUPS]],
        "n_near_duplicates": len(pairs),
        "n_poor": {kind: len(paths) for kind, paths in poor.items()},
        "poor": {kind: paths[:SHOWN_POOR] for kind, paths in poor.items()},
        "warnings": [*listing.warnings, *map(printable, warnings + _differently_labelled(kept, pairs))],
    }
    by_class = {str(label): dict(Counter(map(_extension, paths))) for label, paths in other.groupby("label")["path"]}
    return Inventory(kept, pairs, sorted(unreadable), conflicts, few, small, by_class, summary)


def _extension(path: str) -> str:
    return PurePosixPath(path).suffix.strip().lower() or "no extension"


def _is_other(found: pd.DataFrame) -> pd.Series:
    """Which rows are files beside images: by their first bytes no images, with an extension that images do not have.

    An extension belongs to images if it is that of an image format, or if most files with it can be read.
    """
    extension = found["path"].map(_extension)
    is_mostly_read = (found["reason"] == "").groupby(extension).transform("mean") > 0.5
    return (found["format"] == NO_IMAGE) & ~extension.isin(IMAGE_EXTENSIONS) & ~is_mostly_read


def _poor(kept: pd.DataFrame) -> dict[str, list[str]]:
    """Paths of the images that may show nothing, by what is wrong with them (values of POOR)."""
    side = kept[["width", "height"]].astype(int).min(axis=1)
    sharpness = pd.to_numeric(kept["sharpness"])  # NaN where it is empty
    is_poor = {kind: kept["look"] == kind for kind in ("flat", "few levels", "dark")}
    is_poor["tiny"] = (side < TINY_SIDE) | (side * TINY_SHARE < side.median())
    usual = sharpness.quantile(0.75)
    least = max(min(BLURRED, usual * BLURRED_SHARE), usual * FAR_BLURRED_SHARE)
    is_poor["blurred"] = (sharpness < least) & (kept["look"] == "")
    found = {text: kept.loc[is_poor[kind], "path"].tolist() for kind, text in POOR.items()}
    return {text: paths for text, paths in found.items() if paths}


def _equal_images(images: pd.DataFrame) -> list[dict[str, str]]:
    """Path and label of the images that have the same bytes as others, group by group, in order."""
    several = images[images["sha256"].duplicated(keep=False)].groupby("sha256", sort=False)
    return [dict(zip(group["path"], group["label"], strict=True)) for _, group in several]


def _conflict(label: str, group: dict[str, str]) -> str:
    other = next(other for other in group if group[other] != label)
    return f"labelled {label!r}, but {other!r} with the same bytes {group[other]!r}"


def _near_duplicates(kept: pd.DataFrame, correlation: float) -> tuple[list[str], pd.DataFrame]:
    """The group of each row of `kept` by name, and the pairs, as in Inventory.

    Flat pictures have no signature and no group. Of images with the same bytes the first is compared, for all.
    """
    compared = kept[(kept["signature"] != "") & ~kept["sha256"].duplicated()]
    raw = b"".join(map(b64decode, compared["signature"]))
    found, value, component = duplicates.near(np.frombuffer(raw, "<i2").reshape(-1, duplicates.LENGTH), correlation)
    path = compared["path"].to_numpy(str)
    pairs = pd.DataFrame({"a": path[found[:, 0]], "b": path[found[:, 1]], "correlation": value.round(4)})
    is_grouped = np.bincount(component)[component] > 1
    groups = compared["sha256"][is_grouped].groupby(component[is_grouped])
    group_of = {digest: f"near_{min(group)[:12]}" for _, group in groups for digest in group}
    return [group_of.get(digest, "") for digest in kept["sha256"]], pairs


def _counts(values: pd.Series) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _range(values: pd.Series) -> dict[str, float]:
    px = values.astype(int)
    return {} if px.empty else {"min": int(px.min()), "median": float(px.median()), "max": int(px.max())}


def _misnamed(kept: pd.DataFrame) -> list[str]:
    """A warning that names files whose extension belongs to another format, or to none."""
    wrong = [
        f"{path} ({kind})"
        for path, kind in zip(kept["path"], kept["format"], strict=True)
        if PurePosixPath(path).suffix.lower() not in ("", *EXTENSIONS[kind])
    ]
    shown = shorten(wrong, SHOWN_NAMES)
    return [f"{len(wrong)} files have the extension of another format: {shown}"] if wrong else []


def _told_apart(kept: pd.DataFrame) -> list[str]:
    """A warning for each property of the files in which all images of a class agree, and classes differ."""
    warnings = []
    size = kept["width"] + " x " + kept["height"] + " px"
    for what, values in (("format", kept["format"]), ("mode", kept["mode"]), ("size", size)):
        of_class = values.groupby(kept["label"]).agg(["nunique", "first"])
        if (of_class["nunique"] == 1).all() and of_class["first"].nunique() > 1:
            shown = shorten([f"{label} {value}" for label, value in of_class["first"].items()], 4)
            warnings.append(f"the {what} of the files depends on the class ({shown}): a network may learn it instead")
    return warnings


def _differently_labelled(kept: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    label = kept.set_index("path")["label"]
    different = pairs[pairs["a"].map(label) != pairs["b"].map(label)]
    if different.empty:
        return []
    first = " and ".join(f"{path} ({label[path]})" for path in different.iloc[0][["a", "b"]])
    return [f"{len(different)} of {len(pairs)} pairs of near-duplicates are labelled differently, first {first}"]
