"""utils/training/stages.py: the stages follow from the settings."""

import pytest

from tests.config.test_train_config import STAGES
from tests.conftest import settings
from utils.config.train_config import StageConfig
from utils.training.stages import plan_stages


def stages_of(num_images=1000, **changes):
    options = {"freeze_epoch": 3, "unfreeze_epoch": 10, "freeze_batch_size": 64, "unfreeze_batch_size": 16}
    config = settings(**options | changes)
    return plan_stages(config, num_images, transformer=True)


def test_two_stages():
    frozen, thawed = stages_of(freeze_blocks=5)
    assert (frozen.start, frozen.end, frozen.frozen.written, frozen.batch_size) == (0, 3, 5, 64)
    assert (thawed.start, thawed.end, thawed.frozen.written, thawed.batch_size) == (3, 10, "nothing", 16)
    assert frozen.init_lr == pytest.approx(4 * thawed.init_lr)


@pytest.mark.parametrize("changes", [{"freeze_train": False}, {"freeze_epoch": 0}])
def test_straight_to_the_thawed_stage(changes):
    (stage,) = stages_of(**changes)
    assert (stage.start, stage.end, stage.frozen.written) == (0, 10, "nothing")


def test_frozen_to_the_end():
    (stage,) = stages_of(freeze_epoch=10, freeze_blocks="all")
    assert (stage.end, stage.frozen.written) == (10, "all")


def test_a_small_set_makes_a_smaller_batch_and_notes_it():
    frozen, thawed = stages_of(num_images=20)
    assert (frozen.batch_size, thawed.batch_size) == (20, 16)
    assert "batch size 64 -> 20: the training list has no more images" in frozen.notes
    assert thawed.notes == ()


def test_a_rate_beyond_the_limits_is_noted():
    assert not any(stage.notes for stage in stages_of(init_lr=1e-3))
    frozen, _ = stages_of(init_lr=1.0)
    assert "init_lr 1 is 0.25 for 64 images per step -> 0.001, the limit for adamw" in frozen.notes
    assert frozen.init_lr == 1e-3


def test_one_schedule_over_both_stages():
    frozen, thawed = stages_of(freeze_batch_size=16)
    assert frozen.learning_rate(3) == thawed.learning_rate(3)
    assert thawed.learning_rate(9.9) == pytest.approx(thawed.min_lr)


def test_stages_of_ones_own():
    stages = stages_of(stages=STAGES)
    assert [(s.start, s.end, s.frozen.written, s.batch_size) for s in stages] == [
        (0, 3, "all", 64),
        (3, 5, 8, 32),
        (5, 10, "nothing", 16),
    ]


def test_stages_of_another_size():
    stages = stages_of(stages=(StageConfig(3, "all", 64, (96, 128)), StageConfig(5, "nothing")))
    assert [stage.input_shape for stage in stages] == [(96, 128), (224, 224)]


def test_the_learning_rate_rises_again_after_each_thaw():
    plain, warmed = stages_of(stages=STAGES), stages_of(stages=STAGES, thaw_warmup=2.0)
    for before, stage in zip(plain, warmed, strict=True):
        parts = [
            stage.learning_rate(stage.start + done) / before.learning_rate(stage.start + done) for done in (0, 1, 2)
        ]
        assert parts == pytest.approx([1, 1, 1] if stage.start == 0 else [0.1, 0.55, 1])
