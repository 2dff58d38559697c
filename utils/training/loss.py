"""What a training step descends: cross-entropy, if asked for with smoothed labels and mixed images."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What the network takes, and what it shall say: of each image the class in the part `share`, and where images
    are mixed the class of the other in the rest.

    Attributes:
        inputs: (B, ...).
        class_ids: (B,).
        others: (B,), class ids of what was mixed in.
        share: 0 to 1.
    """

    inputs: Tensor
    class_ids: Tensor
    others: Tensor
    share: float

    @property
    def largest(self) -> Tensor:
        """(B,), the class with the larger share of each image."""
        return self.class_ids if self.share >= 0.5 else self.others

    def split(self, parts: int) -> Iterator[Batch]:
        """The same in `parts` parts, one after the other."""
        tensors = (self.inputs, self.class_ids, self.others)
        for inputs, class_ids, others in zip(*(tensor.tensor_split(parts) for tensor in tensors), strict=True):
            yield Batch(inputs, class_ids, others, self.share)


@dataclass(frozen=True)
class TrainingLoss:
    """Cross-entropy of a batch, and how its images are mixed before: by hand, since torchvision's MixUp takes
    images as floats only, in four times the memory.

    Attributes:
        class_weights: weight of the images of each class, (classes,); None: all alike.
        label_smoothing: the part of each label that is spread over all classes, 0 to below 1 (Szegedy et al.,
            "Rethinking the Inception Architecture", 2016, section 7).
        mixup: both parameters of the Beta distribution that the share of the one image is drawn from; 0: no MixUp
            (Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018).
        cutmix: likewise of the part of the area that stays; 0: no CutMix (Yun et al., "CutMix", 2019). With both, each
            step draws which.
    """

    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def to(self, device: torch.device) -> TrainingLoss:
        """The same with its tensors on `device`."""
        weights = self.class_weights
        return self if weights is None else replace(self, class_weights=weights.to(device))

    def mix(self, inputs: Tensor, class_ids: Tensor, seed: int) -> Batch:
        """Images (B, 3, height, width) uint8 mixed, each with the next of the batch; features stay as they are.

        One share, and one part that is cut, is drawn for all of the batch, by `seed`; nothing waits for the device.
        """
        ways = [way for way, alpha in ((_blend, self.mixup), (_cut, self.cutmix)) if alpha]
        if not ways or inputs.dtype != torch.uint8:
            return Batch(inputs, class_ids, class_ids, 1.0)
        draw = random.Random(seed)
        way = draw.choice(ways)
        alpha = self.mixup if way is _blend else self.cutmix
        mixed, share = way(inputs, inputs.roll(1, 0), draw.betavariate(alpha, alpha), draw)
        return Batch(mixed, class_ids, class_ids.roll(1, 0), share)

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss (B,) of logits (B, classes)."""
        own = self._cross_entropy(logits, batch.class_ids)
        if batch.share == 1:
            return own
        return batch.share * own + (1 - batch.share) * self._cross_entropy(logits, batch.others)

    def _cross_entropy(self, logits: Tensor, class_ids: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, class_ids, reduction="none", label_smoothing=self.label_smoothing)
        if self.class_weights is None:
            return loss
        # Not torch's `weight`: that weighs the smoothed part of a label by the class it goes to, so that a rare class
        # outweighs what the image shows. The mean over the list is 1, so that the batch's mean is a plain one.
        return self.class_weights[class_ids] * loss


PLAIN = TrainingLoss()


def _blend(pixels: Tensor, others: Tensor, share: float, _: random.Random) -> tuple[Tensor, float]:
    """`share` of each image and the rest of the other, rounded to levels again."""
    return torch.lerp(others.float(), pixels.float(), share).round_().to(torch.uint8), share


def _cut(pixels: Tensor, others: Tensor, share: float, draw: random.Random) -> tuple[Tensor, float]:
    """A box of the other image in each, at the same place and of about `1 - share` of the area; and what stays,
    which is more where the box goes over the edge."""
    height, width = pixels.shape[-2:]
    side = (1 - share) ** 0.5 / 2  # half a side, in parts of the image
    middle_y, middle_x = draw.random(), draw.random()
    top, bottom = (round(height * min(max(middle_y + to * side, 0), 1)) for to in (-1, 1))
    left, right = (round(width * min(max(middle_x + to * side, 0), 1)) for to in (-1, 1))
    mixed = pixels.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def balanced_class_weights(class_ids: np.ndarray, num_classes: int) -> Tensor:
    """Weights (num_classes,) for the loss that make every class count alike: n / (classes x images of the class).

    The mean over the images is 1; a class without images has weight 0. The same as scikit-learn's "balanced".
    """
    counts = np.bincount(class_ids, minlength=num_classes)
    weights = len(class_ids) / (np.count_nonzero(counts) * np.maximum(counts, 1)) * (counts > 0)
    return torch.from_numpy(weights).float()
