"""The command line: flags, and errors as a person wants to read them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

PROJECT = Path(__file__).resolve().parents[1]


def run(main: Callable[..., Any]) -> Any:
    """Call `main` with its arguments from the command line, and return what it returns.

    An error that Thaw itself raised about the user's input is printed without a traceback, and the exit status is 1. An
    error from inside a library keeps its traceback: it may be a fault of ours.
    """
    try:
        return tyro.cli(main)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if PROJECT not in raised_in.parents:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
