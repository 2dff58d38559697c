"""How a run is stopped from outside, by a signal or by the death of a worker: between two steps, never inside one.

Outside of `held` such an event raises at once, as Ctrl-C does in any Python program. Inside, it waits for the end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
"""Ctrl-C, the end that a queue or a system's shutdown gives, a terminal or a connection that is closed, and Windows'
Ctrl-Break."""


class Stopped(BaseException):
    """One of `SIGNALS` arrived. No `Exception`, so that nothing that handles errors takes it for one.

    Attributes:
        status: the exit status that tells so: 128 and the signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.status = 128 + signum


class WorkerDied(ChildProcessError):
    """A process that loads images is gone; the message names it and the cause."""

    def __init__(self, error: RuntimeError) -> None:
        super().__init__(
            f"{str(error).strip()} A worker that is killed has usually run out of memory: lower num_workers"
        )


class _State:
    active = False
    depth = 0  # of `held`
    pending: BaseException | None = None
    stopping = False


_state = _State()


@contextmanager
def handle_stop_signals() -> Iterator[None]:
    """Within it, `SIGNALS` raise `Stopped`, deferred by `held`; a second one ends the process at once, its children
    first. In a thread other than the main one, where Python handles no signals, nothing changes; nor does it for a
    closed terminal under nohup."""
    if _state.active or threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.active = True
    ignored = {signum for signum in SIGNALS[2:] if signal.getsignal(signum) == signal.SIG_IGN}
    before = {signum: signal.signal(signum, _stop) for signum in SIGNALS if signum not in ignored}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _state.active, _state.depth, _state.pending, _state.stopping = False, 0, None, False


class defer_signals:
    """A context that nothing stops: a step, or a save. What arrived meanwhile is raised at its end."""

    def __enter__(self) -> None:
        _state.depth += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _state.depth -= 1
        if _state.depth == 0 and _state.pending is not None and kind is None:
            raise _state.pending


def watch_workers() -> None:
    """Let `held` defer the error that torch raises when a worker dies; called once its handler is in place."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return
    torchs = signal.getsignal(signal.SIGCHLD)
    if not callable(torchs) or getattr(torchs, "defers", False):
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        try:
            torchs(signum, frame)
        except RuntimeError as error:
            if not _state.stopping:  # else it got the same signal
                _raise(WorkerDied(error), f"\n{str(error).strip()} The run stops after this step.\n")

    handle.defers = True
    signal.signal(signal.SIGCHLD, handle)


def ignore_interrupt(_: int) -> None:
    """For workers: Ctrl-C reaches them too, but it is the main process that decides when they stop."""
    for name in ("SIGINT", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def exit_now(status: int) -> NoReturn:
    """End the process now, its children first."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    os._exit(status)


def _stop(signum: int, _: FrameType | None) -> None:
    if _state.stopping:
        exit_now(128 + signum)
    _state.stopping = True
    _raise(Stopped(signum), "\nstopping after this step; once more to leave at once\n")


def clear_pending() -> None:
    """What was raised has been dealt with: `held` need not raise it again."""
    _state.pending = None


def _raise(error: BaseException, told: str) -> None:
    _state.pending = error  # even if it is raised now: in a destructor, Python would drop it
    if _state.depth == 0:
        raise error
    with suppress(OSError):  # the terminal may be what is gone
        os.write(2, told.encode())  # print could be interrupted by itself
