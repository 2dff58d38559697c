"""utils/inference/tta_views.py against crops made by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import settings
from utils.data.image_io import Region
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.inference.tta_views import TTAViews


def preprocessing(**fields) -> Preprocessing:
    return Preprocessing.from_config(settings(**{"input_shape": (8, 8), "eval_crop": 0.5} | fields))


PIXELS = np.random.default_rng(0).integers(0, 256, (16, 32, 3)).astype(np.uint8)
REGION = Region(PIXELS, (0, 0, 32, 16))


def test_views_are_the_evaluation_crop_and_the_corners():
    eval_preprocessing = preprocessing()
    views = TTAViews(eval_preprocessing, mirror=False).resize(REGION)
    assert views.shape == (5, 3, 8, 8)
    assert torch.equal(views[0], EvalTransform(eval_preprocessing)(Image.fromarray(PIXELS)))
    corners = [PIXELS[:8, :8], PIXELS[:8, -8:], PIXELS[-8:, :8], PIXELS[-8:, -8:]]  # half of the short side is 8
    for view, corner in zip(views[1:], corners, strict=True):
        assert np.array_equal(view.permute(1, 2, 0), corner)


def test_mirror_adds_flipped_views():
    views = TTAViews(preprocessing(), mirror=True).resize(REGION)
    assert len(views) == 10
    assert torch.equal(views[5:], views[:5].flip(-1))


def test_corner_views_are_smaller_with_eval_crop_1():
    boxes = TTAViews(preprocessing(eval_crop=1.0), mirror=False).boxes(REGION)
    assert boxes[0] == (8, 0, 24, 16)
    assert boxes[1:] == [(0, 0, 14, 14), (18, 0, 32, 14), (0, 2, 14, 16), (18, 2, 32, 16)]


def test_a_letterboxed_image_has_one_view():
    views = TTAViews(preprocessing(letterbox_image=True), mirror=False).resize(REGION)
    assert len(views) == 1
    assert torch.equal(views[0], EvalTransform(preprocessing(letterbox_image=True))(Image.fromarray(PIXELS)))


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("letterbox", [False, True])
def test_the_shape_is_that_of_the_result(mirror, letterbox):
    views = TTAViews(preprocessing(letterbox_image=letterbox), mirror)
    assert views.shape == views.resize(REGION).shape


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3)])
def test_views_of_tiny_and_elongated_images(size):
    region = Region(np.zeros((*size, 3), np.uint8), (0, 0, size[1], size[0]))
    assert TTAViews(preprocessing(), mirror=False).resize(region).shape == (5, 3, 8, 8)
