"""Prepares the process of a script; every script imports it first, since it has to come before torch."""

from __future__ import annotations

import os
import sys
from types import TracebackType

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user decides how OpenMP's threads wait for each other."""
SPIN_COUNT = 1000
"""Rounds that a thread of GNU OpenMP waits in before it gives its core to others, instead of 300,000. Where another
process uses a core, threads that don't give up theirs wait for the one that has none. Measured by
benchmarks/busy_machine.py."""


def prepare_process() -> None:
    """Set how threads wait, unless the user has, for this process and its children; print errors of the user at import,
    such as those of `CONFIG`, in one line."""
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    sys.excepthook = _print_error


def _print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    from utils.system.cli import error_message  # imports tyro, which takes a tenth of a second

    if message := error_message(error):
        print(message, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


prepare_process()
