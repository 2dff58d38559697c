"""Train an image classifier: edit CONFIG, then `python train.py`. Every field but `stages` is also a flag.

As CONFIG stands the backbone is frozen first and thawed at `freeze_epoch`; `recipe="auto"` trains all of it from the
start. What each field means, and all the others, stand in `utils/config/train_config.py`.
"""

from __future__ import annotations

import dataclasses
from contextlib import closing
from typing import Annotated

import torch
import tyro
from torch import nn
from torch.utils.data import DataLoader

from utils.config.recipe import keep_flags
from utils.config.train_config import TrainConfig
from utils.data.dataset import ImageDataset
from utils.data.image_cache import open_cache
from utils.data.image_list import read_first_path
from utils.data.loader import eval_loader, train_loader
from utils.data.preprocessing import Preprocessing
from utils.inference.fit_calibration import calibrate_checkpoint
from utils.modeling.build import build_meta_network, build_network, of_size
from utils.modeling.pixel_network import PixelNetwork, ThawedPart
from utils.modeling.precision import choose_precision, pick_device
from utils.runs.checkpoint import BEST
from utils.runs.resolve_recipe import resolve_recipe
from utils.runs.resume import open_run
from utils.runs.run import Run
from utils.system import cli
from utils.system.signals import handle_stop_signals
from utils.training.datasets import Data, load_data, make_datasets, report_unreadable
from utils.training.feature_cache import FeatureCache
from utils.training.optimizer import build_optimizer
from utils.training.stages import Stage, num_cached_views, plan_stages
from utils.training.summary import format_config, format_model, format_stages
from utils.training.trainer import make_trainer

# As it stands, for the built-in handwritten digits: the network in model_data/, which has seen aeroplanes and cats,
# learns to read in a minute and a half, on slow cores in some minutes. For photos "Your own images" in README.md has
# another to put in its place; little of this one suits them.
CONFIG = TrainConfig(
    # the network
    backbone="vit_xs_4",  # 6 blocks, patches of 4 pixels
    input_shape=(32, 32),  # height and width
    pretrained=True,  # with so few images nothing helps as much
    model_path="",  # weights of your own to start from
    drop_rate=0.0,
    attn_drop_rate=0.0,
    drop_path_rate=0.0,
    # the stages
    freeze_train=True,
    freeze_epoch=3,  # until the new head knows what it is about
    freeze_blocks=4,  # of 6
    freeze_batch_size=32,
    unfreeze_epoch=14,
    unfreeze_batch_size=32,
    # the optimizer
    optimizer_type="adamw",
    init_lr=4e-3,  # for 256 images a step: 5e-4 for 32
    min_lr=4e-5,
    weight_decay=0.05,
    # the images
    train_crop=0.6,  # digits fill their frame: no small crops,
    eval_crop=1.0,
    horizontal_flip=0.0,  # no mirroring
    augmentation="none",  # and no rotation
    # the machine
    num_workers=0,  # tiny images need none
)


@handle_stop_signals()
def main(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = CONFIG,
    summary: bool = False,
    find_lr: bool = False,
    cross_validate: int = 0,
    group_regex: str = "",
) -> None:
    """Train an image classifier, in the stages that the settings say.

    Args:
        config: the settings.
        summary: print what would be trained, and leave.
        find_lr: try all learning rates, one a step, plot the losses, suggest an init_lr, and leave.
        cross_validate: train so many times instead, each time validated on another part of the images.
        group_regex: with cross_validate, as in txt_annotation.py: one patient, video or burst stays in one part.
    """
    if group_regex and not cross_validate:
        raise ValueError("group_regex: that is for cross_validate here; for one split give it to txt_annotation.py")
    if cross_validate and (summary or find_lr):
        raise ValueError("cross_validate: that trains; give it without summary and find_lr")
    device = pick_device(config.device)
    if config.recipe == "auto":
        config = keep_flags(config, cli.given_flags())
    asked = config
    if config.recipe == "auto":
        config = resolve_recipe(config, device)
    if cross_validate:
        from utils.runs import cross_validation  # brings scikit-learn

        cross_validation.cross_validate(config, cross_validate, group_regex, main)
        return
    transformer = build_meta_network(config, num_classes=2).transformer
    print(f"config\n{format_config(config)}")
    data = load_data(config)
    stages = plan_stages(config, len(data.train_images), transformer)
    precision, reason = choose_precision(config.precision, device)
    print(f"precision: {config.precision} -> {precision}, {reason}")
    drawn = build_meta_network(config, len(data.class_names))
    print(f"{config.backbone} on {device} in {precision}\n{format_model(drawn, stages)}")
    print(format_stages(stages, len(data.train_images)))
    if summary:
        return
    if find_lr:
        from utils.training.lr_finder import suggest_learning_rate  # brings scikit-learn and matplotlib

        suggest_learning_rate(config, data, stages[-1], device, precision)
        return
    run = open_or_begin(config, asked, data, device, precision)
    train_stages(run, stages, data)
    elsewhere = [] if config.save_dir == TrainConfig.save_dir else ["--model-path", str(run.folder)]
    example = read_first_path("cls_test.txt") or data.val_images.path(0)
    print(f"done, the run is in {run.folder}. Next:")
    for words in (["eval.py", *elsewhere], ["predict.py", *elsewhere, example]):
        print(f"  {cli.command('python', *words)}")


