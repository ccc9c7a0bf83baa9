"""fetch: make a data set from an installed package, or one that torchvision downloads.

Writes  data/raw/<name>/           images and labels.csv
        data/.downloads/<name>/    torchvision's downloads; may be deleted
"""

import sys
from pathlib import Path

from pipeline import logs
from pipeline.files import shared
from pipeline.ingest import sources

RAW = Path("data/raw")


def main() -> None:
    """`python -m pipeline.stages.fetch NAME`."""
    name = sys.argv[1]
    n_images = sources.make(name, RAW / name, shared(".downloads"))
    logs.log.info("fetched %s: %d images", name, n_images)


if __name__ == "__main__":
    logs.run(main)
