"""fetch: make a data set of an installed package, or one that torchvision downloads.

Writes  data/raw/<name>/           images and labels.csv
        data/.downloads/<name>/    what torchvision has downloaded; may be deleted
"""

import os
import sys
from pathlib import Path

from pipeline import logs
from pipeline.ingest import sources

RAW = Path("data/raw")


def main() -> None:
    """`python -m pipeline.stages.fetch NAME`."""
    name = sys.argv[1]
    downloads = Path(os.environ.get("DVC_ROOT", "."), "data", ".downloads")
    count = sources.make(name, RAW / name, downloads)
    logs.log.info("fetched %s: %d images", name, count)


if __name__ == "__main__":
    logs.run(main)
