"""What `fetch` can make: directories of images with a labels.csv, below data/raw/."""

import csv
import io
import shutil
from pathlib import Path

import elpv_dataset

from pipeline.files import write_text


def elpv(directory: Path) -> int:
    """Write the ELPV data set (Deitsch et al. 2019) from its package; the number of images.

    2,624 electroluminescence images of solar cells with a defect probability p. As in the
    publication: defective if p > 0, with weight p, or 1 where p = 0; stratified by probability and
    type of module.
    """
    source = Path(elpv_dataset.__file__).parent / "data"
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["path", "label", "weight", "stratum", "subset"])
    entries = sorted(line.split() for line in (source / "labels.csv").read_text().splitlines())
    for path, text, kind in entries:
        probability = float(text)
        label = "defective" if probability > 0 else "functional"
        stratum = f"{probability:.2f}-{kind}"
        writer.writerow([path, label, probability or 1.0, stratum, kind])
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, directory / path)
    write_text(directory / "labels.csv", table.getvalue())
    return len(entries)
