"""Groups of tensors in safetensors files beside the file of their tree, as several processes write them: each tensor
whole or in pieces, in one file or in several.

Each group has a subfolder of its own. The files are those of `torch.distributed.checkpoint`, whose metadata has the
place of each piece in its tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nets.weights.digest import digest_file

FOLDER = re.compile(r"ep\d+-step\d+-[0-9a-f]{8}")
FILE = re.compile(r"[\w-]+\.safetensors", re.ASCII)
PLACES = "DCP_SHARDING_INFO"
"""The key of the metadata that has the place of each piece."""


class Damaged(ValueError):
    """A file isn't what was written."""


class Pieces(NamedTuple):
    """Where the tensors of some groups are.

    Attributes:
        folder: name of the folder, beside the file of the tree.
        groups: for each group the files in its subfolder, with their SHA-256.
    """

    folder: str
    groups: Mapping[str, Mapping[str, str]]

    def to_text(self) -> str:
        """For the metadata of the tree's file."""
        return json.dumps(self._asdict())

    @staticmethod
    def from_text(text: str) -> Pieces:
        """Read what `to_text` has written.

        Raises:
            Damaged: it is something else, or a file is elsewhere.
        """
        try:
            pieces = Pieces(**json.loads(text))
            files = [name for group in pieces.groups.values() for name in group]
            named = FOLDER.fullmatch(pieces.folder) and all(map(str.isidentifier, pieces.groups))
            listed = all(type(group) is dict for group in pieces.groups.values())
            if not named or not listed or not all(map(FILE.fullmatch, files)):
                raise ValueError("a name isn't allowed")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"its list of files with tensors is malformed ({error!s:.80})") from error
        return pieces


def read_group(folder: Path, files: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors in the files of a group, which have these SHA-256, by name.

    Raises:
        Damaged: a file is missing, or isn't as it was written.
        OSError: a file can't be read.
    """
    found: dict[str, list[tuple[list[int], Tensor]]] = {}
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing; it belongs to the checkpoint, copy the folder, too")
        if digest_file(path) != digest:
            raise Damaged(f"the checksum of {path} doesn't match")
        try:
            with safe_open(path, "pt", backend="pread") as file:
                places = json.loads(file.metadata()[PLACES])
                for key in file.keys():  # noqa: SIM118
                    found.setdefault(key, []).append((places[key]["saved_offsets"], file.get_tensor(key)))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{path} doesn't hold pieces of tensors ({error!s:.80})") from error
    try:
        return {key: _join(found.pop(key)) for key in sorted(found)}
    except (TypeError, ValueError, RuntimeError) as error:
        raise Damaged(f"the pieces of a tensor in {folder} don't fit together ({error!s:.80})") from error


def _join(pieces: list[tuple[list[int], Tensor]]) -> Tensor:
    """A tensor, of its pieces and the places of their first elements."""
    if len(pieces) == 1 and not any(pieces[0][0]):
        return pieces[0][1]
    ends = [[start + size for start, size in zip(place, piece.shape, strict=True)] for place, piece in pieces]
    shape = [max(axis) for axis in zip(*ends, strict=True)]
    if sum(piece.numel() for _, piece in pieces) != math.prod(shape):
        raise ValueError("some are missing")
    whole = torch.zeros(shape, dtype=pieces[0][1].dtype)
    for (place, piece), end in zip(pieces, ends, strict=True):
        whole[tuple(map(slice, place, end))] = piece
    return whole
