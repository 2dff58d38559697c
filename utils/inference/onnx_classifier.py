"""An exported ONNX file becomes a classifier again, by itself: ONNX Runtime, and no network of ours."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.data.image_io import ImageError, upright_rgb
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.inference.classifier import BATCH, ImageInput
from utils.inference.exported_metadata import INPUT, OUTPUT, ExportFacts
from utils.inference.onnx_file import read_onnx
from utils.inference.prediction import Failure, Prediction, make_prediction
from utils.inference.rejection import Rejection
from utils.system.thread_map import MAX_AHEAD, map_ahead

if TYPE_CHECKING:
    import onnxruntime

SUFFIX = ".onnx"


@dataclass(frozen=True)
class OnnxClassifier:
    """An exported file with all that it needs.

    Attributes:
        path: the file.
        session: uint8 images (B, height, width, 3) to probabilities (B, classes).
        facts: what the file says of itself.
        calibration, raw, can_reject: as `Classifier` has them, the same for all files.
    """

    path: Path
    session: onnxruntime.InferenceSession
    facts: ExportFacts
    calibration: None = None  # of it only the temperature is in the file
    raw: bool = False
    can_reject: bool = False

    @property
    def class_names(self) -> list[str]:
        """Name of each class id."""
        return self.facts.class_names

    @property
    def preprocessing(self) -> Preprocessing:
        """How it reads its images; the rest is inside."""
        return self.facts.preprocessing

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """Probabilities (B, classes), fp32, of images (B, height, width, 3), uint8 RGB of any size.

        Raises:
            ValueError: what comes out can't be probabilities of these classes.
        """
        (found,) = self.session.run([OUTPUT], {INPUT: pixels})
        if found.shape != (len(pixels), len(self.class_names)) or not np.isfinite(found).all():
            raise ValueError(
                f"{self.path} can't be used: it gives no probabilities of its {len(self.class_names)} classes"
            )
        return found

    def stream(
        self,
        images: Iterable[ImageInput],
        top_k: int = 5,
        batch_size: int = BATCH,
        tta: bool = False,
        rejection: Rejection | None = None,
    ) -> Iterator[Prediction | Failure]:
        """As `Classifier.stream`, but one image goes through at a time, since they are of different sizes, and at
        most `MAX_AHEAD` are read ahead.

        Raises:
            ValueError: a number below 1, or `tta`.
        """
        if top_k < 1 or batch_size < 1:
            raise ValueError(f"top_k={top_k}, batch_size={batch_size}: give whole numbers from 1 up")
        if tta:
            raise ValueError(f"tta: {self.path} sees an image one way only; take the checkpoint for several views")
        return self._stream(images, min(top_k, len(self.class_names)), min(batch_size, MAX_AHEAD), rejection)

    def _stream(
        self, images: Iterable[ImageInput], top_k: int, ahead: int, rejection: Rejection | None
    ) -> Iterator[Prediction | Failure]:
        load = partial(self._load, EvalTransform(self.preprocessing))
        for path, pixels in map_ahead(load, images, ahead):
            if isinstance(pixels, str):
                yield Failure(path, pixels)
                continue
            (found,) = self.probabilities(pixels[None])
            ranked = np.argsort(-found, kind="stable")[:top_k]
            classes = tuple((self.class_names[i], float(found[i])) for i in ranked)
            yield make_prediction(path, classes, rejection)

    def _load(self, transform: EvalTransform, image: ImageInput) -> tuple[str, np.ndarray | str]:
        """The path, and an image (height, width, 3) as `Classifier` reads it, or what is wrong with the file."""
        path = os.fspath(image) if isinstance(image, str | os.PathLike) else ""
        try:
            if isinstance(image, str | os.PathLike):
                with self.preprocessing.open(path) as opened:
                    return path, transform.region(opened).pixels
            return path, np.array(upright_rgb(image))
        except ImageError as error:
            return path, str(error)


def is_onnx(path: str) -> bool:
    """Whether a path is called as an ONNX file is."""
    return path.lower().endswith(SUFFIX)


def open_onnx(path: str | Path) -> OnnxClassifier:
    """Open an exported file, which isn't trusted, on the processor.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, isn't one of Thaw's exports, or isn't what it says.
    """
    import onnxruntime  # takes a second, and only exports need it

    path = Path(path)
    content, facts = read_onnx(path)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.load_model_format", "ONNX")  # what was checked, and no format of its own
    options.log_severity_level = 3  # what is wrong is raised
    # Threads that wait for work would keep cores busy that read images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have nothing else in common
        raise ValueError(f"{path} can't be opened by ONNX Runtime {onnxruntime.__version__}: {error!s:.200}") from error
    inputs = [(node.name, node.type, len(node.shape), node.shape[3:]) for node in session.get_inputs()]
    outputs = [(node.name, node.type, node.shape[1:]) for node in session.get_outputs()]
    if inputs != [(INPUT, "tensor(uint8)", 4, [3])] or outputs != [(OUTPUT, "tensor(float)", [len(facts.class_names)])]:
        raise ValueError(
            f"{path} can't be used: its graph isn't one from images to its {len(facts.class_names)} classes"
        )
    return OnnxClassifier(path, session, facts)
