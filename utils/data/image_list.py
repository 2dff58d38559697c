"""The annotation list: one `class_id;path` a line, UTF-8.

The id ends at the first `;`; all that follows is the path, whatever is in it. A relative path is relative to the folder
of the list. Bytes of a file name that are no UTF-8 go through as they are (surrogateescape).
"""

from __future__ import annotations

import codecs
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.system.files import write_bytes

NEWLINE, RETURN, SEMICOLON = b"\n\r;"
MAX_DIGITS = 9
BLOCK = 1 << 22
"""Bytes that are searched for line ends, and lines whose ids are read, at a time."""


@dataclass(frozen=True)
class ImageList:
    """A list in memory: the file's bytes and two arrays, so that millions of lines cost no Python objects, and worker
    processes that read it share it.

    Attributes:
        folder: what relative paths start from.
        buffer: the bytes of the file, uint8.
        starts: (n + 1,) int64, where each line begins in `buffer`, and where the last one ends.
        class_ids: (n,) int32.
    """

    folder: str
    buffer: np.ndarray
    starts: np.ndarray
    class_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.class_ids)

    def path(self, index: int) -> str:
        """The path of one image, as it can be opened."""
        return os.path.join(self.folder, self.name(index))

    def name(self, index: int) -> str:
        """The path of one image, as it stands in the list."""
        line = self.buffer[self.starts[index] : self.starts[index + 1]].tobytes().rstrip(b"\r\n")
        return _decode(line.partition(b";")[2])

    def digest(self) -> str:
        """SHA-256 of the list."""
        return hashlib.sha256(self.buffer.data).hexdigest()


def _format(entries: Iterable[tuple[int, str]]) -> bytes:
    return _encode("".join(f"{class_id};{_one_line(name)}\n" for class_id, name in entries))


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decode(encoded: bytes) -> str:
    return encoded.decode("utf-8", "surrogateescape")


def write_list(path: str | Path, entries: Iterable[tuple[int, str]]) -> None:
    """Write `(class_id, path)` pairs, in this order.

    Raises:
        ValueError: a path has a line break in it, which the format can't hold.
    """
    write_bytes(Path(path), _format(entries))


def write_excluded(path: str | Path, reasons: Mapping[str, str]) -> None:
    """Write a line `reason;path` for each path that `reasons` has a reason for."""
    write_bytes(Path(path), _encode("".join(f"{reason};{_one_line(name)}\n" for name, reason in reasons.items())))


def list_in_memory(entries: Iterable[tuple[int, str]]) -> ImageList:
    """A list of `(class_id, path)` pairs that was never a file."""
    return parse_list(np.frombuffer(_format(entries), np.uint8), "the list")


def parse_list(buffer: np.ndarray, source: str | Path) -> ImageList:
    """A list out of its bytes, uint8 (n,), whose relative paths start from the working folder.

    Raises:
        ValueError: a line, named as one of `source`, isn't `class_id;path`.
    """
    return _parse(buffer, "", str(source))


def draw(images: ImageList, most: int, seed: int, by_class: bool = False) -> np.ndarray:
    """Indices (n,), rising, of up to `most` images drawn at random: any, or of each class as many, as far as it has
    them."""
    order = np.random.default_rng(seed).permutation(len(images))
    if by_class:
        order = order[np.argsort(count_earlier(images.class_ids[order]), kind="stable")]
    return np.sort(order[:most])


def count_earlier(values: np.ndarray) -> np.ndarray:
    """For each of values (n,) how often it came before."""
    by_value = np.argsort(values, kind="stable")
    _, starts, counts = np.unique(values[by_value], return_index=True, return_counts=True)
    earlier = np.empty(len(values), np.int64)
    earlier[by_value] = np.arange(len(values)) - np.repeat(starts, counts)
    return earlier


def take(images: ImageList, indices: np.ndarray) -> ImageList:
    """Some images of a list, as a list."""
    return list_in_memory((int(images.class_ids[i]), images.path(i)) for i in indices)


