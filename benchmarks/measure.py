"""Shared by the benchmarks: timing tasks in turn, finished runs, the last line of JSON. Makes Thaw importable."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from utils.modeling.precision import choose_precision, pick_device
from utils.system.files import write_text

DEVICE = pick_device("auto")
PRECISION, _ = choose_precision("auto", DEVICE)
PEERS = ["timm fp32"] + (["timm bf16"] if choose_precision("bf16", DEVICE)[0] == "bf16" else [])

Times = dict[str, list[float]]
"""Seconds of each repeat, by task."""


def take_turns(tasks: dict[str, Callable[[], int]], repeats: int, warm_ups: int = 1) -> Times:
    """Time the tasks in turn, A B A B, `repeats` times after `warm_ups`. A task returns its number of images; its times
    are per image."""
    times: Times = {name: [] for name in tasks}
    for i in range(warm_ups + repeats):
        for name, task in tasks.items():
            started = time.perf_counter()
            images = task()
            elapsed = time.perf_counter() - started
            if i >= warm_ups:
                times[name].append(elapsed / images)
    return times


def medians(times: Times) -> dict[str, float]:
    """The median of each task."""
    return {name: statistics.median(values) for name, values in times.items()}


def print_speeds(title: str, times: Times) -> None:
    """Print images per second and milliseconds per image of each task, with the range."""
    for name, median in medians(times).items():
        slow, fast = 1000 * max(times[name]), 1000 * min(times[name])
        print(
            f"{title:<20}{name:<16}{1 / median:10.2f} images/s, {1000 * median:9.2f} ms ({fast:.2f} to {slow:.2f})",
            flush=True,
        )


class Finished:
    """Seconds and accuracy of finished runs, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, tuple[float, float]] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, run: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        """The result for `key`: from the file, or of `run`."""
        if key not in self.runs:
            self.runs[key] = run()
            write_text(self.path, json.dumps(self.runs, indent=1))
            print(f"{key}: {self.runs[key][0]:.0f} s, {self.runs[key][1]:.1%}", flush=True)
        return self.runs[key]


def print_ratios(benchmark: str, ratios: dict[str, float | None], **figures: object) -> None:
    """Print the last line with rounded ratios; None: this machine can't measure it."""
    rounded = {name: None if ratio is None else float(f"{ratio:.3g}") for name, ratio in ratios.items()}
    print_result(benchmark, ratios=rounded, **figures)


def print_result(benchmark: str, **figures: object) -> None:
    """Print the last line, JSON."""
    print(json.dumps({"benchmark": benchmark, **figures, "machine": machine(), "torch": torch.__version__}))


def machine() -> str:
    """The name of the GPU, or that of the CPU with its number of cores and instruction set."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"
