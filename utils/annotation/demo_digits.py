"""The built-in dataset: scikit-learn's handwritten digits, for a first run without images of your own."""

from pathlib import Path

import numpy as np
from PIL import Image

from utils.system.files import WriteError, make_folder

FOLDER = "demo"
CLASSES = tuple("0123456789")


def write_demo(datasets_path: str | Path) -> int:
    """Write the 1,797 digits as 8x8 gray PNGs, every fifth to `test/<digit>/`, the others to `train/<digit>/`.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998 (its test part, 13 writers).
    Returns the number of images.

    Raises:
        WriteError: they can't be written.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8); the source has 17 levels
    for index, (pixels, target) in enumerate(zip(images, digits.target, strict=True)):
        folder = Path(datasets_path, "test" if index % 5 == 4 else "train", CLASSES[target])
        make_folder(folder)
        path = folder / f"{index:04d}.png"
        try:
            Image.fromarray(pixels).save(path)
        except OSError as error:
            raise WriteError(error.errno, error.strerror, str(path)) from error
    return len(images)
