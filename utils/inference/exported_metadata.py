"""The metadata inside exported files: enough to use one without its run, and validated on reading."""

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
VERSION_KEY = "thaw_export"
"""The metadata key of the format version, present in every export of Thaw."""

INPUT, OUTPUT = "images", "probabilities"
INPUT_DESCRIPTION = {
    "name": INPUT,
    "dtype": "uint8",
    "shape": ["batch", "height", "width", 3],
    "content": "upright RGB images of any size, the same within a batch, with white in place of transparency and "
    "16-bit integers divided by 257; no other preprocessing is needed",
}
OUTPUT_DESCRIPTION = {
    "name": OUTPUT,
    "dtype": "float32",
    "shape": ["batch", "classes"],
    "content": "the probability of each class, in the order of class_names",
}

MAX_CLASSES = 1_000_000
MAX_INPUT_PIXELS = 1 << 24
"""The largest input shape, 4096 x 4096, by its area."""


@dataclass(frozen=True)
class ExportedMetadata:
    """The metadata of an exported file.

    Attributes:
        class_names: the name of each class id.
        preprocessing: how images are prepared; part of the exported graph, except for reading files.
        temperature: what logits are divided by; also part of the graph.
        provenance: `checkpoint`, `checkpoint_sha256`, `run`, `torch`, `date` and `precision`.
        model: the arguments of `nets.factory.build_model`.
    """

    class_names: list[str]
    preprocessing: Preprocessing
    temperature: float
    provenance: dict[str, str]
    model: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The content of the JSON file beside an export, as plain types."""
        return {
            VERSION_KEY: FORMAT_VERSION,
            "class_names": self.class_names,
            "input": INPUT_DESCRIPTION,
            "output": OUTPUT_DESCRIPTION,
            "preprocessing": self.preprocessing.as_dict(),
            "temperature": self.temperature,
            "provenance": self.provenance,
            "model": self.model,
        }

    def as_strings(self) -> dict[str, str]:
        """`as_dict` with each value encoded as JSON, for the metadata of ONNX and torch files."""
        return {name: json.dumps(value) for name, value in self.as_dict().items()}

    @staticmethod
    def from_strings(strings: Mapping[str, str], source: str | Path) -> ExportedMetadata:
        """Parse and validate the result of `as_strings`, read from the file `source`.

        Raises:
            ValueError: `source` isn't an export of Thaw, has another version, or contains an invalid value.
        """
        if VERSION_KEY not in strings:
            raise ValueError(f"{source} isn't an export of Thaw: create one with python export.py")
        if strings[VERSION_KEY] != str(FORMAT_VERSION):
            version = strings[VERSION_KEY]
            raise ValueError(f"{source} has export format {version:.20}, not {FORMAT_VERSION}: export it again")
        try:
            names, values, temperature, provenance, model = (
                json.loads(strings[key])
                for key in ("class_names", "preprocessing", "temperature", "provenance", "model")
            )
            preprocessing = Preprocessing.from_dict(values)
        except (KeyError, TypeError, RecursionError, OverflowError, ValueError) as error:
            raise ValueError(f"{source} can't be used: its metadata can't be read ({error!r:.80})") from error
        valid = {
            "class_names": valid_class_names(names),
            "preprocessing": valid_preprocessing(preprocessing),
            "temperature": type(temperature) in (int, float) and 1e-6 < temperature < 1e6,
            "provenance": isinstance(provenance, dict) and all(isinstance(v, str) for v in provenance.values()),
            "model": isinstance(model, dict),
        }
        if invalid := [name for name, is_valid in valid.items() if not is_valid]:
            raise ValueError(f"{source} can't be used: invalid {', '.join(invalid)} in its metadata")
        return ExportedMetadata(names, preprocessing, float(temperature), provenance, model)


def valid_class_names(names: Any) -> bool:
    """Whether `names` is a list of two or more distinct strings that can be written to a file."""
    if not isinstance(names, list) or not 2 <= len(names) <= MAX_CLASSES:
        return False
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        return False
    try:
        return bool("".join(names).encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return False


def valid_preprocessing(preprocessing: Preprocessing) -> bool:
    """Whether the values are valid settings and the input shape doesn't take too much memory."""
    try:
        TrainConfig(**dataclasses.asdict(preprocessing))
    except (ValueError, OverflowError):  # OverflowError: an integer too large for a float
        return False
    return math.prod(preprocessing.input_shape) <= MAX_INPUT_PIXELS
