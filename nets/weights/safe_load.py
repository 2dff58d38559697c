"""Files of weights opened without trusting them."""

from __future__ import annotations

import argparse
import io
import math
import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from nets.weights.seal import check_seal, is_sealed

if torch.torch_version.TorchVersion(torch.__version__) < (2, 10):
    # Before, a file could run code or corrupt memory in spite of weights_only=True: CVE-2025-32434, CVE-2026-24747.
    raise ImportError(
        f"torch {torch.__version__} opens files of weights unsafely, and Thaw needs 2.10 or later: "
        f"pip install --upgrade 'torch>=2.10' torchvision"
    )

NEEDED = re.compile(
    r"collections\.OrderedDict|argparse\.Namespace"
    r"|torch\.(Size|device|(storage\.)?\w+Storage|b?float\w+|u?int\w+|bool|half|double|complex\w+)"
    r"|torch\.nn\.parameter\.Parameter|torch\._utils\._rebuild_(tensor_v[23]|parameter(_with_state)?)"
)
"""What a file of weights may name: torch lets a file call more, with which it takes any amount of memory."""
MOST_VALUES = 50_000_000
"""In nested dicts and lists: more than any file of weights has."""
LARGE = 0xFFFFFFFF
"""What stands where a zip archive of 4 GB has no room for an offset."""
LEGACY_PICKLES = 5
"""What a file of torch's before 1.6 begins with: pickles in a row, and then bare numbers."""


def open_safely(path: str | Path) -> Any:
    """What a `.safetensors` file, an `.npz` of numpy's or a file of `torch.save` holds, on the CPU; which of them it is
    tells its beginning, not its name. Nothing in the file is executed, and its tensors take no more memory than it has
    bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, claims to hold more than it does, would run code, or is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    archived = zipfile.is_zipfile(path)
    if archived:
        _check_archive(path)
    elif _begins_as_archive(path):
        raise ValueError(f"{path} is damaged: the end of its archive isn't there; was it copied or downloaded whole?")
    if archived or not _is_safetensors(path):
        _check_pickles(path, archived)
    try:
        if archived and _is_npz(path):
            content = _load_npz(path)
        elif not archived and _is_safetensors(path):
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            # Meta's checkpoints have the command line beside the weights, as plain attributes.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes the readers raise nearly every type there is
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"it holds code ({code[1]}), which is never run"
            if code
            else f"it is damaged, or something else, or holds code, which is never run ({type(error).__name__})"
        )
        raise ValueError(f"{path} can't be opened as weights: {reason}") from error
    _check_nesting(content, path)
    _check_tensors(content, path)
    return content


def _check_archive(path: Path) -> None:
    """Raise a ValueError unless every byte that a zip archive claims to hold is in it, and as it was written."""
    size = path.stat().st_size
    if sealed := is_sealed(path):
        check_seal(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if not _begins_as_archive(path):
                raise ValueError(f"{path} can't be opened as weights: before the archive in it stands something else")
            if len({entry.filename.casefold() for entry in entries}) < len(entries):
                raise ValueError(f"{path} can't be opened as weights: two entries in it have the same name")
            claimed = sum(entry.file_size for entry in entries)
            if claimed > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError(
                    f"{path} can't be opened as weights: its {size:,} bytes claim to unpack to {claimed:,}; torch "
                    f"writes its files unpacked"
                )
            offset = _directory_offset(path, len(archive.comment))
            if offset != archive.start_dir and not (offset == LARGE <= size):
                raise ValueError(f"{path} can't be opened as weights: it holds two archives, one hidden from the other")
            broken = None if sealed else archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged: its archive can't be read ({error})") from error
    if broken:
        raise ValueError(f"{path} is damaged: the checksum of {broken} in it doesn't match")


def read_header(path: Path) -> dict[str, str]:
    """What a `.safetensors` file that `open_safely` opened says of itself; nothing, of any other file."""
    if not _is_safetensors(path):
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _is_safetensors(path: Path) -> bool:
    """Whether it begins as such a file: the length of a header, in 8 bytes, and the header's brace."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _begins_as_archive(path: Path) -> bool:
    """Whether torch, which looks at a file's beginning, takes it for an archive; zipfile looks at its end."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _is_npz(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def _load_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of numbers in a file of numpy's, of which `_check_archive` has seen that all of it is there.

    Raises:
        ValueError: one is no array of numbers, or claims to be larger than it is.
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            content = archive.read(entry)
            with io.BytesIO(content) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, by_columns, dtype = read(file)
                start = file.tell()
            if dtype.kind not in "fiub" or math.prod(shape) * dtype.itemsize != len(content) - start:
                raise ValueError(f"{entry.filename} is no array of numbers, or not all of it is there")
            array = np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if by_columns else "C")
            arrays[entry.filename.removesuffix(".npy")] = torch.from_numpy(array.copy())
    return arrays


def _directory_offset(path: Path, comment: int) -> int:
    """Where a zip archive's last record says that its directory is; readers differ in whether they believe it."""
    with path.open("rb") as file:
        file.seek(-comment - 6, os.SEEK_END)
        return int.from_bytes(file.read(4), "little")


