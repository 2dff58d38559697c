"""Work on many files at once."""

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
"""Results that may be under way where each is an image as large as it was taken."""
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], title: str, ahead: int = 4 * THREADS
) -> Iterator[Result]:
    """`map_ahead` with a progress bar."""
    yield from tqdm(map_ahead(function, items, ahead), title, len(items), leave=False, disable=None)


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """`function` of each item, in order, in a thread for each core that this process may use.

    Threads, since decoding images leaves Python's lock alone; only `ahead` items are under way, so that millions of
    them take no memory. With 1, an item is asked for when the result of the one before was taken.
    """
    under_way: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) == ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
