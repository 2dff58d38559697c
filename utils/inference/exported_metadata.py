"""What an exported file says of itself: enough to use it without its run, and never taken on trust."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config.train_config import TrainConfig
from utils.data.preprocessing import Preprocessing

FORMAT_VERSION = 1
MARK = "thaw_export"
"""The key under which the version stands; what lacks it is none of Thaw's exports."""

INPUT, OUTPUT = "images", "probabilities"
INPUT_DESCRIPTION = {
    "name": INPUT,
    "dtype": "uint8",
    "shape": ["batch", "height", "width", 3],
    "content": "upright RGB images of any size, those of a batch of one size, white where they were transparent; "
    "nothing else is to be done to them",
}
OUTPUT_DESCRIPTION = {
    "name": OUTPUT,
    "dtype": "float32",
    "shape": ["batch", "classes"],
    "content": "the probability of each class, in the order of class_names",
}

MAX_CLASSES = 1_000_000
MAX_NUMBER = 1e9
MAX_INPUT_PIXELS = 1 << 24
"""Of what an image is resized to: 4096 x 4096."""


@dataclass(frozen=True)
class ExportFacts:
    """What an exported file says of itself.

    Attributes:
        class_names: name of each class id.
        preprocessing: how images are prepared; all but reading files is inside the file.
        temperature: what logits are divided by, inside the file too.
        provenance: where it comes from: `checkpoint`, `checkpoint_sha256`, `run`, `torch`, `date`, `precision`.
        model: what `nets.factory.build_model` needs to build the network.
    """

    class_names: list[str]
    preprocessing: Preprocessing
    temperature: float
    provenance: dict[str, str]
    model: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """As plain types, as a JSON card has them."""
        return {
            MARK: FORMAT_VERSION,
            "class_names": self.class_names,
            "input": INPUT_DESCRIPTION,
            "output": OUTPUT_DESCRIPTION,
            "preprocessing": self.preprocessing.as_dict(),
            "temperature": self.temperature,
            "provenance": self.provenance,
            "model": self.model,
        }

    def as_strings(self) -> dict[str, str]:
        """The same with each value as JSON, as the metadata of ONNX and torch has it."""
        return {name: json.dumps(value) for name, value in self.as_dict().items()}

    @staticmethod
    def from_strings(strings: Mapping[str, str], source: str | Path) -> ExportFacts:
        """What `as_strings` gave, from a file that isn't trusted.

        Raises:
            ValueError: it isn't an export of Thaw's of this version, or something in it can't be; names `source`.
        """
        if MARK not in strings:
            raise ValueError(f"{source} is none of Thaw's exports: python export.py makes one of a checkpoint")
        if strings[MARK] != str(FORMAT_VERSION):
            raise ValueError(
                f"{source} has export format {strings[MARK]:.20}, this is for {FORMAT_VERSION}: export it anew"
            )
        try:
            names, values, temperature, provenance, model = (
                json.loads(strings[key])
                for key in ("class_names", "preprocessing", "temperature", "provenance", "model")
            )
            preprocessing = Preprocessing.from_dict(values)
        except (KeyError, TypeError, RecursionError, OverflowError, ValueError) as error:
            raise ValueError(f"{source} can't be used: its metadata can't be read ({error!r:.80})") from error
        wrong = [
            name
            for name, fits in {
                "class_names": are_names(names),
                "preprocessing": is_preprocessing(preprocessing),
                "temperature": _is_number(temperature) and 1e-6 < temperature < 1e6,
                "provenance": isinstance(provenance, dict) and all(isinstance(v, str) for v in provenance.values()),
                "model": isinstance(model, dict),
            }.items()
            if not fits
        ]
        if wrong:
            raise ValueError(f"{source} can't be used: in its metadata {', '.join(wrong)} can't be right")
        return ExportFacts(names, preprocessing, float(temperature), provenance, model)


def are_names(names: Any) -> bool:
    """Whether these can be the names of classes: two or more, each once, and each to be written to a file."""
    fits = isinstance(names, list) and 2 <= len(names) <= MAX_CLASSES
    fits = fits and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    try:
        return fits and bool("".join(names).encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return False


def is_preprocessing(values: Preprocessing) -> bool:
    """Whether these can be settings of a run, and don't ask for more memory than an image may take."""
    try:
        TrainConfig(**dataclasses.asdict(values))
    except (ValueError, OverflowError):  # the second of a whole number beyond all floats
        return False
    return math.prod(values.input_shape) <= MAX_INPUT_PIXELS


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -MAX_NUMBER < value < MAX_NUMBER
