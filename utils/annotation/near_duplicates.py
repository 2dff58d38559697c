"""Find near-duplicates: recompressed, resized, brightened or slightly cropped images, and bursts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from utils.annotation.fingerprints import Fingerprint

MAX_BITS = 7
"""Maximum Hamming distance of the 64-bit hashes. Hashes this close share at least one of their eight bytes, so only
images with an equal byte are compared."""
MIN_CORRELATION = 0.97
"""Of the gray thumbnails. 19 of 20 photos recompressed at quality 30, halved, 15 % brighter or cropped by 2 % exceed
it, but only 2 of 340,000 pairs of trash photos (both are bursts) and 1 of 1.1 million pairs of hand photos."""
SMALL_SIDE, MIN_CORRELATION_SMALL = 64, 0.99
"""Images whose shorter side is below this, such as handwritten digits, have fewer details that could differ."""
ROWS, PAIRS = 256, 50_000
"""Hashes, and pairs of thumbnails, that are compared at a time."""


def near_duplicate_groups(fingerprints: Sequence[Fingerprint]) -> list[list[int]]:
    """Return groups of two or more indices that are connected by near-duplicate pairs."""
    labels = np.arange(len(fingerprints))
    if len(fingerprints) < 2:
        return []
    thumbnails = np.frombuffer(b"".join(f.thumbnail for f in fingerprints), np.uint8).reshape(len(fingerprints), -1)
    small = np.array([min(f.width, f.height) < SMALL_SIDE for f in fingerprints])
    threshold = np.where(small, MIN_CORRELATION_SMALL, MIN_CORRELATION)
    for pairs in _candidates(fingerprints, labels):
        for start in range(0, len(pairs), PAIRS):
            chunk = pairs[start : start + PAIRS]
            chunk = chunk[labels[chunk[:, 0]] != labels[chunk[:, 1]]]  # skip pairs that are in one group already
            first, second = _standardize(thumbnails[chunk[:, 0]]), _standardize(thumbnails[chunk[:, 1]])
            labels[:] = _merge(labels, chunk[(first * second).mean(axis=1) >= threshold[chunk].max(axis=1)])
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [group.tolist() for group in groups if len(group) > 1]


def _merge(labels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the group labels (n,) after merging the groups of each pair."""
    if not len(pairs):
        return labels
    from scipy.sparse import coo_array  # slow to import
    from scipy.sparse.csgraph import connected_components

    edges = labels[pairs]
    n = len(labels)
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(n, n))
    return connected_components(graph, directed=False)[1][labels]


def _candidates(fingerprints: Sequence[Fingerprint], labels: np.ndarray) -> Iterator[np.ndarray]:
    """Yield arrays (pairs, 2) of indices whose hashes differ in at most `MAX_BITS`, each pair once.

    Pairs within a group of `labels` (n,), which the caller updates in between, are skipped.
    """
    hash_bytes = np.frombuffer(b"".join(f.phash for f in fingerprints), np.uint8).reshape(-1, 8)
    hashes = hash_bytes.view(np.uint64)[:, 0]
    for position, byte in enumerate(tqdm(hash_bytes.T, "finding near-duplicates", leave=False, disable=None)):
        order = np.argsort(byte, kind="stable")
        for same in np.split(order, np.flatnonzero(np.diff(byte[order])) + 1):
            for start in range(0, len(same), ROWS):
                if (labels[same[start:]] == labels[same[start]]).all():
                    break
                rows, columns = same[start : start + ROWS, None], same[None, start:]
                near = np.bitwise_count(hashes[rows] ^ hashes[columns]) <= MAX_BITS
                near &= labels[rows] != labels[columns]
                row, column = np.nonzero(np.triu(near, k=1))
                pairs = np.stack([same[start + row], same[start + column]], axis=1)
                seen = (hash_bytes[pairs[:, 0], :position] == hash_bytes[pairs[:, 1], :position]).any(axis=1)
                yield pairs[~seen]


def _standardize(levels: np.ndarray) -> np.ndarray:
    levels = levels.astype(np.float32)
    levels -= levels.mean(axis=1, keepdims=True)
    return levels / np.maximum(levels.std(axis=1, keepdims=True), 1e-6)
