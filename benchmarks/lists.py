"""Time and memory to read and shuffle lists of millions of lines, and the memory of a worker that uses them.

    python benchmarks/lists.py [millions ...]

Linux only, since private memory is read from /proc. The last line is JSON.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from measure import print_result

from utils.data.image_list import ImageList, read_list
from utils.data.sampler import EpochSampler


def write(path: Path, lines: int) -> None:
    """Write a list with paths of about 40 bytes in 1,000 classes."""
    with path.open("w") as file:
        for i in range(lines):
            file.write(f"{i % 1000};datasets/train/n{i % 1000:08d}/{i:010d}.jpg\n")


def private_megabytes() -> float:
    """Memory that this process doesn't share."""
    rows = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(row[1]) for row in rows if row[0].startswith("Private")) / 1024


def look_up(images: ImageList, results: multiprocessing.Queue) -> None:
    """Look up a million paths and class ids all over the list, as a worker does."""
    before = private_megabytes()
    length = len(images)
    total = sum(
        len(images.path(i * 7919 % length)) + int(images.class_ids[i * 7919 % length]) for i in range(1_000_000)
    )
    results.put((private_megabytes() - before, total))


def measure(millions: float) -> dict[str, float]:
    """Measure one list; call it in a new process, for its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "list.txt")
        write(path, int(millions * 1e6))
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        started = time.perf_counter()
        images = read_list(path, 1000)
        reading = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sampler = EpochSampler(images.class_ids, "shuffle", seed=0)
    started = time.perf_counter()
    next(iter(sampler))
    shuffling = time.perf_counter() - started
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    worker = context.Process(target=look_up, args=(images, results))
    worker.start()
    private, _ = results.get()
    worker.join()
    return {
        "million_lines": millions,
        "read_s": round(reading, 2),
        "peak_mb": round(peak),
        "peak_over_imports_mb": round(peak - base),
        "shuffle_s": round(shuffling, 2),
        "worker_private_mb": round(private, 1),
    }


def main() -> None:
    """Measure each size in a new process."""
    results = []
    for millions in [float(arg) for arg in sys.argv[1:]] or [1.0, 5.0, 10.0]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(measure, millions).result())
        print(results[-1], flush=True)
    print_result("lists", results=results)


if __name__ == "__main__":
    main()
