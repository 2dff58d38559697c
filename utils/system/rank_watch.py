"""Watches from a thread whether the other ranks and torchrun are alive: a collective waits for lost ones forever."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from utils.system.signals import exit_now

EVERY = 1.0
"""Seconds between signs of life."""
SILENT_AFTER = 15.0
"""Seconds without a sign of life after which a rank counts as lost. A thread gives them, whatever the rank computes."""
GRACE = 10.0
"""Seconds in which this rank can save and end by itself after another is lost."""


class RankWatch:
    """Within this context, rank 0 watches the others, the others watch rank 0, and all watch torchrun.

    A silent rank on this machine, such as a suspended process, is killed, so that its connections break and this rank
    can save and end with an error. If it is on another machine, whose connections stay open, this rank ends at once.
    Without torchrun, a rank stops as with SIGTERM.

    Args:
        store: of the ranks, see `utils.system.runtime.Runtime`.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store = store.clone()  # its own connection: the main thread may wait on the other one
        self._rank = rank
        self._watched = range(1, world_size) if rank == 0 else range(1)
        self._parent = os.getppid()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank watch", daemon=True)

    def __enter__(self) -> None:
        self._beat(0)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(EVERY)

    def _beat(self, number: int) -> None:
        self._store.set(f"life/{self._rank}", f"{number} {os.getpid()} {socket.gethostname()}")

    def _watch(self) -> None:
        last: dict[int, bytes] = {}
        heard = dict.fromkeys(self._watched, time.monotonic())
        number = 0
        while not self._ended.wait(EVERY):
            number += 1
            if os.getppid() != self._parent:
                self._stop()
                return
            try:
                self._beat(number)
                lives = self._store.multi_get([f"life/{rank}" for rank in self._watched])
            except RuntimeError as error:  # also torch's DistError
                self._end(f"the ranks' store doesn't answer ({str(error).splitlines()[0]:.100})")
                return
            now = time.monotonic()
            for rank, life in zip(self._watched, lives, strict=True):
                if life != last.get(rank):
                    last[rank], heard[rank] = life, now
                elif now - heard[rank] > SILENT_AFTER:
                    self._lose(rank, life.decode())
                    return

    def _lose(self, rank: int, life: str) -> None:
        _, pid, host = life.split(" ", 2)
        message = f"rank {rank} (process {pid} on {host}) hasn't answered for {SILENT_AFTER:.0f} s"
        if host == socket.gethostname():
            print(f"\nerror: {message}; it is killed, and the run ends", file=sys.stderr, flush=True)
            with suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)
            self._ended.wait(GRACE)
        self._end(message)

    def _stop(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        self._ended.wait(GRACE)
        self._end("torchrun has ended")

    def _end(self, message: str) -> None:
        if not self._ended.is_set():
            print(f"\nerror: {message}", file=sys.stderr, flush=True)
            exit_now(1)
