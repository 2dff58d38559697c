"""What a classifier makes of all images of a list."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from utils.data.dataset import FileSource, ImageDataset
from utils.data.image_io import ImageError
from utils.data.image_list import ImageList
from utils.data.loader import eval_loader, fetch
from utils.data.sampler import Key
from utils.inference.classifier import BATCH, Classifier


class Outputs(NamedTuple):
    """Of images of a list, in its order, on the CPU.

    Attributes:
        logits: (N, classes), fp32.
        embeddings: (N, C), fp32, what the head takes.
        class_ids: (N,), the truth.
        brightness: (N,), the mean level of what the network was shown, 0 to 1.
        indices: (N,), which images of the list they are: all, unless unreadable ones were left out.
    """

    logits: Tensor
    embeddings: Tensor
    class_ids: Tensor
    brightness: Tensor
    indices: Tensor


class LenientDataset(ImageDataset):
    """Images of which any may be unreadable: it is marked in `unreadable`, and a black one comes in its place."""

    def _read_another(self, key: Key, error: ImageError) -> Tensor:
        return torch.zeros(3, *self.transform.size, dtype=torch.uint8)


def compute_outputs(
    classifier: Classifier,
    images: ImageList,
    num_workers: int,
    batch_size: int = BATCH,
    skip_unreadable: bool = False,
    title: str = "evaluating",
) -> Outputs:
    """What `classifier` makes of the images of a list.

    Raises:
        ImageError: an image can't be read, and `skip_unreadable` doesn't leave such out.
    """
    source = FileSource(images, classifier.preprocessing)
    kind, allowed = (LenientDataset, 1.0) if skip_unreadable else (ImageDataset, None)
    dataset = kind(source, classifier.transform, seed=0, max_bad_fraction=allowed)
    loader = eval_loader(dataset, batch_size, num_workers)
    parts = []
    for pixels, class_ids in tqdm(fetch(loader), title, len(loader), unit="batch", leave=False, disable=None):
        embeddings, logits = classifier.forward(pixels)
        parts.append((logits, embeddings, class_ids, pixels.float().mean(dim=(1, 2, 3)) / 255))
    readable = ~dataset.unreadable
    return Outputs(*(torch.cat(part)[readable] for part in zip(*parts, strict=True)), readable.nonzero()[:, 0])
