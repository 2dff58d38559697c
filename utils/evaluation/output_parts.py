"""Outputs for a part of the images in a file, `eval.py --part`, and the outputs of all parts, `eval.py --merge`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nets.weights.tree import read_tree, write_tree
from utils.data.image_list import ImageList
from utils.inference.classifier import Classifier
from utils.inference.outputs import Outputs
from utils.system.files import write_whole
from utils.system.part import Part, check_facts, complete_parts, refuse_part

FILE = "outputs.safetensors"
"""In the output folder; `Part.place` gives the name of a part's file."""
MAX_DESCRIPTION = 1 << 20
"""Bytes of a part's file besides its outputs."""
IMAGES, OOD = "images", "ood"
"""The names of the lists; unreadable images of the second are skipped."""


@dataclass(frozen=True)
class OutputParts:
    """The files of the parts of an evaluation.

    Attributes:
        folder: of the files.
        checkpoint_sha256: of the evaluated file.
        classifier: the classifier in it.
        lists: the images, and any OOD images, by name.
        batch_size: images per batch.
    """

    folder: Path
    checkpoint_sha256: str
    classifier: Classifier
    lists: Mapping[str, ImageList]
    batch_size: int

    def rows(self, part: Part) -> dict[str, range]:
        """The images of a part, in each list."""
        return {name: part.rows(len(images), self.batch_size) for name, images in self.lists.items()}

    def write(self, part: Part, outputs: Mapping[str, Outputs]) -> Path:
        """Write the outputs for the images of a part, whose indices start from its first image; return the file.

        Raises:
            WriteError: it can't be written.
        """
        tree = {}
        for name, of_list in outputs.items():
            tree[name] = of_list._asdict() | {"indices": of_list.indices + self.rows(part)[name].start}
            del tree[name]["class_ids"]  # they are in the list
        file = part.place(self.folder / FILE)
        with write_whole(file) as opened:
            write_tree(opened, {"facts": self._facts(part, self.classifier.precision), "outputs": tree}, note={})
        return file

    def read(self) -> dict[str, Outputs]:
        """The outputs for all images of each list, from the files of all parts, which may be from untrusted sources.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: a part's file is damaged, or was made of something else, or in another precision than the first.
        """
        collected = {name: self._empty(len(images)) for name, images in self.lists.items()}
        counts = dict.fromkeys(self.lists, 0)
        precision = None
        for part, file in complete_parts(self.folder / FILE).items():
            try:
                content = self._read(part, file)
                facts = content.get("facts")
                if precision is None and isinstance(facts, dict):
                    precision = facts.get("precision")
                check_facts(facts, self._facts(part, str(precision)))
                for name, rows in self.rows(part).items():
                    of_part = self._check(name, rows, content.get("outputs")) if rows else self._empty(0)
                    first, counts[name] = counts[name], counts[name] + len(of_part.indices)
                    for tensor, values in zip(collected[name], of_part, strict=True):
                        tensor[first : counts[name]] = values
            except (ValueError, OSError) as error:
                raise refuse_part(part, file, error) from error
        return {name: Outputs(*(tensor[: counts[name]] for tensor in tensors)) for name, tensors in collected.items()}

    def _facts(self, part: Part, precision: str) -> dict[str, str | int]:
        """What a part's file depends on. The temperature is applied later."""
        digests = {name: self.lists[name].digest() if name in self.lists else "" for name in (IMAGES, OOD)}
        facts = {"part": str(part), "checkpoint": self.checkpoint_sha256, "batch_size": self.batch_size}
        return facts | digests | {"precision": precision}

    @property
    def _sizes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each output for one image."""
        width, num_classes = self.classifier.network.model.head.in_features, len(self.classifier.class_names)
        return {"logits": (num_classes,), "embeddings": (width,), "brightness": ()}

    def _empty(self, count: int) -> Outputs:
        """Memory for the outputs for `count` images."""
        columns = {name: torch.empty(count, *size) for name, size in self._sizes.items()}
        return Outputs(**columns, **{name: torch.empty(count, dtype=torch.int64) for name in ("class_ids", "indices")})

    def _read(self, part: Part, file: Path) -> dict[str, Any]:
        """The content of a part's file, unless it is larger than one can be."""
        bytes_per_image = 8 + 4 * sum(sum(size) or 1 for size in self._sizes.values())
        if file.stat().st_size > sum(map(len, self.rows(part).values())) * bytes_per_image + MAX_DESCRIPTION:
            raise ValueError("it is larger than the outputs for its images")
        return read_tree(file)

    def _check(self, name: str, rows: range, outputs: Any) -> Outputs:
        """The outputs in a part's file for the images `rows` of a list.

        Raises:
            ValueError: they aren't what `write` writes.
        """
        columns = outputs.get(name) if isinstance(outputs, dict) else None
        indices = columns.get("indices") if isinstance(columns, dict) else None
        if not _is_tensor(indices, torch.int64, 1):
            raise ValueError("it has no outputs for its images")
        numbers = indices.tolist()
        if numbers != (sorted(set(rows).intersection(numbers)) if name == OOD else list(rows)):
            raise ValueError("its outputs aren't for its images, each once and in order")
        for column, size in self._sizes.items():
            shape = (len(numbers), *size)
            if not _is_tensor(columns.get(column), torch.float32, len(shape)) or columns[column].shape != shape:
                raise ValueError(f"its {column} aren't of type float32 and shape {shape}")
            if not columns[column].isfinite().all():
                raise ValueError(f"its {column} aren't finite")
        brightness = columns["brightness"]
        if not ((brightness >= 0) & (brightness <= 1)).all():
            raise ValueError("its brightness isn't from 0 to 1")
        class_ids = torch.from_numpy(self.lists[name].class_ids)[indices].long()
        return Outputs(columns["logits"], columns["embeddings"], class_ids, brightness, indices)


def _is_tensor(value: Any, dtype: torch.dtype, dim: int) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype and value.dim() == dim
