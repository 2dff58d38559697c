"""The built-in dataset: scikit-learn's handwritten digits, for a first run without images of your own."""

from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = "demo"
CLASSES = tuple("0123456789")


def write_demo(datasets_path: str | Path) -> int:
    """Write the 1,797 digits as 8x8 gray PNGs, every fifth to `test/<digit>/`, the others to `train/<digit>/`.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998 (its test part, 13 writers).
    Returns the number of images.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8); the source has 17 levels
    for index, (pixels, target) in enumerate(zip(images, digits.target, strict=True)):
        folder = Path(datasets_path, "test" if index % 5 == 4 else "train", CLASSES[target])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:04d}.png")
    return len(images)
