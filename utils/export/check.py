"""Check that an exported file gives the same predictions as the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from utils.data.image_io import ImageError, open_image
from utils.data.image_list import ImageList
from utils.inference.classifier import Classifier
from utils.system.thread_map import MAX_AHEAD, map_parallel

TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2}
"""Allowed difference of a probability, by precision. A fine-tuned DINOv2 differs by 0.006 in fp16, 0.000005 in fp32."""
INT8_MAX_LOSS = 0.01
"""Allowed decrease of top-1 accuracy in int8; nothing else is checked."""
NUM_WORST = 10
"""Images with the largest differences listed in a report."""

Exported = Callable[[np.ndarray], np.ndarray]
"""An opened exported file: maps an image uint8 (height, width, 3) to probabilities (classes,)."""


class ExportError(ValueError):
    """The exported file and the checkpoint give different predictions."""


@dataclass(frozen=True)
class Comparison:
    """Probabilities of the checkpoint and of the exported file for the same n images.

    Attributes:
        paths: the n image paths.
        class_ids: (n,), the true classes.
        expected: (n, classes), probabilities of the checkpoint in fp32.
        found: (n, classes), probabilities of the exported file.
        unreadable: the error of each image that was skipped because it can't be read.
    """

    paths: list[str]
    class_ids: np.ndarray
    expected: np.ndarray
    found: np.ndarray
    unreadable: list[str]

    @property
    def difference(self) -> np.ndarray:
        """(n,), the largest difference of a probability per image; infinite if `found` isn't finite."""
        difference = np.abs(self.expected - self.found).max(axis=1)
        return np.where(np.isfinite(difference), difference, np.inf)

    @property
    def same_top1(self) -> np.ndarray:
        """Bool (n,), whether both predict the same class."""
        return self.expected.argmax(axis=1) == self.found.argmax(axis=1)

    @property
    def accuracy(self) -> tuple[float, float]:
        """Top-1 accuracy of the checkpoint and of the exported file."""
        before, after = ((of.argmax(axis=1) == self.class_ids).mean() for of in (self.expected, self.found))
        return float(before), float(after)

    def fault(self, precision: str) -> str:
        """Why an export in `precision` fails the check; "" if it passes."""
        before, after = self.accuracy
        if not np.isfinite(self.difference).all():
            return "some of its probabilities aren't finite"
        if precision == "int8":
            failed = before - after > INT8_MAX_LOSS + 1e-9
            return f"its top-1 accuracy is {after:.1%}, the checkpoint's {before:.1%}" if failed else ""
        faults = []
        if changed := int((~self.same_top1).sum()):
            faults.append(f"the predicted class differs for {changed} of {len(self.paths)} images")
        if (difference := self.difference.max()) > TOLERANCE[precision]:
            faults.append(f"a probability differs by {difference:.2g}, more than {TOLERANCE[precision]:.0e}")
        return "; ".join(faults)

    def worst(self) -> list[tuple[str, float]]:
        """The paths and differences of the images that differ most; those with another predicted class come first."""
        order = np.lexsort((-self.difference, self.same_top1))[:NUM_WORST]
        return [(self.paths[i], float(self.difference[i])) for i in order if self.difference[i] > 0]

    def as_dict(self, precision: str) -> dict[str, Any]:
        """The report as plain types."""
        before, after = self.accuracy
        difference = self.difference
        finite = np.isfinite(difference).all()
        return {
            "passed": not self.fault(precision),
            "fault": self.fault(precision),
            "images": len(self.paths),
            "unreadable": self.unreadable,
            "same_top1": int(self.same_top1.sum()),
            "largest_difference": float(difference.max()) if finite else None,
            "mean_difference": float(difference.mean()) if finite else None,
            "top1_checkpoint": before,
            "top1_exported": after,
            "worst": [
                {"path": path, "difference": value if np.isfinite(value) else None} for path, value in self.worst()
            ],
        }


def compare(classifier: Classifier, exported: Exported, images: ImageList) -> Comparison:
    """Run the checkpoint and the exported file on the same images; unreadable ones are skipped.

    Raises:
        ValueError: none of the images can be read.
    """
    preprocessing = classifier.preprocessing

    def read(index: int) -> np.ndarray | str:
        try:
            image = open_image(images.path(index), preprocessing.max_pixels, preprocessing.allow_truncated)
        except ImageError as error:
            return str(error)
        return np.asarray(image)

    readable, expected, found, unreadable = [], [], [], []
    for index, pixels in enumerate(map_parallel(read, range(len(images)), "comparing", MAX_AHEAD)):
        if isinstance(pixels, str):
            unreadable.append(pixels)
            continue
        readable.append(index)
        expected.append(by_checkpoint(classifier, pixels))
        found.append(exported(pixels))
    if not readable:
        raise ValueError(
            f"none of the {len(images)} images for the check can be read ({unreadable[0]}); give others with --data"
        )
    paths = [images.path(index) for index in readable]
    return Comparison(paths, images.class_ids[readable], np.stack(expected), np.stack(found), unreadable)


def by_checkpoint(classifier: Classifier, pixels: np.ndarray) -> np.ndarray:
    """The checkpoint's probabilities (classes,) for an image uint8 (height, width, 3)."""
    transformed = classifier.transform(Image.fromarray(pixels))
    return classifier.probabilities(transformed[None])[0].numpy()
