"""The annotation list: one `class_id;path` a line, UTF-8.

The id ends at the first `;`; all that follows is the path, whatever is in it. A relative path is relative to the folder
of the list. Bytes of a file name that are no UTF-8 go through as they are (surrogateescape).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class ImageList:
    """A list in memory: one buffer and two arrays, so that millions of lines cost no Python objects.

    Attributes:
        folder: what relative paths start from.
        buffer: all paths in a row.
        ends: (n,) int64, where each path ends in `buffer`.
        class_ids: (n,) int64.
    """

    folder: str
    buffer: bytes
    ends: np.ndarray
    class_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.class_ids)

    def path(self, index: int) -> str:
        """The path of one picture, as it can be opened."""
        start = self.ends[index - 1] if index else 0
        name = self.buffer[start : self.ends[index]].decode("utf-8", "surrogateescape")
        return os.path.join(self.folder, name)

    @staticmethod
    def pack(folder: str | Path, entries: Iterable[tuple[int, str]]) -> ImageList:
        """Make a list of `(class_id, path)` pairs."""
        class_ids, lengths, buffer = [], [], bytearray()
        for class_id, path in entries:
            encoded = path.encode("utf-8", "surrogateescape")
            class_ids.append(class_id)
            lengths.append(len(encoded))
            buffer += encoded
        ends = np.cumsum(np.asarray(lengths, dtype=np.int64), dtype=np.int64)
        return ImageList(
            "" if Path(folder) == Path() else str(folder), bytes(buffer), ends, np.asarray(class_ids, dtype=np.int64)
        )


def write_list(path: str | Path, entries: Iterable[tuple[int, str]]) -> None:
    """Write `(class_id, path)` pairs, in this order.

    Raises:
        ValueError: a path has a line break in it, which the format can't hold.
    """
    lines = []
    for class_id, name in entries:
        if "\n" in name or "\r" in name:
            raise ValueError(f"{name!r} has a line break in its name, which no list can hold: rename it")
        lines.append(f"{class_id};{name}\n")
    Path(path).write_bytes("".join(lines).encode("utf-8", "surrogateescape"))


def read_list(path: str | Path, num_classes: int) -> ImageList:
    """Read a list.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the list is empty, or a line has no id below `num_classes` before its first `;`; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {path}: run python txt_annotation.py")

    def entries() -> Iterable[tuple[int, str]]:
        for number, line in enumerate(path.read_bytes().decode("utf-8", "surrogateescape").split("\n"), start=1):
            line = line.removesuffix("\r")
            if not line:
                continue
            class_id, separator, name = line.partition(";")
            if not (separator and name and class_id.isascii() and class_id.isdigit()):
                raise ValueError(f"{path}, line {number}: expected class_id;path, found {line[:80]!r}")
            if int(class_id) >= num_classes:
                raise ValueError(
                    f"{path}, line {number}: class id {class_id}, but there are {num_classes} classes (0 to "
                    f"{num_classes - 1}); list and class file differ: run python txt_annotation.py"
                )
            yield int(class_id), name

    images = ImageList.pack(path.parent, entries())
    if not len(images):
        raise ValueError(f"{path} is empty: put pictures into datasets/ and run python txt_annotation.py")
    return images


def write_classes(path: str | Path, names: Sequence[str]) -> None:
    """Write class names, one a line."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes("".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape"))


def read_classes(path: str | Path) -> list[str]:
    """Read class names, one a line; the line number is the class id.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a name stands twice, or there are fewer than two.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no class file {path}: run python txt_annotation.py")
    lines = path.read_bytes().decode("utf-8-sig", "surrogateescape").split("\n")
    names = [name for name in (line.removesuffix("\r") for line in lines) if name]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"{path} names {', '.join(doubled)} twice: every class has one line")
    if len(names) < 2:
        raise ValueError(f"{path} names {len(names)} classes; a classifier needs two at least")
    return names
