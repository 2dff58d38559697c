"""Work on many files at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_parallel(function: Callable[[Item], Result], items: Sequence[Item], title: str) -> Iterator[Result]:
    """`function` of each item, in order, with a progress bar, in a thread for each core.

    Threads, since decoding pictures leaves Python's lock alone; a chunk of items at a time, so that millions of items
    take no memory.
    """
    threads = os.cpu_count() or 1
    chunk = 32 * threads
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(items), desc=title, leave=False, disable=None) as bar:
        for start in range(0, len(items), chunk):
            for result in pool.map(function, items[start : start + chunk]):
                yield result
                bar.update()
