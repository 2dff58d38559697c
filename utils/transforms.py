"""What happens to a picture between the file and the network, for training and for evaluation side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms import v2

from utils.config import TrainConfig
from utils.images import open_image

GREY = (128, 128, 128)


@dataclass(frozen=True)
class Preprocessing:
    """How evaluation prepares a picture. A checkpoint carries it; the fields are those of `TrainConfig`."""

    max_pixels: int
    allow_truncated: bool
    input_shape: tuple[int, int]
    letterbox_image: bool
    eval_crop: float
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Preprocessing:
        """Take the fields out of a checkpoint's preprocessing or a config; other keys are passed over."""
        names = [field.name for field in dataclasses.fields(Preprocessing)]
        plain = {name: values[name] for name in names}
        return Preprocessing(**{name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()})

    def read(self, path: str) -> Image.Image:
        """An upright RGB picture; see `utils.images.open_image` for what it raises."""
        return open_image(path, self.max_pixels, self.allow_truncated)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain types."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def train_transform(config: TrainConfig) -> v2.Transform:
    """An RGB picture to uint8 (3, height, width), with augmentation drawn from torch's global generator."""
    steps: list[nn.Module] = [v2.RandomResizedCrop(config.input_shape, scale=(config.train_crop, 1.0), antialias=True)]
    if config.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(config.horizontal_flip))
    if config.auto_augment:
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=list(GREY)))
    return v2.Compose([*steps, v2.PILToTensor()])


def eval_transform(preprocessing: Preprocessing) -> v2.Transform:
    """An RGB picture to uint8 (3, height, width): the same for validation, evaluation and prediction."""
    if preprocessing.letterbox_image:
        fit = Letterbox(preprocessing.input_shape)
    else:
        fit = ResizeAndCrop(preprocessing.input_shape, preprocessing.eval_crop)
    return v2.Compose([fit, v2.PILToTensor()])


class ResizeAndCrop(nn.Module):
    """Cut out of the centre the largest part with the aspect ratio of `size`, times `crop`; resize it to `size`.

    With a square `size` this is the usual "resize the short side to size / crop, then crop the centre", in one step and
    without the pixels that are cut off.
    """

    def __init__(self, size: Sequence[int], crop: float) -> None:
        super().__init__()
        self.size = tuple(size)
        self.crop = crop

    def forward(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        scale = self.crop * min(
            image.height / height, image.width / width
        )  # pixels of the picture to one of the result
        left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
        box = (
            max(0, left),
            max(0, top),
            min(image.width, left + width * scale),
            min(image.height, top + height * scale),
        )
        return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


class Letterbox(nn.Module):
    """Resize, keeping the aspect ratio, until the whole picture fits; pad with grey around it."""

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = tuple(size)

    def forward(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        return ImageOps.pad(image, (width, height), Image.Resampling.BILINEAR, color=GREY)


class Normalise(nn.Module):
    """Pixels (B, 3, height, width) uint8 to floats, with `mean` subtracted and divided by `std` (of values 0 to 1)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        scale = [1 / (255 * s) for s in std]
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.addcmul(self.shift, pixels.to(self.scale.dtype), self.scale)
