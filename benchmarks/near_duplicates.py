"""Near-duplicates: how many planted copies are found, and how many different images are taken for copies.

`python -m benchmarks.near_duplicates` plants copies of every tenth image of the default data (resized, recompressed,
enlarged to a JPEG that is decoded at reduced size, cropped), and chains all images of the default data by the threshold
of params.yaml.
"""

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.dataset import decoding
from pipeline.ingest import duplicates, sources
from pipeline.ingest.indexing import LEAST_SIDE
from pipeline.params import load_params

COPIED = 10  # every so many images
LARGE = 5  # images of a component


def copies(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """A kind, and the copy."""
    width, height = image.size
    for factor in (0.25, 0.5, 0.75, 0.9, 1.5):
        yield f"resized by {factor}", image.resize((round(width * factor), round(height * factor)))
    for quality in (30, 50, 75, 90):
        yield f"JPEG of quality {quality}", _saved(image, "JPEG", quality)
    yield "WebP of quality 50", _saved(image, "WEBP", 50)
    yield "half the size, JPEG of quality 60", _saved(image.resize((width // 2, height // 2)), "JPEG", 60)
    for factor in (2, 4, 8):
        large = _saved(image.resize((width * factor, height * factor), Image.Resampling.BICUBIC), "JPEG", 90)
        yield f"enlarged {factor} times, JPEG of quality 90", large
    for share in (0.01, 0.02, 0.05):
        x, y = round(width * share), round(height * share)
        yield f"cropped by {share:.0%} at each side", image.crop((x, y, width - x, height - y))


def _saved(image: Image.Image, kind: str, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, kind, quality=quality)
    return decoding.decode(stream.getvalue(), LEAST_SIDE)


def main() -> None:
    """Print the rates."""
    correlation = load_params().dataset.near_duplicate_correlation
    with tempfile.TemporaryDirectory() as scratch:
        sources.elpv(Path(scratch))
        images = [decoding.decode(path.read_bytes()) for path in sorted(Path(scratch).rglob("*.png"))]
    print(f"correlation at least {correlation}, {len(images):,} images of the default data")
    signatures = duplicates.signatures([*map(duplicates.reduced, images)])
    pairs, _, component = duplicates.near(np.stack([row for row in signatures if row is not None]), correlation)
    size = np.bincount(component)[component]
    n_large = np.count_nonzero(size > LARGE)
    print(f"{len(pairs)} pairs; in components of more than {LARGE}: {n_large} images ({n_large / len(images):.1%})")
    found: dict[str, list[bool]] = {}
    for image, signature in list(zip(images, signatures, strict=True))[::COPIED]:
        for kind, copy in copies(image):
            both = [row for row in (signature, *duplicates.signatures([duplicates.reduced(copy)])) if row is not None]
            hits, _, _ = duplicates.near(np.reshape(both, (-1, duplicates.LENGTH)), correlation)
            found.setdefault(kind, []).append(len(hits) > 0)
    for kind, hits in found.items():
        print(f"{kind}: {np.mean(hits):.1%} of {len(hits)} copies found")
    copied = [hit for kind, hits in found.items() if "cropped" not in kind for hit in hits]
    print(f"all resized and recompressed copies: {np.mean(copied):.2%} of {len(copied):,} found")


if __name__ == "__main__":
    main()
