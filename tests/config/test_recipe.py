"""utils/config/recipe.py and utils/runs/setup.py: choices depend on what is known; user settings are kept."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import train
from nets.factory import build_meta_model
from tests.conftest import TINY, write_back
from tests.test_train import only_run
from utils.config.recipe import Known, choose
from utils.config.train_config import PLAIN_DEFAULTS, StageConfig, TrainConfig
from utils.runs.checkpoint import LAST, load_checkpoint
from utils.runs.setup import count_layers, prepare
from utils.training.stages import plan_stages
from utils.training.summary import format_settings

AUTO = TrainConfig(recipe="auto")


def known(**changes) -> Known:
    values = {"class_counts": np.array([50, 60]), "pretrained": True, "transformer": True}
    values |= {"layers": 14, "parameters": 22_000_000, "on_cpu": True}
    return Known(**values | changes)


def apply(config: TrainConfig, facts: Known) -> TrainConfig:
    """The config of a run, as made by `utils.runs.setup.prepare`."""
    choices = {choice.field: choice.value for choice in choose(config, facts)}
    return config.with_defaults(**{name: v for name, v in choices.items() if getattr(config, name) is None})


def small_auto(**changes) -> TrainConfig:
    """A recipe run that takes seconds."""
    fixed = {name: TINY[name] for name in ("backbone", "input_shape", "num_workers", "precision")}
    return TrainConfig(**fixed, recipe="auto", **changes)


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("transformer", [True, False])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_choices_are_of_fields_that_are_none_by_default(pretrained, transformer, on_cpu):
    facts = known(pretrained=pretrained, transformer=transformer, on_cpu=on_cpu)
    choices = choose(AUTO, facts)
    assert {choice.field for choice in choices} <= PLAIN_DEFAULTS.keys()
    assert all(choice.reason for choice in choices)
    own = {"unfreeze_epoch": 7, "init_lr": 3e-4, "drop_rate": 0.3, "augmentation": "augmix"}
    config = apply(dataclasses.replace(AUTO, **own), facts)
    assert {field: getattr(config, field) for field in own} == own
    assert config.min_lr == pytest.approx(3e-6)
    assert config.freeze_train is False
    assert None not in [getattr(config, field) for field in PLAIN_DEFAULTS]


def test_choices_depend_on_what_is_known():
    assert apply(AUTO, known()).head_init == "probe"
    assert apply(AUTO, known(pretrained=False)).head_init == "random"
    assert apply(AUTO, known(pretrained=False)).optimizer_type == "muon"
    assert apply(AUTO, known(pretrained=False, transformer=False)).optimizer_type == "adamw"
    assert apply(AUTO, known(transformer=False)).layer_decay == 1
    assert apply(AUTO, known(class_counts=np.array([50, 600]))).sampler == "balanced"
    assert apply(AUTO, known(class_counts=np.array([100, 0, 600]))).sampler == "shuffle"
    for millions, rate in ((3, 0.0), (22, 0.05), (86, 0.2), (304, 0.45), (632, 0.6)):
        large = known(pretrained=False, parameters=millions * 10**6)
        assert apply(AUTO, large).drop_path_rate == rate
        assert apply(AUTO, large._replace(transformer=False)).drop_path_rate == 0
    many = known(class_counts=np.array([40_000, 40_000]), pretrained=False)
    few = known(class_counts=np.array([40, 40]), pretrained=False)
    assert apply(AUTO, many).unfreeze_epoch < apply(AUTO, few).unfreeze_epoch
    assert apply(AUTO, few).unfreeze_epoch < apply(AUTO, few._replace(on_cpu=False)).unfreeze_epoch


@pytest.mark.parametrize("images", [4, 17, 90, 1000])
@pytest.mark.parametrize("own", [{}, {"unfreeze_epoch": 2}, {"unfreeze_batch_size": 8}])
def test_a_short_list_is_repeated_for_enough_samples(images, own):
    config = apply(dataclasses.replace(AUTO, **own), known(class_counts=np.array([images // 2, images - images // 2])))
    (stage,) = plan_stages(config, images, transformer=True)
    assert stage.steps * stage.batch_size * config.epochs > 1600 - 16 * config.epochs  # of incomplete batches
    assert config.epoch_repeats == 1 or (config.epoch_repeats - 1) * images * config.epochs < 1600
    assert apply(AUTO, known(pretrained=False, class_counts=np.array([2, 2]))).epoch_repeats == 1


def test_choices_fit_user_settings():
    scratch, plain = known(pretrained=False), PLAIN_DEFAULTS
    sgd = apply(dataclasses.replace(AUTO, optimizer_type="sgd"), scratch)
    assert (sgd.optimizer_type, sgd.momentum, sgd.init_lr) == ("sgd", plain["momentum"], plain["init_lr"])
    assert apply(dataclasses.replace(AUTO, optimizer_type="sgd"), known()).init_lr == plain["init_lr"]
    weighted = dataclasses.replace(AUTO, class_weights="balanced")
    assert apply(weighted, known(class_counts=np.array([50, 600]))).sampler == "shuffle"


def test_user_value_equal_to_the_default_is_kept():
    own = {name: PLAIN_DEFAULTS[name] for name in ("optimizer_type", "unfreeze_epoch", "min_lr", "layer_decay")}
    config = apply(dataclasses.replace(AUTO, **own), known(pretrained=False))
    assert {name: getattr(config, name) for name in own} == own


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("own", [{}, {"unfreeze_epoch": 7}])
def test_freezing_can_be_set(pretrained, own):
    frozen = apply(dataclasses.replace(AUTO, freeze_train=True, **own), known(pretrained=pretrained))
    assert frozen.freeze_train
    assert frozen.freeze_epoch == frozen.unfreeze_epoch // 5
    both_set = apply(dataclasses.replace(AUTO, freeze_train=True, freeze_epoch=2, **own), known())
    assert both_set.freeze_epoch == 2


def test_single_layer_backbone_has_no_layer_decay():
    """The high init_lr is only for layer decay."""
    assert count_layers(build_meta_model("timm/test_vit", 2, (160, 160))) == 8  # 6 blocks
    assert count_layers(build_meta_model("vit_xs_4", 2, (8, 8))) == 8
    whole = apply(AUTO, known(layers=1))
    assert (whole.layer_decay, whole.init_lr) == (1.0, PLAIN_DEFAULTS["init_lr"])
    same = apply(dataclasses.replace(AUTO, layer_decay=1.0), known())
    assert (same.layer_decay, same.init_lr) == (1.0, PLAIN_DEFAULTS["init_lr"])
    own = apply(dataclasses.replace(AUTO, layer_decay=0.8), known())
    assert own.init_lr == apply(AUTO, known()).init_lr > PLAIN_DEFAULTS["init_lr"]


@pytest.mark.parametrize("layers", [2, 14, 26, 40])
def test_the_first_layer_of_a_deep_network_still_learns(layers):
    decay = apply(AUTO, known(layers=layers)).layer_decay
    assert 0.7 <= decay < 1
    assert decay ** (layers - 1) > 0.005


def test_reason_depends_on_head_init():
    for head_init, reason in (
        ("random", "all layers learn from the start"),
        (None, "the probe replaces a frozen stage"),
    ):
        choices = choose(dataclasses.replace(AUTO, head_init=head_init), known())
        assert reason in {choice.reason for choice in choices if choice.field == "freeze_train"}


def test_custom_stages_are_kept():
    stages = (StageConfig(2, "all"), StageConfig(3, "nothing"))
    config = dataclasses.replace(AUTO, stages=stages)
    assert apply(config, known()).all_stages == config.all_stages


def test_table_shows_who_set_a_field(two_classes):
    config = small_auto(unfreeze_epoch=2, momentum=0.9, weight_decay=0.1)
    setup = prepare(config)
    table = format_settings(setup.config, setup.asked, setup.choices, all_fields=False)
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert lines["unfreeze_epoch"].endswith("epochs)") and "you (recipe: 100," in lines["unfreeze_epoch"]
    assert "you (recipe: 0.95," in lines["momentum"]
    assert lines["optimizer_type"].split(maxsplit=2)[1:] == [
        "muon",
        "recipe: it learns more per image than adamw",
    ]
    assert lines["weight_decay"].endswith("you")
    assert "color_jitter" not in lines and "lr_decay_type" not in lines
    whole = format_settings(setup.config, setup.asked, setup.choices, all_fields=True)
    assert [line.split()[0] for line in whole.splitlines()] == list(TrainConfig().as_dict())


def test_same_command_resumes_a_recipe_run(two_classes, capsys, monkeypatch):
    """With the choices stored in its checkpoint."""
    config = small_auto(unfreeze_epoch=2, save_period=1)
    train.main(config)
    stored = load_checkpoint(only_run() / LAST)["config"]
    assert (stored["recipe"], stored["optimizer_type"], stored["unfreeze_epoch"]) == ("none", "muon", 2)
    write_back(only_run(), 1)
    monkeypatch.setattr("utils.config.recipe.SMALL_BATCH_UP_TO", 1)  # changes the recipe's choice
    train.main(config)
    assert load_checkpoint(only_run() / LAST)["epoch"] == 2
    assert "as chosen when the run started" in capsys.readouterr().out
    train.main(dataclasses.replace(config, resume=str(only_run() / LAST)))  # finished: no new choices
    assert "enough images for larger batches" not in capsys.readouterr().out
    train.main(config)  # finished: a new run starts, with new choices
    assert len(list(Path("logs").iterdir())) == 2
    newest = max(Path("logs").iterdir(), key=lambda run: run.stat().st_mtime)
    assert load_checkpoint(newest / LAST)["config"]["unfreeze_batch_size"] == 128


def test_choices_of_a_run_without_checkpoints_are_not_reused(two_classes, capsys):
    config = small_auto(unfreeze_epoch=1)
    train.main(config)
    for path in only_run().glob("*.safetensors"):
        path.unlink()
    capsys.readouterr()
    train.main(config)
    assert "as chosen when the run started" not in capsys.readouterr().out


def test_choices_of_a_run_with_other_classes_are_not_reused(two_classes, capsys):
    config = small_auto(unfreeze_epoch=2, save_period=1)
    train.main(config)
    write_back(only_run(), 1)
    for path in ("cls_train.txt", "cls_val.txt", "cls_test.txt", "model_data/cls_classes.txt"):
        Path(path).unlink()
    (two_classes / "train/dark").rename(two_classes / "train/gloomy")
    (two_classes / "test/dark").rename(two_classes / "test/gloomy")
    capsys.readouterr()
    train.main(config)
    printed = capsys.readouterr().out
    assert "as chosen when the run started" not in printed and "isn't resumed: it has other classes" in printed
    assert len(list(Path("logs").iterdir())) == 2
