"""Find near-duplicates: images that show the same picture, resized, recompressed or a little brighter.

A picture is reduced to 32 x 32 grey pixels, of which the 63 lowest frequencies but the mean (discrete cosine transform)
are kept, scaled to length 1: its *signature*. The scalar product of two signatures is their correlation. It ignores
colour, brightness and contrast, and hardly depends on size and compression. `python -m benchmarks.near_duplicates`
measures how many copies it finds, and how many different images it takes for copies.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy.fft import dct
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

SIDE, KEPT = 32, 8  # px of the reduced picture, and frequencies kept of each direction
COSINES = np.asarray(dct(np.eye(SIDE), axis=0, norm="ortho"))[:KEPT]
FLAT = 1.0  # standard deviation (grey levels) of these frequencies below which a picture counts as flat
SCALE = 32767  # of a signature as int16
LENGTH = KEPT**2 - 1  # of a signature
N_PARTNERS = 10  # near-duplicates of each picture that are found: the most similar ones


def reduced(image: Image.Image) -> np.ndarray:
    """The 32 x 32 grey pixels (uint8) of an 8-bit image (L or RGB) from which its signature is made."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0).convert("L"))


def signatures(pixels: Sequence[np.ndarray]) -> list[np.ndarray | None]:
    """The signature (63,) int16 of each result of `reduced`; None for a flat picture, which resembles every other."""
    if not pixels:
        return []
    low = (COSINES @ np.stack(pixels).astype(np.float64) @ COSINES.T).reshape(len(pixels), -1)[:, 1:]
    length = np.linalg.norm(low, axis=1)
    scaled = np.round(SCALE * low / np.maximum(length, 1e-9)[:, None]).astype(np.int16)
    return [None if size < FLAT * SIDE else row for size, row in zip(length, scaled, strict=True)]


def near(signature: np.ndarray, correlation: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of pictures whose signatures (n, 63) int16 correlate by at least `correlation`.

    Of each picture the ten most similar partners are found. Pictures with the same signature count as one, and each is
    a pair with the first of them.

    Returns the pairs (k, 2) int64, each with the smaller row first, and their correlation (k,) float64, the most
    similar first; and the component (n,) int64 of each picture (pictures connected by pairs share a number).
    """
    n = len(signature)
    if not n:
        return np.zeros((0, 2), np.int64), np.zeros(0), np.zeros(0, np.int64)
    _, first, member = np.unique(signature, axis=0, return_index=True, return_inverse=True)
    order = np.sort(first)  # the first picture of each signature, in the order of the rows
    same = np.column_stack([first[member.ravel()], np.arange(n)])
    same = same[same[:, 0] != same[:, 1]]
    points = signature[order].astype(np.float64)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    # |a - b|^2 = 2 - 2 a b for vectors of length 1
    nearest = KDTree(points).query(points, N_PARTNERS + 1, distance_upper_bound=np.sqrt(2 * (1 - correlation)) + 1e-9)
    partner = np.asarray(nearest[1])
    a, b = np.nonzero((partner < len(points)) & (partner != np.arange(len(points))[:, None]))
    found = np.unique(np.sort(np.column_stack([a, partner[a, b]]), axis=1), axis=0)
    value = np.concatenate([np.ones(len(same)), np.einsum("ij,ij->i", points[found[:, 0]], points[found[:, 1]])])
    pairs = np.concatenate([same, order[found]]).astype(np.int64)
    edges = coo_array((np.ones(len(pairs), bool), tuple(pairs.T)), shape=(n, n))
    by_similarity = np.lexsort((pairs[:, 1], pairs[:, 0], -value.round(9)))
    component = connected_components(edges, directed=False)[1].astype(np.int64)
    return pairs[by_similarity], value[by_similarity], component
