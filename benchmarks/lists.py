"""Lists of millions of lines: time and memory to read one, to shuffle it, and of a worker that reads from it.

    python benchmarks/lists.py [millions ...]

Linux only: private memory is read from /proc. The last line is JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.data.image_list import ImageList, read_list
from utils.data.sampler import EpochSampler


def write(path: Path, lines: int) -> None:
    """Paths of about 40 bytes in 1,000 classes."""
    with path.open("w") as file:
        for i in range(lines):
            file.write(f"{i % 1000};datasets/train/n{i % 1000:08d}/{i:010d}.jpg\n")


def private_megabytes() -> float:
    """Memory of this process that it shares with no other."""
    rows = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(row[1]) for row in rows if row[0].startswith("Private")) / 1024


def an_epoch_of_index_traffic(images: ImageList, answer: multiprocessing.Queue) -> None:
    """What a worker does with the list: look a million paths and ids up, all over it."""
    before = private_megabytes()
    length = len(images)
    total = sum(
        len(images.path(i * 7919 % length)) + int(images.class_ids[i * 7919 % length]) for i in range(1_000_000)
    )
    answer.put((private_megabytes() - before, total))


def measure(millions: float) -> dict[str, float]:
    """Run in a process of its own, so that its peak memory is its own."""
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
    answer = context.Queue()
    worker = context.Process(target=an_epoch_of_index_traffic, args=(images, answer))
    worker.start()
    private, _ = answer.get()
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
    """Measure each size in a fresh process."""
    results = []
    for millions in [float(arg) for arg in sys.argv[1:]] or [1.0, 5.0, 10.0]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(measure, millions).result())
        print(results[-1], flush=True)
    print(json.dumps({"benchmark": "lists", "results": results}))


if __name__ == "__main__":
    main()
