"""Outputs of a classifier for all images of a list."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from utils.data.dataset import FileSource, ImageDataset
from utils.data.image_io import ImageError
from utils.data.image_list import ImageList
from utils.data.loader import eval_loader, iterate_batches
from utils.data.sampler import Key
from utils.inference.classifier import BATCH, Classifier
from utils.system.runtime import runtime


class Outputs(NamedTuple):
    """Outputs for the images of a list, in its order, on the CPU.

    Attributes:
        logits: (N, classes), fp32; (N, 0) if they weren't asked for. With TTA, the mean of the views.
        embeddings: (N, C), fp32, the input of the head. With TTA, the mean of the views.
        class_ids: (N,), the true classes.
        brightness: (N,), the mean of the preprocessed pixels, 0 to 1.
        indices: (N,), positions in the list: all, unless unreadable images were skipped.
    """

    logits: Tensor
    embeddings: Tensor
    class_ids: Tensor
    brightness: Tensor
    indices: Tensor


class LenientDataset(ImageDataset):
    """A dataset that returns black pixels for unreadable images and marks them in `unreadable`."""

    def _read_replacement(self, key: Key, error: ImageError) -> Tensor:
        return torch.zeros(self.transform.shape, dtype=torch.uint8)


def compute_outputs(
    classifier: Classifier,
    images: ImageList,
    num_workers: int,
    batch_size: int = BATCH,
    skip_unreadable: bool = False,
    title: str = "evaluating",
    keep_logits: bool = True,
    tta: bool = False,
) -> Outputs:
    """Run `classifier` on the images of a list. Of several ranks, rank 0 has all outputs, the others have none.

    With many classes, the logits take nearly all of the memory; `keep_logits` set to False drops those of each batch.
    With `tta`, both are averaged over test-time augmentation views.

    Raises:
        ImageError: an image can't be read and `skip_unreadable` is False.
    """
    source = FileSource(images, classifier.preprocessing)
    dataset_class, max_bad = (LenientDataset, 1.0) if skip_unreadable else (ImageDataset, None)
    transform = classifier.tta_views if tta else classifier.transform
    dataset = dataset_class(source, transform, seed=0, max_bad_fraction=max_bad)
    loader = eval_loader(dataset, batch_size, num_workers)
    size = min(len(images), len(loader) * batch_size)  # at most, of this rank
    buffers, count = [], 0
    for pixels, class_ids in tqdm(iterate_batches(loader), title, len(loader), unit="batch", leave=False, disable=None):
        embeddings, logits = classifier.forward_views(pixels) if tta else classifier.forward(pixels)
        embeddings = embeddings.mean(dim=1) if tta else embeddings
        brightness = pixels.float().mean(dim=tuple(range(1, pixels.ndim))) / 255
        batch = (logits if keep_logits else logits[:, :0], embeddings, class_ids, brightness)
        # Concatenating all batches at the end would need twice the memory.
        buffers = buffers or [tensor.new_empty(size, *tensor.shape[1:]) for tensor in batch]
        for buffer, tensor in zip(buffers, batch, strict=True):
            buffer[count : count + len(pixels)] = tensor
        count += len(pixels)
    runtime.unite(dataset.unreadable)
    rows = runtime.collect_batches([buffer[:count] for buffer in buffers] or [torch.empty(0)] * 4, batch_size)
    readable = (~dataset.unreadable)[: len(rows[0])]
    if not readable.all():
        rows = [tensor[readable] for tensor in rows]
    return Outputs(*rows, readable.nonzero()[:, 0])
