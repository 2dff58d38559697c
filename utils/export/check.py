"""Whether an exported file gives what the checkpoint gives, image for image."""

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
"""How far a probability may be off, by precision; int8 is judged by `MOST_LOST`. A fine-tuned DINOv2's are off by 0.006
in fp16, and by 0.000005 in fp32."""
MOST_LOST = 0.01
"""The part of the images by which int8 may name fewer right."""
WORST = 10
"""Images with the largest differences that a report names."""

Exported = Callable[[np.ndarray], np.ndarray]
"""An exported file: an image uint8 (height, width, 3) to probabilities (classes,)."""


class ExportError(ValueError):
    """The exported file doesn't give what the checkpoint gives."""


@dataclass(frozen=True)
class Comparison:
    """What the checkpoint and the exported file make of the same n images, in memory.

    Attributes:
        paths: of the images, n.
        class_ids: (n,), the truth.
        expected: (n, classes), the checkpoint's probabilities in fp32.
        found: (n, classes), the exported file's.
        unreadable: what is wrong with files that couldn't be read and are left out.
    """

    paths: list[str]
    class_ids: np.ndarray
    expected: np.ndarray
    found: np.ndarray
    unreadable: list[str]

    @property
    def difference(self) -> np.ndarray:
        """(n,), the largest difference of a probability; infinite where what was found isn't finite."""
        off = np.abs(self.expected - self.found).max(axis=1)
        return np.where(np.isfinite(off), off, np.inf)

    @property
    def same_top1(self) -> np.ndarray:
        """Bool (n,), whether both name the same class."""
        return self.expected.argmax(axis=1) == self.found.argmax(axis=1)

    @property
    def accuracy(self) -> tuple[float, float]:
        """The part (0 to 1) that the checkpoint and the exported file name right."""
        before, after = ((of.argmax(axis=1) == self.class_ids).mean() for of in (self.expected, self.found))
        return float(before), float(after)

    def fault(self, precision: str) -> str:
        """What is wrong with an export in "fp32", "fp16" or "int8"; empty if nothing is."""
        before, after = self.accuracy
        if not np.isfinite(self.difference).all():
            return "some of its probabilities aren't finite numbers"
        if precision == "int8":
            lost = before - after > MOST_LOST + 1e-9
            return f"it names {after:.1%} of the images right, the checkpoint {before:.1%}" if lost else ""
        told = []
        if others := int((~self.same_top1).sum()):
            told.append(f"it names another class for {others} of {len(self.paths)} images")
        if (off := self.difference.max()) > TOLERANCE[precision]:
            told.append(f"a probability is off by {off:.2g}, and {TOLERANCE[precision]:.0e} is allowed")
        return "; ".join(told)

    def worst(self) -> list[tuple[str, float]]:
        """The images that differ most, other classes first, with the difference."""
        order = np.lexsort((-self.difference, self.same_top1))[:WORST]
        return [(self.paths[i], float(self.difference[i])) for i in order if self.difference[i] > 0]

    def as_dict(self, precision: str) -> dict[str, Any]:
        """The report, as plain types."""
        before, after = self.accuracy
        off = self.difference
        finite = np.isfinite(off).all()
        return {
            "passed": not self.fault(precision),
            "fault": self.fault(precision),
            "images": len(self.paths),
            "unreadable": self.unreadable,
            "same_top1": int(self.same_top1.sum()),
            "largest_difference": float(off.max()) if finite else None,
            "mean_difference": float(off.mean()) if finite else None,
            "top1_checkpoint": before,
            "top1_exported": after,
            "worst": [
                {"path": path, "difference": value if np.isfinite(value) else None} for path, value in self.worst()
            ],
        }


def compare(classifier: Classifier, exported: Exported, images: ImageList) -> Comparison:
    """Put the same images, read into memory once, through both.

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
            f"none of the {len(images)} images to check the export with can be read ({unreadable[0]}); give others "
            f"with --data"
        )
    paths = [images.path(index) for index in readable]
    return Comparison(paths, images.class_ids[readable], np.stack(expected), np.stack(found), unreadable)


def by_checkpoint(classifier: Classifier, pixels: np.ndarray) -> np.ndarray:
    """Probabilities (classes,) of an image uint8 (height, width, 3), as evaluation prepares it."""
    shown = classifier.transform(Image.fromarray(pixels))
    return classifier.probabilities(shown[None])[0].numpy()
