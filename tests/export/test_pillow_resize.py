"""The resize of exported files against that of evaluation, which is Pillow's, and that against Pillow's in one call."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.export.pillow_resize import PixelResize

FILTERS = ("bilinear", "bicubic")


def resizer(
    shape: tuple[int, int], letterbox: bool = False, crop: float = 1.0, interpolation: str = "bilinear"
) -> tuple[PixelResize, Preprocessing]:
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(10**9, False, shape, letterbox, crop, interpolation, half, half)
    return PixelResize(preprocessing), preprocessing


def by_pillow(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """What evaluation shows the network of an image in memory."""
    return EvalTransform(preprocessing)(Image.fromarray(pixels)).permute(1, 2, 0).numpy()


def by_graph(module: PixelResize, pixels: np.ndarray) -> np.ndarray:
    levels = module(torch.from_numpy(pixels)[None])[0].permute(1, 2, 0).numpy()
    assert np.array_equal(levels, levels.round())
    return levels


def noise(height: int, width: int, kind: str, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if kind == "black and white":  # the filters overshoot most
        return (generator.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


side = st.integers(1, 40) | st.integers(1, 400)


@settings(deadline=None, max_examples=300)
@example(height=1, width=2, shape=(1, 1), letterbox=True, crop=1.0, interpolation="bilinear", kind="levels", seed=0)
@example(height=2, width=900, shape=(9, 9), letterbox=True, crop=1.0, interpolation="bilinear", kind="levels", seed=0)
@example(height=900, width=1, shape=(9, 7), letterbox=True, crop=1.0, interpolation="bicubic", kind="levels", seed=0)
@given(
    height=side,
    width=side,
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    letterbox=st.booleans(),
    crop=st.sampled_from([1.0, 0.875, 0.3]),
    interpolation=st.sampled_from(FILTERS),
    kind=st.sampled_from(["levels", "black and white"]),
    seed=st.integers(0, 5),
)
def test_pillows_pixels(height, width, shape, letterbox, crop, interpolation, kind, seed):
    module, preprocessing = resizer(shape, letterbox, crop, interpolation)
    pixels = noise(height, width, kind, seed)
    assert np.array_equal(by_graph(module, pixels), by_pillow(pixels, preprocessing))


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize(
    "size", [(480, 640), (377, 501), (224, 224), (100, 150), (31, 900), (1200, 900), (562, 375), (900, 31)]
)
def test_images_as_they_are_taken(size, letterbox, interpolation):
    module, preprocessing = resizer((224, 224), letterbox, 0.9, interpolation)
    pixels = noise(*size, "levels", seed=1)
    assert np.array_equal(by_graph(module, pixels), by_pillow(pixels, preprocessing))


def test_the_same_size_stays_as_it_is():
    for interpolation in FILTERS:
        pixels = noise(16, 24, "black and white", seed=3)
        assert np.array_equal(by_graph(resizer((16, 24), interpolation=interpolation)[0], pixels), pixels)


def test_a_sliver_keeps_a_line():
    """An image so thin that by its aspect ratio nothing of it would be left."""
    module, preprocessing = resizer((8, 8), letterbox=True)
    for size in ((1, 400), (400, 1)):
        pixels = np.zeros((*size, 3), np.uint8)
        levels = by_graph(module, pixels)
        assert [int((levels == level).sum()) for level in (0, 128)] == [8 * 3, 56 * 3]
        assert np.array_equal(levels, by_pillow(pixels, preprocessing))


def test_images_of_a_batch_do_not_mix():
    module, _ = resizer((8, 8))
    images = torch.from_numpy(np.stack([noise(20, 30, "levels", seed) for seed in range(3)]))
    assert torch.equal(module(images)[1:2], module(images[1:2]))
