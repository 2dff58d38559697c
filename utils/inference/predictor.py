"""The interface shared by classifiers from checkpoints and from ONNX files, and the loop behind `stream`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from utils.data.image_io import ImageError, Region, upright_rgb
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import Transform
from utils.inference.prediction import Failure, Prediction
from utils.inference.rejection import Calibration, Rejection
from utils.system.runtime import runtime
from utils.system.thread_map import map_ahead

ImageInput = str | os.PathLike | Image.Image | np.ndarray
"""A path; a Pillow image; or a uint8 array, (height, width, 3) in RGB or (height, width) in gray."""

BATCH = 32
"""Default batch size for inference."""

Pixels = TypeVar("Pixels")


class Predictor(Protocol):
    """A classifier that predict.py can use: `Classifier` or `OnnxClassifier`."""

    @property
    def class_names(self) -> list[str]:
        """The name of each class id."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How image files are read."""

    @property
    def calibration(self) -> Calibration | None:
        """What was fitted on the validation images; None if the file doesn't contain it."""

    @property
    def raw(self) -> bool:
        """Whether the calibration fitted after training is ignored."""

    @property
    def can_reject(self) -> bool:
        """Whether `calibration` is present and in use."""

    def stream(
        self,
        images: Iterable[ImageInput],
        top_k: int = 5,
        batch_size: int = BATCH,
        tta: bool = False,
        rejection: Rejection | None = None,
    ) -> Iterator[Prediction | Failure]:
        """Yield a `Prediction` for each image, in order, or a `Failure` if the file can't be read.

        Args:
            images: the images. Some are read ahead while the network runs.
            top_k: number of classes in each prediction.
            batch_size: images per forward pass; with 1, an image is requested only after the previous result is taken.
            tta: average the logits over test-time augmentation views: center and corners, and their mirror images if
                training used flips. This takes five or ten times as long.
            rejection: which predictions to reject, see `Calibration.choose_rejection`.

        Raises:
            ValueError: `top_k` or `batch_size` is below 1, or the classifier doesn't support an argument.
        """


def check_stream_arguments(top_k: int, batch_size: int) -> None:
    """Raise a ValueError if an argument is below 1."""
    if top_k < 1 or batch_size < 1:
        raise ValueError(f"top_k={top_k}, batch_size={batch_size}: give whole numbers from 1 up")


def read_region(image: ImageInput, preprocessing: Preprocessing, transform: Transform) -> Region:
    """Decode the part of an image that `transform` uses.

    Raises:
        ImageError: the image can't be read.
    """
    if isinstance(image, str | os.PathLike):
        with preprocessing.open(os.fspath(image)) as opened:
            return transform.region(opened)
    upright = upright_rgb(image, preprocessing.max_pixels, preprocessing.allow_truncated)
    return Region(np.array(upright), transform.choose_box(*upright.size))


def stream_predictions(
    images: Iterable[ImageInput],
    load: Callable[[ImageInput], Pixels],
    predict: Callable[[list[tuple[str, Pixels]]], Iterator[Prediction | Failure]],
    batch_size: int,
    read_ahead: int,
) -> Iterator[Prediction | Failure]:
    """Yield a result for each image, in order.

    `load` turns an image into pixels; threads call it for up to `read_ahead` images ahead, and an ImageError becomes a
    `Failure`. `predict` turns a batch of paths ("" for images in memory) and pixels into results.
    """
    loaded = map_ahead(partial(_load_or_fail, load), images, read_ahead)
    while batch := list(islice(loaded, batch_size)):
        readable = [item for item in batch if not isinstance(item, Failure)]
        results = predict(readable) if readable else iter(())
        for item in batch:
            yield item if isinstance(item, Failure) else next(results)


def stream_dealt(
    stream: Callable[[Sequence[str]], Iterator[Prediction | Failure]], paths: Sequence[str], batch_size: int
) -> Iterator[Prediction | Failure]:
    """Yield a result for each file, in order, on rank 0, and nothing on other ranks, which have to iterate, too.

    Batches are dealt out: batch b to rank b mod the number of ranks, which `stream` classifies. Whole ones, since
    kernels for other batch sizes round differently.
    """
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    results = stream([*chain.from_iterable(batches[runtime.rank :: runtime.world_size])])
    for _ in range(0, len(batches), runtime.world_size):
        of_ranks = runtime.gather(list(islice(results, batch_size)))
        if runtime.is_main:
            yield from chain.from_iterable(of_ranks)


def _load_or_fail(load: Callable[[ImageInput], Pixels], image: ImageInput) -> tuple[str, Pixels] | Failure:
    path = os.fspath(image) if isinstance(image, str | os.PathLike) else ""
    try:
        return path, load(image)
    except ImageError as error:
        return Failure(path, str(error))
