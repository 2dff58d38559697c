"""Work in parts, on any number of machines that share a disk: each does one, such as 3/16."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")

MAX_NAMED = 5
"""Missing parts in a message."""


@dataclass(frozen=True, order=True)
class Part:
    """One of `count` parts; `number` is 1 to `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """The part that a flag gives, such as "3/16".

        Raises:
            ValueError: it is none.
        """
        found = re.fullmatch(r"0*([0-9]{1,9})/0*([0-9]{1,9})", text.strip())
        if not found:
            raise ValueError(f"part={text!r}: not a part; give its number and how many there are, such as 3/16")
        part = cls(*map(int, found.groups()))
        if not 1 <= part.number <= part.count:
            raise ValueError(f"part={text!r}: there is no such part; give 1/{part.count} to {part.count}/{part.count}")
        return part

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every item of this part: each `count`th, so that all parts have as many of each kind."""
        return items[self.number - 1 :: self.count]

    def rows(self, count: int, batch_size: int) -> range:
        """The rows of this part, of `count` in all: consecutive whole batches, as many as other parts have or one more.

        Whole ones, since kernels for other batch sizes round differently.
        """
        batches = -(-count // batch_size)
        first, end = (batches * number // self.count * batch_size for number in (self.number - 1, self.number))
        return range(min(first, count), min(end, count))

    def place(self, path: Path) -> Path:
        """Where this part writes instead of `path`."""
        return path.with_name(f"{path.stem}-{self.number}-of-{self.count}{path.suffix}")


def find_parts(path: Path) -> dict[Part, Path]:
    """The files that parts wrote instead of `path`, in order. Links are skipped."""
    name = re.compile(rf"{re.escape(path.stem)}-([1-9][0-9]{{0,8}})-of-([1-9][0-9]{{0,8}}){re.escape(path.suffix)}")
    found = {}
    for file in path.parent.glob("*-of-*"):
        if (match := name.fullmatch(file.name)) and file.is_file() and not file.is_symlink():
            found[Part(*map(int, match.groups()))] = file
    return dict(sorted(found.items()))


def complete_parts(path: Path) -> dict[Part, Path]:
    """The files that all parts wrote instead of `path`, in order.

    Raises:
        FileNotFoundError: a part's file is missing.
        ValueError: there are files of other numbers of parts.
    """
    found = find_parts(path)
    counts = sorted({part.count for part in found})
    if not counts:
        raise FileNotFoundError(f"merge: there is no part of {path}; run the same command with --part 1/16 to 16/16")
    if len(counts) > 1:
        raise ValueError(
            f"merge: {path.parent} has files of {' and '.join(map(str, counts))} parts of {path.name}; delete those "
            f"that aren't wanted"
        )
    (count,) = counts
    if missing := count - len(found):
        absent = (str(part) for n in range(1, count + 1) if (part := Part(n, count)) not in found)
        named = list(islice(absent, MAX_NAMED))
        more = f" and {missing - len(named)} more" if missing > len(named) else ""
        raise FileNotFoundError(
            f"merge: parts {', '.join(named)}{more} of {path} are missing; for each, run the same command with --part "
            f"in place of --merge, such as --part {named[0]}"
        )
    return found


def check_facts(theirs: object, ours: Mapping[str, str | int | float | bool | None]) -> None:
    """Raise a ValueError unless the facts in a part's file, which may hold anything, are ours."""
    if not isinstance(theirs, dict):
        raise ValueError("it isn't the file of a part")
    if others := [
        name for name in ours if type(theirs.get(name)) is not type(ours[name]) or theirs[name] != ours[name]
    ]:
        raise ValueError(f"it was made with another {', '.join(others)}")


def refuse_part(part: Part, file: Path, error: ValueError | OSError) -> ValueError:
    """The error for a part's file that can't be used."""
    return ValueError(
        f"merge: {file} can't be used: {error}; run the same command with --part {part} in place of --merge"
    )
