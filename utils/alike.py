"""Which pictures look alike: recompressed, resized, brightened, a little cropped, or taken in one burst."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.fingerprints import Fingerprint

MOST_BITS = 7
"""Bits of 64 in which the hashes of alike pictures may differ. Two such hashes have one byte of the eight in common at
least, so only pictures with a byte in common are held against each other."""
LEAST_CORRELATION = 0.97
"""Of the grey thumbnails. Photos recompressed at quality 30, halved, 15 % brighter or cropped by 2 % are above it in 19
of 20 cases; of 340,000 pairs of photos of rubbish on the same board two are, both bursts, and of 1.1 million pairs of
hands before one wall one."""
TINY, LEAST_CORRELATION_OF_TINY = 64, 0.99
"""Pictures with a side of fewer pixels, such as handwritten digits, have too little in them to differ by."""
ROWS = 1024


def alike_groups(fingerprints: Sequence[Fingerprint]) -> list[list[int]]:
    """Groups of two and more, of indices, that are linked by looking alike."""
    if len(fingerprints) < 2:
        return []
    from scipy.sparse import coo_array  # slow to import
    from scipy.sparse.csgraph import connected_components

    pairs = _confirm(_candidates(fingerprints), fingerprints)
    n = len(fingerprints)
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    _, labels = connected_components(graph, directed=False)
    linked = np.unique(labels[pairs[:, 0]])
    return [np.flatnonzero(labels == label).tolist() for label in linked]


def _candidates(fingerprints: Sequence[Fingerprint]) -> np.ndarray:
    """Pairs (pairs, 2) of indices whose hashes differ in `MOST_BITS` at most."""
    in_bytes = np.frombuffer(b"".join(f.phash for f in fingerprints), np.uint8).reshape(-1, 8)
    hashes = in_bytes.view(np.uint64)[:, 0]
    found = [np.empty((0, 2), np.int64)]
    for byte in in_bytes.T:
        order = np.argsort(byte, kind="stable")
        for same in np.split(order, np.flatnonzero(np.diff(byte[order])) + 1):
            for start in range(0, len(same), ROWS):
                distance = np.bitwise_count(hashes[same[start : start + ROWS], None] ^ hashes[None, same[start:]])
                rows, columns = np.nonzero(np.triu(distance <= MOST_BITS, k=1))
                found.append(np.sort(np.stack([same[start + rows], same[start + columns]], axis=1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _confirm(pairs: np.ndarray, fingerprints: Sequence[Fingerprint]) -> np.ndarray:
    """Those of the pairs whose thumbnails correlate."""
    thumbnails = np.frombuffer(b"".join(f.thumbnail for f in fingerprints), np.uint8).reshape(len(fingerprints), -1)
    tiny = np.array([min(f.width, f.height) < TINY for f in fingerprints])
    kept = [pairs[:0]]
    for start in range(0, len(pairs), 100_000):
        chunk = pairs[start : start + 100_000]
        one, other = _standardised(thumbnails[chunk[:, 0]]), _standardised(thumbnails[chunk[:, 1]])
        least = np.where(tiny[chunk].any(axis=1), LEAST_CORRELATION_OF_TINY, LEAST_CORRELATION)
        kept.append(chunk[(one * other).mean(axis=1) >= least])
    return np.concatenate(kept)


def _standardised(levels: np.ndarray) -> np.ndarray:
    levels = levels.astype(np.float32)
    levels -= levels.mean(axis=1, keepdims=True)
    return levels / np.maximum(levels.std(axis=1, keepdims=True), 1e-6)
