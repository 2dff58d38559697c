"""The command line: flags, and text as a person wants to read it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import tyro

from utils.system.errors import InputError
from utils.system.signals import Stopped, exit_now, handle_stop_signals
from utils.system.text import printable

PROJECT = Path(__file__).resolve().parents[2]
NEW_LINE = "\n"
HARMLESS = re.compile(r"(\x1b\[[\d;]*[mA])")


def run(main: Callable[..., Any], optional_switches: Collection[str] = ()) -> Any:
    """Call `main` with its arguments from the command line, and return what it returns. For `optional_switches` see
    `expand_switches`.

    An error that Thaw itself raised about the user's input is printed without a traceback, and the exit status is 1. An
    error from inside a library keeps its traceback: it may be a fault of ours. What the terminal's encoding can't show,
    such as a file name's bytes that aren't UTF-8, is printed as escapes, and in a terminal what would steer it, too.
    """
    for stream in (sys.stdout, sys.stderr):
        in_file = os.name == "nt" and not stream.isatty()  # where the code page of the console would be taken
        stream.reconfigure(encoding="utf-8" if in_file else None, errors="backslashreplace")
        if stream.isatty():
            stream.write = partial(_write_printable, stream.write)
    with handle_stop_signals():
        try:
            return _call(main, expand_switches(sys.argv[1:], optional_switches))
        except Stopped as stopped:
            # Not through the interpreter's shutdown, where a second signal would meet nobody.
            sys.stdout.flush()
            sys.stderr.flush()
            exit_now(stopped.status)


def _write_printable(write: Callable[[str], int], text: str) -> int:
    """Names of files, classes and tensors come from anywhere, and are printed in many places. Colours, and the way up
    to another bar, are let through."""
    parts = HARMLESS.split(text)  # what is harmless is every second one
    return write("".join(part if i % 2 else printable(part, keep="\n\r\t") for i, part in enumerate(parts)))


def _call(main: Callable[..., Any], args: Sequence[str]) -> Any:
    try:
        return tyro.cli(main, args=args)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if not is_own(raised_in) and not isinstance(error, InputError):
            raise
        print(f"error: {printable(str(error), keep=NEW_LINE)}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} isn't installed: pip install -r requirements.txt", file=sys.stderr)
        sys.exit(1)


def is_own(file: Path) -> bool:
    """Whether a file is one of Thaw's scripts or modules, whose errors are about what the user gave."""
    inside = file.is_relative_to(PROJECT) and file.relative_to(PROJECT).parts
    return bool(inside) and (len(inside) == 1 or inside[0] in ("nets", "utils"))


def expand_switches(args: Sequence[str], names: Collection[str]) -> list[str]:
    """Command-line arguments in which `--name` and `--no-name` are replaced by `--name True` and `--name False`, for
    fields of the type `bool | None`, of which tyro wants a value."""
    expanded: list[str] = []
    for word, after in zip_longest(args, args[1:]):
        flag = word.removeprefix("--no-").removeprefix("--")
        if word.startswith("--") and flag.replace("-", "_") in names and after not in ("True", "False", "None"):
            expanded += [f"--{flag}", str(not word.startswith("--no-"))]
        else:
            expanded.append(word)
    return expanded


def check_folder(field: str, folder: str) -> None:
    """Raise a ValueError if what is to be a folder to write to is a file."""
    if folder and Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"{field}={folder!r}: it is a file; give a folder")


def command(*words: str) -> str:
    """A command as it is typed on this system's command line."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
