"""The command line: flags, errors and safe output."""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from itertools import islice, zip_longest
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro

from utils.system.errors import InputError
from utils.system.runtime import has_other_ranks, runtime
from utils.system.signals import Stopped, exit_now, handle_stop_signals
from utils.system.text import printable

PROJECT = Path(__file__).resolve().parents[2]
_, POSITIONAL = get_args(tyro.conf.Positional[str])
CURSOR_MOVES = re.compile(r"[\r\n]*(\x1b\[A)*")
"""What nested progress bars write by itself, between lines."""


def suggest_nothing(name: str, known: Collection[str]) -> str:
    """No name."""
    return ""


def run(
    main: Callable[..., Any],
    optional_switches: Collection[str] = (),
    suggest: Callable[[str, Collection[str]], str] = suggest_nothing,
    defaults: Callable[[Sequence[str]], dict[str, Any]] = lambda _: {},
    alone: bool = False,
) -> Any:
    """The result of `main`, called with arguments from the command line; for `optional_switches` see `expand_switches`,
    for `suggest` see `order_words`. `defaults` returns defaults of main's arguments that depend on the command line.
    `alone`: `main` runs in one process only, so several processes of torchrun are refused.

    Errors that Thaw raised about user input are printed without a traceback, with exit status 1. Errors from libraries
    keep their traceback, since they may be bugs. Characters that the output encoding lacks, and control characters, are
    printed as escapes, also into a file, which may be shown in a terminal later.
    """
    prepare_streams()
    if alone:
        refuse_torchrun()
    with handle_stop_signals():
        try:
            with runtime.joined():
                return _call(main, expand_switches(sys.argv[1:], optional_switches), suggest, defaults)
        except Stopped as stopped:
            if hasattr(builtins, "__IPYTHON__"):  # a notebook, whose kernel must survive
                raise KeyboardInterrupt from stopped
            # Skips the interpreter's shutdown, in which a second signal wouldn't be handled.
            sys.stdout.flush()
            sys.stderr.flush()
            exit_now(stopped.status)


def refuse_torchrun() -> None:
    """End with a message, printed by rank 0, if torchrun has started several processes."""
    if has_other_ranks():
        if os.environ.get("RANK", "0") == "0":
            script = Path(sys.argv[0]).name
            print(f"error: {script} runs in one process: start it with python, not with torchrun", file=sys.stderr)
        sys.exit(1)


