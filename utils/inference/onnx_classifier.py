"""Classify images with an exported ONNX file through ONNX Runtime."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.inference.exported_metadata import INPUT, OUTPUT, ExportedMetadata
from utils.inference.onnx_file import read_onnx
from utils.inference.prediction import Failure, Prediction, make_prediction
from utils.inference.predictor import BATCH, ImageInput, check_stream_arguments, read_region, stream_predictions
from utils.inference.rejection import Rejection
from utils.system.files import format_bytes
from utils.system.thread_map import MAX_AHEAD

if TYPE_CHECKING:
    import onnxruntime

ONNX_SUFFIX = ".onnx"
MAX_MEMORY = 6 << 30
"""Bytes for the weights of all files that are open and for the values of an image."""
EXTEND_AS_REQUESTED = 1
"""ONNX Runtime's number for growing by what is needed, not by powers of two."""
SECONDS = 60
"""Time limit of an image."""
MAX_DEVIATION = 1e-3
"""Of a sum of probabilities from 1."""


@dataclass(frozen=True)
class OnnxClassifier:
    """An exported ONNX file, ready to classify images.

    Attributes:
        path: the file.
        session: uint8 images (B, height, width, 3) to probabilities (B, classes).
        metadata: class names, preprocessing and provenance.
        calibration, raw, can_reject: as in `Predictor`; the same for all files, which contain only a temperature.
    """

    path: Path
    session: onnxruntime.InferenceSession
    metadata: ExportedMetadata
    calibration: None = None
    raw: bool = False
    can_reject: bool = False

    @property
    def class_names(self) -> list[str]:
        """The name of each class id."""
        return self.metadata.class_names

    @property
    def preprocessing(self) -> Preprocessing:
        """How image files are read; the file's graph does the rest."""
        return self.metadata.preprocessing

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """Probabilities (B, classes), fp32, of uint8 RGB images (B, height, width, 3) of any size; NaN where the
        network's output isn't finite.

        Raises:
            ValueError: the output isn't probabilities of the classes, or takes too much time or memory.
        """
        output = self._run(pixels)
        if output.shape != (len(pixels), len(self.class_names)) or not _are_probabilities(output):
            raise ValueError(
                f"{self.path} can't be used: its output is not probabilities of {len(self.class_names)} classes"
            )
        return output

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        """The output for images, within `SECONDS` and `MAX_MEMORY`."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        timer = threading.Timer(SECONDS, setattr, (options, "terminate", True))
        timer.daemon = True
        timer.start()
        try:
            (output,) = self.session.run([OUTPUT], {INPUT: pixels}, options)
        except Exception as error:  # ONNX Runtime's exceptions have no other base class
            raise ValueError(
                f"{self.path} can't be used: it takes more than {format_bytes(MAX_MEMORY)} or {SECONDS} s for an "
                f"image, or is inconsistent ({error!s:.120})"
            ) from error
        finally:
            timer.cancel()
        return output

    def stream(
        self,
        images: Iterable[ImageInput],
        top_k: int = 5,
        batch_size: int = BATCH,
        tta: bool = False,
        rejection: Rejection | None = None,
    ) -> Iterator[Prediction | Failure]:
        """Yield a result for each image, see `Predictor.stream`.

        Images differ in size, so one is classified at a time; `batch_size` only limits how many are read ahead.

        Raises:
            ValueError: also if `tta` is set.
        """
        check_stream_arguments(top_k, batch_size)
        if tta:
            raise ValueError(f"tta: not available for the ONNX file {self.path}; use its checkpoint")
        transform = EvalTransform(self.preprocessing)

        def load(image: ImageInput) -> np.ndarray:
            return read_region(image, self.preprocessing, transform).pixels

        def predict(batch: list[tuple[str, np.ndarray]]) -> Iterator[Prediction | Failure]:
            for path, pixels in batch:
                (probabilities,) = self.probabilities(pixels[None])
                if not np.isfinite(probabilities).all():
                    yield Failure(path, f"{path}: the output of {self.path} isn't finite; use another file")
                    continue
                top = np.argsort(-probabilities, kind="stable")[:top_k]
                classes = tuple((self.class_names[k], float(probabilities[k])) for k in top)
                yield make_prediction(path, classes, rejection)

        return stream_predictions(images, load, predict, batch_size=1, read_ahead=min(batch_size, MAX_AHEAD))


def _are_probabilities(output: np.ndarray) -> bool:
    """Whether each row has numbers from 0 to 1 whose sum is 1, or isn't finite."""
    rows = output[np.isfinite(output).all(axis=1)]
    return bool((rows >= 0).all() and (rows <= 1).all() and (abs(rows.sum(axis=1) - 1) < MAX_DEVIATION).all())


@cache
def _limit_memory() -> None:
    """Give ONNX Runtime an allocator of limited size for all sessions of this process."""
    import onnxruntime

    place = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    limits = onnxruntime.OrtArenaCfg({"max_mem": MAX_MEMORY, "arena_extend_strategy": EXTEND_AS_REQUESTED})
    onnxruntime.create_and_register_allocator(place, limits)


def is_onnx(path: str) -> bool:
    """Whether `path` has the suffix of ONNX files."""
    return path.lower().endswith(ONNX_SUFFIX)


def open_onnx(path: str | Path) -> OnnxClassifier:
    """Open an exported file, from a possibly untrusted source, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, isn't an export of Thaw, or its graph doesn't match its metadata.
    """
    import onnxruntime  # takes a second, and only exported files need it

    path = Path(path)
    content, metadata = read_onnx(path)
    _limit_memory()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Without this, ONNX Runtime might detect its own format, which was not checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.log_severity_level = 3  # errors are raised anyway
    # Spinning threads would take the cores that decode images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no other base class
        raise ValueError(f"{path} can't be opened by ONNX Runtime {onnxruntime.__version__}: {error!s:.200}") from error
    num_classes = len(metadata.class_names)
    inputs = [(node.name, node.type, len(node.shape), node.shape[3:]) for node in session.get_inputs()]
    outputs = [(node.name, node.type, node.shape[1:]) for node in session.get_outputs()]
    if inputs != [(INPUT, "tensor(uint8)", 4, [3])] or outputs != [(OUTPUT, "tensor(float)", [num_classes])]:
        raise ValueError(f"{path} can't be used: its graph doesn't map images to its {num_classes} classes")
    return OnnxClassifier(path, session, metadata)
