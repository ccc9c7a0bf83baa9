"""Millions of rows and images: `python -m benchmarks.scale [--images N] [--views V] [--largest N]`.

Makes stores of tiny rows, in shards of as many rows as extraction writes, and tables of images, labels and splits, in a
temporary directory. By default 1.2 million images with four views, and 10,000 rows read from stores of 10⁴, 10⁵ and
10⁶: in order, as features.h5 is assembled, and in random batches, as training reads. All times are ratios of two that
are measured in one process; memory is the peak of a process, imports included.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.common import Line, Workspace, run, took, workspace
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Images, Labels

N_READ, ROW_SHAPE, N_CLASSES, SEEDS = 10_000, (4,), 1000, 10
IN_ORDER, BATCHES, AT_ONCE = "in order", "in random batches of 32", "at random, all at once"


def main() -> None:
    """Make and measure everything, or one part of it in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_200_000, help="of the large store and of the tables")
    parser.add_argument("--views", type=int, default=4, help="of each image of the large store")
    parser.add_argument("--largest", type=int, default=1_000_000, help="rows of the largest of three stores")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.part:
        print(json.dumps(PARTS[chosen.part](chosen)))
        return
    run(lambda *, is_quick: measure())


def measure() -> Iterator[Line]:
    """The store, and the tables."""
    for measured in (measure_opening, measure_reading, measure_tables):
        with workspace(Path("images"), split={"seeds": [*range(SEEDS)]}) as place:
            yield from measured(place)


def measure_opening(place: Workspace) -> Iterator[Line]:
    """A large store, without its index and with it."""
    part(place, "fill")
    without, found = part(place, "open_store"), part(place, "open_store")
    print(
        f"  {found['n_rows']:,} rows in {found['n_shards']:,} shards: opened in {without['seconds']:.1f} s without an "
        f"index ({without['peak_mb']:.0f} MB), {found['seconds']:.2f} s with it; listed in {found['listed']:.3f} s",
        flush=True,
    )
    yield Line("opening / listing and stat-ing the shards", found["seconds"] / found["listed"], "times", "at most", 50)
    yield Line("peak memory of opening", found["peak_mb"] / 1024, "GB", "at most", 1)
    yield Line("index", found["index_bytes"] / found["n_rows"], "bytes a row", "at most", 64)


def measure_reading(place: Workspace) -> Iterator[Line]:
    """The time per row in stores of three sizes, as extraction and as training read."""
    found = part(place, "read_rows")
    for how, each in found["seconds"].items():
        shown = ", ".join(f"{1e6 * seconds:.1f} µs of {n}" for n, seconds in each.items())
        print(f"  found and read, {how}, a row: {shown}", flush=True)
        smallest, *_, largest = each.values()
        if how in (IN_ORDER, BATCHES):
            yield Line(f"time per row {how}, growth", largest / smallest, "times", "at most", 1.6)


def measure_tables(place: Workspace) -> Iterator[Line]:
    """images.csv, labels.csv, and the stage that splits."""
    written, split = part(place, "write_tables"), place.run("pipeline.stages.split")
    read = part(place, "read_tables")
    print(
        f"  {written['n_images']:,} images: images.csv and labels.csv written in {written['seconds']:.0f} s, "
        f"{SEEDS} times split in {split.seconds:.0f} s, all read in {read['seconds']:.0f} s",
        flush=True,
    )
    for name, peak_mb in (("writing", written["peak_mb"]), ("splitting", split.peak_mb), ("reading", read["peak_mb"])):
        yield Line(f"peak memory of {name} the tables", peak_mb / 1024, "GB", "at most", 3)


def part(place: Workspace, name: str) -> dict:
    """Run a part in a process of its own; what it found, and its peak memory."""
    ran = place.run("benchmarks.scale", "--part", name, *sys.argv[1:])
    return json.loads(ran.printed.splitlines()[-1]) | {"peak_mb": ran.peak_mb}


def fill(chosen: argparse.Namespace) -> dict:
    """Fill a store as extraction does: the views of an image one after the other."""
    fill_store("large", chosen.images * chosen.views, chosen.views)
    return {}


def open_store(chosen: argparse.Namespace) -> dict:
    """Seconds to open the store, and to list and stat its shards."""
    from pipeline.features.shard_index import SAVED
    from pipeline.features.store import Store, root

    key = key_of("large")
    directory = root() / key.name(0)

    def stat() -> list[os.stat_result]:
        return [entry.stat() for entry in os.scandir(directory) if entry.name.endswith(".h5")]

    listed = min(took(stat) for _ in range(3))
    start = time.perf_counter()
    store = Store(key)
    seconds = time.perf_counter() - start
    assert len(store) == chosen.images * chosen.views
    found = {"seconds": seconds, "listed": listed, "n_shards": len(stat()), "n_rows": len(store)}
    return found | {"index_bytes": (directory / SAVED).stat().st_size}


