"""Fixtures that several tests share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder that is the working folder too."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shared() -> Path:
    """The folder of real pictures and weights beside the project."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared with real pictures beside the project")
    return SHARED


def write_picture(path: Path, level: int = 128, size: tuple[int, int] = (20, 16), seed: int = 0) -> Path:
    """Write a noisy picture, as bright as `level`, and the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-40, 40, (size[1], size[0], 3))
    Image.fromarray(np.clip(level + noise, 0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def two_classes(here) -> Path:
    """`datasets/` with dark and light pictures: 24 and 16 to train on, 6 and 4 to test on."""
    for split, counts in (("train", (24, 16)), ("test", (6, 4))):
        for name, level, count in zip(("dark", "light"), (60, 190), counts, strict=True):
            for i in range(count):
                write_picture(here / "datasets" / split / name / f"{i:02d}.png", level, seed=i)
    return here / "datasets"
