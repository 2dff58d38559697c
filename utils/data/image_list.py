"""Reading and writing image lists and class files.

A list has one `class_id;path` per line, in UTF-8. The id ends at the first `;`, the rest is the path. Relative paths
start from the list's folder. Bytes that aren't valid UTF-8 are preserved (surrogateescape). Files that an editor saved
as UTF-16 are read, too.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np

from utils.system.files import make_folder, write_bytes
from utils.system.text import shorten_list

NEWLINE, CARRIAGE_RETURN, SEMICOLON, SPACE, TAB = b"\n\r; \t"
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MAX_DIGITS = 9
BLOCK = 1 << 22
"""Bytes, or lines, that are parsed at a time."""
MAX_CHECKED = 1000
"""Paths with outer spaces, which are rare, that are looked up."""


@dataclass(frozen=True)
class ImageList:
    """A list in memory, as three arrays: no Python object per line, and shared by forked worker processes.

    Attributes:
        folder: where relative paths start.
        buffer: the bytes of the file, uint8.
        starts: (n + 1,) int64, the start of each line in `buffer`, and the end of the last.
        class_ids: (n,) int32.
    """

    folder: str
    buffer: np.ndarray
    starts: np.ndarray
    class_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.class_ids)

    def path(self, index: int) -> str:
        """Return the path of one image."""
        return os.path.join(self.folder, self.name(index))

    def name(self, index: int) -> str:
        """Return the path of one image as written in the list."""
        line = self.buffer[self.starts[index] : self.starts[index + 1]].tobytes().rstrip(b"\r\n")
        return _decode(line.partition(b";")[2])

    def digest(self) -> str:
        """Return the SHA-256 of the list."""
        return hashlib.sha256(self.buffer.data).hexdigest()


def _format(entries: Iterable[tuple[int, str]]) -> bytes:
    return _encode("".join(f"{class_id};{_one_line(name)}\n" for class_id, name in entries))


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decode(encoded: bytes) -> str:
    return encoded.decode("utf-8", "surrogateescape")


def write_list(path: str | Path, entries: Iterable[tuple[int, str]]) -> None:
    """Write `(class_id, path)` pairs in this order.

    Raises:
        ValueError: a path contains a line break.
    """
    write_bytes(Path(path), _format(entries))


def write_excluded(path: str | Path, reasons: Mapping[str, str]) -> None:
    """Write a line `reason;path` for each path of `reasons`."""
    write_bytes(Path(path), _encode("".join(f"{reason};{_one_line(name)}\n" for name, reason in reasons.items())))


def list_in_memory(entries: Iterable[tuple[int, str]]) -> ImageList:
    """Return `(class_id, path)` pairs as a list without a file."""
    return parse_list(np.frombuffer(_format(entries), np.uint8), "the list")


def parse_list(buffer: np.ndarray, source: str | Path) -> ImageList:
    """Parse the bytes of a list, uint8 (n,), with paths relative to the working folder.

    Raises:
        ValueError: a line isn't `class_id;path`; the message names `source` and the line.
    """
    return _parse(buffer, "", str(source))


def sample_indices(images: ImageList, max_images: int, seed: int, by_class: bool = False) -> np.ndarray:
    """Return sorted indices of up to `max_images` random images; `by_class`: as evenly from all classes as possible."""
    order = np.random.default_rng(seed).permutation(len(images))
    if by_class:
        order = order[np.argsort(count_earlier(images.class_ids[order]), kind="stable")]
    return np.sort(order[:max_images])


def count_earlier(values: np.ndarray) -> np.ndarray:
    """Return for each of `values` (n,) how many earlier ones are equal to it."""
    by_value = np.argsort(values, kind="stable")
    _, starts, counts = np.unique(values[by_value], return_index=True, return_counts=True)
    earlier = np.empty(len(values), np.int64)
    earlier[by_value] = np.arange(len(values)) - np.repeat(starts, counts)
    return earlier


def select(images: ImageList, indices: np.ndarray) -> ImageList:
    """Return the list of the images at `indices`."""
    return list_in_memory((int(images.class_ids[i]), images.path(i)) for i in indices)


def cut(images: ImageList, rows: range) -> ImageList:
    """Return the list of consecutive images, without copying."""
    starts, class_ids = images.starts[rows.start : rows.stop + 1], images.class_ids[rows.start : rows.stop]
    return replace(images, starts=starts, class_ids=class_ids)


def read_list(path: str | Path, num_classes: int) -> ImageList:
    """Read a list.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the list is empty, a line isn't `class_id;path` with an id below `num_classes`, or an image exists
            only without the spaces around its path.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {path}: run python txt_annotation.py")
    images = _parse(np.fromfile(path, np.uint8), _folder(path), str(path))
    if not len(images):
        raise ValueError(f"{path} is empty: put images into datasets/ and run python txt_annotation.py")
    _check_spaces(images, path)
    if images.class_ids.max() >= num_classes:
        worst = int(images.class_ids.argmax())
        number = _line_number(images.buffer, images.starts[worst])
        raise ValueError(
            f"{path}, line {number}: class id {images.class_ids[worst]}, but there are {num_classes} classes (0 to "
            f"{num_classes - 1}); run python txt_annotation.py with the same flags to rewrite list and class file"
        )
    return images


