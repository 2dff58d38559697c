"""Tests of utils/data/transforms.py against Pillow, torchvision and synthetic images."""

import dataclasses
import math
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from tests.conftest import settings
from utils.config.train_config import Augmentation, TrainConfig
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform, TrainTransform
from utils.modeling.pixel_network import Normalize


def preprocessing(**changes) -> Preprocessing:
    return Preprocessing.from_dict(settings().as_dict() | changes)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def gradient(width: int, height: int) -> Image.Image:
    """Brightness rises from left to right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], (height, 1, 3)))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (50, 80)])
def test_evaluation_matches_torchvision_resize_and_center_crop(size):
    peer = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224), v2.PILToTensor()])
    image = gradient(*size)
    own = EvalTransform(preprocessing())(image)
    assert (own.dtype, own.shape) == (torch.uint8, (3, 224, 224))
    assert (own.int() - peer(image).int()).abs().max() <= 2  # the long side may be rounded differently, by one pixel


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(640, 480), (300, 224), (50, 40)])
def test_evaluation_matches_pillow_resize(size, interpolation):
    """For landscape images Pillow resizes horizontally first, too."""
    transform = EvalTransform(preprocessing(interpolation=interpolation, eval_crop=0.9))
    image = noise(*size)
    box = transform.choose_box(*size)
    peer = image.resize((224, 224), Image.Resampling[interpolation.upper()], box=box)
    assert torch.equal(transform(image), pil_to_tensor(peer))


@pytest.mark.parametrize("upright", [False, True])
def test_extreme_aspect_ratios_cost_no_more_than_others(upright, monkeypatch):
    """Resizing the short side of 10 x 20,000 pixels to 256 first would give 512 million pixels."""
    areas = []
    resize = Image.Image.resize

    def watched(image: Image.Image, size: tuple[int, int], *args, **options) -> Image.Image:
        areas.append(size[0] * size[1])
        return resize(image, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    image = gradient(20_000, 10)
    pixels = EvalTransform(preprocessing())(image.transpose(Image.Transpose.TRANSPOSE) if upright else image)
    assert pixels.shape == (3, 224, 224)
    assert abs(pixels[0].float().mean().item() - 127) < 2
    assert max(areas) <= 224 * 224


def test_evaluation_at_a_shape_that_is_not_square():
    pixels = EvalTransform(preprocessing(input_shape=[100, 200], eval_crop=1.0))(gradient(200, 200))
    assert pixels.shape == (3, 100, 200)
    assert np.abs(pixels[0, 0].numpy().astype(int) - np.linspace(0, 255, 200)).max() <= 1.5  # the whole width


@pytest.mark.parametrize(("size", "bars"), [((200, 100), "rows"), ((100, 200), "columns")])
def test_letterbox_pads_with_gray(size, bars):
    white = Image.new("RGB", size, "white")
    pixels = EvalTransform(preprocessing(input_shape=[64, 64], letterbox_image=True))(white)[0]
    pixels = pixels if bars == "rows" else pixels.T
    assert pixels.shape == (64, 64)
    assert (pixels[:16] == 128).all()
    assert (pixels[16:48] == 255).all()
    assert (pixels[48:] == 128).all()


def test_normalization_matches_torchvision():
    pixels = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = preprocessing()
    peer = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.image_mean, config.image_std)])
    own = Normalize(config.image_mean, config.image_std)
    torch.testing.assert_close(own(pixels), peer(pixels), atol=1e-5, rtol=0)
    assert not own.state_dict()


def test_train_transform_returns_uint8_of_the_input_shape():
    pixels = TrainTransform(settings(input_shape=(32, 48)))(noise(100, 80))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 32, 48))


@pytest.mark.parametrize("side", [300, 660, 672, 1000, 1344, 2688])  # decoded at 1, 1, 1/2, 1/2, 1/4, 1/8
def test_scaled_decoding_matches_full_decoding(shared, here, side):
    """Decoded at a lower scale and resized by torch, against decoded in full and resized by Pillow."""
    config = settings(horizontal_flip=0.0, augmentation="none")
    for path in sorted((shared / "data" / "trashnet" / "test").rglob("*.jpg"))[::60]:
        width = side * 5 // 4
        Image.open(path).resize((width, width), Image.Resampling.BICUBIC).save("a.jpg", quality=90)
        left, top = side // 80 * 8, side // 160 * 8  # whole pixels at every scale
        box = (left, top, left + side, top + side)
        transform = TrainTransform(config)
        transform.choose_box = lambda w, h, box=box: box
        with preprocessing().open("a.jpg") as image:
            own = transform.resize(transform.region(image)).float()
        with Image.open("a.jpg") as image:
            plain = pil_to_tensor(image.crop(box).resize((224, 224), Image.Resampling.BILINEAR)).float()
        assert (own - plain).abs().mean() < 1.5  # of 255 levels
        assert 10 * math.log10(255**2 / (own - plain).square().mean()) > 36  # dB


def samples(config: TrainConfig, image: Image.Image, count: int = 200) -> torch.Tensor:
    torch.manual_seed(0)
    transform = TrainTransform(config)
    return torch.stack([transform(image) for _ in range(count)]).float()


PLAIN = settings(input_shape=(16, 16), augmentation="none", horizontal_flip=0.0)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_horizontal_flip(probability):
    pixels = samples(dataclasses.replace(PLAIN, horizontal_flip=probability, train_crop=0.5), gradient(64, 64))
    mirrored = pixels[:, 0, :, 0].mean(1) > pixels[:, 0, :, -1].mean(1)
    assert mirrored.float().mean().item() == pytest.approx(probability, abs=0.1)


def test_train_crop():
    def min_span(train_crop):
        pixels = samples(dataclasses.replace(PLAIN, train_crop=train_crop), gradient(64, 64))
        return (pixels[:, 0, 0, -1] - pixels[:, 0, 0, 0]).min().item() / 255

    assert min_span(0.9) > 0.75
    assert min_span(0.08) < 0.4


AUGMENTATIONS = [{"augmentation": name} for name in get_args(Augmentation) if name != "none"]


@pytest.mark.parametrize("fields", [*AUGMENTATIONS, {"color_jitter": 0.4}, {"random_erasing": 0.5}, {}])
def test_augmentation_fields(fields):
    pixels = samples(dataclasses.replace(PLAIN, train_crop=1.0, **fields), gradient(16, 16), 50)
    plain = samples(dataclasses.replace(PLAIN, train_crop=1.0), gradient(16, 16), 50)
    assert len(plain.unique(dim=0)) <= 5  # only crops by whole pixels vary
    unchanged = (pixels[:, None] == plain.unique(dim=0)).flatten(2).all(dim=2).any(dim=1)
    assert unchanged.float().mean() < 0.8 if fields else unchanged.all()


def test_random_erasing_and_color_jitter():
    """Gray boxes of 2 to 33 % in half of the images, and the brightness of gray images within the jitter."""
    gray = Image.new("RGB", (40, 40), (100, 100, 100))
    plain = dataclasses.replace(PLAIN, train_crop=1.0, input_shape=(40, 40))
    erased = (samples(dataclasses.replace(plain, random_erasing=0.5), gray, 400) == 128).all(1).float().mean(dim=(1, 2))
    hit = erased[erased > 0]
    assert 150 < len(hit) < 250
    assert hit.min() > 0.015
    assert hit.max() < 0.35
    levels = samples(dataclasses.replace(plain, color_jitter=0.2), gray, 400)[:, 0, 0, 0]
    # Only brightness changes uniform gray, by up to 20 % and rounding; contrast and saturation don't.
    assert 77 <= levels.min() < 85
    assert 115 < levels.max() <= 121


def test_preprocessing_round_trip():
    before = preprocessing(input_shape=[32, 48], letterbox_image=True)
    assert before.input_shape == (32, 48)
    assert Preprocessing.from_dict(before.as_dict()) == before
    assert all(type(v) in (list, bool, float, int, str) for v in before.as_dict().values())


def test_center_box_of_a_shape_that_is_not_square():
    """Computed by hand, for a tall image and a wide shape."""
    preprocessing = Preprocessing.from_config(settings(input_shape=(8, 16), eval_crop=1.0))
    assert EvalTransform(preprocessing).choose_box(width=10, height=20) == pytest.approx((0, 7.5, 10, 12.5))
    preprocessing = Preprocessing.from_config(settings(input_shape=(8, 16), eval_crop=0.5))
    assert EvalTransform(preprocessing).choose_box(width=10, height=20) == pytest.approx((2.5, 8.75, 7.5, 11.25))


@pytest.mark.parametrize("size", [(900, 2), (2, 900)])
def test_letterbox_keeps_one_line_of_a_strip(size):
    transform = EvalTransform(Preprocessing.from_config(settings(input_shape=(32, 32), letterbox_image=True)))
    pixels = transform(Image.new("RGB", size, "white"))
    assert (pixels == 255).sum().item() == 3 * 32
    assert (pixels == 128).sum().item() == 3 * 32 * 31
