"""What the benchmarks share: works in turn, their medians and spread, the last line."""

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
"""Seconds of each repeat, by the name of the work."""


def in_turn(works: dict[str, Callable[[], int]], repeats: int, warm_ups: int = 1) -> Times:
    """Do the works in turn, A B A B, `repeats` times after `warm_ups` that aren't counted.

    A work returns how many images it did; its time is per image.
    """
    times: Times = {name: [] for name in works}
    for i in range(warm_ups + repeats):
        for name, work in works.items():
            started = time.perf_counter()
            images = work()
            elapsed = time.perf_counter() - started
            if i >= warm_ups:
                times[name].append(elapsed / images)
    return times


def medians(times: Times) -> dict[str, float]:
    """The median of each work."""
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, times: Times) -> None:
    """Print images a second and milliseconds an image of each work, with their spread."""
    for name, median in medians(times).items():
        slow, fast = 1000 * max(times[name]), 1000 * min(times[name])
        print(
            f"{title:<20}{name:<16}{1 / median:10.2f} images/s, {1000 * median:9.2f} ms ({fast:.2f} to {slow:.2f})",
            flush=True,
        )


class Finished:
    """The runs that are finished, seconds and accuracy by what they were, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, tuple[float, float]] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, run: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        """The result of `run`, from the file if it is there."""
        if key not in self.runs:
            self.runs[key] = run()
            write_text(self.path, json.dumps(self.runs, indent=1))
            print(f"{key}: {self.runs[key][0]:.0f} s, {self.runs[key][1]:.1%}", flush=True)
        return self.runs[key]


def finish(benchmark: str, ratios: dict[str, float | None], **figures: object) -> None:
    """Print the last line, JSON: the ratios, null for what this machine can't show, the figures, and the machine."""
    rounded = {name: None if ratio is None else float(f"{ratio:.3g}") for name, ratio in ratios.items()}
    told = {"benchmark": benchmark, "ratios": rounded, "machine": machine(), "torch": torch.__version__}
    print(json.dumps(told | figures))


def machine() -> str:
    """The GPU, or the processor with the number of its cores that may be used and what it can do."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"
