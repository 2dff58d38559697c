"""utils/data.py: what is seen depends on the seed alone, and nothing is dropped in evaluation."""

import pytest
import torch

from tests.conftest import write_picture
from utils.config import TrainConfig
from utils.data import EpochSampler, FileSource, ImageDataset, eval_loader, train_loader
from utils.images import ImageError
from utils.lists import ImageList, list_in_memory
from utils.seeds import derive_seed
from utils.transforms import EvalTransform, Preprocessing, TrainTransform

CONFIG = TrainConfig(input_shape=(16, 16))
PREPROCESSING = Preprocessing.from_dict(CONFIG.as_dict())


@pytest.fixture
def images(here) -> ImageList:
    for i in range(23):
        write_picture(here / f"{i}.png", level=60 + 6 * i, seed=i)
    return list_in_memory((i, f"{i}.png") for i in range(23))


def epoch_of(images, workers, seed=1, epoch=0, batch_size=5):
    loader = train_loader(FileSource(images, PREPROCESSING), TrainTransform(CONFIG), batch_size, workers, seed)
    loader.sampler.epoch = epoch
    return list(loader)


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(images, workers):
    torch.manual_seed(0)
    alone = epoch_of(images, 0)
    torch.manual_seed(99)
    assert equal(epoch_of(images, workers), alone)


def test_seed_and_epoch_change_everything(images):
    first = epoch_of(images, 0)
    assert equal(epoch_of(images, 0), first)
    assert not equal(epoch_of(images, 0, epoch=1), first)
    assert not equal(epoch_of(images, 0, seed=2), first)


def test_the_same_picture_looks_otherwise_in_another_epoch(images):
    dataset = ImageDataset(FileSource(images, PREPROCESSING), TrainTransform(CONFIG), seed=1)
    assert torch.equal(dataset[(0, 3)][0], dataset[(0, 3)][0])
    assert not torch.equal(dataset[(0, 3)][0], dataset[(1, 3)][0])


def test_training_batches_are_whole_and_no_picture_comes_twice(images):
    batches = epoch_of(images, 0)
    assert [len(targets) for _, targets in batches] == [5] * 4
    seen = torch.cat([targets for _, targets in batches])
    assert len(seen.unique()) == 20
    assert seen.tolist() != sorted(seen.tolist())
    left_out = [
        set(range(23)) - set(torch.cat([t for _, t in epoch_of(images, 0, epoch=e)]).tolist()) for e in range(4)
    ]
    assert len(set.union(*left_out)) > 3


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_picture_once_and_in_order(images, workers):
    batches = list(eval_loader(FileSource(images, PREPROCESSING), EvalTransform(PREPROCESSING), 5, workers))
    assert torch.cat([targets for _, targets in batches]).tolist() == list(range(23))
    assert all(pixels.dtype == torch.uint8 for pixels, _ in batches)
    brightness = torch.cat([pixels.float().mean((1, 2, 3)) for pixels, _ in batches])
    assert (brightness[5:] - brightness[:-5]).min() > 0


def test_a_second_pass_of_evaluation_is_the_same(images):
    loader = eval_loader(FileSource(images, PREPROCESSING), EvalTransform(PREPROCESSING), 5, 1)
    assert equal(list(loader), list(loader))


def test_order_is_a_permutation_that_depends_on_the_epoch():
    sampler = EpochSampler(100, shuffle=True, seed=3)
    first = list(sampler)
    sampler.epoch = 1
    second = list(sampler)
    assert sorted(first) == [(0, i) for i in range(100)]
    assert sorted(second) == [(1, i) for i in range(100)]
    assert [i for _, i in first] != [i for _, i in second]


def test_an_unreadable_picture_is_named(images, here):
    (here / "3.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"3\.png can't be read as a picture"):
        epoch_of(images, 0, batch_size=23)


def test_an_unreadable_picture_is_named_by_a_worker(images, here):
    (here / "3.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"3\.png can't be read as a picture"):
        epoch_of(images, 1, batch_size=23)


def test_seeds_differ_by_purpose_and_position():
    parts = [
        (1, "a"),
        (1, "b"),
        (2, "a"),
        (1, "a", 0),
        (1, "a", 1),
        (1, "a", 0, 1),
        (1, "a", 1, 0),
        (11, "a"),
        (1, "a", 11),
    ]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derive_seed(1, "sample", 2, 3) == derive_seed(1, "sample", 2, 3)
