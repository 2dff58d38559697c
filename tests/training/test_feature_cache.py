"""utils/training/feature_cache.py: training on features equals training on images; features are computed once."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

import train
from nets.factory import build_model
from tests.conftest import SMALL, TINY, settings, write_back, write_image
from utils.data.cache_file import CHECKSUM
from utils.data.dataset import FileSource, ImageDataset
from utils.data.feature_dataset import FeatureDataset
from utils.data.image_list import list_in_memory
from utils.data.loader import train_loader
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform, TrainTransform
from utils.modeling.pixel_network import PixelNetwork, ThawedPart
from utils.training.feature_cache import IMAGE_FIELDS, FeatureCache
from utils.training.optimizer import build_optimizer
from utils.training.stages import num_cached_views, plan_stages
from utils.training.trainer import Trainer

CPU = torch.device("cpu")
CONFIG = settings(**SMALL | {"freeze_batch_size": 5, "init_lr": 0.05})
PREPROCESSING = Preprocessing.from_config(CONFIG)


def make_network(blocks=4, seed=0):
    torch.manual_seed(seed)
    model = build_model("vit_xs_4", 3, (8, 8))
    model.freeze_backbone(blocks)
    return PixelNetwork(model, PREPROCESSING, CPU)


@pytest.fixture
def images(here):
    """18 images of three classes."""
    for i in range(18):
        write_image(here / f"{i:02d}.png", 60 + 60 * (i % 3), seed=i)
    return list_in_memory((i % 3, f"{i:02d}.png") for i in range(18))


def dataset_of(images, transform=None, config=CONFIG):
    source = FileSource(images, PREPROCESSING)
    return ImageDataset(source, transform or TrainTransform(config), config.seed, max_bad_fraction=0.2)


def open_features(images, config=CONFIG, network=None, views=3, precision="fp32", dataset=None):
    cache = FeatureCache(network or make_network(), config, CPU, precision)
    return cache.open(dataset or dataset_of(images, config=config), "list.txt", views)


def train_losses(network, dataset, sampling, epochs=3):
    """The loss of each step; the network has dropout and stochastic depth."""
    trainer = Trainer(network, CPU, "fp32", seed=3)
    optimizer = build_optimizer(network, CONFIG, 1e-3)
    loader = train_loader(dataset, 5, 0, sampling)
    losses = []
    for epoch in range(epochs):
        loader.batch_sampler.epoch = epoch
        network.train()
        losses += [trainer.train_step(inputs, targets, optimizer)[0].item() for inputs, targets in loader]
    return losses


@pytest.mark.parametrize("sampling", ["shuffle", "balanced"])
@pytest.mark.parametrize("blocks", [0, 4, 6, "all"])
def test_cached_and_uncached_losses_are_bitwise_equal(images, blocks, sampling):
    plain = dataset_of(images, EvalTransform(PREPROCESSING))
    uncached = train_losses(make_network(blocks), plain, sampling)
    network = make_network(blocks)
    features = open_features(images, network=network, views=1)
    assert train_losses(ThawedPart(network), features, sampling) == uncached
    assert len(set(uncached)) == len(uncached) == 9


def test_first_view_is_plain_and_others_are_augmented(images):
    network, dataset = make_network(), dataset_of(images)
    features = open_features(images, network=network, views=3).views
    plain = dataset_of(images, EvalTransform(PREPROCESSING))
    for view, source in ((0, plain), (1, dataset), (2, dataset)):
        pixels = torch.stack([source[(view, i, 0)][0] for i in range(18)])
        expected = network.model.eval().forward_frozen(network.normalize(pixels))
        torch.testing.assert_close(features[view], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(features[1], features[2], atol=1e-2)


def test_epochs_take_views_in_turn():
    """Each epoch has every image once; over as many epochs as views, each view is used once."""
    features = torch.arange(4 * 10).view(4, 10, 1, 1)  # row = 10 * view + index
    dataset = FeatureDataset(features, list_in_memory((i, f"{i}.png") for i in range(10)), seed=1)
    loader = train_loader(dataset, 5, 0)
    seen = []
    for epoch in range(4):
        loader.batch_sampler.epoch = epoch
        batches = list(loader)
        rows = torch.cat([batch.flatten() for batch, _ in batches])
        assert torch.equal(rows % 10, torch.cat([targets for _, targets in batches]))
        assert sorted((rows % 10).tolist()) == list(range(10))
        assert len(set((rows // 10).tolist())) == 4
        seen += rows.tolist()
    assert sorted(seen) == list(range(40))


@pytest.fixture
def computed(monkeypatch):
    """Names of the files that are computed."""
    paths = []
    write = FeatureCache._write
    monkeypatch.setattr(FeatureCache, "_write", lambda self, *args: paths.append(args[-1].name) or write(self, *args))
    return paths


def same_features(one, other):
    return all(map(torch.equal, one.views, other.views))


def test_features_are_computed_once_and_size_is_printed_first(images, computed, capsys):
    first = open_features(images)
    printed = capsys.readouterr().out
    assert "features of 3 views of 18 images: 0.21 MB, 3 to compute, in cache/" in printed
    second = open_features(images)
    assert len(computed) == 3
    assert "images: 0.21 MB, 0 to compute" in capsys.readouterr().out
    assert same_features(first, second)
    path = next(Path("cache").glob("features-*.bin"))
    os.truncate(path, path.stat().st_size // 2)  # torch would pad it with zeros
    assert same_features(open_features(images), first)
    assert len(computed) == 4
    with path.open("r+b") as file:
        file.write(bytes(8))
    capsys.readouterr()
    assert same_features(open_features(images), first)
    assert f"warning: {path} isn't as it was written: it is made anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    ["weights", "freezing point", "list", "label", "image", "crop", "flip", "mean", "precision", "views", "seed"],
)
def test_features_are_recomputed_after_a_change(images, computed, change):
    before = open_features(images)
    config, network, options = CONFIG, make_network(), {}
    if change == "weights":
        network.model.blocks[3].mlp.fc2.bias.data[0] += 1
    elif change == "freezing point":
        network = make_network(blocks=5)
    elif change == "list":
        images = list_in_memory((i % 3, f"{17 - i:02d}.png") for i in range(18))
    elif change == "label":
        images = list_in_memory((min(i, 2), f"{i:02d}.png") for i in range(18))
    elif change == "image":
        write_image(Path("03.png"), 250, seed=7)
    elif change == "precision":
        options["precision"] = "bf16"
    elif change == "views":
        options["views"] = 4
    else:
        field, value = {
            "crop": ("train_crop", 0.9),
            "flip": ("horizontal_flip", 0.1),
            "mean": ("image_mean", (0.1, 0.1, 0.1)),
            "seed": ("seed", 5),
        }[change]
        config = dataclasses.replace(CONFIG, **{field: value})
    open_features(images, config, network, **options)
    assert len(computed) == (4 if change == "views" else 6)
    assert len(list(Path("cache").iterdir())) == {"freezing point": 6, "views": 4}.get(change, 3)
    again = open_features(list_in_memory((i % 3, f"{i:02d}.png") for i in range(18)))
    assert same_features(again, before) == (change != "image")


def test_fields_read_by_the_transform_are_in_the_key():
    """Otherwise outdated features would be used."""
    read = set()

    class Spy:
        def __getattr__(self, name):
            read.add(name)
            return getattr(CONFIG, name)

    TrainTransform(Spy())
    assert {"train_crop", "augmentation", "input_shape"} <= read <= set(IMAGE_FIELDS)


def test_thawed_weights_are_not_in_the_key(images, computed):
    """Head, thawed blocks and learning rate don't change the features."""
    open_features(images)
    network = make_network()
    network.model.head.weight.data.zero_()
    network.model.blocks[4].mlp.fc2.bias.data[0] += 1
    open_features(images, dataclasses.replace(CONFIG, init_lr=0.1, num_workers=2), network)
    assert len(computed) == 3


