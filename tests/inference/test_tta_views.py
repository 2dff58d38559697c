"""utils/inference/tta_views.py: the views of test-time augmentation, against pieces cut out by hand."""

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
    return Preprocessing.of(settings(**{"input_shape": (8, 8), "eval_crop": 0.5} | fields))


PIXELS = np.random.default_rng(0).integers(0, 256, (16, 32, 3)).astype(np.uint8)
REGION = Region(PIXELS, (0, 0, 32, 16))


def test_the_first_view_is_that_of_evaluation_and_the_others_are_the_corners():
    of_evaluation = preprocessing()
    views = TTAViews(of_evaluation, mirror=False).resize(REGION)
    assert views.shape == (5, 3, 8, 8)
    assert torch.equal(views[0], EvalTransform(of_evaluation)(Image.fromarray(PIXELS)))
    corners = [PIXELS[:8, :8], PIXELS[:8, -8:], PIXELS[-8:, :8], PIXELS[-8:, -8:]]  # half of the short side is 8
    for view, corner in zip(views[1:], corners, strict=True):
        assert np.array_equal(view.permute(1, 2, 0), corner)


def test_mirrored_views_only_if_training_mirrored():
    views = TTAViews(preprocessing(), mirror=True).resize(REGION)
    assert len(views) == 10
    assert torch.equal(views[5:], views[:5].flip(-1))


def test_a_frame_that_is_filled_is_cropped_a_little():
    boxes = TTAViews(preprocessing(eval_crop=1.0), mirror=False).boxes(REGION)
    assert boxes[0] == (8, 0, 24, 16)
    assert boxes[1:] == [(0, 0, 14, 14), (18, 0, 32, 14), (0, 2, 14, 16), (18, 2, 32, 16)]


def test_all_of_a_letterboxed_image_is_one_view():
    views = TTAViews(preprocessing(letterbox_image=True), mirror=False).resize(REGION)
    assert len(views) == 1
    assert torch.equal(views[0], EvalTransform(preprocessing(letterbox_image=True))(Image.fromarray(PIXELS)))


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3)])
def test_tiny_and_long_images_have_views(size):
    region = Region(np.zeros((*size, 3), np.uint8), (0, 0, size[1], size[0]))
    assert TTAViews(preprocessing(), mirror=False).resize(region).shape == (5, 3, 8, 8)
