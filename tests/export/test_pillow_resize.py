"""The resize in exported files gives the same pixels as evaluation, which uses Pillow."""

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
    """The network's input in evaluation, for an image in memory."""
    return EvalTransform(preprocessing)(Image.fromarray(pixels)).permute(1, 2, 0).numpy()


def by_graph(module: PixelResize, pixels: np.ndarray) -> np.ndarray:
    values = module(torch.from_numpy(pixels)[None])[0].permute(1, 2, 0).numpy()
    assert np.array_equal(values, values.round())
    return values


def noise(height: int, width: int, kind: str, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if kind == "black and white":  # where filters overshoot most
        return (generator.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


side = st.integers(1, 40) | st.integers(1, 400)


@settings(deadline=None, max_examples=300)
@example(height=1, width=2, shape=(1, 1), letterbox=True, crop=1.0, interpolation="bilinear", kind="uniform", seed=0)
@example(height=2, width=900, shape=(9, 9), letterbox=True, crop=1.0, interpolation="bilinear", kind="uniform", seed=0)
@example(height=900, width=1, shape=(9, 7), letterbox=True, crop=1.0, interpolation="bicubic", kind="uniform", seed=0)
@given(
    height=side,
    width=side,
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    letterbox=st.booleans(),
    crop=st.sampled_from([1.0, 0.875, 0.3]),
    interpolation=st.sampled_from(FILTERS),
    kind=st.sampled_from(["uniform", "black and white"]),
    seed=st.integers(0, 5),
)
def test_same_pixels_as_pillow(height, width, shape, letterbox, crop, interpolation, kind, seed):
    module, preprocessing = resizer(shape, letterbox, crop, interpolation)
    pixels = noise(height, width, kind, seed)
    assert np.array_equal(by_graph(module, pixels), by_pillow(pixels, preprocessing))


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize(
    "size", [(480, 640), (377, 501), (224, 224), (100, 150), (31, 900), (1200, 900), (562, 375), (900, 31)]
)
def test_usual_and_extreme_image_sizes(size, letterbox, interpolation):
    module, preprocessing = resizer((224, 224), letterbox, 0.9, interpolation)
    pixels = noise(*size, "uniform", seed=1)
    assert np.array_equal(by_graph(module, pixels), by_pillow(pixels, preprocessing))


def test_same_size_is_unchanged():
    for interpolation in FILTERS:
        pixels = noise(16, 24, "black and white", seed=3)
        assert np.array_equal(by_graph(resizer((16, 24), interpolation=interpolation)[0], pixels), pixels)


def test_extremely_thin_image_keeps_one_line():
    """The shorter side would be rounded to zero."""
    module, preprocessing = resizer((8, 8), letterbox=True)
    for size in ((1, 400), (400, 1)):
        pixels = np.zeros((*size, 3), np.uint8)
        values = by_graph(module, pixels)
        assert [int((values == value).sum()) for value in (0, 128)] == [8 * 3, 56 * 3]
        assert np.array_equal(values, by_pillow(pixels, preprocessing))


def test_images_in_a_batch_are_independent():
    module, _ = resizer((8, 8))
    images = torch.from_numpy(np.stack([noise(20, 30, "uniform", seed) for seed in range(3)]))
    assert torch.equal(module(images)[1:2], module(images[1:2]))
