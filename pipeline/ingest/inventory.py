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
from pipeline.ingest.indexing import Inspected
from pipeline.ingest.listing import Listing, shorten

SHOWN_GROUPS, SHOWN_MEMBERS, SHOWN_NAMES = 20, 20, 20  # at most, in the summary


@dataclass(frozen=True)
class Inventory:
    """The content of a data set.

    `kept`: a row per usable image, with the columns of Listing.images and Inspected, and `near_duplicate_group`, a name
    that is empty for an image without near-duplicates. `unreadable` and `conflicts` (images with the same bytes but
    different labels): (path, reason) of the images that are rejected. `near_duplicates`: pairs of kept images a and b
    with their correlation, the most similar first; of images with the same bytes, the first stands for all.
    """

    kept: pd.DataFrame
    near_duplicates: pd.DataFrame
    unreadable: list[tuple[str, str]]
    conflicts: list[tuple[str, str]]
    summary: dict[str, Any]


def take(listing: Listing, inspected: Sequence[Inspected], near_duplicate_correlation: float) -> Inventory:
    """Combine what was listed with what was found in the files; images with conflicting labels are rejected."""
    found = listing.images.join(pd.DataFrame(inspected))
    is_readable = found["reason"] == ""
    unreadable = [*listing.rejected, *found.loc[~is_readable, ["path", "reason"]].itertuples(index=False, name=None)]
    readable = found[is_readable]
    is_disputed = readable.groupby("sha256")["label"].transform("nunique") > 1
    disputed = _equal_images(readable[is_disputed])
    conflicts = [(path, _conflict(path, label, group)) for group in disputed for path, label in group.items()]
    kept = readable[~is_disputed].reset_index(drop=True)
    same = _equal_images(kept)[:SHOWN_GROUPS]
    kept["near_duplicate_group"], pairs = _near_duplicates(kept, near_duplicate_correlation)
    summary = {
        "n_images": len(kept),
        "n_rejected": len(unreadable) + len(conflicts),
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
        "warnings": [*listing.warnings, *_misnamed(kept), *_differently_labelled(kept, pairs)],
    }
    return Inventory(kept, pairs, sorted(unreadable), conflicts, summary)


def _equal_images(images: pd.DataFrame) -> list[dict[str, str]]:
    """Path and label of the images that have the same bytes as others, group by group, in order."""
    several = images[images["sha256"].duplicated(keep=False)].groupby("sha256", sort=False)
    return [dict(zip(group["path"], group["label"], strict=True)) for _, group in several]


def _conflict(path: str, label: str, group: dict[str, str]) -> str:
    other = next(other for other in group if group[other] != label)
    return f"labelled {label!r}, but {other!r} with the same bytes {group[other]!r}"


def _near_duplicates(kept: pd.DataFrame, correlation: float) -> tuple[list[str], pd.DataFrame]:
    """The group of each row of `kept` by name, and the pairs, as in Inventory.

    Flat pictures have no signature and no group. Of images with the same bytes the first is compared, for all.
    """
    compared = kept[(kept["signature"] != "") & ~kept["sha256"].duplicated()]
    raw = b"".join(map(b64decode, compared["signature"]))
    found, value, component = duplicates.near(np.frombuffer(raw, "<i2").reshape(-1, duplicates.LENGTH), correlation)
    path, sha256 = compared["path"].to_numpy(str), compared["sha256"].tolist()
    pairs = pd.DataFrame({"a": path[found[:, 0]], "b": path[found[:, 1]], "correlation": value.round(4)})
    members: dict[int, list[str]] = {}
    for digest, number in zip(sha256, component.tolist(), strict=True):
        members.setdefault(number, []).append(digest)
    group_of = {digest: f"near_{min(group)[:12]}" for group in members.values() if len(group) > 1 for digest in group}
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


def _differently_labelled(kept: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    label = kept.set_index("path")["label"]
    different = pairs[pairs["a"].map(label) != pairs["b"].map(label)]
    if different.empty:
        return []
    first = " and ".join(f"{path} ({label[path]})" for path in different.iloc[0][["a", "b"]])
    return [f"{len(different)} of {len(pairs)} pairs of near-duplicates are labelled differently, first {first}"]
