"""Train an image classifier: edit CONFIG, then `python train.py`. Every field is also a flag, see `--help`.

The backbone is frozen first and thawed at `freeze_epoch`. What each field means, and all the others, stand in
`utils/config.py`; "Your own pictures" in README.md says what to put here for photos.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from torch import nn
from torch.utils.data import DataLoader

from nets import build_model, draw_model, expected_preprocessing
from nets.backbones import RATES
from nets.freezing import FreezableNetwork
from nets.pretrained import find_pretrained
from nets.vit import SIZES
from nets.weights import Weights, load_weights, read_weights
from utils import cli
from utils.annotation import ensure_lists
from utils.cache import open_cache
from utils.classifier import pixel_network
from utils.config import TrainConfig
from utils.data import FileSource, ImageDataset, balanced_class_weights, eval_loader, train_loader
from utils.device import choose_precision, pick_device
from utils.engine import Trainer
from utils.finish import calibrate_checkpoint
from utils.freeze import FeatureCache, Stage, ThawedPart, num_cached_views, plan_stages
from utils.lists import ImageList, read_classes, read_first_path, read_list
from utils.loss import TrainingLoss
from utils.optim import WeightAverage, batch_scale, build_optimizer, rate_limits
from utils.recipe import settle_recipe
from utils.resume import open_run
from utils.run import Run, of_size
from utils.seeds import derive_seed
from utils.stop import Stopped, WorkerDied, received, stop_signals
from utils.summary import format_config, format_model, format_stages, warn_of_small_input
from utils.transforms import EvalTransform, Preprocessing, TrainTransform, settle_preprocessing

# As it stands, for the built-in handwritten digits: the network in model_data/, which has seen aeroplanes and cats,
# learns to read in a minute or two of two cores.
CONFIG = TrainConfig(
    # the network
    backbone="vit_xs_4",  # 6 blocks, patches of 4 pixels; photos: vit_b_16
    input_shape=(32, 32),  # pixels; photos: (224, 224)
    pretrained=True,  # with so few pictures nothing helps as much
    model_path="",  # weights of your own to start from
    drop_rate=0.0,
    attn_drop_rate=0.0,
    drop_path_rate=0.0,
    # the stages
    freeze_train=True,
    freeze_epoch=4,  # until the new head knows what it is about; photos: 10 of 50
    freeze_blocks=4,  # of 6; photos: 8 of 12
    freeze_batch_size=32,
    unfreeze_epoch=20,
    unfreeze_batch_size=32,
    # the optimizer
    optimizer_type="adamw",
    init_lr=4e-3,  # for 256 pictures a step: 5e-4 for 32
    min_lr=4e-5,
    weight_decay=0.05,
    # the pictures
    train_crop=0.6,  # digits fill their frame: no small crops,
    eval_crop=1.0,
    horizontal_flip=0.0,  # no mirroring
    augmentation="none",  # and no rotation
    # the machine
    num_workers=0,  # tiny pictures need none; photos: the number of cores
)


@stop_signals()
def main(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = CONFIG,
    summary: bool = False,
    find_lr: bool = False,
    cross_validate: int = 0,
    group_regex: str = "",
) -> None:
    """Train an image classifier: first with a frozen backbone, then all of it.

    Args:
        config: the settings.
        summary: print what would be trained, and leave.
        find_lr: try all learning rates, one a step, plot the losses, suggest an init_lr, and leave.
        cross_validate: train so many times instead, each time validated on another part of the pictures.
        group_regex: with that, as in txt_annotation.py: pictures of one patient, video or burst stay in one part.
    """
    if group_regex and not cross_validate:
        raise ValueError("group_regex: that is for cross_validate here; for one split give it to txt_annotation.py")
    if cross_validate and (summary or find_lr):
        raise ValueError("cross_validate: that trains; give it without summary and find_lr")
    device = pick_device(config.device)
    asked = config
    if config.recipe == "auto":
        config = settle_recipe(config, device)
    if cross_validate:
        from utils import cross_validation  # brings scikit-learn

        cross_validation.cross_validate(config, cross_validate, group_regex, main)
        return
    transformer = draw_network(config, num_classes=2).transformer
    print(f"config\n{format_config(config)}")
    data = load_data(config)
    stages = plan_stages(config, len(data.train_images), transformer)
    precision, reason = choose_precision(config.precision, device)
    print(f"precision: {config.precision} -> {precision}, {reason}")
    drawn = draw_network(config, len(data.class_names))
    print(f"{config.backbone} on {device} in {precision}\n{format_model(drawn, stages)}")
    print(format_stages(stages, len(data.train_images)))
    if summary:
        return
    if find_lr:
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
        config, model, origin = make_model(config, data.class_names, folder.checkpoint)
        network = pixel_network(model, Preprocessing.from_dict(config.as_dict()), device)
        trainer = make_trainer(config, network, precision, data, folder.checkpoint)
        return Run(config, model, trainer, data.class_names, lists, folder, origin)
    except BaseException:
        folder.discard_if_new()
        raise


def draw_network(config: TrainConfig, num_classes: int) -> FreezableNetwork:
    """The network without its weights, on the meta device: nothing is computed, but what can't be built or frozen
    like that is a ValueError."""
    options = {} if config.activation == "auto" else {"activation": config.activation}
    model = draw_model(config.backbone, num_classes, config.input_shape, **options)
    if config.optimizer_type == "muon" and not model.transformer:
        raise ValueError(
            f"optimizer_type='muon': that is for transformers, and {config.backbone} is none; give another"
        )
    for stage in config.all_stages:
        if stage.input_shape != config.input_shape:
            draw_model(config.backbone, num_classes, stage.input_shape, **options).resize(config.input_shape)
        if stage.frozen != "nothing":
            model.freeze_backbone(stage.frozen)
    return model


class Data(NamedTuple):
    """What the lists say."""

    class_names: list[str]
    train_images: ImageList
    val_images: ImageList


def load_data(config: TrainConfig) -> Data:
    """Read the lists; make them first where that is clearly wanted."""
    ensure_lists(config)
    class_names = read_classes(config.classes_path)
    train_images = read_list(config.train_annotation_path, len(class_names))
    val_images = read_list(config.val_annotation_path, len(class_names))
    print(f"{len(train_images)} training and {len(val_images)} validation pictures, {len(class_names)} classes")
    warn_of_small_input(train_images, config.input_shape, config.max_pixels)
    return Data(class_names, train_images, val_images)


class Beginning(NamedTuple):
    """What a run begins with, or goes on with: the settings, with what they left open of the preprocessing; the
    network; and where its weights were from, see `nets.weights.Weights.origin`."""

    config: TrainConfig
    model: FreezableNetwork
    origin: Mapping[str, str]


def make_model(config: TrainConfig, class_names: list[str], resumed: dict[str, Any] | None = None) -> Beginning:
    """The network with the weights that the run starts from, random ones if there are none, or with those of the
    checkpoint that it goes on from; and what follows from them."""
    weights = None if resumed else find_weights(config)
    expected = expected_preprocessing(config.backbone) | dict(weights.preprocessing) if weights else {}
    settled = settle_preprocessing(config, resumed["preprocessing"] if resumed else expected)
    for name in expected:
        if getattr(settled, name) != getattr(config, name):
            print(f"{name}: {getattr(settled, name)}, as the weights expect")
    input_shape = config.all_stages[0].input_shape
    arguments = {"name": config.backbone, "num_classes": len(class_names), "input_shape": input_shape}
    arguments |= weights.variant if weights else {}
    arguments |= {} if config.activation == "auto" else {"activation": config.activation}
    rates = {rate: getattr(config, rate) for rate in RATES}
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = build_model(**(resumed["model"] if resumed else arguments), **rates)
    for rate in model.ignored_rates:
        if rates[rate]:
            print(f"{rate}: {rates[rate]} -> 0, {config.backbone} has no place for it")
    if resumed:
        model.load_state_dict(resumed["weights_in_training"] or resumed["weights"])
        return Beginning(settled, model, resumed["origin"])
    if weights:
        load_weights(model, weights, class_names)
        return Beginning(settled, model, weights.origin)
    return Beginning(settled, model, {})


def find_weights(config: TrainConfig) -> Weights | None:
    """The weights that a new run starts from; None: random ones."""
    of_vit = config.backbone in SIZES
    if config.model_path:
        if config.pretrained:
            print(f"pretrained: {config.pretrained} -> False, for model_path says which weights to start from")
        return read_weights(config.model_path, of_vit)
    if config.pretrained:
        return read_weights(find_pretrained(config.backbone, config.pretrained), of_vit)
    if config.all_stages[0].frozen != "nothing":
        print("attention: freeze_train without pretrained weights freezes a backbone that has learned nothing yet")
    return None


def make_trainer(
    config: TrainConfig, network: nn.Module, precision: str, data: Data, resumed: dict[str, Any] | None = None
) -> Trainer:
    """What trains `network`, with the loss and the average of the weights that `config` asks for."""
    weights, average = None, None
    if config.class_weights == "balanced":
        weights = balanced_class_weights(data.train_images.class_ids, len(data.class_names))
    loss = TrainingLoss(weights, config.label_smoothing, config.mixup, config.cutmix)
    _, model = network
    if config.ema_decay:
        average = WeightAverage(model, config.ema_decay)
        if resumed:
            average.load(resumed["weights"])
    device = next(model.parameters()).device
    return Trainer(network, device, precision, config.seed, loss, average, config.on_nan, config.clip_grad)


def suggest_learning_rate(config: TrainConfig, data: Data, stage: Stage, device: torch.device, precision: str) -> None:
    """Print the `init_lr` at which the loss falls fastest in `stage`, and plot how it falls at others."""
    from utils.find_lr import run_range_test
    from utils.plots import plot_range_test  # brings matplotlib

    config, model, _ = make_model(config, data.class_names)
    network = pixel_network(model, Preprocessing.from_dict(config.as_dict()), device)
    if config.head_init == "probe":
        from utils.probe import init_head

        small = of_size(config, model)
        init_head(model, FeatureCache(network, small, device, precision), *make_datasets(data, small), small)
    model.resize(stage.input_shape)
    trainer = make_trainer(config, network, precision, data)
    stage.freeze(model)
    train_set, _ = make_datasets(data, config)
    loader = train_loader(train_set, stage.batch_size, config.num_workers, config.sampler)
    found = run_range_test(trainer, loader, build_optimizer(model, config, stage.init_lr))
    _, highest = rate_limits(config.optimizer_type, model.transformer)
    suggestion = min(found.suggestion, highest)
    path = Path(config.save_dir, "learning_rates.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_range_test(found.rates, found.losses, suggestion).savefig(path)
    init_lr = suggestion / batch_scale(stage.batch_size, model.transformer)
    limited = f" (the most that {config.optimizer_type} is let take is {highest:.0e})" if suggestion == highest else ""
    print(
        f"the loss falls fastest at a learning rate of {found.suggestion:.1e} a step of {stage.batch_size} pictures"
        f"{limited}: init_lr={init_lr:.1e}; see {path}"
    )


def train_stages(run: Run, stages: list[Stage], data: Data) -> None:
    """Train through what is left of `stages`, saving after every epoch and as often besides as the settings say.

    Raises:
        NonFiniteLoss: a training or validation loss isn't finite; what was saved before stays.
        SaveError: a checkpoint can't be written; likewise.
        WorkerDied: a process that loads pictures did; the run is saved.
    """
    config, model, trainer = run.config, run.model, run.trainer
    network = trainer.network
    with closing(run), save_when_stopped(run):
        if config.cache_images:  # of all sizes now: a full disk is no news for later
            for shape in dict.fromkeys(config.epoch_shapes[run.epoch :]):
                open_cache(data.train_images, dataclasses.replace(config, input_shape=shape))
        train_set, val_set, cache = pictures = make_pictures(run, network, data)
        if run.new:
            begin(run, *pictures)
        run.log.log_pictures(network, next(iter(train_loader(train_set, min(16, len(train_set)), 0)))[0])
        for stage in stages:
            if run.is_past(stage):
                continue
            if stage.input_shape != train_set.transform.size:
                if trainer.average:
                    trainer.average.resize(model, stage.input_shape)
                model.resize(stage.input_shape)
                before = (train_set, val_set)
                train_set, val_set, cache = make_pictures(run, network, data)
                for new, old in zip((train_set, val_set), before, strict=True):
                    new.take_account(old)
            stage.freeze(model)
            if trainer.average:
                trainer.average.settle_frozen(model.frozen_state())
            optimizer = build_optimizer(model, config, stage.init_lr)
            run.take_up(optimizer, stage)
            trainer.network, loader, val_loader = feed(stage, network, cache, train_set, val_set)
            while not run.is_past(stage):
                numbers = trainer.train_epoch(loader, optimizer, run.epoch, stage.learning_rate, run.after_step)
                run.finish_epoch(numbers | trainer.validate(val_loader))
                report_unreadable(train_set, val_set)
        if run.epoch < config.epochs and not run.finished:
            print(f"the validation loss hasn't fallen for {config.patience} epochs: the run ends here (patience)")
        run.finish(partial(calibrate_checkpoint, data.train_images, data.val_images, config))


def begin(run: Run, train_set: ImageDataset, val_set: ImageDataset, cache: FeatureCache) -> None:
    """Give a new run the head that it begins with, and save it."""
    if run.config.head_init == "probe":
        from utils.probe import init_head  # brings scikit-learn, which nothing else here needs

        init_head(run.model, cache, train_set, val_set, run.config)
        if run.trainer.average:
            run.trainer.average.load(run.model.state_dict())
    run.save()  # what can't be written is known before hours are spent


def make_pictures(run: Run, network: nn.Module, data: Data) -> tuple[ImageDataset, ImageDataset, FeatureCache]:
    """The pictures, of the size that the network takes now, and what keeps its frozen part's features of them."""
    config = of_size(run.config, run.model)
    return *make_datasets(data, config), FeatureCache(network, config, run.trainer.device, run.trainer.precision)


