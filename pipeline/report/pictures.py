"""Pictures for the page, as data URIs: thumbnails of images, filters, feature maps; and a map of the features.

An image file is shown only if it has not changed since it was indexed.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA
from torch.nn.modules.conv import _ConvNd

from pipeline.dataset import decoding
from pipeline.dataset.manifest import Images
from pipeline.features.hdf5 import Features
from pipeline.features.pixels import crop
from pipeline.network import cuts, tracing
from pipeline.network.backbones import Backbone
from pipeline.network.preprocessing import Normalize

THUMBNAIL = 128  # px, the longer side
MAX_POINTS = 5000  # of the map
MAX_BLOCKS = 12
CHANNELS = 8  # of a block
TILE = 56  # px of a feature map
FILTERS = 64
TIMES = "\u00d7"  # between two sizes
GAP = 2  # px between tiles


@dataclass(frozen=True)
class Picture:
    """A picture and its caption; `width` and `height` in px of the page."""

    uri: str
    width: int
    height: int
    title: str


class Album:
    """The images of a data set."""

    def __init__(self, directory: Path, files: Images) -> None:
        self.directory = directory
        self._digests = dict(zip(files.image_id, files.sha256, strict=True))

    def thumbnail(self, image_id: str) -> str | None:
        """A data URI of the whole image; None if its file is missing, cannot be read, or changed since indexing."""
        image = self.open(image_id, 2 * THUMBNAIL)
        if image is None:
            return None
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=3.0)
        return _uri(image, "WEBP")

    def open(self, image_id: str, least_side: int | None = None) -> Image.Image | None:
        """The image, decoded as `decode` does, or None; one that is not in the index must only lie in the directory."""
        path = self.directory / image_id
        try:
            if not path.resolve().is_relative_to(self.directory.resolve()):
                return None
            content = path.read_bytes()
            if image_id in self._digests and decoding.sha256(content) != self._digests[image_id]:
                return None
            return decoding.decode(content, least_side)
        except (OSError, ValueError):
            return None


def first_filters(backbone: Backbone) -> Picture | None:
    """The filters of the first convolution, each scaled to its own range; None if they have less than 2 x 2 pixels."""
    layers = ((name, layer) for name, layer in backbone.module.named_modules() if isinstance(layer, _ConvNd))
    name, layer = next(layers, ("", None))
    if layer is None or layer.weight.ndim != 4 or min(layer.weight.shape[2:]) < 2:
        return None
    weight = layer.weight.detach().float().numpy()
    # In colour only if the three channels are those of the image
    tiles = weight.transpose(0, 2, 3, 1) if weight.shape[1] == 3 else weight.mean(1)[..., None]
    n, size = len(weight), TIMES.join(map(str, weight.shape[2:]))
    some = f"the first {FILTERS} of " if n > FILTERS else ""
    title = f"{some}{n} filters of {size} px, layer {name}"
    return _grid([_scaled(tile) for tile in tiles[:FILTERS]], max(24, 2 * weight.shape[2]), 8, title)


def feature_maps(backbone: Backbone, image: Image.Image, last: str) -> list[Picture]:
    """View 0 of the image, and the channels that vary most at the end of each block up to the cut `last`.

    ValueError if the network cannot be traced, or has no maps.
    """
    pixels = crop(image, backbone.preprocessing)
    ends = {cuts.block(backbone.module, name): name for name in tracing.find(backbone)}
    names = list(ends.values())
    if last in names:
        names = names[: names.index(last) + 1]
    if len(names) > MAX_BLOCKS:
        names = [names[i] for i in np.linspace(0, len(names) - 1, MAX_BLOCKS).round().astype(int)]
    blocks = []
    with torch.inference_mode():
        x = Normalize(backbone.preprocessing)(torch.from_numpy(pixels[None].copy()))
        for name, piece in zip(names, cuts.split(backbone, *names), strict=False):
            x = piece(x)
            if x.ndim == 4 and min(x.shape[1:]) > 1:
                blocks.append(_block(name, x[0].float().numpy()))
    if not blocks:
        raise ValueError(f"{backbone.name} has no feature maps of more than one pixel at its cut points")
    side = 2 * TILE + GAP
    small = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
    return [Picture(_uri(small, "PNG"), side, side, f"input: {len(pixels)}{TIMES}{len(pixels)} px"), *blocks]


def map_features(features: Features) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """The first two principal components of view 0; of many images, always the same sample of MAX_POINTS.

    Returns the images' rows (n,), where they lie (n, 2), and the shares of the variance along the two axes. Feature
    maps are averaged over their pixels.
    """
    n = len(features.values)
    rows = np.arange(n)
    if n > MAX_POINTS:
        rows = np.sort(np.random.default_rng(0).choice(n, MAX_POINTS, replace=False))
    is_vector = features.values.ndim == 3
    pool = cuts.Pool("none" if is_vector else "avg", features.provenance.backbone.prefix_tokens)
    vectors = [pool(torch.from_numpy(features.values[row, :1].astype(np.float32))) for row in rows]
    pca = PCA(2, svd_solver="randomized", random_state=0)
    return rows, pca.fit_transform(torch.cat(vectors).numpy()), pca.explained_variance_ratio_.tolist()


def _block(name: str, maps: np.ndarray) -> Picture:
    is_channels_last = maps.shape[0] == maps.shape[1] != maps.shape[2]
    maps = np.moveaxis(maps, -1, 0) if is_channels_last else maps
    order = np.argsort(-maps.std(axis=(1, 2)), kind="stable")[:CHANNELS]
    title = f"{name}: {len(maps)} maps of {maps.shape[1]}{TIMES}{maps.shape[2]}"
    return _grid([_scaled(maps[channel][..., None]) for channel in np.sort(order)], TILE, CHANNELS // 2, title)


def _scaled(tile: np.ndarray) -> np.ndarray:
    """(height, width, channels) to uint8 over its own range."""
    low, high = float(tile.min()), float(tile.max())
    return (255 * (tile - low) / (high - low or 1.0)).astype(np.uint8)


def _grid(tiles: Sequence[np.ndarray], side: int, columns: int, title: str) -> Picture:
    columns = min(columns, len(tiles))
    lines = -(-len(tiles) // columns)
    size = columns * (side + GAP) - GAP, lines * (side + GAP) - GAP
    grid = Image.new("RGBA", size)
    for i, tile in enumerate(tiles):
        image = Image.fromarray(tile[..., 0] if tile.shape[2] == 1 else tile).convert("RGB")
        kind = Image.Resampling.NEAREST if side > image.width else Image.Resampling.BOX
        place = (i % columns) * (side + GAP), i // columns * (side + GAP)
        grid.paste(image.resize((side, side), kind), place)
    return Picture(_uri(grid, "PNG"), *size, title)


def _uri(image: Image.Image, kind: str) -> str:
    content = io.BytesIO()
    options = {"quality": 70, "method": 4} if kind == "WEBP" else {"optimize": True}
    image.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
