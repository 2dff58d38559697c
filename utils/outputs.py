"""What a classifier makes of all pictures of a list."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from utils.classifier import Classifier
from utils.data import FileSource, ImageDataset, eval_loader, fetch
from utils.lists import ImageList

BATCH = 32
"""Pictures that go through the network at a time, unless told."""


class Outputs(NamedTuple):
    """Of each picture of a list, in its order, on the CPU.

    Attributes:
        logits: (N, classes), fp32.
        embeddings: (N, C), fp32, what the head takes.
        class_ids: (N,), the truth.
        brightness: (N,), the mean level of what the network was shown, 0 to 1.
    """

    logits: Tensor
    embeddings: Tensor
    class_ids: Tensor
    brightness: Tensor


def compute_outputs(
    classifier: Classifier,
    images: ImageList,
    num_workers: int,
    batch_size: int = BATCH,
    max_bad_fraction: float | None = None,
    title: str = "evaluating",
) -> Outputs:
    """What `classifier` makes of the pictures of a list.

    Raises:
        ImageError: a picture can't be read, or more than `max_bad_fraction`, see `utils.data.ImageDataset`.
    """
    source = FileSource(images, classifier.preprocessing)
    dataset = ImageDataset(source, classifier.transform, seed=0, max_bad_fraction=max_bad_fraction)
    loader = eval_loader(dataset, batch_size, num_workers)
    parts = []
    for pixels, class_ids in tqdm(fetch(loader), title, len(loader), unit="batch", leave=False, disable=None):
        embeddings, logits = classifier.forward(pixels)
        parts.append(Outputs(logits, embeddings, class_ids, pixels.float().mean(dim=(1, 2, 3)) / 255))
    return Outputs(*map(torch.cat, zip(*parts, strict=True)))