def make_datasets(data: Data, config: TrainConfig) -> tuple[ImageDataset, ImageDataset]:
    """The pictures to train on, augmented, and those to validate on."""
    preprocessing = Preprocessing.from_dict(config.as_dict())
    files, val_files = FileSource(data.train_images, preprocessing), FileSource(data.val_images, preprocessing)
    source = open_cache(data.train_images, config) if config.cache_images else files
    train_set = ImageDataset(source, TrainTransform(config), config.seed, config.max_bad_fraction)
    val_set = ImageDataset(val_files, EvalTransform(preprocessing), config.seed, config.max_bad_fraction)
    return train_set, val_set


def feed(
    stage: Stage, network: nn.Module, cache: FeatureCache, train_set: ImageDataset, val_set: ImageDataset
) -> tuple[nn.Module, DataLoader, DataLoader]:
    """What `stage` trains, and the batches to train on and to validate on: of pictures for the whole network, or of
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


def report_unreadable(*datasets: ImageDataset) -> None:
    """Name the pictures that couldn't be read and weren't named after an earlier epoch."""
    for dataset in datasets:
        if new := dataset.newly_unreadable():
            shown = ", ".join(new[:10]) + (f" and {len(new) - 10} more" if len(new) > 10 else "")
            print(f"attention: {len(new)} unreadable, others of their class stood in: {shown}")


@contextmanager
def save_when_stopped(run: Run) -> Iterator[None]:
    """When a run is stopped by a signal, or a worker dies, save it, and print how to go on with it."""
    try:
        yield
    except (Stopped, WorkerDied) as reason:
        received()
        if run.finished:
            print(f"\n{type(reason).__name__}: {run.folder} is finished")
        elif not run.new:
            run.save()
            how = f"--resume {run.folder}" if run.config.resume == "no" else "the same command"
            print(f"\n{type(reason).__name__}: {run.folder} is saved at step {run.trainer.step}; {how} goes on")
        raise


if __name__ == "__main__":
    cli.run(main)
