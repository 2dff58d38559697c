"""Images for the page of an evaluation: thumbnails, what the network looked at, and the nearest training image."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.data.image_io import ImageError
from utils.evaluation.evaluation import Evaluation
from utils.evaluation.mistakes import nearest
from utils.inference.explain import explain, fit, shown, titled_overlays
from utils.inference.fit_calibration import TrainEmbeddings
from utils.system.text import printable

THUMBNAIL = 160
"""Pixels on the longer side of an image on the page."""
EXPLAINED_AT_ONCE = 8


class Gallery:
    """The images on the page, each thumbnail made once.

    Args:
        evaluation: whose images they are.
        train: training images to show the nearest of beside a mistake, if there are any.
    """

    def __init__(self, evaluation: Evaluation, train: TrainEmbeddings | None) -> None:
        self.evaluation = evaluation
        self.train = train
        self.preprocessing = evaluation.classifier.preprocessing
        self._thumbnails: dict[str, str] = {}

    def thumbnail(self, path: str) -> str:
        """A small JPEG of a file as a data URI; empty if it can't be read."""
        if path not in self._thumbnails:
            try:
                self._thumbnails[path] = to_uri(self._read(path))
            except ImageError:
                self._thumbnails[path] = ""
        return self._thumbnails[path]

    def _read(self, path: str) -> Image.Image:
        with self.preprocessing.open(path) as image:
            scale = THUMBNAIL / max(image.width, image.height)
            size = max(1, round(image.height * scale)), max(1, round(image.width * scale))
            pixels = image.decode((0, 0, image.width, image.height), size).pixels
        return fit(Image.fromarray(pixels), THUMBNAIL)

    def figure(self, index: int) -> dict[str, Any]:
        """What is shown of an evaluated image."""
        scores, names = self.evaluation.scores, self.evaluation.classifier.class_names
        truth, predicted = int(scores.class_ids[index]), int(scores.predicted[index])
        path = self.evaluation.images.path(index)
        return {
            "path": printable(path),
            "image": self.thumbnail(path),
            "truth": printable(names[truth]),
            "predicted": printable(names[predicted]),
            "classes": f"{truth} {predicted}",
            "right": truth == predicted,
            "probability": float(scores.confidence[index]),
            "of_truth": float(scores.probabilities[index, truth]),
            "maps": [],
            "nearest": None,
        }

    def figures(self, indices: Sequence[int], explained: bool = False) -> list[dict[str, Any]]:
        """What is shown of evaluated images: with the nearest training image of each, and to be explained with maps
        of what the network looked at."""
        figures = [self.figure(index) for index in indices]
        if explained:
            self._add_maps(indices, figures)
        if self.train is not None and indices:
            neighbours = nearest(self.evaluation.outputs.embeddings[list(indices)], self.train.embeddings)
            for figure, neighbour in zip(figures, neighbours, strict=True):
                path = self.train.images.path(neighbour)
                name = self.evaluation.classifier.class_names[self.train.images.class_ids[neighbour]]
                figure["nearest"] = {
                    "path": printable(path),
                    "image": self.thumbnail(path),
                    "class_name": printable(name),
                }
        return figures

    def _add_maps(self, indices: Sequence[int], figures: Sequence[dict[str, Any]]) -> None:
        classifier, images = self.evaluation.classifier, self.evaluation.images
        for start in range(0, len(indices), EXPLAINED_AT_ONCE):
            some = list(indices[start : start + EXPLAINED_AT_ONCE])
            pixels = torch.stack([classifier.load(images.path(i)) for i in some])
            maps = explain(classifier, pixels, torch.from_numpy(self.evaluation.scores.predicted[some]))
            for row, figure in enumerate(figures[start : start + EXPLAINED_AT_ONCE]):
                overlays = titled_overlays(pixels[row], maps, row, THUMBNAIL)
                figure["maps"] = [{"title": title, "image": to_uri(image)} for title, image in overlays.items()]


def to_uri(image: Image.Image) -> str:
    """An image as a JPEG in a data URI."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def shown_images(evaluation: Evaluation, indices: Sequence[int]) -> np.ndarray:
    """What the network was shown of some images, uint8 (n, height, width, 3)."""
    classifier = evaluation.classifier
    images = [np.asarray(shown(classifier.load(evaluation.images.path(i)), THUMBNAIL)) for i in indices]
    return np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)