def _check_spaces(images: ImageList, path: Path) -> None:
    """Raise a ValueError if an image exists only without the spaces around its path, as an editor may add them."""
    for position in islice(_outer_spaces(images.buffer), MAX_CHECKED):
        index = max(0, int(np.searchsorted(images.starts, position, side="right")) - 1)
        written, meant = images.path(index), os.path.join(images.folder, images.name(index).strip())
        if not os.path.exists(written) and os.path.isfile(meant):
            number = _line_number(images.buffer, images.starts[index])
            raise ValueError(
                f"{path}, line {number}: there is no image {images.name(index)!r}, but there is one without the spaces "
                f"around the path; remove them"
            )


def _outer_spaces(buffer: np.ndarray) -> Iterator[int]:
    """Yield the positions of spaces and tabs after a semicolon or at the end of a line."""
    for start in range(0, len(buffer), BLOCK):
        block = buffer[start : start + BLOCK]
        spaces = np.flatnonzero((block == SPACE) | (block == TAB)) + start
        after = np.where(spaces + 1 < len(buffer), buffer[np.minimum(spaces + 1, len(buffer) - 1)], NEWLINE)
        outer = (buffer[spaces - 1] == SEMICOLON) | (after == NEWLINE) | (after == CARRIAGE_RETURN)
        yield from spaces[outer].tolist()


def compare_lists(before: ImageList, now: ImageList, class_names: Sequence[str]) -> str:
    """Describe the images added, removed, moved (same file name, other folder) and relabeled between two lists."""
    old_ids, new_ids = ({lst.name(i): int(lst.class_ids[i]) for i in range(len(lst))} for lst in (before, now))
    removed, added = old_ids.keys() - new_ids.keys(), new_ids.keys() - old_ids.keys()
    old_files, new_files = _by_file_name(removed), _by_file_name(added)
    moved = {old_files[file]: new_files[file] for file in old_files.keys() & new_files.keys()}
    relabeled = [name for name in sorted(old_ids.keys() & new_ids.keys()) if old_ids[name] != new_ids[name]]
    changes = {
        "added": sorted(added - set(moved.values())),
        "removed": sorted(removed - moved.keys()),
        "moved": [f"{old} -> {moved[old]}" for old in sorted(moved)],
        "relabeled": [f"{name}, {class_names[old_ids[name]]} -> {class_names[new_ids[name]]}" for name in relabeled],
    }
    parts = [
        f"{len(names)} {kind} ({'; '.join(names[:5])}{'; ...' if len(names) > 5 else ''})"
        for kind, names in changes.items()
        if names
    ]
    return ", ".join(parts) or "the same images, reordered or with paths written differently"


def _by_file_name(names: Iterable[str]) -> dict[str, str]:
    """Return file name -> path for the paths whose file name is unique."""
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(os.path.basename(name), []).append(name)
    return {file: same[0] for file, same in files.items() if len(same) == 1}


