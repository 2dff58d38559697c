"""Images for the report page: thumbnails, explanation maps, and nearest training images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from utils.evaluation.evaluation import Evaluation
from utils.evaluation.mistakes import nearest
from utils.inference.explain import explain, shown, titled_overlays
from utils.inference.fit_calibration import TrainEmbeddings
from utils.inference.thumbnails import THUMBNAIL, thumbnail_uri, to_uri
from utils.system.text import printable

EXPLAIN_BATCH = 8


class Gallery:
    """Makes the figures of the page, and each thumbnail only once.

    Args:
        evaluation: the evaluation whose images are shown.
        train: embeddings of training images, to show the nearest one beside a mistake.
    """

    def __init__(self, evaluation: Evaluation, train: TrainEmbeddings | None) -> None:
        self.evaluation = evaluation
        self.train = train
        self.preprocessing = evaluation.classifier.preprocessing
        self.thumbnail = functools.cache(partial(thumbnail_uri, preprocessing=self.preprocessing))

    def figure(self, index: int) -> dict[str, Any]:
        """The template's data for an evaluated image."""
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
            "of_truth": float(scores.true_probabilities[index]),
            "maps": [],
            "nearest": None,
        }

    def figures(self, indices: Sequence[int], explained: bool = False) -> list[dict[str, Any]]:
        """The template's data for evaluated images, with the nearest training image and, if `explained`, maps."""
        figures = [self.figure(index) for index in indices]
        if explained:
            self._add_maps(indices, figures)
        if self.train is not None and indices:
            neighbors = nearest(self.evaluation.outputs.embeddings[list(indices)], self.train.embeddings)
            for figure, neighbor in zip(figures, neighbors, strict=True):
                path = self.train.images.path(neighbor)
                name = self.evaluation.classifier.class_names[self.train.images.class_ids[neighbor]]
                figure["nearest"] = {"path": printable(path), "image": self.thumbnail(path), "class": printable(name)}
        return figures

    def _add_maps(self, indices: Sequence[int], figures: Sequence[dict[str, Any]]) -> None:
        classifier, images = self.evaluation.classifier, self.evaluation.images
        for start in range(0, len(indices), EXPLAIN_BATCH):
            batch = list(indices[start : start + EXPLAIN_BATCH])
            pixels = torch.stack([classifier.load(images.path(i)) for i in batch])
            maps = explain(classifier, pixels, torch.from_numpy(self.evaluation.scores.predicted[batch]))
            for row, figure in enumerate(figures[start : start + EXPLAIN_BATCH]):
                overlays = titled_overlays(pixels[row], maps, row, THUMBNAIL)
                figure["maps"] = [{"title": title, "image": to_uri(image)} for title, image in overlays.items()]


def shown_images(evaluation: Evaluation, indices: Sequence[int]) -> np.ndarray:
    """Evaluated images as the network sees them, uint8 (n, height, width, 3)."""
    classifier = evaluation.classifier
    images = [np.asarray(shown(classifier.load(evaluation.images.path(i)), THUMBNAIL)) for i in indices]
    return np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)
