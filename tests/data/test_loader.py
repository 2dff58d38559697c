"""Tests of dataset, sampler and loader: samples depend on the seed only, and evaluation reads every image."""

import dataclasses
import errno
import sys

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from tests.conftest import settings, write_image
from utils.data import loader
from utils.data.dataset import FileSource, ImageDataset, TooManyUnreadable
from utils.data.image_io import ImageError
from utils.data.image_list import ImageList, list_in_memory
from utils.data.loader import batch_paths, eval_loader, train_loader
from utils.data.preprocessing import Preprocessing
from utils.data.sampler import EpochSampler
from utils.data.transforms import EvalTransform, TrainTransform
from utils.system.seeds import derive_seed
from utils.training.loss import balanced_class_weights

CONFIG = settings(input_shape=(16, 16))
PREPROCESSING = Preprocessing.from_config(CONFIG)


@pytest.fixture
def images(here) -> ImageList:
    for i in range(23):
        write_image(here / f"{i}.png", level=60 + 6 * i, seed=i)
    return list_in_memory((i, f"{i}.png") for i in range(23))


def test_cpu_runs_do_not_initialize_cuda(images, monkeypatch):
    """Pinning memory initializes CUDA, which fails if another process uses all GPU memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    dataset = ImageDataset(FileSource(images, PREPROCESSING), TrainTransform(CONFIG), seed=1)
    assert not train_loader(dataset, 5, 0).pin_memory


def epoch_of(images, workers, seed=1, epoch=0, batch_size=5):
    loader = train_loader(
        ImageDataset(FileSource(images, PREPROCESSING), TrainTransform(CONFIG), seed), batch_size, workers
    )
    loader.batch_sampler.epoch = epoch
    return list(loader)


def eval_set(images):
    return ImageDataset(FileSource(images, PREPROCESSING), EvalTransform(PREPROCESSING), seed=0)


def equal(one, other) -> bool:
    pairs = [pair for x, y in zip(one, other, strict=True) for pair in zip(x, y, strict=True)]
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(images, workers):
    torch.manual_seed(0)
    alone = epoch_of(images, 0)
    torch.manual_seed(99)
    assert equal(epoch_of(images, workers), alone)


@pytest.fixture
def fresh_warnings():
    """The loader prints each of its warnings once."""
    loader._warn_about_pipes.cache_clear()
    loader._warn_about_semaphores.cache_clear()


def test_without_room_in_shared_memory_batches_pass_through_pipes(images, monkeypatch, capsys, fresh_warnings):
    alone = epoch_of(images, 0)
    monkeypatch.setattr(loader, "free_bytes", lambda folder: 1 << 10)
    train = train_loader(ImageDataset(FileSource(images, PREPROCESSING), TrainTransform(CONFIG), 1), 5, 2)
    batches = [batch for _ in range(2) for batch in loader.iterate_batches(train)]
    assert equal(batches[:4], alone) and equal(batches[4:], alone)
    assert batches[0][0].stride() == alone[0][0].stride()  # channels-last
    output = capsys.readouterr().out
    assert output.count("warning: /dev/shm is too small for the batches of 2 workers (0.00 MB free)") == 1


def test_without_semaphores_the_main_process_loads(images, monkeypatch, capsys, fresh_warnings):
    left = iter(range(10))  # of which a loader with two workers takes more

    def lock(self):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("multiprocessing.context.BaseContext.Lock", lock)
    dataset = eval_set(images)
    assert [eval_loader(dataset, 5, workers).num_workers for workers in (0, 2, 2)] == [0, 0, 0]
    output = capsys.readouterr().out
    assert output.count("no room for the semaphores of workers (No space left on device), so the main process") == 1


def test_a_dataset_without_workers_needs_no_shared_memory(images, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda self: pytest.fail("shared memory"))
    assert not eval_set(images).unreadable.any()


def test_samples_depend_on_seed_and_epoch(images):
    first = epoch_of(images, 0)
    assert equal(epoch_of(images, 0), first)
    assert not equal(epoch_of(images, 0, epoch=1), first)
    assert not equal(epoch_of(images, 0, seed=2), first)


def test_images_are_augmented_differently_in_each_epoch(images):
    dataset = ImageDataset(FileSource(images, PREPROCESSING), TrainTransform(CONFIG), seed=1)
    assert torch.equal(dataset[(0, 3, 0)][0], dataset[(0, 3, 0)][0])
    assert not torch.equal(dataset[(0, 3, 0)][0], dataset[(1, 3, 0)][0])


def test_images_do_not_depend_on_the_rest_of_the_batch(images):
    transform = TrainTransform(dataclasses.replace(CONFIG, augmentation="autoaugment"))
    dataset = ImageDataset(FileSource(images, PREPROCESSING), transform, seed=1)
    together = dataset.__getitems__([(0, i, 0) for i in range(23)])
    alone = [dataset[(0, i, 0)] for i in range(23)]
    assert equal(together, [(pixels, class_id) for pixels, class_id in alone])


def test_last_incomplete_batch_is_dropped_and_no_image_repeated(images):
    batches = epoch_of(images, 0)
    assert [len(targets) for _, targets in batches] == [5] * 4
    seen = torch.cat([targets for _, targets in batches])
    assert len(seen.unique()) == 20
    assert seen.tolist() != sorted(seen.tolist())
    excluded = [
        set(range(23)) - set(torch.cat([t for _, t in epoch_of(images, 0, epoch=e)]).tolist()) for e in range(4)
    ]
    assert len(set.union(*excluded)) > 3


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_and_in_order(images, workers):
    batches = list(eval_loader(eval_set(images), 5, workers))
    assert torch.cat([targets for _, targets in batches]).tolist() == list(range(23))
    assert all(pixels.dtype == torch.uint8 for pixels, _ in batches)
    brightness = torch.cat([pixels.float().mean((1, 2, 3)) for pixels, _ in batches])
    assert (brightness[5:] - brightness[:-5]).min() > 0


def test_a_second_pass_of_evaluation_is_the_same(images):
    loader = eval_loader(eval_set(images), 5, 1)
    assert equal(list(loader), list(loader))


def test_order_is_a_permutation_that_depends_on_the_epoch():
    sampler = EpochSampler(np.zeros(100, np.int32), "shuffle", seed=3)
    first = list(sampler)
    sampler.epoch = 1
    second = list(sampler)
    assert sorted(first) == [(0, i, 0) for i in range(100)]
    assert sorted(second) == [(1, i, 0) for i in range(100)]
    assert [i for _, i, _ in first] != [i for _, i, _ in second]


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_raises(images, here, workers):
    (here / "3.png").write_text("no image")
    with pytest.raises(ImageError, match=r"3\.png can't be read as an image"):
        epoch_of(images, workers, batch_size=23)


def test_derived_seeds_differ_by_purpose_and_position():
    parts = [(1, "a"), (1, "b"), (2, "a"), (1, "a", 0), (1, "a", 1), (1, "a", 0, 1), (1, "a", 1, 0), (11, "a")]
    parts.append((1, "a", 11))
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derive_seed(1, "sample", 2, 3) == derive_seed(1, "sample", 2, 3)


@pytest.fixture
def two_of_three(here) -> ImageList:
    """Class 0 is images 0 to 19, class 1 is 20 to 29, class 2 is 30 and 31; 3 and 25 can't be read."""
    for i in range(32):
        write_image(here / f"{i}.png", level=40 + 70 * (0 if i < 20 else 1 if i < 30 else 2), seed=i)
    for i in (3, 25):
        (here / f"{i}.png").write_text("no image")
    return list_in_memory((0 if i < 20 else 1 if i < 30 else 2, f"{i}.png") for i in range(32))