def _parse(buffer: np.ndarray, folder: str, source: str) -> ImageList:
    """Find lines and ids in the bytes of a list, block by block to save memory."""
    if buffer[:2].tobytes() in UTF_16:
        buffer = np.frombuffer(_utf_16_to_utf_8(buffer.tobytes(), source), np.uint8)
    start = len(codecs.BOM_UTF8) if buffer[:3].tobytes() == codecs.BOM_UTF8 else 0
    for i in range(0, len(buffer), BLOCK):
        if not (block := buffer[i : i + BLOCK]).all():
            number = _line_number(buffer, i + int(block.argmin()))
            raise ValueError(
                f"{source}, line {number}: NUL byte; the file is damaged or isn't UTF-8: save it as UTF-8, or run "
                f"python txt_annotation.py"
            )
    newlines = [np.flatnonzero(buffer[i : i + BLOCK] == NEWLINE) + (i + 1) for i in range(0, len(buffer), BLOCK)]
    starts = np.concatenate([[start], *newlines])
    starts = starts[starts < len(buffer)]
    starts = starts[(buffer[starts] != NEWLINE) & (buffer[starts] != CARRIAGE_RETURN)]  # without empty lines
    class_ids = np.empty(len(starts), np.int32)
    for i in range(0, len(starts), BLOCK):
        class_ids[i : i + BLOCK] = _parse_ids(buffer, starts[i : i + BLOCK], source)
    return ImageList(folder, buffer, np.append(starts, len(buffer)), class_ids)


def _parse_ids(buffer: np.ndarray, starts: np.ndarray, source: str) -> np.ndarray:
    """Return the class ids of the lines at `starts`."""

    def at(position: np.ndarray) -> np.ndarray:
        return buffer[np.minimum(position, len(buffer) - 1)]

    class_ids = np.zeros(len(starts), np.int32)
    cursor = starts.copy()
    in_id = np.ones(len(starts), bool)  # lines whose id continues at `cursor`
    for _ in range(MAX_DIGITS):
        digit = at(cursor) - np.uint8(ord("0"))  # bytes below "0" wrap around to above 9
        in_id &= (digit <= 9) & (cursor < len(buffer))
        class_ids[in_id] = class_ids[in_id] * 10 + digit[in_id]
        cursor += in_id
    no_path = (cursor + 1 >= len(buffer)) | np.isin(at(cursor + 1), (NEWLINE, CARRIAGE_RETURN))
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
    """Return the path of the first image of a list; None if the list is missing or empty."""
    if not Path(path).is_file():
        return None
    return next((os.path.join(_folder(path), _decode(line.partition(b";")[2])) for _, line in _lines(path)), None)


def _folder(path: str | Path) -> str:
    """Return the folder where relative paths of a list start; "" for the working folder."""
    return "" if Path(path).parent == Path() else str(Path(path).parent)


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the non-empty lines, without byte-order mark and line endings."""
    with Path(path).open("rb") as file:
        is_utf_16 = file.peek(2)[:2] in UTF_16
        for number, line in enumerate(BytesIO(_utf_16_to_utf_8(file.read(), path)) if is_utf_16 else file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            if line:
                yield number, line


def _utf_16_to_utf_8(content: bytes, source: str | Path) -> bytes:
    try:
        return content.decode("utf-16").encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: damaged UTF-16; save it as UTF-8, or run python txt_annotation.py") from error


def _one_line(name: str) -> str:
    if "\n" in name or "\r" in name:
        raise ValueError(f"{name!r}: the name contains a line break; rename it")
    return name


def write_classes(path: str | Path, names: Sequence[str]) -> None:
    """Write class names, one per line.

    Raises:
        ValueError: a name contains a line break.
    """
    lines = [f"{_one_line(name)}\n" for name in names]
    make_folder(Path(path).parent)
    write_bytes(Path(path), _encode("".join(lines)))


def normalize_class_name(name: str) -> str:
    """Return a class name in the form in which names of folders and lines of class files are compared.

    Unicode form NFC, since macOS decomposes accents and Hangul in file names, without the spaces around it, which
    editors add.
    """
    return unicodedata.normalize("NFC", name).strip()


def read_classes(path: str | Path) -> list[str]:
    """Read class names, one per line in the order of class ids, each normalized.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a name is repeated, there are fewer than two, or the file isn't UTF-8 or UTF-16.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no class file {path}: run python txt_annotation.py")
    names = [name for _, line in _lines(path) if (name := normalize_class_name(_decode(line)))]
    if any("\0" in name for name in names):
        raise ValueError(f"{path}: NUL byte; the file is damaged or isn't UTF-8: save it as UTF-8")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"{path}: repeated class names: {shorten_list(repeated)}; give each class one line")
    if len(names) < 2:
        raise ValueError(f"{path}: at least two classes are needed, found {len(names)}")
    return names
