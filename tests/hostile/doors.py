"""Opens files at the doors of Thaw, in a process with limits: `python -m tests.hostile.doors KIND FILE ...`.

Prints a line for each file: its name, the outcome at each door ("opened", or "refused: ..." for an error of Thaw's own,
or a traceback) and the seconds at all doors. Exceeding the limit of memory may end the process.
"""

from __future__ import annotations

import resource
import sys
import time
import traceback
from collections.abc import Callable

import numpy as np

from utils.annotation.embeddings import choose_backbone
from utils.config.train_config import TrainConfig
from utils.inference.classifier import load_classifier
from utils.inference.onnx_classifier import open_onnx
from utils.modeling.build import build_network
from utils.runs.checkpoint import load_checkpoint
from utils.system.cli import error_message

MEMORY = 8 << 30
"""Bytes of address space, of which torch and ONNX Runtime need about three gigabytes."""


def use_onnx(path: str) -> None:
    """Open an exported file and classify two images with it."""
    classifier = open_onnx(path)
    for shape in ((8, 8), (33, 17)):
        classifier.probabilities(np.full((1, *shape, 3), 128, np.uint8))


def resume(path: str) -> None:
    """Read a checkpoint as a resumed run does."""
    content = load_checkpoint(path)
    build_network(TrainConfig.from_dict(content["config"]).with_defaults(), content["class_names"], content)


def classify(path: str) -> None:
    """Classify an image with a checkpoint or an export, and reject the prediction if the file knows when to."""
    classifier = load_classifier(path, "cpu")
    rejection = classifier.calibration.choose_rejection(0.05) if classifier.can_reject else None
    classifier.predict(np.full((8, 8, 3), 128, np.uint8), tta=True, rejection=rejection)


def start(path: str) -> None:
    """Start a run like that of `tests/conftest.py` from weights."""
    config = TrainConfig(backbone="vit_xs_4", input_shape=(8, 8), model_path=path).with_defaults()
    build_network(config, ["dark", "light"])


DOORS: dict[str, tuple[Callable[[str], object], ...]] = {
    "onnx": (use_onnx,),
    "checkpoint": (resume, classify, start, choose_backbone),
    "weights": (classify, start, choose_backbone),
}
"""What is done with files of each kind."""


def try_door(door: Callable[[str], object], path: str) -> str:
    """The outcome of opening a file."""
    try:
        door(path)
        return "opened"
    except Exception as error:
        message = error_message(error)  # what users are shown in place of a traceback
        outcome = f"refused: {message}" if message and isinstance(error, ValueError) else traceback.format_exc()
        return outcome.replace("\n", " ").replace("\t", " ")


if __name__ == "__main__":
    kind, *paths = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for path in paths:
        started = time.monotonic()
        outcomes = [try_door(door, path) for door in DOORS[kind]]
        print("", path, *outcomes, f"{time.monotonic() - started:.2f}", sep="\t", flush=True)
