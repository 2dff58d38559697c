"""A checkpoint becomes a classifier: the only way in for evaluation and prediction."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nets.factory import restore_model
from nets.weights.load import read_weights
from nets.weights.safe_load import read_header
from utils.data.image_io import ImageError, upright_rgb
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform, Transform
from utils.inference.exported_metadata import ExportFacts, are_names, is_preprocessing
from utils.inference.prediction import Failure, Prediction, make_prediction
from utils.inference.rejection import Calibration, Rejection
from utils.inference.tta_views import TTAViews
from utils.modeling.pixel_network import PixelNetwork, cast_for_inference
from utils.modeling.precision import autocast, choose_precision, pick_device
from utils.runs.checkpoint import find_checkpoint, load_checkpoint
from utils.system.thread_map import map_ahead

ImageInput = str | os.PathLike | Image.Image | np.ndarray
"""What a classifier takes: a path, an Pillow image, or an array, see `Classifier.predict`."""

BATCH = 32
"""Images that go through the network at a time, unless told."""

WEIGHTS_SUFFIX = ".safetensors"
"""Of export.py's files of weights."""

MAX_VIEWS = 64
"""TTAViews that go through the network at a time."""


@dataclass(frozen=True)
class Classifier:
    """A trained network with all that it needs.

    Attributes:
        network: uint8 pixels (B, 3, height, width) to logits (B, classes), on `device`, in eval mode; it is called
            under `utils.modeling.precision.autocast(device, precision)`.
        preprocessing: how it wants its images.
        transform: an image to uint8 (3, height, width).
        class_names: name of each class id.
        device: where the network is.
        precision: the arithmetic: what the run was set to, as far as this device has it.
        temperature: what logits are divided by to become probabilities; 1 if they are taken as the network gives them.
        calibration: what the validation images told of it; None: it isn't the best of a finished run.
        raw: whether nothing that was fitted after training is used.
        config: the settings of its run, as in `TrainConfig.as_dict`.
        origin: where the weights that its run began with were from, see `nets.weights.load.Weights`; empty: random
            ones;
            None: that isn't known.
    """

    network: nn.Module
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
        """Whether what was fitted after training says which of its answers to reject."""
        return self.calibration is not None and not self.raw

    @property
    def non_finite_message(self) -> str:
        """What to say where the network's outputs aren't finite."""
        return (
            f"the network's output isn't finite: some weights are NaN, or overflow in {self.precision}; take another "
            f"checkpoint"
        )

    def load(self, path: str) -> Tensor:
        """An image as the network wants it, uint8 (3, height, width). For one in memory there is `transform`.

        Raises:
            ImageError: the file can't be read.
        """
        return self._read(path, self.transform)

    def _read(self, path: str, transform: Transform) -> Tensor:
        with self.preprocessing.open(path) as image:
            region = transform.region(image)
        return transform.resize(region)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, C), what the head takes, and logits (B, classes) of images (B, 3, height, width) uint8; both
        fp32 on the CPU."""
        model = self.network.model
        with autocast(self.device, self.precision):
            embeddings = model.forward_embedding(self.network.normalize(pixels.to(self.device, non_blocking=True)))
            logits = model.head(embeddings)
        return embeddings.float().cpu(), logits.float().cpu()

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Probabilities (B, classes), fp32 on the CPU, of images (B, 3, height, width) uint8."""
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
        """Say what is in images.

        >>> classifier = load_classifier("logs/2026-01-01_12-00-00")  # doctest: +SKIP
        >>> classifier.predict(["cat.jpg", Image.open("dog.png"), array])[0].label  # doctest: +SKIP
        'cat'

        Args:
            images: one image or several; a path, an Pillow image (turned upright by its EXIF orientation), or
                an array of uint8, (height, width, 3) in RGB or (height, width) in grey. A JPEG that comes as a path is
                decoded no finer than the network needs, so that its pixels differ from those of the same image in
                memory by about one level of 255.
            top_k: how many classes to give.
            batch_size: images that go through the network at a time.
            tta: average over the centre, the corners and, if training mirrored, their mirror images: five or ten times
                the time.
            rejection: which answers to reject, from `calibration.choose_rejection`.

        Returns:
            A prediction for each image, in order.

        Raises:
            ImageError: a file can't be read, or the network's output for it isn't finite. `stream` goes on instead.
            ValueError: an array is of another type or shape.
        """
        several = [images] if isinstance(images, ImageInput) else images
        answers = []
        for answer in self.stream(several, top_k, batch_size, tta, rejection):
            if isinstance(answer, Failure):
                raise ImageError(answer.error, answer.path)
            answers.append(answer)
        return answers

    def stream(
        self,
        images: Iterable[ImageInput],
        top_k: int = 5,
        batch_size: int = BATCH,
        tta: bool = False,
        rejection: Rejection | None = None,
    ) -> Iterator[Prediction | Failure]:
        """As `predict`, of any number of images, an answer as soon as it is there; a file that can't be read becomes
        a `Failure`. Images are read ahead while the network is at work."""
        if top_k < 1 or batch_size < 1:
            raise ValueError(f"top_k={top_k}, batch_size={batch_size}: give whole numbers from 1 up")
        return self._stream(images, min(top_k, len(self.class_names)), batch_size, tta, rejection)

    def _stream(
        self, images: Iterable[ImageInput], top_k: int, batch_size: int, tta: bool, rejection: Rejection | None
    ) -> Iterator[Prediction | Failure]:
        transform = TTAViews(self.preprocessing, self.config.get("horizontal_flip", 0) > 0) if tta else self.transform
        # Asked for one by one, images are answered one by one.
        loaded = map_ahead(partial(self._load, transform), images, 2 * batch_size if batch_size > 1 else 1)
        while batch := list(islice(loaded, batch_size)):
            readable = [(path, views) for path, views in batch if isinstance(views, Tensor)]
            answers = self._answer(*zip(*readable, strict=True), top_k, rejection) if readable else iter(())
            for path, views in batch:
                yield Failure(path, views) if isinstance(views, str) else next(answers)

    def _load(self, transform: Transform, image: ImageInput) -> tuple[str, Tensor | str]:
        """The path, and an image's views (views, 3, height, width) or what is wrong with the file."""
        path = os.fspath(image) if isinstance(image, str | os.PathLike) else ""
        try:
            if isinstance(image, str | os.PathLike):
                views = self._read(path, transform)
            else:
                views = transform(upright_rgb(image))
        except ImageError as error:
            return path, str(error)
        return path, views.reshape(-1, *views.shape[-3:])

    def _answer(
        self, paths: Sequence[str], pixels: Sequence[Tensor], top_k: int, rejection: Rejection | None
    ) -> Iterator[Prediction | Failure]:
        """The predictions for `pixels`, each (views, 3, height, width)."""
        num_views = len(pixels[0])
        parts = [self.forward(part) for part in torch.cat(pixels).split(MAX_VIEWS)]
        embeddings, logits = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        probabilities = (logits / self.temperature).softmax(dim=1).unflatten(0, (-1, num_views)).mean(dim=1)
        if rejection and self.calibration:
            distances = self.calibration.distances(embeddings[::num_views])  # of what evaluation shows
        else:
            distances = torch.zeros(len(pixels))
        values, ids = probabilities.topk(top_k)
        for path, p, k, distance in zip(paths, values.tolist(), ids.tolist(), distances.tolist(), strict=True):
            if not math.isfinite(p[0]):  # of NaN and numbers NaN is the greatest
                yield Failure(path, f"{path}: {self.non_finite_message}" if path else self.non_finite_message)
                continue
            classes = tuple((self.class_names[i], value) for i, value in zip(k, p, strict=True))
            yield make_prediction(path, classes, rejection, distance)


