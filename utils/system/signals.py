"""Stop signals and worker deaths, deferred to the end of a training step.

Outside `defer_signals` they raise at once, like Ctrl-C in any Python program.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, SimpleNamespace
from typing import NoReturn

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
"""Ctrl-C; termination by a job queue or a shutdown; a closed terminal; Ctrl-Break on Windows."""


class Stopped(BaseException):
    """One of `SIGNALS` arrived. It is a BaseException, so error handlers don't catch it.

    Attributes:
        status: the exit status, 128 plus the signal number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.status = 128 + signum


class WorkerDied(ChildProcessError):
    """A DataLoader worker process died."""

    def __init__(self, error: RuntimeError) -> None:
        super().__init__(f"{str(error).strip()} Workers are usually killed for lack of memory: lower num_workers")


_state = SimpleNamespace(active=False, depth=0, pending=None, stopping=False)
"""`depth` of nested `defer_signals`, and the `pending` exception that the outermost one raises at its end."""


@contextmanager
def handle_stop_signals() -> Iterator[None]:
    """Within this context `SIGNALS` raise `Stopped`, deferred by `defer_signals`; a second signal kills the child
    processes and exits at once.

    Signals that are ignored (a closed terminal under nohup) stay ignored. Outside the main thread, where Python can't
    handle signals, the context has no effect.
    """
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
    """A context, such as a step or a save, at whose end signals and worker deaths are raised."""

    def __enter__(self) -> None:
        _state.depth += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _state.depth -= 1
        if _state.depth == 0 and _state.pending is not None and kind is None:
            raise _state.pending


def watch_workers() -> None:
    """Make `defer_signals` defer the error that torch raises when a worker dies; call it after torch has installed its
    handler."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return
    torch_handler = signal.getsignal(signal.SIGCHLD)
    if not callable(torch_handler) or getattr(torch_handler, "defers", False):
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        try:
            torch_handler(signum, frame)
        except RuntimeError as error:
            if not _state.stopping:  # otherwise the worker received the same signal
                _raise(WorkerDied(error), f"\n{str(error).strip()} The run stops after this step.\n")

    handle.defers = True
    signal.signal(signal.SIGCHLD, handle)


def ignore_interrupt(_: int) -> None:
    """Ignore Ctrl-C in a DataLoader worker: the main process, which receives it too, decides when workers stop."""
    for name in ("SIGINT", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def exit_now(status: int) -> NoReturn:
    """Kill the child processes and exit without cleanup."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    os._exit(status)


def _stop(signum: int, _: FrameType | None) -> None:
    if _state.stopping:
        exit_now(128 + signum)
    _state.stopping = True
    _raise(Stopped(signum), "\nstopping after this step; a second signal exits at once\n")


def clear_pending() -> None:
    """Clear a handled event, which `defer_signals` would raise again."""
    _state.pending = None


def _raise(error: BaseException, message: str) -> None:
    _state.pending = error  # even if it is raised now: Python drops exceptions raised in destructors
    if _state.depth == 0:
        raise error
    with suppress(OSError):  # the terminal may be closed
        os.write(2, message.encode())  # print isn't reentrant
