"""Tests of utils/data/augment.py against torchvision's crops and operations on Pillow images."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2

from utils.data.augment import GRAY, OPERATIONS, POLICY, AutoAugment, magnitude, random_box

GIVEN = {"interpolation": InterpolationMode.NEAREST, "fill": v2.AutoAugment(fill=list(GRAY))._fill}
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


@pytest.mark.parametrize(("name", "size"), [(name, m) for name, all_m in MAGNITUDES.items() for m in all_m])
@pytest.mark.parametrize("kind", ["photo", "noise", "flat"])
def test_operations_match_torchvision(kind, name, size, request):
    image = photo(request.getfixturevalue("shared")) if kind == "photo" else {"noise": noise, "flat": flat}[kind]()
    peer = v2.AutoAugment()._apply_image_or_video_transform(image, name, size, **GIVEN)
    own = OPERATIONS[name](np.array(image), size)
    difference = torch.from_numpy(np.abs(own.astype(int) - np.asarray(peer))).amax(2).float()
    if name in ("ShearX", "Rotate"):  # ties between nearest pixels may be resolved differently
        assert (difference > 1).float().mean() < 0.01
    else:
        assert difference.max() <= 2  # rounding of the gray image and of the blend
        assert (difference > 1).float().mean() < 0.002


def test_policy_matches_torchvision():
    peer = v2.AutoAugment()
    theirs = [[(name, p, level or 0) for name, p, level in row] for row in peer._policies]
    assert theirs == [list(row) for row in POLICY]
    assert {name for row in POLICY for name, *_ in row} <= set(OPERATIONS) == set(MAGNITUDES)
    for name in {name for row in POLICY for name, *_ in row} - {"AutoContrast", "Equalize", "Invert"}:
        levels, signed = peer._AUGMENTATION_SPACE[name]
        own = [magnitude(name, level, negative=False) for level in range(10)]
        assert own == pytest.approx(levels(10, 224, 224).tolist(), abs=1e-5)
        assert (magnitude(name, 5, negative=True) == -own[5]) == signed


def test_operation_frequencies_follow_the_policy(monkeypatch):
    counts = Counter()

    def counter(name):
        return lambda pixels, size: counts.update([(name, size < 0)]) or pixels

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, counter(name))
    torch.manual_seed(0)
    transform, pixels = AutoAugment(), torch.zeros(3, 2, 2, dtype=torch.uint8)
    for _ in range(5000):
        transform(pixels)
    for name in OPERATIONS:
        expected = 200 * sum(p for row in POLICY for n, p, _ in row if n == name)
        count = counts[name, False] + counts[name, True]
        assert count == pytest.approx(expected, abs=4 * expected**0.5)
        if name == "Rotate":
            assert counts[name, True] / count == pytest.approx(0.5, abs=0.1)


def boxes(sample, count=4000) -> np.ndarray:
    torch.manual_seed(0)
    return np.array([sample() for _ in range(count)], float)


@pytest.mark.parametrize(
    ("width", "height", "min_area"), [(500, 375, 0.08), (64, 64, 0.5), (300, 40, 0.3), (40, 300, 0.9)]
)
def test_crop_distribution_matches_torchvision(width, height, min_area):
    def peer():
        top, left, h, w = RandomResizedCrop.get_params(torch.empty(1, height, width), [min_area, 1.0], [3 / 4, 4 / 3])
        return left, top, left + w, top + h

    own, theirs = boxes(lambda: random_box(width, height, min_area)), boxes(peer)
    assert (own[:, :2] >= 0).all() and (own[:, 2] <= width).all() and (own[:, 3] <= height).all()
    for column in range(4):
        levels = np.quantile(theirs[:, column], (0.1, 0.25, 0.5, 0.75, 0.9))
        own_levels = np.quantile(own[:, column], (0.1, 0.25, 0.5, 0.75, 0.9))
        np.testing.assert_allclose(own_levels, levels, atol=0.03 * (width, height)[column % 2])
    area = (own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1]) / (width * height)
    peer_area = (theirs[:, 2] - theirs[:, 0]) * (theirs[:, 3] - theirs[:, 1]) / (width * height)
    assert area.mean() == pytest.approx(peer_area.mean(), abs=0.02)
