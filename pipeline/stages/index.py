"""index: read every image once; say what is there, and what cannot be read.

Reads   the directory dataset.path
Writes  data/images.csv, data/labels.csv
        reports/data/summary.json, rejected.csv
"""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd

from pipeline import images, logs, manifest
from pipeline.files import write_json, write_text
from pipeline.manifest import Images, Labels
from pipeline.params import load_params

REPORTS = Path("reports/data")


def main() -> None:
    """Write the manifest, or fail if too much is unreadable or a class loses every image."""
    params = load_params()
    directory = Path(params.dataset.path)
    listed = manifest.find_images(directory)
    results = read_all([directory / path for path in listed["path"]], params.runtime.workers)
    listed["rejected"] = [result if isinstance(result, str) else "" for result in results]
    rejected, kept = listed[listed["rejected"] != ""], listed[listed["rejected"] == ""]
    table = rejected[["path", "rejected"]].rename(columns={"rejected": "reason"})
    write_text(REPORTS / "rejected.csv", table.to_csv(index=False, lineterminator="\n"))
    if len(rejected) > params.dataset.max_rejected_fraction * len(listed):
        path, reason = table.iloc[0]
        raise ValueError(
            f"{len(rejected)} of {len(listed)} images cannot be read, first {directory / path} ({reason}); all are in "
            f"{REPORTS / 'rejected.csv'}; mend or remove them, or raise dataset.max_rejected_fraction"
        )
    if lost := set(listed["label"]) - set(kept["label"]):
        raise ValueError(f"{directory}: no image of class {min(lost)!r} can be read")
    if kept["label"].nunique() < 2:
        raise ValueError(f"{directory}: one class only ({kept['label'].iloc[0]}); expected two or more")
    write(kept, [result for result in results if isinstance(result, tuple)], len(rejected))


def write(kept: pd.DataFrame, found: list[tuple[str, int, int]], n_rejected: int) -> None:
    """Write images.csv, labels.csv and the summary."""
    sha256, width, height = (list(column) for column in zip(*found, strict=True))
    image_id, class_names = list(kept["path"]), sorted(set(kept["label"]))
    manifest.write_images(Images(image_id, sha256, width, height))
    labels = Labels(
        image_id=image_id,
        sha256=sha256,
        label=kept["label"].map(class_names.index).to_numpy(),
        weight=kept["weight"].astype(float).to_numpy(),
        group=list(kept["group"]),
        near_duplicate_group=[""] * len(kept),
        stratum=list(kept["stratum"]),
        subset=list(kept["subset"]),
        given_split=list(kept["split"]),
        class_names=class_names,
    )
    manifest.write_labels(labels)
    counts = Counter(kept["label"])
    summary = {
        "n_images": len(kept),
        "n_rejected": n_rejected,
        "n_distinct": len(set(sha256)),
        "classes": {name: counts[name] for name in class_names},
        "width": {"min": min(width), "max": max(width)},
        "height": {"min": min(height), "max": max(height)},
    }
    write_json(REPORTS / "summary.json", summary)
    logs.log.info("indexed %d images, rejected %d", len(kept), n_rejected)


def read_all(paths: list[Path], workers: int) -> list[tuple[str, int, int] | str]:
    """For each file (SHA-256, width, height), upright, or the reason why it cannot be read."""
    if not workers:
        return list(logs.progress(map(read, paths), len(paths), "images", "index"))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return list(logs.progress(pool.map(read, paths, chunksize=32), len(paths), "images", "index"))


def read(path: Path) -> tuple[str, int, int] | str:
    """Read and fully decode one file."""
    try:
        content = path.read_bytes()
        image = images.decode(content)
    except (OSError, ValueError) as error:
        return str(error)
    return images.sha256(content), image.width, image.height


if __name__ == "__main__":
    logs.run(main)
