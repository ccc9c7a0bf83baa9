"""label_suspects: labels that are probably wrong, the most suspicious first.

Reads   data/features.h5, data/labels.csv
Writes  reports/label_suspects.csv

No other stage reads what it writes, so it may look at the labels of test images, too.
"""

from collections import Counter
from pathlib import Path

import pandas as pd

from pipeline import engine, hdf5, logs, manifest, suspects
from pipeline.manifest import Labels
from pipeline.params import load_params
from pipeline.suspects import Suspects
from pipeline.units import make_units

REPORT = Path("reports/label_suspects.csv")


def main() -> None:
    """Write the list, and name the classes that are left out."""
    params = load_params()
    options, features, labels = params.label_suspects, hdf5.read_features(), manifest.read_labels()
    if features.sha256 != labels.sha256:
        raise ValueError(f"{hdf5.FEATURES}: other images than in {manifest.LABELS}; run: dvc repro")
    units = make_units(labels)
    n_units = Counter(index for unit in units for index in {*labels.label[unit].tolist()})
    small = [name for index, name in enumerate(labels.class_names) if n_units[index] < options.folds]
    if small:
        logs.log.warning(
            "left out: %s: fewer images than label_suspects.folds (%d), where those that must stay together count "
            "as one",
            ", ".join(small),
            options.folds,
        )
    found = suspects.find(features.values, labels, units, options, engine.choose_device(params.runtime.device))
    write(found, labels)
    logs.log.info("%d of %d labels are suspects: %s", len(found.rows), len(labels.image_id), REPORT)


def write(found: Suspects, labels: Labels) -> None:
    """Write the list."""
    frame = pd.DataFrame(
        {
            "rank": range(1, len(found.rows) + 1),
            "image_id": [labels.image_id[row] for row in found.rows],
            "label": [labels.class_names[index] for index in labels.label[found.rows]],
            "suggested": [labels.class_names[index] for index in found.suggested],
            "self_confidence": found.self_confidence.round(6),
            "suggested_confidence": found.suggested_confidence.round(6),
            "weight": labels.weight[found.rows],
        }
    )
    manifest.write_csv(REPORT, frame)


if __name__ == "__main__":
    logs.run(main)