def read_exported(path: Path) -> dict[str, Any]:
    """What a `.safetensors` file of export.py holds, as far as a checkpoint has it.

    Raises:
        ValueError: it isn't one, or something in it can't be.
    """
    state = read_weights(path).state
    facts = ExportFacts.from_strings(read_header(path), path)
    return {
        "model": facts.model,
        "weights": {name: t.float() if t.is_floating_point() else t for name, t in state.items()},
        "preprocessing": facts.preprocessing.as_dict(),
        "class_names": facts.class_names,
        "temperature": facts.temperature,
        "calibration": {},
        "config": {"precision": "auto"},
        "origin": None,
    }


def load_classifier(path: str | Path, device: str = "auto", raw: bool = False, precision: str = "") -> Classifier:
    """Open a checkpoint or weights of export.py; nothing else is needed.

    Args:
        path: the file, or a folder, see `utils.runs.checkpoint.find_checkpoint`; `.safetensors` for weights of
            export.py, which have no calibration but a temperature.
        device: auto, cuda, cpu or mps.
        raw: give probabilities as the network does, without the temperature that was fitted after training.
        precision: "fp32", "bf16" or "fp16"; empty: what the run was set to. Either as far as this device has it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't one of Thaw's, or there is no such device.
    """
    place = pick_device(device)
    file = find_checkpoint(str(path))
    checkpoint = read_exported(file) if file.suffix.lower() == WEIGHTS_SUFFIX else load_checkpoint(file)
    try:
        model = restore_model(checkpoint["model"], checkpoint["weights"])
        preprocessing = Preprocessing.from_dict(checkpoint["preprocessing"])
        transform = EvalTransform(preprocessing)
        arithmetic, _ = choose_precision(precision or checkpoint["config"]["precision"], place)
        calibration = Calibration.from_dict(checkpoint["calibration"])
        if not is_preprocessing(preprocessing) or not are_names(checkpoint["class_names"]):
            raise TypeError("its class names or its preprocessing can't be right")
        if preprocessing.input_shape != tuple(model.arguments["input_shape"]):
            raise TypeError("its images have another size than its network's")
        if len(checkpoint["class_names"]) != model.head.out_features:
            raise TypeError(
                f"it names {len(checkpoint['class_names'])} classes, its head has {model.head.out_features}"
            )
        if calibration and len(calibration.centre) != model.head.in_features:
            raise TypeError("its calibration is of another network")
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} can't be used: its parts don't fit together ({error})") from error
    origin = checkpoint["origin"]
    return Classifier(
        network=cast_for_inference(PixelNetwork(model, preprocessing, place), arithmetic).eval(),
        preprocessing=preprocessing,
        transform=transform,
        class_names=checkpoint["class_names"],
        device=place,
        precision=arithmetic,
        temperature=1.0 if raw else calibration.temperature if calibration else checkpoint.get("temperature", 1.0),
        calibration=calibration,
        raw=raw,
        config=checkpoint["config"],
        origin=origin and {str(name): str(value) for name, value in origin.items()},
    )
