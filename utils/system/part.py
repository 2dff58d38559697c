"""Work in parts, on any number of machines that share a disk: each does one, such as 3/16."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


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