def prepare_streams() -> None:
    """Make standard output and error print any text, see `run`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # pythonw has no console
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
            continue
        if hasattr(stream, "reconfigure"):  # not in notebooks and IDLE, which print any text
            redirected = os.name == "nt" and not stream.isatty()  # Windows would use the code page of the console
            stream.reconfigure(encoding="utf-8" if redirected else None, errors="backslashreplace")


@contextmanager
def printable_output() -> Iterator[None]:
    """Escape control characters in what is printed within this context: names of files, classes and tensors from
    untrusted sources may contain them."""
    streams = [sys.stdout, sys.stderr]
    originals = [stream.write for stream in streams]
    for stream, write in zip(streams, originals, strict=True):
        stream.write = partial(_write_printable, write)
    try:
        yield
    finally:
        for stream, write in zip(streams, originals, strict=True):
            stream.write = write


def _write_printable(write: Callable[[str], int], text: str) -> int:
    return write(text if CURSOR_MOVES.fullmatch(text) else printable(text, keep="\n\r\t"))


def _call(
    main: Callable[..., Any],
    args: Sequence[str],
    suggest: Callable[[str, Collection[str]], str],
    defaults: Callable[[Sequence[str]], dict[str, Any]],
) -> Any:
    @wraps(main)
    def printing(*values: Any, **named: Any) -> Any:  # tyro's help has colors
        with printable_output():
            return main(*values, **named)

    try:
        args = order_words(args, main, suggest)
        return tyro.cli(partial(printing, **defaults(args)), args=args)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ArithmeticError, MemoryError, ModuleNotFoundError) as error:
        if not (message := error_message(error)):
            raise
        if not getattr(error, "printed_by_rank_0", False):
            print(message, file=sys.stderr)
        sys.exit(1)


def error_message(error: BaseException) -> str:
    """The line for an error that the user can fix; empty for one of a library, which may be a bug."""
    if isinstance(error, ModuleNotFoundError):
        return f"error: {error.name} isn't installed: pip install -r requirements.txt"
    if not isinstance(error, ValueError | OSError | ArithmeticError | MemoryError):
        return ""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    if not is_own(raised_in) and not isinstance(error, InputError):
        return ""
    return "error: " + printable(str(error), keep="\n")


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


def order_words(
    args: Sequence[str], main: Callable[..., Any], suggest: Callable[[str, Collection[str]], str]
) -> list[str]:
    """`args` with the words that belong to no flag last: tyro doesn't find those between flags.

    `suggest(name, known)` gives what to use in place of a name that isn't `known`: one that is, a sentence, or "".

    Raises:
        ValueError: there is no such flag, or a word belongs to none.
    """
    flags, words_name = read_flags(main)
    options: list[str] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        if word == "--":
            rest += words
        elif words_name and (word == "-" or not word.startswith("-")):
            rest.append(word)
        else:
            options.append(word)
            if not re.match("--?[A-Za-z]", word):  # a value, such as -1
                continue
            name, _, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            if name not in flags:
                _refuse_flag(word, name, flags, words_name, suggest)
            if words_name and not value:
                options += islice(words, flags[name])
    return [*options, *(["--", *rest] if rest else [])]


def _refuse_flag(
    word: str, name: str, flags: Collection[str], words_name: str, suggest: Callable[[str, Collection[str]], str]
) -> None:
    known = [flag for flag in flags if not flag.startswith(("no_", "tyro_")) and len(flag) > 1]
    answer = suggest(name, [*known, words_name])
    script = Path(sys.argv[0]).name
    if answer in known:
        answer = f"use {as_flag(answer)}"
    elif answer == words_name:
        answer = f"give the {words_name} without a flag" if words_name else f"python {script} --help lists them"
    raise ValueError(f"{word.partition('=')[0]}: {script} has no such flag; {answer}")


def as_flag(name: str) -> str:
    """The flag of a parameter."""
    return "--" + name.replace("_", "-")


def read_flags(main: Callable[..., Any]) -> tuple[dict[str, int], str]:
    """The names of the flags of `main` and how many values they take; the parameter of words without a flag, or "".

    As in tyro, the fields of a dataclass are flags, except those that hold dataclasses themselves.
    """
    flags = {"help": 0, "h": 0, "tyro_print_completion": 1, "tyro_write_completion": 2}
    words_name = ""
    hints = get_type_hints(main, include_extras=True)
    for parameter in inspect.signature(main).parameters:
        hint, *marks = get_args(hints[parameter]) if get_origin(hints[parameter]) is Annotated else [hints[parameter]]
        if POSITIONAL in marks:
            words_name = parameter
            continue
        fields = {next((mark.name for mark in marks if getattr(mark, "name", None)), parameter): hint}
        if dataclasses.is_dataclass(hint):
            fields = get_type_hints(hint)
            fields = {field.name: fields[field.name] for field in dataclasses.fields(hint)}
        for name, kind in fields.items():
            if not any(map(dataclasses.is_dataclass, get_args(kind))):
                flags[name] = _count_values(kind)
                flags |= {f"no_{name}": 0} if kind is bool else {}
    return flags, words_name


def _count_values(kind: Any) -> int:
    """How many words a flag of this type takes, apart from None."""
    if get_origin(kind) is tuple:
        return len(get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return max(map(_count_values, get_args(kind)))
    return int(kind is not bool)


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
