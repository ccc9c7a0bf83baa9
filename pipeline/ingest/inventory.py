"""Take stock of a dataset: which images are kept, which rejected, what is there twice, and a summary for reports."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from pipeline.dataset.decoding import EXTENSIONS
from pipeline.ingest import duplicates
from pipeline.ingest.duplicates import Near
from pipeline.ingest.indexing import Inspected
from pipeline.ingest.listing import Listing

SHOWN_GROUPS, SHOWN_MEMBERS, SHOWN_PAIRS, SHOWN_NAMES = 20, 20, 50, 20  # at most, in the summary


@dataclass(frozen=True)
class Inventory:
    """What a dataset holds.

    `kept`: a row per sound image, the columns of Listing.images and Inspected. `rejected`: (path, reason), of which
    `conflicts` are images of the same bytes with different labels. `near_duplicate_group`: a name per row of `kept`.
    """

    kept: pd.DataFrame
    rejected: list[tuple[str, str]]
    conflicts: list[tuple[str, str]]
    near_duplicate_group: list[str]
    summary: dict[str, Any]


def take(listing: Listing, inspected: Sequence[Inspected], near_duplicate_distance: int) -> Inventory:
    """Sort out what was listed by what was found in it; images of one content with different labels are rejected."""
    found = listing.images.join(pd.DataFrame(inspected))
    is_bad = found["reason"] != ""
    rejected = [*listing.rejected, *found.loc[is_bad, ["path", "reason"]].itertuples(index=False, name=None)]
    readable = found[~is_bad].reset_index(drop=True)
    path, label = list(readable["path"]), list(readable["label"])
    groups = duplicates.exact(list(readable["sha256"]))
    disputed = [group for group in groups if len({label[row] for row in group}) > 1]
    conflicts = [(path[row], _conflict(path, label, group, row)) for group in disputed for row in group]
    kept = readable.drop([row for group in disputed for row in group]).reset_index(drop=True)
    same = [[kept["path"][row] for row in group] for group in duplicates.exact(list(kept["sha256"]))[:SHOWN_GROUPS]]
    near, pairs = _near(kept, near_duplicate_distance)
    summary = {
        "n_images": len(kept),
        "n_rejected": len(rejected) + len(conflicts),
        "n_distinct": kept["sha256"].nunique(),
        "classes": _counts(kept["label"]),
        "width": _spread(kept["width"]),
        "height": _spread(kept["height"]),
        "formats": _counts(kept["format"]),
        "modes": _counts(kept["mode"]),
        "orientations": _counts(kept["orientation"]),
        "exact_duplicates": [group[:SHOWN_MEMBERS] for group in same],
        "n_exact_duplicates": len(kept) - kept["sha256"].nunique(),
        "conflicts": [[path[row] for row in group[:SHOWN_MEMBERS]] for group in disputed[:SHOWN_GROUPS]],
        "near_duplicates": pairs,
        "n_near_duplicates": near.n_pairs,
        "warnings": [*listing.warnings, *_misnamed(kept), *_differing(kept, pairs)],
    }
    return Inventory(kept, sorted(rejected + conflicts), conflicts, _groups(list(kept["sha256"]), near), summary)


def _conflict(path: list[str], label: list[str], group: list[int], row: int) -> str:
    other = next(other for other in group if label[other] != label[row])
    return f"labelled {label[row]!r}, but {path[other]!r} with the same bytes {label[other]!r}"


def _near(kept: pd.DataFrame, bits: int) -> tuple[Near, list[dict[str, Any]]]:
    """Near-duplicates by row of `kept` (a flat picture, and a further copy, is alone), and the nearest pairs."""
    rows = np.flatnonzero((kept["phash"] != "") & ~kept["sha256"].duplicated())
    hashes = np.array([int(phash, 16) for phash in kept["phash"].iloc[rows]], np.uint64)
    near = duplicates.near(hashes, bits, SHOWN_PAIRS)
    component = np.arange(len(kept)) + len(rows)
    component[rows] = near.component
    path = list(kept["path"].iloc[rows])
    pairs = [{"a": path[a], "b": path[b], "bits": distance} for a, b, distance in near.closest.tolist()]
    return Near(component, near.closest, near.n_pairs), pairs


def _groups(sha256: list[str], near: Near) -> list[str]:
    """A name for each group of pictures that are connected, copies included; empty for those that are alone."""
    component: dict[str, int] = {}
    pictures: dict[int, set[str]] = {}
    for name, number in zip(sha256, near.component.tolist(), strict=True):
        pictures.setdefault(component.setdefault(name, number), set()).add(name)
    names = {number: f"near_{min(same)[:12]}" if len(same) > 1 else "" for number, same in pictures.items()}
    return [names[component[name]] for name in sha256]


def _counts(values: pd.Series) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _spread(values: pd.Series) -> dict[str, float]:
    px = values.astype(int)
    if px.empty:
        return {}
    return {"min": int(px.min()), "median": float(px.median()), "max": int(px.max())}


def _misnamed(kept: pd.DataFrame) -> list[str]:
    """A warning that names files whose extension belongs to another format, or to none."""
    suffixes = {path: PurePosixPath(path).suffix.lower() for path in kept["path"]}
    wrong = [
        f"{path} ({kind})"
        for path, kind in zip(kept["path"], kept["format"], strict=True)
        if suffixes[path] not in ("", *EXTENSIONS[kind])
    ]
    more = f", … and {len(wrong) - SHOWN_NAMES} more" if len(wrong) > SHOWN_NAMES else ""
    return [f"{len(wrong)} files are not what their extension says: {', '.join(wrong[:20])}{more}"] if wrong else []


def _differing(kept: pd.DataFrame, pairs: list[dict[str, Any]]) -> list[str]:
    label = dict(zip(kept["path"], kept["label"], strict=True))
    apart = [pair for pair in pairs if label[pair["a"]] != label[pair["b"]]]
    if not apart:
        return []
    names = f"{apart[0]['a']} ({label[apart[0]['a']]}) and {apart[0]['b']} ({label[apart[0]['b']]})"
    return [
        f"{len(apart)} of the {len(pairs)} nearest pairs of near-duplicates are labelled differently, first {names}"
    ]
