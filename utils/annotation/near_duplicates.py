"""Find near-duplicates: recompressed, resized, brightened or slightly cropped images, and bursts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from utils.annotation.fingerprint_table import FingerprintTable

MAX_BITS = 7
"""Maximum Hamming distance of the 64-bit hashes."""
MIN_CORRELATION = 0.97
"""Of the gray thumbnails. 19 of 20 photos recompressed at quality 30, halved, 15 % brighter or cropped by 2 % exceed
it, but only 2 of 340,000 pairs of trash photos (both are bursts) and 1 of 1.1 million pairs of hand photos."""
SMALL_SIDE, MIN_CORRELATION_SMALL = 64, 0.99
"""Images whose shorter side is below this, such as handwritten digits, have fewer details that could differ."""
ROWS, COLUMNS, PAIRS = 256, 1 << 13, 50_000
"""Hashes that are compared with how many others at a time, and pairs of thumbnails."""


class Bands(NamedTuple):
    """Equal pieces of the hash, at least one of which differs in no more than `radius` bits if hashes differ in no more
    than `MAX_BITS`: hashes are only compared where one does (multi-index hashing, Norouzi et al., 2012)."""

    bits: int
    radius: int


NARROW, WIDE = Bands(8, 0), Bands(16, 1)
"""Both find all pairs: seven bits can't reach all of eight pieces, nor twice each of four."""
MANY = 400_000
"""From so many images on, `WIDE` bands are faster: they compare 30 times fewer pairs, in more and smaller blocks."""


def near_duplicate_groups(prints: FingerprintTable, indices: np.ndarray) -> list[list[int]]:
    """Return groups of two or more of `indices` that are connected by near-duplicate pairs, by their first index.

    Args:
        prints: fingerprints of all images.
        indices: (n,) those to compare, all readable, ascending.
    """
    labels = np.arange(len(indices))  # the first member of each one's group
    small = np.minimum(prints.rows["width"][indices], prints.rows["height"][indices]) < SMALL_SIDE
    threshold = np.where(small, MIN_CORRELATION_SMALL, MIN_CORRELATION)
    hashes = prints.rows["phash"][indices].view(np.uint64)[:, 0]
    for pairs in _batches(_candidates(hashes, labels, WIDE if len(hashes) >= MANY else NARROW)):
        for start in range(0, len(pairs), PAIRS):
            chunk = pairs[start : start + PAIRS]
            chunk = chunk[labels[chunk[:, 0]] != labels[chunk[:, 1]]]  # skip pairs that are in one group already
            first, second = (_standardize(prints.rows["thumbnail"][indices[side]]) for side in chunk.T)
            labels[:] = _merge(labels, chunk[(first * second).mean(axis=1) >= threshold[chunk].max(axis=1)])
    order = np.argsort(labels, kind="stable")
    return [indices[group].tolist() for group in split_repeated(order, np.diff(labels[order]) != 0)]


def split_repeated(order: np.ndarray, changes: np.ndarray) -> list[np.ndarray]:
    """Return the runs of two or more in `order` (n,); `changes` (n - 1,) is where another one starts.

    Unlike with `np.split`, runs of one, which are nearly all, take no memory.
    """
    starts = np.append(0, np.flatnonzero(changes) + 1)
    sizes = np.diff(np.append(starts, len(order)))
    return [order[start : start + size] for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True)]


def _merge(labels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the group labels (n,) after merging the groups of each pair; each is the smallest of those merged."""
    if not len(pairs):
        return labels
    from scipy.sparse import coo_array  # slow to import
    from scipy.sparse.csgraph import connected_components

    known, edges = np.unique(labels[pairs], return_inverse=True)
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(len(known), len(known)))
    count, component = connected_components(graph, directed=False)
    smallest = np.full(count, len(labels))
    np.minimum.at(smallest, component, known)
    renamed = np.arange(len(labels))
    renamed[known] = smallest[component]
    return renamed[labels]


def _batches(arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield arrays (pairs, 2) joined until they have `PAIRS` rows: merging takes time for each batch."""
    batch, size = [], 0
    for array in arrays:
        batch.append(array)
        size += len(array)
        if size >= PAIRS:
            yield np.concatenate(batch)
            batch, size = [], 0
    if size:
        yield np.concatenate(batch)


def _candidates(hashes: np.ndarray, labels: np.ndarray, bands: Bands) -> Iterator[np.ndarray]:
    """Yield arrays (pairs, 2) of indices of hashes (n,) that differ in at most `MAX_BITS`, each pair once.

    Pairs within a group of `labels` (n,), which the caller updates in between, are skipped.
    """
    count = 64 // bands.bits
    for position in range(count):
        band = (hashes >> np.uint64(position * bands.bits)).astype(f"u{bands.bits // 8}")
        order = np.argsort(band, kind="stable")
        starts = np.searchsorted(band[order], np.arange((1 << bands.bits) + 1))
        values = np.flatnonzero(np.diff(starts))
        title = f"finding near-duplicates, {position + 1} of {count}"
        for value in tqdm(values.tolist(), title, leave=False, disable=None):
            own = order[starts[value] : starts[value + 1]]
            flipped = [value ^ (1 << bit) for bit in range(bands.bits)] if bands.radius else []
            others = [order[starts[other] : starts[other + 1]] for other in flipped if other > value]
            for pairs in _compare(hashes, labels, own, np.concatenate([own, *others])):
                yield pairs[~_found_before(hashes, pairs, position, bands)]


def _compare(hashes: np.ndarray, labels: np.ndarray, own: np.ndarray, others: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the pairs of `own`, and of `own` and the rest of `others`, which starts with `own`."""
    own_hashes, other_hashes = hashes[own], hashes[others]
    for top in range(0, len(own), ROWS):
        if (labels[others[top:]] == labels[own[top]]).all():
            break
        for left in range(top, len(others), COLUMNS):
            differences = own_hashes[top : top + ROWS, None] ^ other_hashes[None, left : left + COLUMNS]
            near = np.bitwise_count(differences) <= MAX_BITS
            row, column = np.divmod(np.flatnonzero(near), near.shape[1])
            after = top + row < left + column
            pairs = np.stack([own[top + row[after]], others[left + column[after]]], axis=1)
            pairs = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]
            if len(pairs):
                yield pairs


def _found_before(hashes: np.ndarray, pairs: np.ndarray, position: int, bands: Bands) -> np.ndarray:
    """Whether an earlier band of each pair was near, too."""
    differences = hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]
    found = np.zeros(len(pairs), bool)
    for earlier in range(position):
        piece = differences >> np.uint64(earlier * bands.bits) & np.uint64((1 << bands.bits) - 1)
        found |= np.bitwise_count(piece) <= bands.radius
    return found


def _standardize(levels: np.ndarray) -> np.ndarray:
    levels = levels.astype(np.float32)
    levels -= levels.mean(axis=1, keepdims=True)
    return levels / np.maximum(levels.std(axis=1, keepdims=True), 1e-6)
