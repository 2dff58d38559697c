"""utils/training/stages.py: stages from settings."""

from contextlib import nullcontext

import pytest

from nets.factory import build_meta_model
from tests.config.test_train_config import STAGES
from tests.conftest import settings
from utils.config.train_config import StageConfig
from utils.training.stages import check_single_images, plan_stages


def make_stages(num_images=1000, **changes):
    options = {"freeze_epoch": 3, "unfreeze_epoch": 10, "freeze_batch_size": 64, "unfreeze_batch_size": 16}
    config = settings(**options | changes)
    return plan_stages(config, num_images, transformer=True)


def test_two_stages():
    frozen, thawed = make_stages(freeze_blocks=5)
    assert (frozen.start, frozen.end, frozen.frozen.written, frozen.batch_size) == (0, 3, 5, 64)
    assert (thawed.start, thawed.end, thawed.frozen.written, thawed.batch_size) == (3, 10, "nothing", 16)
    assert frozen.init_lr == pytest.approx(4 * thawed.init_lr)


@pytest.mark.parametrize("changes", [{"freeze_train": False}, {"freeze_epoch": 0}])
def test_single_thawed_stage(changes):
    (stage,) = make_stages(**changes)
    assert (stage.start, stage.end, stage.frozen.written) == (0, 10, "nothing")


def test_single_frozen_stage():
    (stage,) = make_stages(freeze_epoch=10, freeze_blocks="all")
    assert (stage.end, stage.frozen.written) == (10, "all")


@pytest.mark.parametrize(
    ("backbone", "side", "batch_size", "blocks", "refused"),
    [
        ("resnet18", 32, 1, 2, True),  # its last feature map is 1 x 1
        ("resnet18", 32, 2, 2, False),
        ("resnet18", 64, 1, 2, False),
        ("resnet18", 32, 1, "all", False),  # frozen: in eval mode
        ("vit_xs_4", 32, 1, 2, False),
    ],
)
def test_batches_of_one_image_and_batch_norm(backbone, side, batch_size, blocks, refused):
    stages = make_stages(input_shape=(side, side), freeze_epoch=10, freeze_batch_size=batch_size, freeze_blocks=blocks)
    network = build_meta_model(backbone, 2, (side, side))
    with pytest.raises(ValueError, match="resnet18 can't be trained with batches of one") if refused else nullcontext():
        check_single_images(stages, network)


def test_batch_size_is_limited_to_the_list_with_a_note():
    frozen, thawed = make_stages(num_images=20)
    assert (frozen.batch_size, thawed.batch_size) == (20, 16)
    assert "batch size 64 -> 20: the training list has no more images" in frozen.notes
    assert thawed.notes == ()


def test_steps_of_an_epoch():
    assert [stage.steps for stage in make_stages(num_images=1000)] == [15, 62]
    (stage,) = make_stages(num_images=10, epoch_repeats=7, freeze_train=False)
    assert (stage.batch_size, stage.steps) == (10, 7)
    (stage,) = make_stages(num_images=20, epoch_repeats=7, freeze_train=False)
    assert stage.steps == 8  # of 140 images; the last 12 are dropped


def test_limited_learning_rate_is_noted():
    assert not any(stage.notes for stage in make_stages(init_lr=1e-3))
    frozen, _ = make_stages(init_lr=1.0)
    assert "init_lr 1 scales to 0.25 for 64 images per step -> 0.001, the limit for adamw" in frozen.notes
    assert frozen.init_lr == 1e-3


def test_one_schedule_over_both_stages():
    frozen, thawed = make_stages(freeze_batch_size=16)
    assert frozen.learning_rate(3) == thawed.learning_rate(3)
    assert thawed.learning_rate(9.9) == pytest.approx(thawed.min_lr)


def test_custom_stages():
    stages = make_stages(stages=STAGES)
    assert [(s.start, s.end, s.frozen.written, s.batch_size) for s in stages] == [
        (0, 3, "all", 64),
        (3, 5, 8, 32),
        (5, 10, "nothing", 16),
    ]


def test_input_shape_per_stage():
    stages = make_stages(stages=(StageConfig(3, "all", 64, (96, 128)), StageConfig(5, "nothing")))
    assert [stage.input_shape for stage in stages] == [(96, 128), (224, 224)]


def test_warm_up_after_each_thaw():
    plain, warmed = make_stages(stages=STAGES), make_stages(stages=STAGES, thaw_warmup=2.0)
    for before, stage in zip(plain, warmed, strict=True):
        parts = [
            stage.learning_rate(stage.start + done) / before.learning_rate(stage.start + done) for done in (0, 1, 2)
        ]
        assert parts == pytest.approx([1, 1, 1] if stage.start == 0 else [0.1, 0.55, 1])
