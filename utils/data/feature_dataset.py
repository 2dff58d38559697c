"""The dataset of cached features, used in place of images while the backbone is frozen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.data.image_list import ImageList
from utils.data.sampler import Key


class FeatureDataset(Dataset):
    """The frozen network's outputs for the images of a list, with the interface of `ImageDataset`.

    Args:
        views: features (n, ...) of each view; an image's view changes from epoch to epoch.
        images: the list.
        seed: determines the order.
    """

    def __init__(self, views: Sequence[Tensor], images: ImageList, seed: int) -> None:
        self.views = tuple(views)
        self.images = images
        self.class_ids = images.class_ids
        self.targets = torch.from_numpy(images.class_ids.astype(np.int64))
        self.seed = seed

    def __len__(self) -> int:
        return len(self.class_ids)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """Return a batch: features (B, ...) and class ids (B,)."""
        epoch, index, repeat = torch.tensor(keys).unbind(1)
        view_of = (epoch + index + repeat) % len(self.views)
        batch = self.views[0].new_empty(len(keys), *self.views[0].shape[1:])
        for view, features in enumerate(self.views):
            rows = (view_of == view).nonzero()[:, 0]
            batch[rows] = features[index[rows]]
        return batch, self.targets[index]

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return `batch`, which `__getitems__` has already collated."""
        return batch
