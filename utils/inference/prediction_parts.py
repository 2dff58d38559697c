"""Predictions for a part of the images in a file, `predict.py --part`, and those of all parts, `predict.py --merge`.

The first line of the file has what the predictions depend on, the others are as of `predict.py --json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from utils.inference.output_formats import from_json
from utils.inference.prediction import Failure, Prediction
from utils.inference.predictor import BATCH, Predictor
from utils.inference.rejection import UNKNOWN, Rejection
from utils.system.part import Part, check_facts, complete_parts, refuse_part

MAX_LINE = 1 << 26
"""Bytes of a line."""


@dataclass(frozen=True)
class PredictionParts:
    """The files of the parts of predictions.

    Attributes:
        path: the file that gets the predictions for all images.
        model_sha256: of the model's file.
        model: the model.
        paths: the images of all parts.
        top_k: classes of each prediction.
        tta: whether they are over views.
        rejection: which are rejected, if any.
    """

    path: Path
    model_sha256: str
    model: Predictor
    paths: Sequence[str]
    top_k: int
    tta: bool
    rejection: Rejection | None

    def rows(self, part: Part) -> range:
        """The images of a part."""
        return part.rows(len(self.paths), BATCH)

    def header(self, part: Part) -> str:
        """The first line of a part's file."""
        return json.dumps(self._facts(part, precision_of(self.model)))

    def read(self) -> Iterator[Prediction | Failure]:
        """Yield the predictions for all images, from the files of all parts, which may be from untrusted sources.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: a part's file is damaged, or was made of something else, or in another precision than the first.
        """
        files = complete_parts(self.path)
        precision = None
        for part, file in files.items():
            try:
                with file.open("rb") as opened:
                    facts = _read_header(opened)
                precision = facts.get("precision") if precision is None else precision
                check_facts(facts, self._facts(part, str(precision)))
            except (ValueError, OSError) as error:
                raise refuse_part(part, file, error) from error
        for part, file in files.items():
            try:
                with file.open("rb") as opened:
                    _read_header(opened)
                    yield from self._read_lines(opened, self.rows(part))
            except (ValueError, OSError) as error:
                raise refuse_part(part, file, error) from error

    @cached_property
    def _digest(self) -> str:
        """Of the paths."""
        return hashlib.sha256(b"\0".join(map(os.fsencode, self.paths))).hexdigest()

    def _facts(self, part: Part, precision: str) -> dict[str, str | int | bool]:
        """What a part's file depends on."""
        return {
            "part": str(part),
            "model": self.model_sha256,
            "images": self._digest,
            "batch_size": BATCH,
            "top_k": self.top_k,
            "tta": self.tta,
            "raw": self.model.raw,
            "rejection": repr(self.rejection),
            "precision": precision,
        }

    def _read_lines(self, file: BinaryIO, rows: range) -> Iterator[Prediction | Failure]:
        """Yield the predictions in the lines of a part's file, for the images `rows`.

        Raises:
            ValueError: they aren't what predict.py writes.
        """
        names = set(self.model.class_names)
        for i in rows:
            result = from_json(_read_line(file))
            if result.path != self.paths[i]:
                raise ValueError(f"it has {result.path!r:.200} in place of {self.paths[i]!r:.200}")
            if isinstance(result, Prediction):
                self._check(result, names)
            yield result
        if file.read(1):
            raise ValueError("it has more predictions than images")

    def _check(self, prediction: Prediction, names: set[str]) -> None:
        """Raise a ValueError unless a prediction could be one of the model's."""
        classes, probabilities = zip(*prediction.classes, strict=True)
        known = len(classes) == len(names.intersection(classes)) == self.top_k
        labelled = prediction.label == (UNKNOWN if prediction.rejected else classes[0])
        allowed = self.rejection is not None or not prediction.rejected
        if not (known and labelled and allowed) or sorted((0.0, *probabilities, 1.0), reverse=True) != [
            1.0,
            *probabilities,
            0.0,
        ]:
            raise ValueError(f"the prediction for {prediction.path!r:.200} can't be one of this model")


def _read_header(file: BinaryIO) -> dict[str, object]:
    try:
        content = json.loads(_read_line(file))
    except RecursionError:
        content = None
    if not isinstance(content, dict):
        raise ValueError("it isn't the file of a part")
    return content


def _read_line(file: BinaryIO) -> str:
    line = file.readline(MAX_LINE)
    if not line.endswith(b"\n"):
        raise ValueError("it was cut off")
    return line[:-1].decode()


def precision_of(model: Predictor) -> str:
    """The precision that a model computes in; "" for an ONNX file, which has only one."""
    return getattr(model, "precision", "")