def read_rows(chosen: argparse.Namespace) -> dict:
    """Seconds per row to find and read rows whose shards were checked before."""
    from pipeline.features.extraction import SHARD_ROWS
    from pipeline.features.store import Store

    sizes = [max(1, chosen.largest // 100), max(1, chosen.largest // 10), chosen.largest]
    n_read, stores, calls = min(N_READ, sizes[0]), {}, {}
    for n in sizes:
        fill_store(str(n), n, 1)
        stores[n] = Store(key_of(str(n)))
        start = (n - n_read) // 2
        in_order = [(name_of(number), 0) for number in range(start, start + n_read)]
        at_random = [(name_of(number), 0) for number in np.random.default_rng(0).permutation(n)[:n_read].tolist()]
        ways = (IN_ORDER, in_order, SHARD_ROWS), (BATCHES, at_random, 32), (AT_ONCE, at_random, n_read)
        for how, rows, size in ways:
            assert stores[n].missing(rows) == []
            assert np.array_equal(stores[n].read(rows), arrays_of(rows)[0])
            calls[how, n] = [rows[i : i + size] for i in range(0, n_read, size)]
    times = {call: [] for call in calls}
    for _ in range(9):  # in turn, so that a busy moment of the machine hits all of them
        for (how, n), parts in calls.items():
            times[how, n].append(took(partial(deque, map(stores[n].read, parts), maxlen=0)) / n_read)
    hows = IN_ORDER, BATCHES, AT_ONCE
    return {"seconds": {how: {f"{n:,}": float(np.median(times[how, n])) for n in sizes} for how in hows}}


def write_tables(chosen: argparse.Namespace) -> dict:
    """Seconds to write images.csv and labels.csv."""
    n, random = chosen.images, np.random.default_rng(0)
    class_names = [f"n{number:08}" for number in range(min(N_CLASSES, max(2, n // 100)))]
    label = np.sort(random.integers(0, len(class_names), n))
    names = [f"{class_names[number]}/{class_names[number]}_{i:08}.JPEG" for i, number in enumerate(label.tolist())]
    digests, empty = [name_of(i) for i in range(n)], [""] * n
    start = time.perf_counter()
    manifest.write_images(Images(names, digests, [500] * n, [375] * n))
    manifest.write_labels(Labels(names, digests, label, np.ones(n), empty, empty, empty, empty, empty, class_names))
    manifest.NEAR_DUPLICATES.write_text("a,b\n")
    return {"seconds": time.perf_counter() - start, "n_images": n}


def read_tables(chosen: argparse.Namespace) -> dict:
    """Seconds to read images.csv, labels.csv and all splits, which stay in memory together."""
    start = time.perf_counter()
    images, labels = manifest.read_images(), manifest.read_labels()
    splits = manifest.read_splits(labels.image_id)
    assert (len(images.sha256), len(splits)) == (chosen.images, SEEDS)
    return {"seconds": time.perf_counter() - start}


def name_of(number: int) -> str:
    """The SHA-256 of an image that there is not."""
    return hashlib.sha256(b"%d" % number).hexdigest()


def key_of(name: str):  # noqa: ANN201 (a Key, whose module loads torch)
    """A key with tiny rows."""
    from pipeline.features.store import Key
    from pipeline.params import load_params

    return Key({"store_dtype": "fp32", "cut": name}, load_params().augmentation, ROW_SHAPE)


def fill_store(name: str, n_rows: int, n_views: int) -> None:
    """Write a store's shards; each is a written one with other rows and values, since HDF5 alone would take minutes."""
    from pipeline.features import hdf5
    from pipeline.features.extraction import SHARD_ROWS
    from pipeline.features.store import root
    from pipeline.files import write_json

    key = key_of(name)
    directory = root() / key.name(0)
    directory.mkdir(parents=True)
    write_json(directory / "key.json", key.describe(0))
    content, places = bytearray(), []
    for start in range(0, n_rows, SHARD_ROWS):
        rows = [(name_of(row // n_views), row % n_views) for row in range(start, min(start + SHARD_ROWS, n_rows))]
        arrays = arrays_of(rows)
        if start == 0 or len(rows) < SHARD_ROWS:
            path = hdf5.write_shard(directory, directory.name, rows, arrays[0], np.zeros(len(rows), np.float32))
            content = bytearray(path.read_bytes())
            places = [content.index(array.tobytes()) for array in arrays]
            continue
        for place, array in zip(places, arrays, strict=True):
            content[place : place + array.nbytes] = array.tobytes()
        (directory / f"{hashlib.sha256(content).hexdigest()}.h5").write_bytes(content)


def arrays_of(rows: Sequence[tuple[str, int]]) -> list[np.ndarray]:
    """Values that tell the row, names and views, as in a shard."""
    values = np.repeat(np.array([[int(name[:4], 16)] for name, _ in rows], np.float32), ROW_SHAPE[0], axis=1)
    return [values, np.array([name.encode() for name, _ in rows]), np.array([view for _, view in rows], np.int32)]


PARTS = {made.__name__: made for made in (fill, open_store, read_rows, write_tables, read_tables)}

if __name__ == "__main__":
    main()
