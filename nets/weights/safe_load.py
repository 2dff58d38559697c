"""Open files of weights without trusting them.

`torch.load(weights_only=True)` refuses to run code. It does not refuse a file that allocates far more memory than the
file is long, verifies no checksums, and reads some archives differently from `zipfile`. The checks here do that; the
docstring or comment of each names the attack that it stops.
"""

from __future__ import annotations

import argparse
import json
import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from nets.weights.seal import has_checksum, verify_checksum

if torch.torch_version.TorchVersion(torch.__version__) < (2, 10):
    # Older versions could run code or corrupt memory despite weights_only=True: CVE-2025-32434, CVE-2026-24747.
    raise ImportError(
        f"torch {torch.__version__} opens files of weights unsafely; Thaw needs 2.10 or later: "
        f"pip install --upgrade 'torch>=2.10' torchvision"
    )

ALLOWED_GLOBALS = re.compile(
    r"collections\.OrderedDict|argparse\.Namespace"
    r"|torch\.(Size|device|(storage\.)?\w+Storage|b?float\w+|u?int\w+|bool|half|double|complex\w+)"
    r"|torch\.nn\.parameter\.Parameter|torch\._utils\._rebuild_(tensor_v[23]|parameter(_with_state)?)"
)
"""Globals that a pickle of weights needs. torch allows more, which can allocate any amount of memory."""
MAX_VALUES = 10_000_000
"""Maximum number of values in nested dicts and lists."""
ZIP64_OFFSET = 0xFFFFFFFF
"""Placeholder for an offset that needs more than 4 bytes."""
LEGACY_PICKLES = 5
"""Number of pickles at the start of a file in torch's format before 1.6."""


def open_safely(path: str | Path) -> Any:
    """Load a `.safetensors`, numpy `.npz` or `torch.save` file on the CPU.

    The format is detected by content, not by name. No code is run, and tensors take no more memory than the file has
    bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, contains code, claims to hold more than it does, or has another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    is_archive = zipfile.is_zipfile(path)
    is_safetensors = not is_archive and _is_safetensors(path)
    if is_archive:
        _check_archive(path)
    elif _starts_as_archive(path):
        raise ValueError(
            f"{path} is damaged: the end of its archive isn't there; was it copied or downloaded completely?"
        )
    if not is_safetensors:
        _check_pickles(path, is_archive)
    try:
        if is_safetensors:
            from safetensors.torch import load, load_file

            content = load_file(path) if _is_utf8(path) else load(path.read_bytes())
        elif is_archive and _is_npz(path):
            content = _load_npz(path)
        else:
            # Meta's checkpoints contain the command line as an argparse.Namespace of plain values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the readers raise nearly any exception for a damaged file
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"it holds code ({code[1]}), which is never run"
            if code
            else f"it is damaged, has another format, or holds code, which is never run ({type(error).__name__})"
        )
        raise ValueError(f"{path} can't be opened as weights: {reason}") from error
    _check_content(content, path)
    return content


def _check_archive(path: Path) -> None:
    """Raise a ValueError if a zip archive is damaged, is a zip bomb, or hides a second archive."""
    size = path.stat().st_size
    if sealed := has_checksum(path):
        verify_checksum(path)
    # torch reads a file that starts otherwise in its old format, with pickles that the scan of the archive misses.
    if not _starts_as_archive(path):
        raise ValueError(f"{path} can't be opened as weights: there is other data before its archive")
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
            if claimed > size:  # a zip bomb
                raise ValueError(
                    f"{path} can't be opened as weights: its {size:,} bytes would unpack to {claimed:,}; torch writes "
                    f"archives without compression"
                )
            # zipfile finds the directory by its size, torch by this offset: the scan might read another archive.
            offset = _directory_offset(path, len(archive.comment))
            if offset != archive.start_dir and not (offset == ZIP64_OFFSET <= size):
                raise ValueError(f"{path} can't be opened as weights: it contains two archives, one of them hidden")
            damaged = None if sealed else archive.testzip()  # torch doesn't verify the checksums
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged: its archive can't be read ({error})") from error
    if damaged:
        raise ValueError(f"{path} is damaged: the checksum of its entry {damaged} doesn't match")


def read_header(path: Path) -> dict[str, str]:
    """Return the metadata of a `.safetensors` file opened by `open_safely`; empty for other files."""
    if not _is_safetensors(path):
        return {}
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__", {})


def _is_utf8(path: Path) -> bool:
    """Return whether safetensors can open a file by its path."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_safetensors(path: Path) -> bool:
    """Return whether a file starts like `.safetensors`: 8 bytes of header length, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _starts_as_archive(path: Path) -> bool:
    """Return whether torch reads a file as an archive; it looks at the start of the file, zipfile at the end."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _is_npz(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def _load_npz(path: Path) -> dict[str, Tensor]:
    """Load the arrays of an `.npz` file.

    Raises:
        ValueError: an array needs unpickling, which could run code, or its header claims more than the file holds.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except MemoryError as error:
        raise ValueError("an array doesn't fit in memory") from error


def _directory_offset(path: Path, comment_length: int) -> int:
    """Return the offset of the directory according to the last record of a zip archive."""
    with path.open("rb") as file:
        file.seek(-comment_length - 6, os.SEEK_END)
        return int.from_bytes(file.read(4), "little")


def _check_pickles(path: Path, is_archive: bool) -> None:
    """Raise a ValueError if a pickle uses other globals than weights need.

    torch would call some of them, such as `bytearray` or `FloatTensor`, which allocate memory of any size.
    """
    try:
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                # All pickles are scanned, since torch ignores case and entries may have the same name.
                entries = [entry for entry in archive.infolist() if entry.filename.casefold().endswith(".pkl")]
                forbidden = [name for entry in entries for name in _forbidden_globals(archive.read(entry))]
        else:
            with path.open("rb") as file:
                forbidden = [name for _ in range(LEGACY_PICKLES) for name in _forbidden_globals(file)]
    except (ValueError, MemoryError) as error:
        raise ValueError(f"{path} can't be opened as weights: it is damaged or has another format ({error})") from error
    if forbidden:
        raise ValueError(f"{path} can't be opened as weights: it holds code ({forbidden[0]}), which is never run")


def _forbidden_globals(pickled: bytes | BinaryIO) -> list[str]:
    """Return the globals of the next pickle that are not allowed; raise a ValueError if there is no pickle."""
    # GLOBAL has module and name separated by a space; torch's unpickler supports no other opcode for globals.
    names = [argument.replace(" ", ".") for code, argument, _ in pickletools.genops(pickled) if code.name == "GLOBAL"]
    return [name for name in names if not ALLOWED_GLOBALS.fullmatch(name)]


def _check_content(content: Any, path: Path) -> None:
    """Raise a ValueError for nested lists or tensors that stand for far more data than the file holds.

    A list that contains another list twice, and so on, takes few bytes but has exponentially many values. A tensor with
    stride 0 repeats the same few bytes, and needs memory for all of them as soon as it is copied.
    """
    waiting, num_values = [content], 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            dense = value.layout == torch.strided and value.device.type == "cpu"
            if not dense or value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise ValueError(
                    f"{path} can't be opened as weights: it doesn't contain all values of a tensor of shape "
                    f"{tuple(value.shape)}"
                )
        elif isinstance(value, dict | list | tuple):
            num_values += len(value)
            if num_values > MAX_VALUES:
                raise ValueError(f"{path} can't be opened as weights: its nested lists have over {MAX_VALUES:,} values")
            waiting.extend(value.values() if isinstance(value, dict) else value)
