"""Train an image classifier: edit CONFIG, then `python train.py`. Every field but `stages` is also a flag.

All fields, and what they mean: `utils/config/train_config.py` and docs/settings.md.
"""

from __future__ import annotations

import utils.system.startup  # noqa: F401, before torch

# isort: split

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import tyro
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from utils.config.other_names import suggest_name
from utils.config.train_config import AUTO, OPTIONAL_SWITCHES, TrainConfig
from utils.data.image_cache import open_cache
from utils.data.image_list import read_first_path
from utils.data.loader import train_loader
from utils.inference.fit_calibration import calibrate_checkpoint
from utils.inference.pseudo_labels import add_unlabeled
from utils.runs.checkpoint import BEST
from utils.runs.history import format_no_gain
from utils.runs.run import Run
from utils.runs.saved_settings import settings_to_continue, settings_to_resume
from utils.runs.setup import Setup, prepare
from utils.runs.start import start_or_resume
from utils.system import cli
from utils.system.runtime import runtime
from utils.system.signals import agreed_signals, defer_signals, handle_stop_signals
from utils.training.datasets import StageInputs
from utils.training.optimizer import build_optimizer, set_learning_rate
from utils.training.pace import Pace
from utils.training.stages import Stage
from utils.training.summary import count_parameters, format_model, format_settings, format_stages

# For the built-in handwritten digits: fine-tuning the bundled CIFAR-10 weights takes a minute or two.
# For photos, paste the CONFIG of "Your own images" in README.md.
CONFIG = TrainConfig(
    # network
    backbone="vit_xs_4",  # 6 blocks, patches of 4 x 4 pixels
    input_shape=(32, 32),  # height and width
    pretrained=True,  # helps most with few images
    model_path="",  # start from your own weights instead
    drop_rate=0.0,
    attn_drop_rate=0.0,
    drop_path_rate=0.0,
    # stages
    freeze_train=True,
    freeze_epoch=3,  # then the backbone is thawed
    freeze_blocks=4,  # of 6
    freeze_batch_size=32,
    unfreeze_epoch=14,
    unfreeze_batch_size=32,
    # optimizer
    optimizer_type="adamw",
    init_lr=4e-3,  # per 256 images: 5e-4 at batch size 32
    min_lr=4e-5,
    weight_decay=0.05,
    # images
    train_crop=0.6,  # digits fill the frame: no small crops
    eval_crop=1.0,
    horizontal_flip=0.0,  # mirrored digits are wrong
    augmentation="none",  # the others would rotate digits
    num_workers=0,  # tiny images load fast
    demo=True,  # without images of yours: the digits
)


@handle_stop_signals()
def main(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = CONFIG,
    continue_run: Annotated[str, tyro.conf.arg(name="continue")] = "",
    summary: bool = False,
    find_lr: bool = False,
    cross_validate: int = 0,
    group_regex: str = "",
) -> None:
    """Train an image classifier in stages.

    Args:
        config: the settings.
        continue_run: run folder: start a new run that trains its best checkpoint further, with its settings but all
            layers, 10 epochs and a tenth of the learning rate; other flags change these.
        summary: print all settings, the network and the stages, without unlabeled images, and exit; nothing is
            written.
        find_lr: run a learning-rate range test, plot the losses, suggest an init_lr, and exit.
        cross_validate: number of folds; trains one run per fold, validated on that fold.
        group_regex: keep each patient, video or burst in one fold, as in txt_annotation.py; needs cross_validate.
    """
    if continue_run and Path(continue_run) not in Path(config.model_path).parents:
        raise ValueError("continue: is a flag; in Python give main(settings_to_continue(run))")
    if continue_run:
        print(f"continues {continue_run} with its settings, but all layers and a tenth of its learning rate")
    if group_regex and not cross_validate:
        raise ValueError("group_regex: needs cross_validate; for a single split pass it to txt_annotation.py")
    if cross_validate and (summary or find_lr):
        raise ValueError("cross_validate: can't be combined with summary or find_lr; use one of them")
    if cross_validate and (config.distill_from or config.unlabeled):
        raise ValueError(
            "cross_validate: a teacher has seen the images of the folds; leave distill_from and unlabeled empty"
        )
    if find_lr and config.distill_from:
        raise ValueError("find_lr: can't be combined with distill_from, which changes the loss; leave it empty")
    if cross_validate and config.backbone == AUTO:
        raise ValueError(
            "cross_validate: all folds, and the same command later, need one backbone; see what --backbone auto "
            "--summary chooses, and set backbone to it"
        )
    setup = prepare(config, write_lists=not summary, add_images=None if summary else add_unlabeled)
    if cross_validate:
        train_folds(setup, cross_validate, group_regex)
        return
    print(describe(setup))
    if summary:
        print(format_model(setup.network, setup.stages))
        print(f"settings\n{format_settings(setup.config, setup.asked, setup.choices, all_fields=True)}")
    elif find_lr:
        from utils.training.lr_finder import suggest_learning_rate  # imports scikit-learn and matplotlib

        suggest_learning_rate(setup.config, setup.data, setup.stages[-1], setup.device, setup.precision)
    else:
        print_next_commands(start_and_train(setup), setup)


