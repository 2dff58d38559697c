"""Functions mapped over many files in parallel threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_AHEAD = 4
"""Limit on pending results where each is a full-size image."""
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], title: str, ahead: int = 4 * THREADS
) -> Iterator[Result]:
    """`map_ahead` with a progress bar."""
    yield from tqdm(map_ahead(function, items, ahead), title, len(items), leave=False, disable=None)


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """`function` of each item, in order, computed in one thread per available core.

    Threads suffice because image decoders release the GIL. At most `ahead` items are pending, which bounds memory; with
    `ahead=1` an item is requested only after the previous result was consumed.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
