"""Work on many files at once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_parallel(function: Callable[[Item], Result], items: Sequence[Item], title: str) -> Iterator[Result]:
    """`function` of each item, in order, with a progress bar, in a thread for each core that this process may use.

    Threads, since decoding pictures leaves Python's lock alone; only a few items are under way, so that millions of
    them take no memory.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    under_way: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(items), desc=title, leave=False, disable=None) as bar:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) == 4 * threads:
                yield under_way.popleft().result()
                bar.update()
        while under_way:
            yield under_way.popleft().result()
            bar.update()
