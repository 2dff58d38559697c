"""utils/augment.py against torchvision's crops and its operations on Pillow's pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2
from torchvision.transforms.functional import pil_to_tensor

from utils.augment import GREY, OPERATIONS, AutoAugment, random_box

GIVEN = {"interpolation": InterpolationMode.NEAREST, "fill": v2.AutoAugment(fill=list(GREY))._fill}
MAGNITUDES = {
    "ShearX": (0.3, -0.1),
    "Rotate": (30.0, -3.3),
    "Color": (0.9, -0.5),
    "Sharpness": (0.9, -0.9),
    "Brightness": (0.7, -0.4),
    "Contrast": (0.9, -0.6),
    "Posterize": (4, 7),
    "Solarize": (0.0, 0.43, 1.0),
    "AutoContrast": (0.0,),
    "Equalize": (0.0,),
    "Invert": (0.0,),
}


def photo(shared) -> Image.Image:
    path = sorted((shared / "data" / "trashnet").rglob("*.jpg"))[7]
    return Image.open(path).convert("RGB").resize((97, 64))


def noise() -> Image.Image:
    levels = np.random.default_rng(0).normal((90, 120, 200), 40, (64, 97, 3))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def flat() -> Image.Image:
    return Image.new("RGB", (97, 64), (10, 128, 255))


@pytest.mark.parametrize(("name", "magnitude"), [(name, m) for name, all_m in MAGNITUDES.items() for m in all_m])
@pytest.mark.parametrize("kind", ["photo", "noise", "flat"])
def test_operations_are_torchvisions(kind, name, magnitude, request):
    image = photo(request.getfixturevalue("shared")) if kind == "photo" else {"noise": noise, "flat": flat}[kind]()
    peer = v2.AutoAugment()._apply_image_or_video_transform(image, name, magnitude, **GIVEN)
    own = AutoAugment()._apply_image_or_video_transform(pil_to_tensor(image), name, magnitude, **GIVEN)
    difference = (own.int() - pil_to_tensor(peer).int()).abs().amax(0).float()
    if name in ("ShearX", "Rotate"):  # of a pixel between two others either may be the nearest
        assert (difference > 1).float().mean() < 0.01
    else:
        assert difference.max() <= 2  # two roundings, of the grey and of the blend
        assert (difference > 1).float().mean() < 0.002


def test_the_table_is_complete():
    policy = {name for row in AutoAugment()._policies for name, *_ in row}
    assert policy <= set(OPERATIONS) == set(MAGNITUDES)


def test_draws_are_torchvisions():
    """The same random numbers choose the same operations and magnitudes."""
    image = noise()

    def run(transform, picture):
        names = []
        own = transform._apply_image_or_video_transform
        transform._apply_image_or_video_transform = lambda *args, **kwargs: (
            names.append(args[1:3]) or own(*args, **kwargs)
        )
        torch.manual_seed(0)
        for _ in range(50):
            transform(picture)
        return names

    called = run(AutoAugment(), pil_to_tensor(image))
    assert called == run(v2.AutoAugment(), image)
    assert len({name for name, _ in called}) > 6


def boxes(draw, count=4000) -> np.ndarray:
    torch.manual_seed(0)
    return np.array([draw() for _ in range(count)], float)


@pytest.mark.parametrize(
    ("width", "height", "least"), [(500, 375, 0.08), (64, 64, 0.5), (300, 40, 0.3), (40, 300, 0.9)]
)
def test_crops_are_spread_like_torchvisions(width, height, least):
    def peer():
        top, left, h, w = RandomResizedCrop.get_params(torch.empty(1, height, width), [least, 1.0], [3 / 4, 4 / 3])
        return left, top, left + w, top + h

    own, theirs = boxes(lambda: random_box(width, height, least)), boxes(peer)
    assert (own[:, :2] >= 0).all() and (own[:, 2] <= width).all() and (own[:, 3] <= height).all()
    for column in range(4):
        levels = np.quantile(theirs[:, column], (0.1, 0.25, 0.5, 0.75, 0.9))
        own_levels = np.quantile(own[:, column], (0.1, 0.25, 0.5, 0.75, 0.9))
        np.testing.assert_allclose(own_levels, levels, atol=0.03 * (width, height)[column % 2])
    area = (own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1]) / (width * height)
    peer_area = (theirs[:, 2] - theirs[:, 0]) * (theirs[:, 3] - theirs[:, 1]) / (width * height)
    assert area.mean() == pytest.approx(peer_area.mean(), abs=0.02)
