"""Names of classes that mean the same: one spelling in Unicode, and warnings or errors about the others."""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

MISSING = {"nan", "none", "null", "na", "n/a", "#n/a", "<na>", "?", "-"}  # how programs write a value that is missing


def unify(directory: Path, images: pd.DataFrame, similar: str, *, is_table: bool) -> list[str]:
    """Give classes, groups, strata and subsets one spelling in Unicode (NFC); look for names that mean the same.

    Returns warnings; ValueError for classes that differ by case, blanks or invisible characters only.
    """
    warnings = []
    for column in ("label", "group", "stratum", "subset"):
        names = set(images[column])
        plain = {name: unicodedata.normalize("NFC", name) for name in names}
        images[column] = images[column].map(plain)
        several = sorted(name for name, n in Counter(plain.values()).items() if n > 1)
        warnings += [f"{column} {name!r} is spelled in two ways of Unicode: taken as one" for name in several]
        for alike in _alike(set(plain.values()), _bare):
            listed = " and ".join(map(repr, alike))
            found = f"{'classes' if column == 'label' else f'{column}s'} {listed} differ by case or blanks only"
            if column != "label" or similar == "keep":
                warnings.append(f"{found}: taken as different")
            elif similar == "error":
                advice = "rename one, or set dataset.similar_classes: merge (they are one class) or keep (they are not)"
                raise ValueError(f"{directory}: {found}; {advice}")
            else:
                counts = images["label"].value_counts()
                name = max(alike, key=lambda name: (counts[name], name))
                images["label"] = images["label"].replace(dict.fromkeys(alike, name))
                warnings.append(f"{found}: taken as one class {name!r}")
    labels = set(images["label"])
    for key, difference in ((_number, "are the same number"), (_joined, "differ by the signs between words only")):
        for alike in _alike(labels, key):
            if len(set(map(_bare, alike))) > 1:
                warnings.append(f"classes {' and '.join(map(repr, alike))} {difference}: taken as different")
    for name in sorted(labels) if is_table else ():
        if name.strip().casefold() in MISSING:
            n = int((images["label"] == name).sum())
            warnings.append(f"{n} images have the label {name!r}, as programs write a missing one: taken as a class")
    return warnings


def _alike(names: Iterable[str], key: Callable[[str], object]) -> list[list[str]]:
    """Names that have the same key, unless it is None."""
    found = defaultdict(list)
    for name in sorted(names):
        found[key(name)].append(name)
    return [alike for value, alike in found.items() if value is not None and len(alike) > 1]


def _bare(name: str) -> str | None:
    """The name without case, invisible characters, and blanks that do not show."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return " ".join("".join(sign for sign in plain if unicodedata.category(sign) != "Cf").split()) or None


def _joined(name: str) -> str | None:
    return None if _number(name) is not None else re.sub(r"[\s_.-]+", "_", _bare(name) or "").strip("_") or None


def _number(name: str) -> float | None:
    try:
        number = float(name)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
