"""The paths of the images that predict.py reads: files, folders, globs, standard input, typed paths; and which of them
are copies of others."""

from __future__ import annotations

import codecs
import functools
import glob
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nets.weights.digest import digest_file
from utils.annotation.folder_scan import find_images
from utils.runs.folder import in_run


def expand(paths: Iterable[str]) -> Iterator[str]:
    """Yield files, the images below folders, and the matches of globs, sorted; for "-", those of standard input.

    A path that doesn't exist and a folder without images are yielded as they are, so that reading them fails with a
    message.
    """
    for path in paths:
        if path == "-":
            yield from expand(line for line in read_lines() if line != "-")
            continue
        matches = [path] if os.path.exists(path) else find_matches(path) or [path]
        searched: tuple[str, ...] = ()  # "**" matches a folder and also what is in it
        for match in matches:
            if match.startswith(searched):
                continue
            if os.path.isdir(match):
                searched += (os.path.join(match, ""),)
                found = find_images(match, skipped := Counter())
                of_runs = set(filter(in_run, set(map(os.path.dirname, found))))
                images = [path for path in found if os.path.dirname(path) not in of_runs]
                skipped["plots of runs"] += len(found) - len(images)
                for reason, count in (+skipped).items():
                    print(f"skipped in {match}: {count} {reason}", file=sys.stderr)
                yield from images or [match]
            else:
                yield match


def find_matches(pattern: str) -> list[str]:
    """Return the sorted matches of a glob. Brackets in the leading part that exists are part of its name, and so are
    others if nothing matches them."""
    folder, rest = pattern, ""
    while folder and not os.path.exists(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest) if rest else name
    folder = glob.escape(folder)
    matches = glob.glob(os.path.join(folder, rest), recursive=True)
    return sorted(matches or glob.glob(os.path.join(folder, rest.replace("[", "[[]")), recursive=True))


def read_lines() -> Iterator[str]:
    """Yield the non-empty lines of standard input, decoded as file names.

    Raises:
        ValueError: on Windows, a line isn't UTF-8.
    """
    for line in sys.stdin.buffer:
        if name := line.rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8):  # PowerShell writes a BOM
            try:
                yield os.fsdecode(name)
            except UnicodeDecodeError as error:
                raise ValueError(f"standard input: {name!r} isn't UTF-8; run chcp 65001 first") from error


def ask_for_paths() -> Iterator[str]:
    """Yield typed paths, without quotes around them, until an empty line or the end of the input."""
    while True:
        print("image (empty line to quit): ", end="", file=sys.stderr, flush=True)
        path = sys.stdin.readline().strip()
        if not path:
            return
        yield path[1:-1] if path[0] == path[-1] and path[0] in "'\"" and len(path) > 2 else path


def drop_copies(images: Sequence[str], listed: Iterable[str]) -> list[str]:
    """The images without those that are copies of a file in `listed`, whatever their names."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for path in listed:
        by_size[_size(path)].append(path)
    by_size.pop(-1, None)

    @functools.cache
    def digests(size: int) -> set[str]:
        return set(map(_digest, by_size[size])) - {""}

    return [path for path in images if (size := _size(path)) not in by_size or _digest(path) not in digests(size)]


def _size(path: str) -> int:
    """The size of a file in bytes; -1 if there is none."""
    return os.path.getsize(path) if os.path.isfile(path) else -1


def _digest(path: str) -> str:
    """The SHA-256 of a file; "" if it can't be read."""
    try:
        return digest_file(Path(path))
    except OSError:
        return ""