@pytest.mark.parametrize("gigabytes", [0.0, 1.0])
def test_features_beyond_the_limit_are_read_from_file(images, capsys, gigabytes):
    config = dataclasses.replace(CONFIG, feature_cache_gb=gigabytes)
    features = open_features(images, config)
    assert ("not held in memory" in capsys.readouterr().out) == (gigabytes == 0)
    expected = [view.clone() for view in features.views]
    for path in Path("cache").iterdir():
        assert path.stat().st_size == expected[0].nbytes + 18 + CHECKSUM
        with path.open("r+b") as file:  # only seen if the file is mapped
            file.write(bytes(8))
    for view, before in zip(features.views, expected, strict=True):
        assert torch.equal(view, before) == (gigabytes == 1)


def test_features_have_the_precision_of_the_run(images):
    full, half = (open_features(images, precision=precision).views[0] for precision in ("fp32", "bf16"))
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.05)


def test_unreadable_image_is_replaced_and_reported_each_time(images, here):
    (here / "04.png").write_text("no image")
    for _ in range(2):
        dataset = dataset_of(images)
        features = open_features(images, dataset=dataset)
        assert dataset.newly_unreadable() == ["04.png"]
        assert dataset.newly_unreadable() == []
    plain = features.views[0]
    others = [i for i in range(1, 18, 3) if i != 4]
    assert any(torch.allclose(plain[4], plain[i], atol=1e-5) for i in others)


