"""Tests of utils/annotation/demo_digits.py against scikit-learn's digits."""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from utils.annotation.demo_digits import write_demo


def test_every_digit_is_written_once(here):
    assert write_demo("datasets") == 1797
    digits = load_digits()
    files = sorted(here.glob("datasets/*/*/*.png"), key=lambda path: path.name)
    assert [int(path.parent.name) for path in files] == digits.target.tolist()
    assert sum(path.parts[-3] == "test" for path in files) == 359
    for index in (0, 1000, 1796):
        pixels = np.asarray(Image.open(files[index]))
        np.testing.assert_allclose(pixels / 255 * 16, digits.images[index], atol=0.04)