def start_and_train(setup: Setup) -> Run:
    """Start or resume the run that the settings select, and train it."""
    run, choices = start_or_resume(setup)
    settings = format_settings(run.config, setup.asked, [*setup.choices, *choices], all_fields=False)
    print(f"non-default settings (--summary prints all)\n{settings}")
    train(run, setup)
    return run


def train(run: Run, setup: Setup) -> None:
    """Train a run through its remaining stages, calibrate the best checkpoint, and mark the run as finished.

    Raises:
        NonFiniteLoss: a loss isn't finite; the last saved state is kept.
        SaveError: a checkpoint can't be written; the last saved state is kept.
        WorkerDied: a DataLoader worker died; the run is saved.
    """
    with closing(run), run.saved_when_stopped():
        inputs = start_run(run, setup)
        for stage in setup.stages:
            if run.is_past(stage):
                continue
            inputs, optimizer, loader, val_loader = start_stage(run, stage, inputs)
            trainer = run.trainer
            if run.has_no_start:
                run.record_start(trainer.validate(val_loader, is_start=True))
            pace = Pace(trainer.device)
            while not run.is_past(stage):
                epoch = trainer.start_epoch(loader, run.epoch)
                pace.start()
                with agreed_signals(runtime.world_size > 1):
                    for images, class_ids in epoch.batches():
                        with defer_signals():  # a signal takes effect after the step
                            lr = stage.learning_rate(epoch.position)
                            set_learning_rate(optimizer, lr)
                            loss, hits = trainer.train_step(images, class_ids, optimizer, stage.batch_size)
                            epoch.record(loss, hits)
                            pace.record()
                            trainer.non_finite.check(epoch, trainer.step, lr)
                            run.save_if_due()
                lr = stage.learning_rate(epoch.last_position)
                set_learning_rate(optimizer, lr)  # if the last step was in an earlier process
                metrics = epoch.summary() | {"learning_rate": lr}
                metrics |= trainer.validate(val_loader)
                run.finish_epoch(metrics)
                inputs.report_unreadable()
        if run.finished:
            return
        if run.epoch < run.config.epochs:
            print(f"stopped early: no lower calibrated validation loss for {run.config.patience} epochs (patience)")
        if run.history[run.best]["epoch"] == 0:
            print(format_no_gain(run.history))
        data = setup.data
        run.finish(lambda: calibrate_checkpoint(run.folder / BEST, data.train_images, data.val_images, run.config))


