"""The built-in data set: the handwritten digits that ship inside scikit-learn, for a first run without own images."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = tuple("0123456789")
PREFIX = "builtin-digit-"
"""Their file names begin with this, so that they can be told from the user's images and set aside for them."""


def write_demo(datasets_path: str | Path) -> int:
    """Write the 1,797 digits as 8x8 grey PNGs, every fifth into `test/<digit>/`, the others into `train/<digit>/`.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998 (its test part, 13 writers).

    Returns:
        How many images were written.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8); the source has 17 levels
    for index, (pixels, target) in enumerate(zip(grey, digits.target, strict=True)):
        folder = Path(datasets_path, "test" if index % 5 == 4 else "train", CLASSES[target])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{PREFIX}{index:04d}.png")
    return len(grey)
