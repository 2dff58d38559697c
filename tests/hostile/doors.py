"""Opens files at the doors of Thaw, in a process with limits: `python -m tests.hostile.doors DOOR FILE ...`.

Prints a line for each file: its name, the outcome ("opened", or "refused: ..." for a clear error) and the seconds. Any
other exception ends the process, as does exceeding the limits.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import numpy as np

from nets.weights.load import read_weights
from utils.config.train_config import TrainConfig
from utils.inference.classifier import load_classifier
from utils.inference.onnx_classifier import open_onnx
from utils.modeling.build import build_network
from utils.runs.checkpoint import load_checkpoint

MEMORY = 8 << 30
"""Bytes of address space, of which torch and ONNX Runtime need about three gigabytes."""


def use_onnx(path: str) -> None:
    """Open an exported file and classify two images with it."""
    classifier = open_onnx(path)
    for shape in ((8, 8), (33, 17)):
        classifier.probabilities(np.full((1, *shape, 3), 128, np.uint8))


def use_checkpoint(path: str) -> None:
    """Read a checkpoint to resume, to classify, and as weights."""
    content = load_checkpoint(path)
    build_network(TrainConfig.from_dict(content["config"]).with_defaults(), content["class_names"], content)
    classifier = load_classifier(path, "cpu")
    classifier.predict(np.full((8, 8, 3), 128, np.uint8))
    read_weights(path)


DOORS: dict[str, Callable[[str], None]] = {
    "onnx": use_onnx,
    "checkpoint": use_checkpoint,
    "weights": lambda path: read_weights(path) and None,
}

if __name__ == "__main__":
    door, *paths = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for path in paths:
        started = time.monotonic()
        try:
            DOORS[door](path)
            outcome = "opened"
        except ValueError as error:  # what users are shown in one line
            outcome = f"refused: {error}".replace("\n", " ")
        print(f"{path}\t{outcome}\t{time.monotonic() - started:.2f}", flush=True)
