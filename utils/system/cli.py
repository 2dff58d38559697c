"""The command line: flags, errors and safe output."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import tyro

from utils.system.errors import InputError
from utils.system.signals import Stopped, exit_now, handle_stop_signals
from utils.system.text import printable

PROJECT = Path(__file__).resolve().parents[2]
SAFE_ESCAPES = re.compile(r"(\x1b\[[\d;]*[mA])")  # colors, and the cursor movement of nested progress bars


def run(
    main: Callable[..., Any],
    optional_switches: Collection[str] = (),
    defaults: Callable[[Sequence[str]], dict[str, Any]] = lambda _: {},
) -> Any:
    """The result of `main`, called with arguments from the command line; for `optional_switches` see `expand_switches`.
    `defaults` returns defaults of main's arguments that depend on the command line.

    Errors that Thaw raised about user input are printed without a traceback, with exit status 1. Errors from libraries
    keep their traceback, since they may be bugs. Characters that the output encoding lacks, and in a terminal also
    control characters, are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        redirected = os.name == "nt" and not stream.isatty()  # Windows would use the code page of the console
        stream.reconfigure(encoding="utf-8" if redirected else None, errors="backslashreplace")
        if stream.isatty():
            stream.write = partial(_write_printable, stream.write)
    with handle_stop_signals():
        try:
            return _call(main, expand_switches(sys.argv[1:], optional_switches), defaults)
        except Stopped as stopped:
            # Skips the interpreter's shutdown, in which a second signal wouldn't be handled.
            sys.stdout.flush()
            sys.stderr.flush()
            exit_now(stopped.status)


def _write_printable(write: Callable[[str], int], text: str) -> int:
    """Escape control characters, which names of files, classes and tensors from untrusted sources may contain."""
    parts = SAFE_ESCAPES.split(text)  # every second part is a safe escape
    return write("".join(part if i % 2 else printable(part, keep="\n\r\t") for i, part in enumerate(parts)))


def _call(main: Callable[..., Any], args: Sequence[str], defaults: Callable[[Sequence[str]], dict[str, Any]]) -> Any:
    try:
        return tyro.cli(partial(main, **defaults(args)), args=args)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if not is_own(raised_in) and not isinstance(error, InputError):
            raise
        message = printable(str(error), keep="\n")
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} isn't installed: pip install -r requirements.txt", file=sys.stderr)
        sys.exit(1)


def is_own(file: Path) -> bool:
    """Whether a file is one of Thaw's scripts or modules, whose errors are about user input."""
    parts = file.relative_to(PROJECT).parts if file.is_relative_to(PROJECT) else ()
    return len(parts) == 1 or parts[:1] in (("nets",), ("utils",))


def expand_switches(args: Sequence[str], names: Collection[str]) -> list[str]:
    """`args` with `--name` and `--no-name` replaced by `--name True` and `--name False`.

    tyro requires a value for fields that take more than True and False.
    """
    expanded: list[str] = []
    for word, after in zip_longest(args, args[1:]):
        flag = word.removeprefix("--no-").removeprefix("--")
        if word.startswith("--") and flag.replace("-", "_") in names and (after is None or after.startswith("--")):
            expanded += [f"--{flag}", str(not word.startswith("--no-"))]
        else:
            expanded.append(word)
    return expanded


def find_value(args: Sequence[str], flag: str) -> str | None:
    """The last value of a flag in `--flag value` or `--flag=value`; None if it isn't given."""
    found = None
    for word, after in zip_longest(args, args[1:]):
        if word == flag:
            found = after
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def check_folder(field: str, folder: str) -> None:
    """Raise a ValueError if an output folder is a file."""
    if folder and Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"{field}={folder!r}: it is a file; give a folder")


def script_path(name: str) -> str:
    """The path of one of Thaw's scripts, from the working folder or, where that is shorter, from the root."""
    return min(os.path.relpath(PROJECT / name), str(PROJECT / name), key=len)


def command(*words: str) -> str:
    """A command, quoted for the command line of this system."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def format_command(script: str, main: Callable[..., Any], arguments: Mapping[str, Any], **changes: Any) -> str:
    """The command that calls the `main` of one of Thaw's scripts with `arguments`, except for `changes`."""
    words = []
    for name, parameter in inspect.signature(main).parameters.items():
        value, flag = (arguments | changes)[name], name.replace("_", "-")
        if str(value) == str(parameter.default):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return command("python", script_path(script), *words)