def read_list(path: str | Path, num_classes: int) -> ImageList:
    """Read a list.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the list is empty, or a line has no id below `num_classes` before its first `;`; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {path}: run python txt_annotation.py")
    images = _parse(np.fromfile(path, np.uint8), _folder(path), str(path))
    if not len(images):
        raise ValueError(f"{path} is empty: put images into datasets/ and run python txt_annotation.py")
    if images.class_ids.max() >= num_classes:
        worst = int(images.class_ids.argmax())
        number = _line_number(images.buffer, images.starts[worst])
        raise ValueError(
            f"{path}, line {number}: class id {images.class_ids[worst]}, but there are {num_classes} classes (0 to "
            f"{num_classes - 1}); list and class file differ: run python txt_annotation.py, with the flags as before"
        )
    return images


def compare_lists(before: ImageList, now: ImageList, class_names: Sequence[str]) -> str:
    """What is in one list and not in the other, in words: images added, removed, moved (the file's name is the same,
    its folder another) and relabelled."""
    then, here = ({images.name(i): int(images.class_ids[i]) for i in range(len(images))} for images in (before, now))
    gone, come = _by_file_name(then.keys() - here.keys()), _by_file_name(here.keys() - then.keys())
    moved = {gone[file]: come[file] for file in gone.keys() & come.keys()}
    other_label = [name for name in sorted(then.keys() & here.keys()) if then[name] != here[name]]
    changes = {
        "added": sorted(here.keys() - then.keys() - set(moved.values())),
        "removed": sorted(then.keys() - here.keys() - moved.keys()),
        "moved": [f"{old} -> {moved[old]}" for old in sorted(moved)],
        "relabelled": [f"{name}, {class_names[then[name]]} -> {class_names[here[name]]}" for name in other_label],
    }
    told = [
        f"{len(names)} {kind} ({'; '.join(names[:5])}{'; ...' if len(names) > 5 else ''})"
        for kind, names in changes.items()
        if names
    ]
    return ", ".join(told) or "the same images in another order or notation"


def _by_file_name(names: Iterable[str]) -> dict[str, str]:
    """Those of `names` whose file name no other of them has."""
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(os.path.basename(name), []).append(name)
    return {file: same[0] for file, same in files.items() if len(same) == 1}


def _parse(buffer: np.ndarray, folder: str, source: str) -> ImageList:
    """Find lines and ids in the bytes of a list, a block at a time, so that it takes little memory besides."""
    start = len(codecs.BOM_UTF8) if buffer[:3].tobytes() == codecs.BOM_UTF8 else 0
    for i in range(0, len(buffer), BLOCK):
        if not (block := buffer[i : i + BLOCK]).all():
            number = _line_number(buffer, i + int(block.argmin()))
            raise ValueError(f"{source}, line {number}: it has a NUL in it, which no path has")
    newlines = [np.flatnonzero(buffer[i : i + BLOCK] == NEWLINE) + (i + 1) for i in range(0, len(buffer), BLOCK)]
    starts = np.concatenate([[start], *newlines])
    starts = starts[starts < len(buffer)]
    starts = starts[(buffer[starts] != NEWLINE) & (buffer[starts] != RETURN)]  # but for empty lines
    class_ids = np.empty(len(starts), np.int32)
    for i in range(0, len(starts), BLOCK):
        class_ids[i : i + BLOCK] = _parse_ids(buffer, starts[i : i + BLOCK], source)
    return ImageList(folder, buffer, np.append(starts, len(buffer)), class_ids)


def _parse_ids(buffer: np.ndarray, starts: np.ndarray, source: str) -> np.ndarray:
    """The class ids of the lines that begin at `starts`."""

    def at(position: np.ndarray) -> np.ndarray:
        return buffer[np.minimum(position, len(buffer) - 1)]

    class_ids = np.zeros(len(starts), np.int32)
    cursor = starts.copy()
    in_id = np.ones(len(starts), bool)  # the lines whose id has not come to its end
    for _ in range(MAX_DIGITS):
        digit = at(cursor) - np.uint8(ord("0"))  # what is below "0" wraps around to above 9
        in_id &= (digit <= 9) & (cursor < len(buffer))
        class_ids[in_id] = class_ids[in_id] * 10 + digit[in_id]
        cursor += in_id
    no_path = (cursor + 1 >= len(buffer)) | np.isin(at(cursor + 1), (NEWLINE, RETURN))
    broken = (cursor == starts) | (at(cursor) != SEMICOLON) | no_path
    if broken.any():
        start = int(starts[broken.argmax()])
        line = buffer[start : start + 80].tobytes().partition(b"\n")[0]
        raise ValueError(
            f"{source}, line {_line_number(buffer, start)}: expected class_id;path, found {_decode(line)!r}"
        )
    return class_ids


def _line_number(buffer: np.ndarray, start: int) -> int:
    return 1 + np.count_nonzero(buffer[:start] == NEWLINE)


def read_first_path(path: str | Path) -> str | None:
    """The first image of a list, as it can be opened; None if there is no list or nothing in it."""
    if not Path(path).is_file():
        return None
    return next((os.path.join(_folder(path), _decode(line.partition(b";")[2])) for _, line in _lines(path)), None)


def _folder(path: str | Path) -> str:
    """What relative paths in a list start from; nothing if that is the working folder."""
    return "" if Path(path).parent == Path() else str(Path(path).parent)


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
    write_bytes(Path(path), _encode("".join(lines)))


def read_classes(path: str | Path) -> list[str]:
    """Read class names, one a line; the line number is the class id. Their letters are composed, as
    `utils.annotation.folder_scan` has them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a name stands twice, or there are fewer than two.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no class file {path}: run python txt_annotation.py")
    names = [unicodedata.normalize("NFC", _decode(line)) for _, line in _lines(path)]
    doubled = sorted(name for name, count in Counter(names).items() if count > 1)
    if doubled:
        raise ValueError(f"{path} names {', '.join(doubled)} twice: every class has one line")
    if len(names) < 2:
        raise ValueError(f"{path} names {len(names)} classes; a classifier needs two at least")
    return names
