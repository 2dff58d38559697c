"""Tests of utils/data/image_cache.py."""

import dataclasses
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from tests.conftest import SMALL, settings, write_image
from utils.data import image_cache
from utils.data.dataset import FileSource, ImageDataset
from utils.data.image_cache import cached_size, open_cache
from utils.data.image_list import ImageList, list_in_memory
from utils.data.loader import train_loader
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import TrainTransform

CONFIG = settings(input_shape=(32, 32), cache_images=True, augmentation="none")


@pytest.fixture
def images(here) -> ImageList:
    for i in range(12):
        write_image(here / f"{i}.png", 60 + 10 * i, (90 + i, 60), seed=i)
    return list_in_memory((i, f"{i}.png") for i in range(12))


@pytest.fixture
def cached(monkeypatch) -> list[str]:
    """The paths of images that are written to a cache."""
    paths = []
    downscale = image_cache._downscale
    monkeypatch.setattr(image_cache, "_downscale", lambda path, config: paths.append(path) or downscale(path, config))
    return paths


def batch(source, config=CONFIG, epoch=0):
    dataset = ImageDataset(source, TrainTransform(config), seed=1, max_bad_fraction=0.5)
    return torch.stack([dataset[(epoch, i, 0)][0] for i in range(len(dataset))]).float(), dataset


@pytest.mark.parametrize("shape", [(224, 224), (96, 160)])
def test_cached_photos_are_close_to_their_files(shared, here, shape):
    paths = sorted(map(str, (shared / "data" / "trashnet" / "test").rglob("*.jpg")))[::20]
    photos = list_in_memory((0, path) for path in paths)
    config = dataclasses.replace(CONFIG, input_shape=shape)
    files, source = FileSource(photos, Preprocessing.from_config(config)), open_cache(photos, config)
    plain = torch.cat([batch(files, config, epoch)[0] for epoch in range(8)])
    from_cache = torch.cat([batch(source, config, epoch)[0] for epoch in range(8)])
    assert (from_cache - plain).abs().mean() < 3  # of 255 levels
    decibels = 10 * torch.log10(255**2 / (from_cache - plain).square().mean((1, 2, 3)))
    assert decibels.mean() > 34
    assert decibels.quantile(0.05) > 25


def test_small_images_are_cached_unchanged(here):
    write_image(here / "a.png", size=(30, 20))
    source = open_cache(list_in_memory([(0, "a.png")]), CONFIG)
    assert cached_size(20, 30, CONFIG) == (20, 30)
    plain, _ = batch(FileSource(source.images, Preprocessing.from_config(CONFIG)))
    assert torch.equal(batch(source)[0], plain)


def test_crops_of_mean_area_are_not_enlarged():
    height, width = cached_size(3000, 4000, settings())
    assert (height, width) == (305, 406)
    assert math.sqrt((1 + 0.08) / 2) * height == pytest.approx(224, abs=1)


