"""Open files of weights without trusting them: safetensors and npz here, pickles in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from nets.weights import tree, unpickle

SECONDS = 20
BYTES_PER_SECOND = 50_000_000
"""Time limit for converting a pickled file, and what a large one gets in addition."""


def open_safely(path: str | Path) -> Any:
    """Load a `.safetensors`, numpy `.npz` or `torch.save` file on the CPU.

    The format is detected by content, not by name. No code is run, and tensors consist of bytes of the file only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, contains code, claims to hold more than it does, or has another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if is_safetensors(path):
            return _load_safetensors(path)
        return _load_npz(path) if _is_npz(path) else _load_pickled(path)
    except (SafetensorError, zipfile.BadZipFile, tree.Damaged, unpickle.Refused) as error:
        raise ValueError(f"{path} can't be opened as weights: {error}") from error


def is_safetensors(path: Path) -> bool:
    """Whether a file starts like `.safetensors`: 8 bytes of header length, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a `.safetensors` file; empty for other files.

    Raises:
        ValueError: the file is damaged.
    """
    if not is_safetensors(path):
        return {}
    try:
        return tree.read_metadata(path)
    except tree.Damaged as error:
        raise ValueError(f"{path} can't be opened as weights, it is damaged or was cut off: {error}") from error


def _load_safetensors(path: Path) -> dict[str, Any]:
    """The tensors of a file, or its tree if it has one, see `nets.weights.tree`."""
    if "plain" in read_header(path):
        return tree.read_tree(path)
    return tree.read_tensors(path)


def _is_npz(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def _load_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an `.npz` file.

    Raises:
        ValueError: it would unpack to more than its size, or an array needs unpickling, which could run code.
    """
    with zipfile.ZipFile(path) as archive:
        claimed = sum(entry.file_size for entry in archive.infolist())
    if claimed > 20 * path.stat().st_size:
        raise unpickle.Refused(f"its {path.stat().st_size:,} bytes would unpack to {claimed:,}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except MemoryError as error:
        raise unpickle.Refused("an array doesn't fit in memory") from error
    except Exception as error:  # the reader raises nearly any exception for a damaged file
        raise unpickle.Refused(f"it is damaged, or holds code, which is never run ({type(error).__name__})") from error


def _load_pickled(path: Path) -> Any:
    """The content of a pickled file, converted by `nets/weights/unpickle.py`.

    Raises:
        Refused: it can't be converted, or not within the limits of time and memory.
    """
    seconds = SECONDS + path.stat().st_size // BYTES_PER_SECOND
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "weights.safetensors")
        command = [sys.executable, unpickle.__file__, str(path.resolve()), str(output), str(seconds)]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise unpickle.Refused(f"opening it took more than {seconds} s") from None
        if done.returncode:
            lines = done.stderr.decode(errors="replace").splitlines()
            raise unpickle.Refused(lines[-1][:500] if lines else f"opening it needed more than {seconds} s or crashed")
        tensors, plain = tree.read_tensors(output), tree.read_metadata(output)["plain"]
    return tree.join(json.loads(plain), tensors)