def _check_pickles(path: Path, archived: bool) -> None:
    """Raise a ValueError if a pickle in a file of torch's names what weights don't need."""
    try:
        if archived:
            with zipfile.ZipFile(path) as archive:
                # torch doesn't look at the case of their names
                entries = [entry for entry in archive.infolist() if entry.filename.casefold().endswith(".pkl")]
                found = [name for entry in entries for name in _unneeded(archive.read(entry))]
        else:
            with path.open("rb") as file:
                found = [name for _ in range(LEGACY_PICKLES) for name in _unneeded(file)]
    except (ValueError, MemoryError) as error:
        raise ValueError(f"{path} can't be opened as weights: it is damaged, or something else ({error})") from error
    if found:
        raise ValueError(
            f"{path} can't be opened as weights: it holds code ({found[0]}), which is never run and weights don't need"
        )


def _unneeded(pickled: bytes | BinaryIO) -> list[str]:
    """What the next pickle names that weights don't need; raises a ValueError if there is no pickle."""
    codes = pickletools.genops(pickled)
    # Module and name stand apart, and torch puts them together, with a dot.
    named = [argument.replace(" ", ".") for code, argument, _ in codes if code.name in ("GLOBAL", "INST")]
    return [name for name in named if not NEEDED.fullmatch(name)]


def _check_nesting(content: Any, path: Path) -> None:
    """Raise a ValueError if nested dicts and lists, written out, hold more than weights have reason to: lists in which
    the next stands twice are as small as you like and stand for any number."""
    sizes: dict[int, float] = {}
    done: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting[-1]
        if id(value) in done:
            waiting.pop()
            continue
        parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        if id(value) not in sizes:
            sizes[id(value)] = math.inf  # as long as its parts aren't known, so that what contains itself is too large
            waiting += [part for part in parts if isinstance(part, dict | list | tuple) and id(part) not in sizes]
        else:
            waiting.pop()
            done.add(id(value))
            sizes[id(value)] = 1 + sum(sizes.get(id(part), 1) for part in parts)
    if sizes[id(content)] > MOST_VALUES:
        raise ValueError(f"{path} can't be opened as weights: it holds lists within lists without end")


def _check_tensors(content: Any, path: Path) -> None:
    """Raise a ValueError if a tensor in nested dicts and lists claims more elements than are in its memory."""
    seen, waiting = set(), [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            dense = value.layout == torch.strided and value.device.type == "cpu"
            if not dense or value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise ValueError(
                    f"{path} can't be opened as weights: a tensor of the shape {tuple(value.shape)} isn't all in it"
                )
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
