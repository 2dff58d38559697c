"""Cross-entropy with label smoothing, class weights and a teacher, on batches that MixUp or CutMix may have mixed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DISTILLED, DISTILL_TEMPERATURE = 0.5, 2.0
"""With a teacher: the share of its probabilities in the loss, and the temperature of both networks in that share."""


@dataclass(frozen=True)
class Batch:
    """Inputs with their labels: `share` for the class of the image itself, the rest for that of the image mixed in.

    Attributes:
        inputs: (B, ...).
        class_ids: (B,).
        mixed_class_ids: (B,), classes of the images mixed in.
        share: 0 to 1; 1 if nothing is mixed in.
    """

    inputs: Tensor
    class_ids: Tensor
    mixed_class_ids: Tensor
    share: float

    @property
    def main_class_ids(self) -> Tensor:
        """(B,), the class with the larger share of each image."""
        return self.class_ids if self.share >= 0.5 else self.mixed_class_ids

    def split(self, count: int) -> Iterator[Batch]:
        """Split into `count` micro-batches."""
        tensors = (self.inputs, self.class_ids, self.mixed_class_ids)
        for parts in zip(*(tensor.tensor_split(count) for tensor in tensors), strict=True):
            yield Batch(*parts, self.share)


@dataclass(frozen=True)
class TrainingLoss:
    """The loss of a batch, and the mixing of its images before the step.

    torchvision's MixUp isn't used, since it only takes float images, in four times the memory.

    Attributes:
        class_weights: (classes,), weights of the images of each class; None: no weights.
        label_smoothing: share of each label that is spread over all classes, 0 to below 1 (Szegedy et al.,
            "Rethinking the Inception Architecture", 2016, section 7).
        mixup: both parameters of the Beta distribution of the share; 0: no MixUp (Zhang et al., "mixup: Beyond
            Empirical Risk Minimization", 2018).
        cutmix: the same for the area; 0: no CutMix (Yun et al., "CutMix", 2019). With both, each step draws one.
        teacher: maps the images of a batch, mixed or not, to logits (B, classes) that the network learns, too (Hinton
            et al., "Distilling the Knowledge in a Neural Network", 2015, section 2; the same view of the image: Beyer
            et al., "Knowledge distillation: A good teacher is patient and consistent", 2022). None: no teacher.
    """

    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    teacher: Callable[[Tensor], Tensor] | None = None

    def to(self, device: torch.device) -> TrainingLoss:
        """A copy with its tensors on `device`."""
        weights = self.class_weights
        return self if weights is None else replace(self, class_weights=weights.to(device))

    def mix(self, inputs: Tensor, class_ids: Tensor, seed: int) -> Batch:
        """Mix each image of a batch, (B, 3, height, width) uint8, with the next one. Features aren't mixed.

        `seed` decides one share and one box for the whole batch, without waiting for the device.
        """
        methods = [(mix, alpha) for mix, alpha in ((_mixup, self.mixup), (_cutmix, self.cutmix)) if alpha]
        if not methods or inputs.dtype != torch.uint8:
            return Batch(inputs, class_ids, class_ids, 1.0)
        rng = random.Random(seed)
        mix, alpha = rng.choice(methods)
        mixed, share = mix(inputs, inputs.roll(1, 0), rng.betavariate(alpha, alpha), rng)
        return Batch(mixed, class_ids, class_ids.roll(1, 0), share)

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss (B,) of logits (B, classes)."""
        loss = self._cross_entropy(logits, batch.class_ids)
        if batch.share < 1:
            loss = batch.share * loss + (1 - batch.share) * self._cross_entropy(logits, batch.mixed_class_ids)
        if self.teacher is None:
            return loss
        return (1 - DISTILLED) * loss + DISTILLED * divergence(logits, self.teacher(batch.inputs), DISTILL_TEMPERATURE)

    def _cross_entropy(self, logits: Tensor, class_ids: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, class_ids, reduction="none", label_smoothing=self.label_smoothing)
        if self.class_weights is None:
            return loss
        # torch's `weight` would weight the smoothed part of a label by the class that it goes to, and a rare class
        # would outweigh the true one. The weights have mean 1 over the list, so a batch is averaged without them.
        return self.class_weights[class_ids] * loss


CROSS_ENTROPY = TrainingLoss()


def divergence(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence (B,) of the probabilities of `logits` from those of `targets`, (B, classes) each, at
    a temperature, whose square restores the size of the gradient (Hinton et al., 2015)."""
    own, other = ((values / temperature).log_softmax(dim=1) for values in (logits, targets))
    return temperature**2 * F.kl_div(own, other, reduction="none", log_target=True).sum(dim=1)


def _mixup(images: Tensor, others: Tensor, share: float, _: random.Random) -> tuple[Tensor, float]:
    """Blend `share` of each image with the rest of the other one, rounded to uint8."""
    return torch.lerp(others.float(), images.float(), share).round_().to(torch.uint8), share


def _cutmix(images: Tensor, others: Tensor, share: float, rng: random.Random) -> tuple[Tensor, float]:
    """Replace a box of about `1 - share` of each image by the other one; the share is that of the box inside it."""
    height, width = images.shape[-2:]
    half = (1 - share) ** 0.5 / 2  # half a side of the box, as a share of the image's
    center_y, center_x = rng.random(), rng.random()
    top, bottom = (round(height * min(max(center_y + sign * half, 0), 1)) for sign in (-1, 1))
    left, right = (round(width * min(max(center_x + sign * half, 0), 1)) for sign in (-1, 1))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def balanced_class_weights(class_ids: np.ndarray, num_classes: int) -> Tensor:
    """Weights (num_classes,) for the loss, as scikit-learn's "balanced": images / (classes * images of the class).

    Their mean over the images is 1; a class without images has weight 0.
    """
    counts = np.bincount(class_ids, minlength=num_classes)
    weights = len(class_ids) / (np.count_nonzero(counts) * np.maximum(counts, 1)) * (counts > 0)
    return torch.from_numpy(weights).float()
