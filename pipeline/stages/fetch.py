"""fetch: make a data set that an installed package carries.

Writes  data/raw/<name>/     images and labels.csv
"""

import sys
from pathlib import Path

from pipeline import datasets, logs

RAW = Path("data/raw")


def main() -> None:
    """`python -m pipeline.stages.fetch NAME`."""
    name = sys.argv[1]
    count = {"elpv": datasets.elpv}[name](RAW / name)
    logs.log.info("fetched %s: %d images", name, count)


if __name__ == "__main__":
    logs.run(main)
