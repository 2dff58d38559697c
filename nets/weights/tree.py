"""Safetensors files that hold nested dicts and lists of plain values and tensors, with checksums.

The tensors are named by their path in the tree, such as `weights/head.bias`; its first part is their group. The
metadata of the file holds, as text:

- `plain`: the tree as JSON, with references in place of tensors, see `split`;
- `note`: JSON that is read without the rest, see `read_note`;
- `groups`: SHA-256 of the bytes of each group's tensors, in the order of their names;
- `sha256`: SHA-256 of the header, in which these digits are zeros. It covers `groups`, so it covers all data.

A group can be skipped on reading; its bytes are then neither read nor verified. A group can also be in other files,
see `nets.weights.pieces`; the metadata then has their SHA-256 as `pieces`.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from nets.weights.pieces import Damaged, Pieces, read_group

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of types in safetensors."""
UNSEALED = "0" * 64
MAX_HEADER = 100_000_000
"""The largest header in bytes, as in the safetensors library."""


def split(tree: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """`tree` as JSON has it; its tensors are added to `tensors` by their path, which begins with `place`.

    A tensor becomes `{"$tensor": path}`, a dict with other keys than strings `{"$items": [[key, value], ...]}`, a tuple
    `{"$tuple": [...]}`.
    """
    if isinstance(tree, Tensor):
        tensors[place] = tree
        return {"$tensor": place}
    if isinstance(tree, Mapping):
        items = [(key, split(value, f"{place}/{key}" if place else str(key), tensors)) for key, value in tree.items()]
        if all(type(key) is str and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$items": [[key, value] for key, value in items]}
    if isinstance(tree, list | tuple):
        values = [split(value, f"{place}/{i}", tensors) for i, value in enumerate(tree)]
        return values if isinstance(tree, list) else {"$tuple": values}
    return tree


def join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `split` split; tensors that aren't in `tensors` become None.

    Raises:
        Damaged: a reference is malformed.
    """
    if isinstance(plain, list):
        return [join(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    try:
        if "$tensor" in plain:
            return tensors.get(plain["$tensor"])
        if "$items" in plain:
            return {key: join(value, tensors) for key, value in plain["$items"]}
        if "$tuple" in plain:
            return tuple(join(value, tensors) for value in plain["$tuple"])
    except (TypeError, ValueError) as error:
        raise Damaged(f"its description is malformed ({error})") from error
    return {key: join(value, tensors) for key, value in plain.items()}


def write_tree(file: BinaryIO, tree: Mapping[str, Any], note: Mapping[str, Any], pieces: Pieces | None = None) -> None:
    """Write `tree` to an empty file, open for reading and writing, without the tensors that are in `pieces`.

    Raises:
        OSError: it can't be written.
    """
    tensors: dict[str, Tensor] = {}
    plain = split(tree, "", tensors)
    names = sorted(name for name in tensors if not (pieces and _group(name) in pieces.groups))
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in names}
    groups = {group: hashlib.sha256() for group in map(_group, ordered)}
    for name, tensor in ordered.items():
        groups[_group(name)].update(_bytes(tensor))
    header: dict[str, Any] = {
        "__metadata__": {
            "plain": json.dumps(plain),
            "note": json.dumps(note),
            "groups": json.dumps({group: digest.hexdigest() for group, digest in groups.items()}),
            "sha256": UNSEALED,
            **({"pieces": pieces.to_text()} if pieces else {}),
        }
    }
    end = 0
    for name, tensor in ordered.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    digest = hashlib.sha256(text).hexdigest()
    text = text.replace(_seal(UNSEALED), _seal(digest), 1)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in ordered.values():
        file.write(_bytes(tensor))


def _seal(digest: str) -> bytes:
    return f'"sha256": "{digest}"'.encode()


def _group(name: str) -> str:
    return name.partition("/")[0]


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def read_tree(path: Path, skip: Collection[str] = ()) -> dict[str, Any]:
    """The tree in a file; the tensors of the groups in `skip` are None, and aren't read.

    Raises:
        Damaged: the file isn't as it was written.
        OSError: it can't be read.
    """
    header = read_header_text(path)
    metadata = _metadata(header)
    digest = metadata.get("sha256", "")
    if hashlib.sha256(header.replace(_seal(digest), _seal(UNSEALED), 1)).hexdigest() != digest:
        raise Damaged("the checksum of its header doesn't match")
    try:
        groups = json.loads(metadata["groups"])
        tensors = read_tensors(path, skip)
        _verify(tensors, groups)
        pieces = read_pieces(metadata)
        for group in pieces.groups if pieces else ():
            if group not in skip:
                tensors |= read_group(path.parent / pieces.folder / group, pieces.groups[group])
        tree = join(json.loads(metadata["plain"]), tensors)
    except (SafetensorError, KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise Damaged(f"it was cut off or changed ({error!s:.80})") from error
    if not isinstance(tree, dict):
        raise Damaged("it holds no dict")
    return tree


def read_tensors(path: Path, skip: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name in order, without those of the groups in `skip`.

    Raises:
        SafetensorError: the file is damaged.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:  # the library can't open a file by such a name
        tensors = load(path.read_bytes())
        return {name: tensors[name] for name in sorted(tensors) if _group(name) not in skip}
    # Not mapped: a process ends at once if a mapped file is changed in place.
    with safe_open(path, "pt", backend="pread") as file:
        names = sorted(name for name in file.keys() if _group(name) not in skip)  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def _verify(tensors: Mapping[str, Tensor], groups: Mapping[str, str]) -> None:
    """Raise `Damaged` if the bytes of a group aren't those that were written. `tensors` are sorted by name."""
    digests = {group: hashlib.sha256() for group in map(_group, tensors)}
    for name, tensor in tensors.items():
        digests[_group(name)].update(_bytes(tensor))
    for group, digest in digests.items():
        if groups.get(group) != digest.hexdigest():
            raise Damaged(f"the checksum of its {group} doesn't match")


def read_pieces(metadata: Mapping[str, str]) -> Pieces | None:
    """Where the tensors are that aren't in the file of this metadata; None if there are none.

    Raises:
        Damaged: it is malformed.
    """
    return Pieces.from_text(metadata["pieces"]) if "pieces" in metadata else None


def read_note(path: Path) -> dict[str, Any] | None:
    """The note of a file, without verifying it; None if there is none."""
    try:
        note = json.loads(read_metadata(path)["note"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return note if isinstance(note, dict) else None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, not verified.

    Raises:
        Damaged: there is none, or it is malformed.
        OSError: the file can't be read.
    """
    return _metadata(read_header_text(path))


def read_header_text(path: Path) -> bytes:
    """The header of a safetensors file as JSON.

    Raises:
        Damaged: there is none.
        OSError: the file can't be read.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_HEADER, os.fstat(file.fileno()).st_size - 8):
            raise Damaged("it has no header of safetensors, or was cut off")
        return file.read(length)


def _metadata(header: bytes) -> dict[str, str]:
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise Damaged("its header is malformed") from error
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise Damaged("its header is malformed")
    return metadata
