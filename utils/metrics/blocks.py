"""Computations on the rows of large tensors, a block at a time, so that intermediate results stay small.

The probabilities of 1,000 images and 100,000 classes take 800 MB in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

MAX_VALUES = 1 << 20
"""Values of an intermediate result, 8 MB in float64: few enough for a CPU's cache, and for the allocator to reuse."""


def row_blocks(columns: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of each of `tensors` (N, ...), in order: as many as a result (rows, `columns`) of up to
    `MAX_VALUES` values has, but at least one. If N is 0, one block without rows."""
    rows = max(1, MAX_VALUES // max(1, columns))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def map_rows(function: Callable[..., tuple[Tensor, ...]], columns: int, *tensors: Tensor) -> list[Tensor]:
    """Call `function` with blocks of rows, see `row_blocks`; return each of its results for all rows.

    They are copied into tensors of N rows. Concatenated at the end, the small results of each block would lie in memory
    between the large intermediate ones, whose space then is not used again.
    """
    results: list[Tensor] = []
    start = 0
    for block in row_blocks(columns, *tensors):
        parts = function(*block)
        results = results or [part.new_empty(len(tensors[0]), *part.shape[1:]) for part in parts]
        end = start + len(block[0])
        for result, part in zip(results, parts, strict=True):
            result[start:end] = part
        start = end
    return results