def test_cache_is_written_once(images, cached, capsys):
    first = open_cache(images, CONFIG)
    assert sorted(cached) == sorted(f"{i}.png" for i in range(12))
    assert "12 images" in capsys.readouterr().out
    second = open_cache(images, CONFIG)
    assert len(cached) == 12
    assert torch.equal(batch(second)[0], batch(first)[0])
    pixels = batch(first)[0].clone()
    for size in (0, 100, first.path.stat().st_size // 2):
        content = first.path.read_bytes()
        first.path.unlink()  # still mapped
        first.path.write_bytes(content[len(content) - size :])
        assert torch.equal(batch(open_cache(images, CONFIG))[0], pixels)
    assert len(cached) == 4 * 12


def test_an_altered_cache_is_made_anew(images, cached, capsys):
    first = open_cache(images, CONFIG)
    content, pixels = bytearray(first.path.read_bytes()), batch(first)[0].clone()
    content[100] ^= 1
    first.path.unlink()  # still mapped
    first.path.write_bytes(content)
    capsys.readouterr()
    assert torch.equal(batch(open_cache(images, CONFIG))[0], pixels)
    assert f"warning: {first.path} isn't as it was written" in capsys.readouterr().out
    assert len(cached) == 2 * 12


@pytest.mark.parametrize("change", ["content", "time", "shape", "crop", "code"])
def test_cache_is_written_again_after_a_change(images, cached, monkeypatch, change):
    first, config = open_cache(images, CONFIG), CONFIG
    before, _ = batch(first)
    if change == "content":
        write_image(Path("3.png"), 250, (90, 60))
    elif change == "time":
        os.utime("3.png", (1, 1))
    elif change == "shape":
        config = dataclasses.replace(CONFIG, input_shape=(16, 16))
    elif change == "code":
        monkeypatch.setattr("utils.data.cache_file.code_digest", lambda modules: "edited")
    else:
        config = dataclasses.replace(CONFIG, train_crop=0.9)
    fresh, _ = batch(open_cache(images, config), config)
    assert len(cached) == 24
    plain, _ = batch(FileSource(images, Preprocessing.from_config(config)), config)
    assert (fresh - plain).abs().mean() < 12
    assert torch.equal(batch(first)[0], before)  # open caches are unaffected
    assert len(list(Path(CONFIG.cache_dir).glob("*.bin"))) == (2 if change == "shape" else 1)


@pytest.mark.slow
def test_two_processes_write_one_cache(here):
    for i in range(40):
        write_image(here / f"{i}.png", 100, (200, 150), seed=i)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.data.test_image_cache import CONFIG, batch, list_in_memory, open_cache\n"
        "cache = open_cache(list_in_memory((0, f'{i}.png') for i in range(40)), CONFIG)\n"
        "print(batch(cache)[0].sum().item())"
    )
    command = [sys.executable, "-c", script, str(Path(train.__file__).parent)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {process.communicate()[0].splitlines()[-1] for process in processes}
    assert len(sums) == 1
    assert [path.suffix for path in Path(CONFIG.cache_dir).iterdir()] == [".bin"]


def test_cache_depends_on_the_order_but_not_on_labels(images, cached):
    for path in Path().glob("*.png"):  # same size and time
        Image.new("RGB", (50, 50), (20 * int(path.stem), 0, 0)).save(path.with_suffix(".bmp"))
        os.utime(path.with_suffix(".bmp"), (1, 1))
    open_cache(list_in_memory((0, f"{i}.bmp") for i in range(12)), CONFIG)
    open_cache(list_in_memory((1, f"{i}.bmp") for i in range(12)), CONFIG)
    assert len(cached) == 12
    pixels, _ = batch(open_cache(list_in_memory((0, f"{i}.bmp") for i in reversed(range(12))), CONFIG))
    assert len(cached) == 24
    assert pixels[:, 0].mean((1, 2)).tolist() == [20 * i for i in reversed(range(12))]


def test_interrupted_write_leaves_no_file(images, monkeypatch):
    def fail(path, config):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_cache, "_downscale", fail)
    with pytest.raises(KeyboardInterrupt):
        open_cache(images, CONFIG)
    assert list(Path(CONFIG.cache_dir).iterdir()) == []


def test_unreadable_images_are_replaced(images, here, capsys):
    (here / "3.png").write_text("no image")
    images = list_in_memory((i // 6, f"{i}.png") for i in range(12))
    pixels, dataset = batch(open_cache(images, CONFIG))
    assert "1 unreadable" in capsys.readouterr().out
    with Image.open("0.png") as dark, Image.open("11.png") as light:
        middle = (np.asarray(dark).mean() + np.asarray(light).mean()) / 2
    assert pixels[3].mean() < middle  # replaced by an image of its class, the darker one
    assert dataset.newly_unreadable() == ["3.png"]


def test_missing_disk_space_is_an_error(images, cached, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"cache_dir='cache': the cache takes about .* are free; set cache_dir"):
        open_cache(images, CONFIG)
    assert cached == []


def test_workers_map_the_file_instead_of_copying_it(images):
    source = open_cache(images, CONFIG)
    expected, _ = batch(source)
    pickled = pickle.dumps(source)
    assert len(pickled) < source.path.stat().st_size / 10
    assert torch.equal(batch(pickle.loads(pickled))[0], expected)
    dataset = ImageDataset(source, TrainTransform(CONFIG), seed=1)
    ((pixels, class_ids),) = train_loader(dataset, 12, num_workers=2)
    assert torch.equal(pixels[np.argsort(class_ids)].float(), expected)


def test_training_with_the_cache(two_classes, capsys):
    train.main(settings(**SMALL | {"unfreeze_epoch": 1}, cache_images=True))
    assert "images from cache" in capsys.readouterr().out