def start_run(run: Run, setup: Setup) -> StageInputs:
    """Open the images of a run; initialize the head of a new run and save it."""
    config, trainer, network = run.config, run.trainer, run.trainer.network
    if config.cache_images:  # all input shapes now, so a full disk fails before training
        for shape in dict.fromkeys(config.epoch_shapes[run.epoch :]):
            open_cache(setup.data.train_images, dataclasses.replace(config, input_shape=shape))
    inputs = StageInputs(config, setup.data, network, trainer.device, trainer.precision)
    if run.is_new:
        if config.head_init == "probe":
            from utils.training.linear_probe import init_head  # imports scikit-learn

            init_head(run.model, inputs.cache, inputs.train_set, inputs.val_set, config)
            if trainer.ema:
                trainer.ema.load(run.model.state_dict())
        run.save()  # an unwritable folder fails before training
    if run.log:
        first_images, _ = next(iter(train_loader(inputs.train_set, min(16, len(inputs.train_set)), num_workers=0)))
        run.log.log_images(network, first_images)
    return inputs


def start_stage(run: Run, stage: Stage, inputs: StageInputs) -> tuple[StageInputs, Optimizer, DataLoader, DataLoader]:
    """Resize and freeze the network for a stage; return its inputs, optimizer, training and validation loaders."""
    if run.trainer.sharded:
        run.join_shards(inputs.data)
        inputs = inputs.renewed(run.trainer.network)
    model, trainer = run.model, run.trainer
    if tuple(model.arguments["input_shape"]) != tuple(stage.input_shape):
        if trainer.ema:
            trainer.ema.resize(model, stage.input_shape)
        model.resize(stage.input_shape)
        trainer.lowest = {}  # losses at another input shape aren't comparable
        inputs = inputs.renewed(inputs.network)
    stage.frozen.apply(model)
    if trainer.ema:
        trainer.ema.set_frozen(model.frozen_state())
    if trainer.by_rows and runtime.world_size > 1:
        trainer.shard(model)
    trainer.network, loader, val_loader = inputs.open(stage, trainer.parts, trainer.exact, trainer.sharded)
    optimizer = build_optimizer(model, run.config, stage.init_lr)
    run.attach_optimizer(optimizer, stage)
    return inputs, optimizer, loader, val_loader


def train_folds(setup: Setup, num_folds: int, group_regex: str) -> None:
    """Train each fold that has no finished run, then report all folds."""
    from utils.runs.cross_validation import make_folds, report_folds  # imports scikit-learn

    folds = runtime.first(lambda: make_folds(setup.config, setup.data, num_folds, group_regex))
    for fold in folds:
        print(fold.title)
        if setup.config.resume == "no" or runtime.first(fold.find_run) is None:
            train_fold(fold.config)
        runtime.first(fold.clear_cache)
    runtime.first(lambda: report_folds(folds))


def train_fold(config: TrainConfig) -> None:
    """Train the run of a fold."""
    setup = prepare(config)
    print(describe(setup))
    start_and_train(setup)


def describe(setup: Setup) -> str:
    """Format data, network and stages for printing."""
    config, data, network = setup.config, setup.data, setup.network
    lists = f"{config.train_annotation_path}, {config.val_annotation_path}"
    return (
        f"data      {len(data.train_images):,} training and {len(data.val_images):,} validation images of "
        f"{len(data.class_names)} classes ({lists})\n"
        f"network   {config.backbone}, {count_parameters(network) / 1e6:.1f} M parameters, on {setup.device} in "
        f"{setup.precision} ({setup.precision_reason})\n"
        f"{format_stages(setup.stages)}"
    )


def print_next_commands(run: Run, setup: Setup) -> None:
    """Print the commands that evaluate the run and predict with it."""
    example = read_first_path(run.config.test_annotation_path) or setup.data.val_images.path(0)
    print(f"done, saved in {run.folder}. Next:")
    for script, *images in (["eval.py"], ["predict.py", example]):
        print(f"  {cli.command('python', cli.script_path(script), str(run.folder), *images)}")


def saved_settings(args: Sequence[str]) -> dict[str, TrainConfig]:
    """The settings that flags change, by the name of main's argument: those of the run in --resume or --continue
    instead of CONFIG."""
    if run := cli.find_value(args, "--continue"):
        return {"config": settings_to_continue(run)}
    run = cli.find_value(args, "--resume")
    return {} if run in (None, "auto", "no") else {"config": settings_to_resume(run)}


if __name__ == "__main__":
    cli.run(main, OPTIONAL_SWITCHES, suggest_name, saved_settings)
