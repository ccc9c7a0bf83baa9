"""split: train, validation and test parts, one split per seed.

Reads   data/labels.csv
Writes  data/splits/seed_<s>.csv
        reports/splits.json     sizes, leaks between the parts, and what else there is to know

Byte-identical images and images of one group stay together; the order of the files does not matter.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from pipeline import logs
from pipeline.dataset import manifest
from pipeline.dataset.manifest import PARTS, Labels, Split
from pipeline.dataset.units import make_units
from pipeline.files import write_json
from pipeline.ingest import splits
from pipeline.ingest.splits import Leak
from pipeline.params import Splitting, load_params

REPORT = Path("reports/splits.json")
FEW = 10  # images of a class in train, below which it is named
SHOWN_LEAKS, SHOWN_IMAGES = 1000, 20  # in the report; the numbers in it are of all


def main() -> None:
    """Write one split per seed; fail if a class misses one of the parts, or if images leak."""
    options = load_params().split
    labels = manifest.read_labels()
    units = make_units(labels)
    drawn = []
    for seed in options.seeds:
        split = splits.draw(labels, units, options, seed)
        drawn.append(split)
        splits.check_classes(split, labels)
        manifest.write_split(split)
        logs.log.info("split %d: %s", seed, ", ".join(f"{n} {part}" for part, n in Counter(split.split).items()))
    by_tie: dict[tuple[str, str], Leak] = {}
    for split in drawn:
        for leak in splits.find_leaks(labels, split):
            by_tie.setdefault((leak.tie, leak.name), leak)
    leaks = list(by_tie.values())
    notes = make_notes(labels, drawn, options)
    write_json(REPORT, as_report(drawn, leaks, notes, options))
    for note in notes:
        logs.log.warning("%s", note)
    if leaks:
        warn_or_fail(leaks, options)


def make_notes(labels: Labels, drawn: list[Split], options: Splitting) -> list[str]:
    """What a reader of the results should know of the splits."""
    notes = []
    if options.method != "given" and any(labels.given_split):
        notes.append(
            f"the data set gives parts to images, and `split.method: {options.method}` ignores them; to use them: given"
        )
    for part in splits.missing_parts(labels) if options.method == "given" else ():
        source = "train and those without a part" if "" in labels.given_split else "train"
        hint = "; to test on the given val, call it test" if part == "test" and "val" in labels.given_split else ""
        notes.append(f"the data set gives no image to {part}: drawn by seed from {source}{hint}")
    few = splits.small_classes(drawn, labels, FEW)
    if few:
        named = ", ".join(f"{name} ({n})" for name, n in few.items())
        notes.append(
            f"classes with fewer than {FEW} images to train on: {named}; add images, or merge classes; "
            "`class_weights: balanced` keeps the larger ones from deciding alone"
        )
    return notes


def as_report(drawn: list[Split], leaks: list[Leak], notes: list[str], options: Splitting) -> dict[str, Any]:
    """JSON of it all."""
    sizes = {str(split.seed): {part: len(split.rows(part)) for part in PARTS} for split in drawn}
    shown = [
        {"tie": leak.tie, "name": leak.name, "n": len(leak.parts), "parts": dict([*leak.parts.items()][:SHOWN_IMAGES])}
        for leak in leaks[:SHOWN_LEAKS]
    ]
    return {"method": options.method, "sizes": sizes, "notes": notes, "n_leaks": len(leaks), "leaks": shown}


def warn_or_fail(leaks: list[Leak], options: Splitting) -> None:
    """ValueError that lists the files, or the same as a warning if params.yaml allows it."""
    listed = []
    for leak in leaks[:5]:
        named = f" {leak.name!r}" if leak.tie == "group" else ""
        one_of_each = {part: image for image, part in reversed(leak.parts.items())}
        files = ", ".join(f"{image} ({part})" for part, image in sorted(one_of_each.items()))
        listed.append(f"{leak.tie}{named}: {files}")
    found = f"split: {len(leaks)} sets of images that belong together lie in several parts: {'; '.join(listed)}"
    found += f"; all are in {REPORT}"
    if not options.allow_leakage:
        raise ValueError(
            f"{found}; give each set one part (`unused` leaves an image out), or accept it: split.allow_leakage: true"
        )
    logs.log.warning("%s", found)


if __name__ == "__main__":
    logs.run(main)