def test_complete_views_survive_an_interruption(images, computed, monkeypatch):
    batches = []

    def fail(self, pixels, compute=FeatureCache._compute):
        batches.append(len(pixels))
        if len(batches) == 7:  # 1 for the shape, 4 for view 0, then the second of view 1
            raise KeyboardInterrupt
        return compute(self, pixels)

    with monkeypatch.context() as patched:
        patched.setattr(FeatureCache, "_compute", fail)
        with pytest.raises(KeyboardInterrupt):
            open_features(images)
    assert len(list(Path("cache").iterdir())) == 1
    cut_off = open_features(images)
    assert len(computed) == 2 + 2
    shutil.rmtree("cache")
    assert same_features(open_features(images), cut_off)


def test_full_disk_is_an_error_before_computing(images, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"cache_dir='cache'.*or feature_views to fewer, or cache_features to False"):
        open_features(images)


@pytest.mark.parametrize(
    ("changes", "views"),
    [
        ({"freeze_epoch": 5}, [4, 0]),
        ({"freeze_epoch": 4}, [0, 0]),
        ({"freeze_epoch": 4, "feature_views": 1}, [1, 0]),
        ({"freeze_epoch": 5, "cache_features": False}, [0, 0]),
        ({"freeze_train": False}, [0]),
    ],
)
def test_stage_is_cached_if_that_saves_computation(changes, views):
    config = settings(**SMALL | {"unfreeze_epoch": 8} | changes)
    assert [num_cached_views(stage, config) for stage in plan_stages(config, 100, transformer=True)] == views


def cached_run(**changes):
    config = settings(**TINY | {"freeze_epoch": 3, "unfreeze_epoch": 4, "feature_views": 2, "save_period": 1} | changes)
    train.main(config)
    return config


@pytest.mark.parametrize("blocks", [4, "all"])
def test_run_on_cached_features(two_classes, capsys, computed, blocks):
    cached_run(freeze_blocks=blocks)
    printed = capsys.readouterr().out
    assert "2 to compute" in printed and "1 to compute" in printed  # for training and for validation
    assert len(computed) == 3
    cached_run(freeze_blocks=blocks)
    assert len(computed) == 3
    losses = [[float(line) for line in run.read_text().split()] for run in Path("logs").glob("*/epoch_loss.txt")]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_probe_and_stage_share_plain_views(two_classes, computed):
    for _ in range(2):
        cached_run(freeze_blocks="all", head_init="probe")
    assert len(computed) == 3  # the probe and the stage share the plain views


def test_resumed_run_reuses_features(two_classes, computed):
    config = cached_run(save_period=1)
    write_back(next(Path("logs").iterdir()), epoch=2)
    before = len(computed)
    train.main(config)
    assert len(computed) == before > 0


def test_resumed_run_computes_nothing_for_a_finished_stage(two_classes, capsys, computed):
    config = cached_run(unfreeze_epoch=5)
    run = next(Path("logs").iterdir())
    for path in Path("cache").iterdir():
        os.remove(path)
    write_back(run, epoch=4)
    train.main(dataclasses.replace(config, resume=str(run)))
    assert len(computed) == 3
    assert "epoch 5/5" in capsys.readouterr().out
