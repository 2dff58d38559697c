"""Tests of utils/data/retry.py: images on a disk that goes away and comes back."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch._utils import ExceptionWrapper

import train
from tests.conftest import TINY, settings, write_image
from utils.annotation.fingerprints import Fingerprints
from utils.data import image_cache, retry
from utils.data.dataset import FileSource, ImageDataset, TooManyUnreadable
from utils.data.image_io import ImageError
from utils.data.image_list import ImageList, list_in_memory
from utils.data.loader import eval_loader
from utils.data.preprocessing import Preprocessing
from utils.data.retry import PAUSES, PAUSES_FOR_ONE, ImagesGone
from utils.data.transforms import EvalTransform
from utils.runs.checkpoint import LAST, load_checkpoint
from utils.training.trainer import Trainer

CONFIG = settings(input_shape=(16, 16))
PREPROCESSING = Preprocessing.from_config(CONFIG)


@pytest.fixture
def images(here) -> ImageList:
    for i in range(30):
        write_image(here / "disk" / f"{i}.png", level=60 + 5 * i, seed=i)
    return list_in_memory((i % 2, f"disk/{i}.png") for i in range(30))


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses so far, which take no time."""
    taken = []
    monkeypatch.setattr(retry.time, "sleep", taken.append)
    return taken


def dataset_of(images: ImageList, max_bad_fraction: float | None = 0.05) -> ImageDataset:
    return ImageDataset(FileSource(images, PREPROCESSING), EvalTransform(PREPROCESSING), 0, max_bad_fraction)


def read_all(dataset: ImageDataset) -> torch.Tensor:
    return torch.cat([pixels for pixels, _ in eval_loader(dataset, 10, num_workers=0)])


def test_images_that_come_back_are_read(images, monkeypatch, capsys):
    expected = read_all(dataset_of(images))
    os.rename("disk", "gone")
    taken = []

    def sleep(pause):
        taken.append(pause)
        if len(taken) == len(PAUSES):  # after half a minute
            os.rename("gone", "disk")

    monkeypatch.setattr(retry.time, "sleep", sleep)
    dataset = dataset_of(images)
    assert torch.equal(read_all(dataset), expected)
    assert (sum(taken), dataset.unreadable.any()) == (sum(PAUSES), False)
    assert "disk/0.png and most other images are missing: waiting for their disk" in capsys.readouterr().out


@pytest.mark.parametrize("max_bad_fraction", [None, 1.0])
def test_a_missing_disk_is_no_damage(images, pauses, max_bad_fraction):
    os.rename("disk", "gone")
    message = r"^15 of 15 images.*such as disk/0\.png: their disk.*run the same command again$"
    with pytest.raises(ImagesGone, match=message) as caught:
        read_all(dataset_of(images, max_bad_fraction))
    assert pauses == list(PAUSES)
    of_worker = ExceptionWrapper((caught.type, caught.value, caught.tb))
    with pytest.raises(ImagesGone, match=message):
        of_worker.reraise()


def test_one_missing_image_is_not_waited_for_long(images, pauses):
    os.unlink("disk/3.png")
    with pytest.raises(ImageError, match=r"there is no such file; make it available again, or run"):
        read_all(dataset_of(images, None))
    dataset = dataset_of(images)
    for _ in range(2):  # known to be missing in the second epoch
        read_all(dataset)
    assert dataset.newly_unreadable() == ["disk/3.png"]
    assert pauses == 2 * list(PAUSES[:PAUSES_FOR_ONE])


def test_missing_and_damaged_images_are_told_apart(images, pauses):
    os.unlink("disk/3.png")
    Path("disk/4.png").write_text("no image")
    message = "2 of 30 images can't be read; missing: 1 (disk/3.png); make it available again, or run"
    with pytest.raises(TooManyUnreadable, match=f"{re.escape(message)}.*damaged: 1 .disk/4.png.; repair"):
        read_all(dataset_of(images))
    assert pauses == list(PAUSES[:PAUSES_FOR_ONE])


def test_no_cache_is_written_of_missing_images(images, pauses):
    os.rename("disk", "gone")
    with pytest.raises(ImagesGone):
        image_cache.open_cache(images, CONFIG)
    assert os.listdir("cache") == []


def test_the_audit_does_not_exclude_missing_images(images, pauses):
    paths = [images.path(i) for i in range(30)]
    os.unlink("disk/3.png")
    assert [p.error for p in Fingerprints("prints").read(paths) if p.error] == ["there is no such file"]
    os.rename("disk", "gone")
    with pytest.raises(ImagesGone):
        Fingerprints("other").read(paths)


def test_a_run_whose_disk_goes_away_is_saved_and_resumes(two_classes, pauses, monkeypatch, capsys):
    config = settings(**TINY | {"cache_features": False, "unfreeze_epoch": 2})
    step = Trainer.train_step

    def lose_the_disk(trainer, *batch):
        if trainer.step == 2:
            os.rename("datasets/train", "gone")
        return step(trainer, *batch)

    with monkeypatch.context() as patch, pytest.raises(ImagesGone):
        patch.setattr(Trainer, "train_step", lose_the_disk)
        train.main(config)
    (run,) = Path("logs").iterdir()
    assert f"ImagesGone: {run} is saved at step 3; the same command resumes it" in capsys.readouterr().out
    assert load_checkpoint(run / LAST)["step"] == 3
