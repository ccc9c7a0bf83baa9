"""Find images that occur twice: near-duplicates by a perceptual hash.

The hash is the usual one of 64 bits: which of the 8 x 8 lowest frequencies (discrete cosine transform of 32 x 32 grey
pixels) are above their median. It ignores colour and hardly depends on size, compression or small changes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image
from scipy.fft import dct
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SIDE, KEPT = 32, 8  # px of the reduced picture, and frequencies kept of each direction
COSINES = np.asarray(dct(np.eye(SIDE), axis=0, norm="ortho"))[:KEPT]
SAMPLED = 4  # rows and columns of the picture that are averaged for each of these pixels
FLAT = 1.0  # standard deviation (grey levels) of these frequencies below which a picture counts as flat
BLOCK = 2**17  # pairs of rows that are compared at a time, so that they fit the processor's cache


def reduced(image: Image.Image) -> np.ndarray:
    """The 32 x 32 grey pixels (uint8) of an 8-bit image (L or RGB) that are hashed."""
    sampled = image.resize((SIDE * SAMPLED, SIDE * SAMPLED), Image.Resampling.NEAREST)
    return np.asarray(sampled.reduce(SAMPLED).convert("L"))


def perceptual_hashes(pixels: Sequence[np.ndarray]) -> list[int | None]:
    """The 64 bits for each result of `reduced`; None for a flat picture, which would resemble every other one."""
    if not pixels:
        return []
    # Rounded, because noise in the last digit would decide the bit of a frequency that is absent
    low = np.round(COSINES @ np.stack(pixels).astype(np.float64) @ COSINES.T, 2).reshape(len(pixels), -1)
    is_flat = np.square(low[:, 1:]).sum(axis=1) < (FLAT * SIDE) ** 2
    bits = np.packbits(low > np.median(low, axis=1, keepdims=True), axis=1)
    values = bits.view(">u8").ravel().tolist()
    return [None if flat else value for flat, value in zip(is_flat.tolist(), values, strict=True)]


def near(hashes: np.ndarray, bits: int, n_closest: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Pairs of pictures whose hashes (n,) uint64 have a Hamming distance of at most `bits`.

    Hashes that differ in b bits agree in at least one of b + 1 bands, so only rows that agree in a band are compared
    (Manku, Jain and Das Sarma 2007). Equal hashes are compared once, however many pictures have them.

    Returns the component (n,) int64 of each picture (pictures connected by pairs share a number); the `n_closest` pairs
    (a, b) with their Hamming distance, (k, 3) int64, the nearest first, where the first of pictures with equal hashes
    represents all; and the number of all pairs.
    """
    distinct, member, count = np.unique(hashes, return_inverse=True, return_counts=True)
    first = np.unique(member, return_index=True)[1]
    connected = np.arange(len(distinct))
    closest, n_pairs = _equal_pairs(member, n_closest), int((count * (count - 1) // 2).sum())
    for a, b, distance in _close_pairs(distinct, bits):
        n_pairs += int((count[a] * count[b]).sum())
        connected = _connect(connected, a, b)
        best = np.argsort(distance, kind="stable")[:n_closest]
        pairs = np.sort([first[a[best]], first[b[best]]], axis=0)
        closest = _nearest(np.concatenate([closest, np.column_stack([*pairs, distance[best]])]), n_closest)
    return connected[member], closest, n_pairs


def _equal_pairs(member: np.ndarray, n: int) -> np.ndarray:
    """The first `n` pairs of successive rows with equal hashes, at distance 0."""
    order = np.argsort(member, kind="stable")
    left = np.flatnonzero(member[order][:-1] == member[order][1:])
    return _nearest(np.column_stack([order[left], order[left + 1], np.zeros(len(left), np.int64)]), n)


def _nearest(pairs: np.ndarray, n: int) -> np.ndarray:
    return pairs[np.lexsort(pairs.T[[1, 0, 2]])][:n]


def _close_pairs(hashes: np.ndarray, bits: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of pairs of rows (a, b) with their distances; each pair occurs once."""
    width = min(64 // (bits + 1), max(1, len(hashes).bit_length() - 6))  # narrow enough for groups of some dozens
    bands = [np.uint64(sum(1 << band + i * (bits + 1) for i in range(width))) for band in range(bits + 1)]
    for number, band in enumerate(bands):
        order = np.argsort(hashes & band, kind="stable")
        value, key = hashes[order], (hashes & band)[order]
        bounds = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1], [True]]))
        several = np.flatnonzero(np.diff(bounds) > 1)
        for start, end in zip(bounds[several].tolist(), bounds[several + 1].tolist(), strict=True):
            rows = max(1, BLOCK // (end - start))
            for top in range(start, end - 1, rows):
                differing = value[top : min(top + rows, end), None] ^ value[None, top:end]
                a, b = np.nonzero(np.bitwise_count(differing) <= bits)
                differing, a, b = differing[a, b], a + top, b + top
                is_new = a < b
                for earlier in bands[:number]:  # in which the pair was found already
                    is_new &= differing & earlier != 0
                if is_new.any():
                    yield order[a[is_new]], order[b[is_new]], np.bitwise_count(differing[is_new])


def _connect(connected: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = connected[a], connected[b]
    if (a == b).all():
        return connected
    edges = coo_array((np.ones(len(a), bool), (a, b)), shape=(len(connected),) * 2)
    return connected_components(edges, directed=False)[1].astype(np.int64)[connected]