def train_set(images, max_bad_fraction=0.1) -> ImageDataset:
    transform = TrainTransform(dataclasses.replace(CONFIG, augmentation="none"))
    return ImageDataset(FileSource(images, PREPROCESSING), transform, 1, max_bad_fraction)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_by_others_of_their_class(two_of_three, workers):
    dataset = train_set(two_of_three)
    (pixels, class_ids), *_ = list(train_loader(dataset, 32, workers))
    levels = pixels.float().mean((1, 2, 3))
    for class_id, level in enumerate((40, 110, 180)):  # labels match
        assert (levels[class_ids == class_id] - level).abs().max() < 25
    assert class_ids.bincount().tolist() == [20, 10, 2]
    assert sorted(dataset.newly_unreadable()) == ["25.png", "3.png"]
    assert dataset.newly_unreadable() == []


def test_replacement_is_always_the_same(two_of_three):
    first, second = train_set(two_of_three), train_set(two_of_three)
    second[(0, 25, 0)]
    assert torch.equal(first[(0, 3, 0)][0], second[(0, 3, 0)][0])
    matches = [i for i in range(20) if i != 3 and torch.equal(first._read((0, 3, 0)), crop_of(first, i))]
    assert len(matches) == 1


def crop_of(dataset, index):
    """Return image `index` with the crop of image 3."""
    return dataset._crop(index, (0, 3, 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_raise(two_of_three, workers):
    with pytest.raises(
        TooManyUnreadable,
        match=r"^max_bad_fraction=0\.05: 2 of 32 images can't be read; damaged: 2 \(3.png, 25.png\); repair",
    ):
        list(train_loader(train_set(two_of_three, 0.05), 32, workers))


def test_class_without_readable_images_is_an_error(two_of_three, here):
    for i in (30, 31):
        (here / f"{i}.png").unlink()
    with pytest.raises(ImageError, match=r"3[01]\.png can't be read.*no such file; no other image of its class .*id 2"):
        list(train_loader(train_set(two_of_three, 0.5), 32, 0))


def test_balanced_sampling_draws_classes_equally():
    class_ids = np.repeat([0, 1, 3], [900, 90, 10]).astype(np.int32)
    sampler = EpochSampler(class_ids, "balanced", seed=3)
    keys = list(sampler)
    order = np.array([index for _, index, _ in keys])
    assert len(keys) == len(sampler) == 1000
    assert np.bincount(class_ids[order]) == pytest.approx([333, 333, 0, 333], abs=60)
    assert len(np.unique(order[class_ids[order] == 0])) > 220  # not the same few images
    assert set(order[class_ids[order] == 3]) == set(range(990, 1000))
    assert list(sampler) == keys
    assert len(set(keys)) == 1000  # repeated images have their own key
    assert max(repeat for _, index, repeat in keys if index >= 990) > 10
    sampler.epoch = 1
    assert [index for _, index, _ in sampler] != order.tolist()


def test_balanced_class_weights_match_scikit_learn():
    class_ids = np.repeat([0, 1, 3], [900, 90, 10])
    peer = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=class_ids)
    weights = balanced_class_weights(class_ids, 5)
    torch.testing.assert_close(weights[[0, 1, 3]], torch.from_numpy(peer).float())
    assert weights[[2, 4]].tolist() == [0, 0]


@pytest.mark.parametrize("sampling", ["shuffle", "balanced"])
def test_epoch_can_start_in_the_middle(sampling):
    sampler = EpochSampler(np.array([0] * 9 + [1] * 3), sampling, seed=3)
    sampler.epoch = 2
    whole = list(sampler)
    sampler.start = 8
    assert list(sampler) == whole[8:]
    assert len(sampler) == 12


def test_epoch_that_goes_over_the_list_several_times():
    sampler = EpochSampler(np.zeros(10, np.int32), "shuffle", seed=3, repeats=3)
    keys = list(sampler)
    assert len(sampler) == len(keys) == len(set(keys)) == 30  # repeated images have their own key
    rounds = [[index for _, index, _ in keys[start : start + 10]] for start in (0, 10, 20)]
    assert [sorted(indices) for indices in rounds] == [list(range(10))] * 3
    assert rounds[0] != rounds[1] != rounds[2]
    once = EpochSampler(np.zeros(10, np.int32), "shuffle", seed=3)
    assert list(once) == keys[:10]
    sampler.start = 17
    assert list(sampler) == keys[17:]


def test_batch_paths(images):
    dataset = ImageDataset(FileSource(images, PREPROCESSING), TrainTransform(CONFIG), seed=1)
    loader = train_loader(dataset, 5, num_workers=0)
    loader.batch_sampler.epoch, loader.batch_sampler.start = 3, 1
    names = [batch_paths(loader, number) for number in (0, 1)]
    assert names[1] == [images.path(int(class_id)) for class_id in next(iter(loader))[1]]
    assert loader.batch_sampler.start == 1
    assert len(set(names[0] + names[1])) == 10