def open_or_begin(config: TrainConfig, asked: TrainConfig, data: Data, device: torch.device, precision: str) -> Run:
    """The run that `config.resume` means, where it was left, or a new one; `asked` is `config` before its recipe."""
    lists = {"train": data.train_images, "val": data.val_images}
    folder = open_run(config, data.class_names, lists, asked)
    try:
        config, model, origin = build_network(config, data.class_names, folder.checkpoint)
        network = PixelNetwork(model, Preprocessing.of(config), device)
        trainer = make_trainer(config, network, precision, data.train_images.class_ids, folder.checkpoint)
        return Run(config, model, trainer, data.class_names, lists, folder, origin)
    except BaseException:
        folder.discard_if_new()
        raise


def train_stages(run: Run, stages: list[Stage], data: Data) -> None:
    """Train through what is left of `stages`, saving after every epoch and as often besides as the settings say.

    Raises:
        NonFiniteLoss: a training or validation loss isn't finite; what was saved before stays.
        SaveError: a checkpoint can't be written; likewise.
        WorkerDied: a process that loads images did; the run is saved.
    """
    config, model, trainer = run.config, run.model, run.trainer
    network = trainer.network
    with closing(run), run.saved_when_stopped():
        if config.cache_images:  # of all sizes now: a full disk is no news for later
            for shape in dict.fromkeys(config.epoch_shapes[run.epoch :]):
                open_cache(data.train_images, dataclasses.replace(config, input_shape=shape))
        train_set, val_set, cache = make_images(run, network, data)
        if run.new:
            start(run, train_set, val_set, cache)
        first_pixels, _ = next(iter(train_loader(train_set, min(16, len(train_set)), num_workers=0)))
        run.log_images(network, first_pixels)
        for stage in stages:
            if run.is_past(stage):
                continue
            if stage.input_shape != train_set.transform.size:
                if trainer.average:
                    trainer.average.resize(model, stage.input_shape)
                model.resize(stage.input_shape)
                before = (train_set, val_set)
                train_set, val_set, cache = make_images(run, network, data)
                for new, old in zip((train_set, val_set), before, strict=True):
                    new.share_unreadable(old)
            stage.freeze(model)
            if trainer.average:
                trainer.average.set_frozen(model.frozen_state())
            trainer.network, loader, val_loader = feed(stage, network, cache, train_set, val_set)
            optimizer = build_optimizer(model, config, stage.init_lr)
            run.take_up(optimizer, stage)
            while not run.is_past(stage):
                numbers = trainer.train_epoch(loader, optimizer, run.epoch, stage.learning_rate, run.after_step)
                run.finish_epoch(numbers | trainer.validate(val_loader))
                report_unreadable(train_set, val_set)
        if run.epoch < config.epochs and not run.finished:
            print(f"patience: the calibrated validation loss hasn't fallen for {config.patience} epochs: the run ends")
        if not run.finished:
            run.finish(calibrate_checkpoint(run.folder / BEST, data.train_images, data.val_images, config))


def start(run: Run, train_set: ImageDataset, val_set: ImageDataset, cache: FeatureCache) -> None:
    """Give a new run the head that it begins with, and save it."""
    if run.config.head_init == "probe":
        from utils.training.linear_probe import init_head  # brings scikit-learn, which nothing else here needs

        init_head(run.model, cache, train_set, val_set, run.config)
        if run.trainer.average:
            run.trainer.average.load(run.model.state_dict())
    run.save()  # what can't be written is known before hours are spent


def make_images(run: Run, network: nn.Module, data: Data) -> tuple[ImageDataset, ImageDataset, FeatureCache]:
    """The images, of the size that the network takes now, and what keeps its frozen part's features of them."""
    config = of_size(run.config, run.model)
    return *make_datasets(data, config), FeatureCache(network, config, run.trainer.device, run.trainer.precision)


def feed(
    stage: Stage, network: nn.Module, cache: FeatureCache, train_set: ImageDataset, val_set: ImageDataset
) -> tuple[nn.Module, DataLoader, DataLoader]:
    """What `stage` trains, and the batches to train on and to validate on: of images for the whole network, or of
    features, computed beforehand, for its thawed part."""
    config = cache.config
    num_views = num_cached_views(stage, config)
    if num_views:
        if config.mixup or config.cutmix:
            print("mixup and cutmix: not in this stage, which trains on cached features")
        network, num_workers = ThawedPart(network), 0
        train_set = cache.open(train_set, config.train_annotation_path, num_views)
        val_set = cache.open(val_set, config.val_annotation_path, num_views=1)
    else:
        num_workers = config.num_workers
    if config.torch_compile:
        network = torch.compile(network)
    loader = train_loader(train_set, stage.batch_size, num_workers, config.sampler)
    return network, loader, eval_loader(val_set, stage.batch_size, num_workers)


if __name__ == "__main__":
    cli.run(main)
