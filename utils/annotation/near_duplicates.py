"""Which images look alike: recompressed, resized, brightened, a little cropped, or taken in one burst."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from utils.annotation.fingerprints import Fingerprint

MOST_BITS = 7
"""Bits of 64 in which the hashes of alike images may differ. Two such hashes have one byte of the eight in common at
least, so only images with a byte in common are held against each other."""
LEAST_CORRELATION = 0.97
"""Of the grey thumbnails. Photos recompressed at quality 30, halved, 15 % brighter or cropped by 2 % are above it in 19
of 20 cases; of 340,000 pairs of photos of rubbish on the same board two are, both bursts, and of 1.1 million pairs of
hands before one wall one."""
TINY, LEAST_CORRELATION_OF_TINY = 64, 0.99
"""Images with a side of fewer pixels, such as handwritten digits, have too little in them to differ by."""
ROWS, PAIRS = 256, 50_000
"""Hashes that are held against the others of a group, and thumbnails against each other, at a time."""


def near_duplicate_groups(fingerprints: Sequence[Fingerprint]) -> list[list[int]]:
    """Groups of two and more, of indices, that are linked by looking alike, directly or over others."""
    labels = np.arange(len(fingerprints))
    if len(fingerprints) < 2:
        return []
    thumbnails = np.frombuffer(b"".join(f.thumbnail for f in fingerprints), np.uint8).reshape(len(fingerprints), -1)
    tiny = np.array([min(f.width, f.height) < TINY for f in fingerprints])
    least = np.where(tiny, LEAST_CORRELATION_OF_TINY, LEAST_CORRELATION)
    for pairs in _candidates(fingerprints, labels):
        for start in range(0, len(pairs), PAIRS):
            chunk = pairs[start : start + PAIRS]
            chunk = chunk[labels[chunk[:, 0]] != labels[chunk[:, 1]]]  # where all look alike, most are linked already
            one, other = _standardised(thumbnails[chunk[:, 0]]), _standardised(thumbnails[chunk[:, 1]])
            labels[:] = _link(labels, chunk[(one * other).mean(axis=1) >= least[chunk].max(axis=1)])
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [group.tolist() for group in groups if len(group) > 1]


def _link(labels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Labels (n,) of linked images, with the links of `pairs` added."""
    if not len(pairs):
        return labels
    from scipy.sparse import coo_array  # slow to import
    from scipy.sparse.csgraph import connected_components

    linked = labels[pairs]
    n = len(labels)
    graph = coo_array((np.ones(len(linked), bool), (linked[:, 0], linked[:, 1])), shape=(n, n))
    return connected_components(graph, directed=False)[1][labels]


def _candidates(fingerprints: Sequence[Fingerprint], labels: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs (pairs, 2) of indices whose hashes differ in `MOST_BITS` at most, some at a time, each once, but
    for those that `labels` (n,), which may change meanwhile, has linked already."""
    in_bytes = np.frombuffer(b"".join(f.phash for f in fingerprints), np.uint8).reshape(-1, 8)
    hashes = in_bytes.view(np.uint64)[:, 0]
    for place, byte in enumerate(tqdm(in_bytes.T, "looking for alike ones", leave=False, disable=None)):
        order = np.argsort(byte, kind="stable")
        for same in np.split(order, np.flatnonzero(np.diff(byte[order])) + 1):
            for start in range(0, len(same), ROWS):
                if (labels[same[start:]] == labels[same[start]]).all():
                    break
                those, others = same[start : start + ROWS, None], same[None, start:]
                near = np.bitwise_count(hashes[those] ^ hashes[others]) <= MOST_BITS
                near &= labels[those] != labels[others]
                rows, columns = np.nonzero(np.triu(near, k=1))
                pairs = np.stack([same[start + rows], same[start + columns]], axis=1)
                earlier = (in_bytes[pairs[:, 0], :place] == in_bytes[pairs[:, 1], :place]).any(axis=1)
                yield pairs[~earlier]


def _standardised(levels: np.ndarray) -> np.ndarray:
    levels = levels.astype(np.float32)
    levels -= levels.mean(axis=1, keepdims=True)
    return levels / np.maximum(levels.std(axis=1, keepdims=True), 1e-6)
