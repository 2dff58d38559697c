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

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGUSR2", "SIGXCPU")
SIGNALS = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
"""Ctrl-C; termination by a job queue or a shutdown; a closed terminal; Ctrl-Break on Windows; a job queue's warning
before it kills; the end of the CPU time that is allowed."""
SAVE_SIGNAL = getattr(signal, "SIGUSR1", None)
"""A request to save and continue; None on Windows."""


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


_state = SimpleNamespace(active=False, depth=0, pending=None, stopping=False, save_requested=False, late=False)
"""`depth` of nested `defer_signals`, and the `pending` exception that the outermost one raises at its end."""
_ranks = SimpleNamespace(agreeing=False, stop=False, save=False, late=False)
"""Whether several ranks agree on requests (see `agreed_signals`), and on which they have agreed."""


@contextmanager
def handle_stop_signals() -> Iterator[None]:
    """Within this context `SIGNALS` raise `Stopped`, deferred by `defer_signals`; a second signal kills the child
    processes and exits at once. `SAVE_SIGNAL` is a request that `take_save_request` returns.

    Signals that are ignored (a closed terminal under nohup) stay ignored. Outside the main thread, where Python can't
    handle signals, the context has no effect.
    """
    if _state.active or threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.active = True
    handlers = dict.fromkeys(SIGNALS, _stop) | ({SAVE_SIGNAL: _request_save} if SAVE_SIGNAL else {})
    ignored = {signum for signum in SIGNALS[2:] if signal.getsignal(signum) == signal.SIG_IGN}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items() if signum not in ignored}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _state.active, _state.depth, _state.pending, _state.stopping = False, 0, None, False
        _state.save_requested = False


def take_save_request() -> bool:
    """Whether `SAVE_SIGNAL` has arrived since the last call."""
    source, name = (_ranks, "save") if _ranks.agreeing else (_state, "save_requested")
    requested = getattr(source, name)
    setattr(source, name, False)
    return requested


def request_timed_save() -> None:
    """Ask all ranks to save after the next step."""
    _state.late = True


def take_timed_save() -> bool:
    """Whether the ranks have agreed since the last call that it is time to save."""
    late, _ranks.late = _ranks.late, False
    return late


def own_requests() -> tuple[bool, bool, bool]:
    """What this rank asks all ranks for: to stop, to save, to save since it is time."""
    return isinstance(_state.pending, Stopped), _state.save_requested, _state.late


def agree_on_requests(stop: bool, save: bool, late: bool) -> None:
    """Obey the requests of all ranks: the same ones on each rank after the same step."""
    _ranks.stop, _ranks.save, _ranks.late = stop, save, late
    _state.save_requested &= not save
    _state.late &= not late
    if stop and _state.pending is None:
        _state.pending = Stopped(signal.SIGTERM)


@contextmanager
def agreed_signals(several_ranks: bool) -> Iterator[None]:
    """With several ranks, signals take effect within this context only after `agree_on_requests`, so that all ranks
    stop after the same step."""
    _ranks.agreeing, _ranks.stop = several_ranks, False
    try:
        yield
    finally:
        _ranks.agreeing = False
    if several_ranks and _state.depth == 0 and _state.pending is not None:
        raise _state.pending


def is_agreed_stop(reason: BaseException) -> bool:
    """Whether all ranks stop after the same step for this reason."""
    return isinstance(reason, Stopped) and _ranks.stop


class defer_signals:
    """A context, such as a step or a save, at whose end signals and worker deaths are raised."""

    def __enter__(self) -> None:
        _state.depth += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _state.depth -= 1
        waits = _ranks.agreeing and isinstance(_state.pending, Stopped) and not _ranks.stop
        if _state.depth == 0 and _state.pending is not None and kind is None and not waits:
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


def ignore_signals(_: int) -> None:
    """Ignore signals in a DataLoader worker, except SIGTERM, by which the main process stops it.

    The main process receives them too, and decides when workers stop.
    """
    for signum in {*SIGNALS, SAVE_SIGNAL} - {signal.SIGTERM, None}:
        signal.signal(signum, signal.SIG_IGN)


def exit_now(status: int) -> NoReturn:
    """Kill the child processes and exit without cleanup."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    os._exit(status)


def _stop(signum: int, _: FrameType | None) -> None:
    if _state.stopping:
        if signum == getattr(signal, "SIGXCPU", None):  # the system repeats it every second
            return
        exit_now(128 + signum)
    _state.stopping = True
    _raise(Stopped(signum), "\nstopping after this step; a second signal exits at once\n")


def _request_save(_: int, __: FrameType | None) -> None:
    _state.save_requested = True


def clear_pending() -> None:
    """Clear a handled event, which `defer_signals` would raise again."""
    _state.pending = None


def _raise(error: BaseException, message: str) -> None:
    _state.pending = error  # even if it is raised now: Python drops exceptions raised in destructors
    if _state.depth == 0 and not (_ranks.agreeing and isinstance(error, Stopped)):
        raise error
    with suppress(OSError):  # the terminal may be closed
        os.write(2, message.encode())  # print isn't reentrant
