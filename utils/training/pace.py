"""Notices a run that has become slow."""

from __future__ import annotations

import statistics
from collections import deque
from time import monotonic

import torch

WARM_UP = 3
"""First steps of a stage, which take longer."""
STEPS = 20
"""Steps whose median counts: single slow ones, such as those that save, don't."""
SLOW = 2.0
"""How many times as long as before a step takes if a run is slow."""
LASTING = 10.0
"""Seconds for which it must be slow: other processes may use the cores for a moment."""


class Pace:
    """The duration of the steps of one stage, with the time they wait for images. Prints, once, if steps take twice as
    long as the fastest ones before."""

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"
        self._recent: deque[float] = deque(maxlen=STEPS)
        self._skipped = 0
        self._fastest = float("inf")
        self._slow_since: float | None = None
        self._reported = False
        self.start()

    def start(self) -> None:
        """Call before the first step of an epoch: the validation before it isn't part of a step."""
        self._previous = monotonic()

    def record(self) -> None:
        """Call after each step."""
        now = monotonic()
        seconds, self._previous = now - self._previous, now
        if self._skipped < WARM_UP:
            self._skipped += 1
            return
        self._recent.append(seconds)
        if self._reported or len(self._recent) < STEPS:
            return
        median = statistics.median(self._recent)
        self._fastest = min(self._fastest, median)
        if median < SLOW * self._fastest:
            self._slow_since = None
            return
        self._slow_since = self._slow_since or now
        if now - self._slow_since >= LASTING:
            self._reported = True
            used, remedy = ("cores", ", or resume with OMP_NUM_THREADS=1") if self._on_cpu else ("GPU", "")
            print(
                f"warning: a step takes {median:.2g} s, and took {self._fastest:.2g} s before: probably other programs "
                f"use the {used} or the disk; stop them{remedy}; see docs/troubleshooting.md"
            )
