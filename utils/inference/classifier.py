"""Classify images with a checkpoint or with exported weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nets.factory import restore_model
from nets.weights.load import read_weights
from nets.weights.safe_load import read_header
from utils.data.image_io import ImageError
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.inference.exported_metadata import VERSION_KEY, ExportedMetadata, valid_class_names, valid_preprocessing
from utils.inference.prediction import Failure, Prediction, make_prediction
from utils.inference.predictor import BATCH, ImageInput, check_stream_arguments, read_region, stream_predictions
from utils.inference.rejection import Calibration, Rejection
from utils.inference.tta_views import TTAViews
from utils.modeling.pixel_network import PixelNetwork, cast_for_inference
from utils.modeling.precision import autocast, choose_precision, pick_device
from utils.runs.checkpoint import find_checkpoint, load_checkpoint

WEIGHTS_SUFFIX = ".safetensors"
"""Suffix of weights written by export.py."""

MAX_VIEWS = 64
"""TTA views per forward pass."""


@dataclass(frozen=True)
class Classifier:
    """A trained network with its preprocessing, class names and calibration.

    Attributes:
        network: uint8 pixels (B, 3, height, width) to logits (B, classes), on `device`, in eval mode; to be called
            under `utils.modeling.precision.autocast(device, precision)`.
        preprocessing: how images are read and resized.
        transform: an image to uint8 (3, height, width).
        class_names: the name of each class id.
        device: where the network is.
        precision: the precision of the run, or the nearest that the device supports.
        temperature: logits are divided by it before the softmax.
        calibration: what was fitted on the validation images; None unless this is the best epoch of a finished run.
        raw: whether the calibration fitted after training is ignored.
        config: the settings of the run, as in `TrainConfig.as_dict`.
        origin: where the initial weights of the run came from, see `nets.weights.load.Weights`; empty for random
            weights; None if unknown.
    """

    network: PixelNetwork
    preprocessing: Preprocessing
    transform: EvalTransform
    class_names: list[str]
    device: torch.device
    precision: str
    temperature: float = 1.0
    calibration: Calibration | None = None
    raw: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, str] | None = None

    @property
    def can_reject(self) -> bool:
        """Whether `calibration` is present and in use."""
        return self.calibration is not None and not self.raw

    @property
    def tta_views(self) -> TTAViews:
        """An image to uint8 (views, 3, height, width), mirrored too if training mirrored images."""
        return TTAViews(self.preprocessing, mirror=self.config.get("horizontal_flip", 0) > 0)

    @property
    def tta_temperature(self) -> float:
        """What logits averaged over TTA views are divided by: `temperature` if none was fitted for TTA."""
        fitted = self.calibration.tta_temperature if self.can_reject else None
        return self.temperature if fitted is None else fitted

    @property
    def non_finite_message(self) -> str:
        """The error message for logits that aren't finite."""
        return (
            f"the network's output isn't finite: some weights are NaN, or values overflow in {self.precision}; use "
            f"another checkpoint"
        )

    def load(self, image: ImageInput) -> Tensor:
        """Read an image as uint8 (3, height, width).

        Raises:
            ImageError: the file can't be read.
        """
        return self.transform.resize(read_region(image, self.preprocessing, self.transform))

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, C), the input of the head, and logits (B, classes) of uint8 images (B, 3, height, width).

        Both are fp32 on the CPU.
        """
        model = self.network.model
        with autocast(self.device, self.precision):
            embeddings = model.forward_embedding(self.network.normalize(pixels.to(self.device, non_blocking=True)))
            logits = model.head(embeddings)
        return embeddings.float().cpu(), logits.float().cpu()

    def forward_views(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, views, C), and logits (B, classes) averaged over the views, of uint8 images (B, views, 3,
        height, width).

        Averaged logits have a lower log-loss than averaged probabilities, see docs/benchmarks.md.
        """
        outputs = [self.forward(pixels) for pixels in views.flatten(0, 1).split(MAX_VIEWS)]
        embeddings, logits = (torch.cat(rows).unflatten(0, views.shape[:2]) for rows in zip(*outputs, strict=True))
        return embeddings, logits.mean(dim=1)

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Probabilities (B, classes), fp32 on the CPU, of uint8 images (B, 3, height, width)."""
        _, logits = self.forward(pixels)
        return (logits / self.temperature).softmax(dim=1)

    def predict(
        self,
        images: ImageInput | Iterable[ImageInput],
        top_k: int = 5,
        batch_size: int = BATCH,
        tta: bool = False,
        rejection: Rejection | None = None,
    ) -> list[Prediction]:
        """Classify one image or several.

        >>> classifier = load_classifier("logs/2026-01-01_12-00-00")  # doctest: +SKIP
        >>> classifier.predict(["cat.jpg", Image.open("dog.png"), array])[0].label  # doctest: +SKIP
        'cat'

        Args:
            images: paths, Pillow images (rotated by their EXIF orientation), or uint8 arrays, (height, width, 3) in
                RGB or (height, width) in gray. Large JPEG files are decoded at a reduced scale, so their pixels differ
                from those of the same image in memory by about one level of 255.
            top_k, batch_size, tta, rejection: see `Predictor.stream`.

        Raises:
            ImageError: a file can't be read, or the network's output for it isn't finite; `stream` yields a `Failure`
                instead.
            ValueError: an array has another dtype or shape.
        """
        inputs = [images] if isinstance(images, ImageInput) else images
        predictions = []
        for result in self.stream(inputs, top_k, batch_size, tta, rejection):
            if isinstance(result, Failure):
                raise ImageError(result.error, result.path)
            predictions.append(result)
        return predictions

    def stream(
        self,
        images: Iterable[ImageInput],
        top_k: int = 5,
        batch_size: int = BATCH,
        tta: bool = False,
        rejection: Rejection | None = None,
    ) -> Iterator[Prediction | Failure]:
        """Yield a result for each image, see `Predictor.stream`."""
        check_stream_arguments(top_k, batch_size)
        transform = self.tta_views if tta else self.transform

        def load(image: ImageInput) -> Tensor:
            views = transform.resize(read_region(image, self.preprocessing, transform))
            return views.reshape(-1, *views.shape[-3:])  # (views, 3, height, width)

        temperature = self.tta_temperature if tta else self.temperature
        predict = partial(self._predict_batch, top_k=top_k, rejection=rejection, temperature=temperature)
        return stream_predictions(images, load, predict, batch_size, 2 * batch_size if batch_size > 1 else 1)

    def _predict_batch(
        self, batch: list[tuple[str, Tensor]], top_k: int, rejection: Rejection | None, temperature: float
    ) -> Iterator[Prediction | Failure]:
        """Yield a result for each pair of a path and views (views, 3, height, width)."""
        paths, images = zip(*batch, strict=True)
        embeddings, logits = self.forward_views(torch.stack(images))
        probabilities = (logits / temperature).softmax(dim=1)
        if rejection and self.calibration:
            distances = self.calibration.distances(embeddings[:, 0])  # of the first view, as in evaluation
        else:
            distances = torch.zeros(len(batch))
        top = probabilities.topk(min(top_k, len(self.class_names)))
        rows = zip(paths, top.values.tolist(), top.indices.tolist(), distances.tolist(), strict=True)
        for path, values, class_ids, distance in rows:
            if math.isfinite(values[0]):  # topk sorts NaN first
                classes = tuple((self.class_names[k], value) for k, value in zip(class_ids, values, strict=True))
                yield make_prediction(path, classes, rejection, distance)
            else:
                yield Failure(path, f"{path}: {self.non_finite_message}" if path else self.non_finite_message)


def is_exported(path: Path) -> bool:
    """Whether a file is weights of export.py."""
    return path.suffix.lower() == WEIGHTS_SUFFIX and VERSION_KEY in read_header(path)


def read_exported(path: Path) -> dict[str, Any]:
    """Read a `.safetensors` file of export.py as the part of a checkpoint that a classifier needs.

    Raises:
        ValueError: the file isn't such an export, or its metadata is invalid.
    """
    state = read_weights(path).state
    metadata = ExportedMetadata.from_strings(read_header(path), path)
    return {
        "model": metadata.model,
        "weights": {name: t.float() if t.is_floating_point() else t for name, t in state.items()},
        "preprocessing": metadata.preprocessing.as_dict(),
        "class_names": metadata.class_names,
        "temperature": metadata.temperature,
        "calibration": {},
        "config": {"precision": "auto"},
        "origin": None,
    }


def load_classifier(path: str | Path, device: str = "auto", raw: bool = False, precision: str = "") -> Classifier:
    """Load a checkpoint or exported weights. No other file is needed.

    Args:
        path: a file or folder, see `utils.runs.checkpoint.find_checkpoint`. Weights of export.py (`.safetensors`)
            contain a temperature but no other calibration.
        device: auto, cuda, cpu or mps.
        raw: ignore the temperature that was fitted after training.
        precision: "fp32", "bf16" or "fp16"; empty: that of the run. If the device lacks it, the nearest one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file isn't a checkpoint or export of Thaw, or the device isn't available.
    """
    torch_device = pick_device(device)
    file = find_checkpoint(str(path))
    checkpoint = read_exported(file) if is_exported(file) else load_checkpoint(file, training_state=False)
    try:
        model = restore_model(checkpoint["model"], checkpoint["weights"])
        preprocessing = Preprocessing.from_dict(checkpoint["preprocessing"])
        transform = EvalTransform(preprocessing)
        chosen_precision, _ = choose_precision(precision or checkpoint["config"]["precision"], torch_device)
        calibration = Calibration.from_dict(checkpoint["calibration"])
        _check_parts(model, preprocessing, checkpoint["class_names"], calibration)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} can't be used: its contents are inconsistent ({error})") from error
    origin = checkpoint["origin"]
    return Classifier(
        network=cast_for_inference(PixelNetwork(model, preprocessing, torch_device), chosen_precision).eval(),
        preprocessing=preprocessing,
        transform=transform,
        class_names=checkpoint["class_names"],
        device=torch_device,
        precision=chosen_precision,
        temperature=1.0 if raw else calibration.temperature if calibration else checkpoint.get("temperature", 1.0),
        calibration=calibration,
        raw=raw,
        config=checkpoint["config"],
        origin=origin and {str(name): str(value) for name, value in origin.items()},
    )


def _check_parts(
    model: nn.Module, preprocessing: Preprocessing, class_names: Any, calibration: Calibration | None
) -> None:
    """Raise a TypeError if the parts of a checkpoint are invalid or don't match."""
    if not valid_preprocessing(preprocessing):
        raise TypeError("invalid preprocessing")
    if not valid_class_names(class_names):
        raise TypeError("invalid class names")
    if preprocessing.input_shape != tuple(model.arguments["input_shape"]):
        raise TypeError("preprocessing and network have different input shapes")
    if len(class_names) != model.head.out_features:
        raise TypeError(f"it names {len(class_names)} classes, its head has {model.head.out_features} outputs")
    if calibration and len(calibration.centre) != model.head.in_features:
        raise TypeError("calibration and network have different embedding sizes")
