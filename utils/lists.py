"""The annotation list: one `class_id;path` a line, UTF-8.

The id ends at the first `;`; all that follows is the path, whatever is in it. A relative path is relative to the folder
of the list. Bytes of a file name that are no UTF-8 go through as they are (surrogateescape).
"""

from __future__ import annotations

import codecs
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
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
        return os.path.join(self.folder, _decode(self.buffer[start : self.ends[index]]))

    @staticmethod
    def pack(folder: str | Path, entries: Iterable[tuple[int, bytes]]) -> ImageList:
        """Make a list of `(class_id, path)` pairs, the paths encoded."""
        class_ids, lengths, buffer = array("q"), array("q"), bytearray()
        for class_id, path in entries:
            class_ids.append(class_id)
            lengths.append(len(path))
            buffer += path
        ends = np.cumsum(np.asarray(lengths, dtype=np.int64), dtype=np.int64)
        folder = "" if Path(folder) == Path() else str(folder)
        return ImageList(folder, bytes(buffer), ends, np.asarray(class_ids, dtype=np.int64))


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decode(encoded: bytes) -> str:
    return encoded.decode("utf-8", "surrogateescape")


def write_list(path: str | Path, entries: Iterable[tuple[int, str]]) -> None:
    """Write `(class_id, path)` pairs, in this order.

    Raises:
        ValueError: a path has a line break in it, which the format can't hold.
    """
    lines = [f"{class_id};{_one_line(name)}\n" for class_id, name in entries]
    Path(path).write_bytes(_encode("".join(lines)))


def list_in_memory(entries: Iterable[tuple[int, str]]) -> ImageList:
    """A list of `(class_id, path)` pairs that was never a file."""
    return ImageList.pack("", ((class_id, _encode(path)) for class_id, path in entries))


def read_list(path: str | Path, num_classes: int) -> ImageList:
    """Read a list.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the list is empty, or a line has no id below `num_classes` before its first `;`; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {path}: run python txt_annotation.py")

    def entries() -> Iterator[tuple[int, bytes]]:
        for number, line in _lines(path):
            class_id, separator, name = line.partition(b";")
            if not (separator and name and class_id.isdigit()):
                raise ValueError(f"{path}, line {number}: expected class_id;path, found {_decode(line[:80])!r}")
            if int(class_id) >= num_classes:
                raise ValueError(
                    f"{path}, line {number}: class id {int(class_id)}, but there are {num_classes} classes (0 to "
                    f"{num_classes - 1}); list and class file differ: run python txt_annotation.py"
                )
            yield int(class_id), name

    images = ImageList.pack(path.parent, entries())
    if not len(images):
        raise ValueError(f"{path} is empty: put pictures into datasets/ and run python txt_annotation.py")
    return images


def read_first_path(path: str | Path) -> str | None:
    """The path in the first line of a list, as it stands there; None if there is no list or nothing in it."""
    if not Path(path).is_file():
        return None
    return next((_decode(line.partition(b";")[2]) for _, line in _lines(path)), None)


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line that isn't empty; a byte-order mark and Windows' line ends are taken off."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            if line:
                yield number, line


def _one_line(name: str) -> str:
    if "\n" in name or "\r" in name:
        raise ValueError(f"{name!r} has a line break in its name, which no list can hold: rename it")
    return name


def write_classes(path: str | Path, names: Sequence[str]) -> None:
    """Write class names, one a line.

    Raises:
        ValueError: a name has a line break in it.
    """
    lines = [f"{_one_line(name)}\n" for name in names]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(_encode("".join(lines)))


def read_classes(path: str | Path) -> list[str]:
    """Read class names, one a line; the line number is the class id.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a name stands twice, or there are fewer than two.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no class file {path}: run python txt_annotation.py")
    names = [_decode(line) for _, line in _lines(path)]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"{path} names {', '.join(doubled)} twice: every class has one line")
    if len(names) < 2:
        raise ValueError(f"{path} names {len(names)} classes; a classifier needs two at least")
    return names
