"""utils/config/recipe.py: what is chosen follows what is known, is said, and leaves alone what was set."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import train
from nets.factory import build_meta_model
from tests.conftest import TINY, write_back
from tests.test_train import only_run
from utils.config.recipe import Known, apply_recipe, keep_flags
from utils.config.train_config import StageConfig, TrainConfig
from utils.runs.checkpoint import LAST, load_checkpoint
from utils.runs.resolve_recipe import count_layers

AUTO = TrainConfig(recipe="auto")


def known(**changes) -> Known:
    values = {"class_counts": np.array([50, 60]), "pretrained": True, "transformer": True}
    values |= {"layers": 14, "parameters": 22_000_000, "on_cpu": True}
    return Known(**values | changes)


def small_auto(**changes) -> TrainConfig:
    """A run of seconds by recipe."""
    fixed = {name: TINY[name] for name in ("backbone", "input_shape", "num_workers", "precision")}
    return TrainConfig(**fixed, recipe="auto", **changes)


def changed(config: TrainConfig, other: TrainConfig) -> dict:
    return {name: value for name, value in vars(config).items() if value != getattr(other, name)}


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("transformer", [True, False])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_every_choice_is_printed_and_can_be_overridden(capsys, pretrained, transformer, on_cpu):
    facts = known(pretrained=pretrained, transformer=transformer, on_cpu=on_cpu)
    choices = changed(apply_recipe(AUTO, facts), AUTO)
    told = capsys.readouterr().out
    assert choices.pop("recipe") == "none"
    assert choices["freeze_train"] is False
    for field in choices:
        assert f"recipe: {field}=" in told
    own = {"unfreeze_epoch": 7, "init_lr": 3e-4, "drop_rate": 0.3, "augmentation": "augmix"}
    config = apply_recipe(dataclasses.replace(AUTO, **own), facts)
    assert {field: getattr(config, field) for field in own} == own
    assert config.min_lr == pytest.approx(3e-6)
    assert "recipe: unfreeze_epoch stays 7, as you set it" in capsys.readouterr().out


def test_what_is_known_decides():
    assert apply_recipe(AUTO, known()).head_init == "probe"
    assert apply_recipe(AUTO, known(pretrained=False)).head_init == "random"
    assert apply_recipe(AUTO, known(pretrained=False)).optimizer_type == "muon"
    assert apply_recipe(AUTO, known(pretrained=False, transformer=False)).optimizer_type == "adamw"
    assert apply_recipe(AUTO, known(transformer=False)).layer_decay == 1
    assert apply_recipe(AUTO, known(class_counts=np.array([50, 600]))).sampler == "balanced"
    assert apply_recipe(AUTO, known(class_counts=np.array([100, 0, 600]))).sampler == "shuffle"
    for millions, rate in ((3, 0.0), (22, 0.05), (86, 0.2), (304, 0.45), (632, 0.6)):
        large = known(pretrained=False, parameters=millions * 10**6)
        assert apply_recipe(AUTO, large).drop_path_rate == rate
        assert apply_recipe(AUTO, large._replace(transformer=False)).drop_path_rate == 0
    many = known(class_counts=np.array([40_000, 40_000]), pretrained=False)
    few = known(class_counts=np.array([40, 40]), pretrained=False)
    assert apply_recipe(AUTO, many).unfreeze_epoch < apply_recipe(AUTO, few).unfreeze_epoch
    assert apply_recipe(AUTO, few).unfreeze_epoch < apply_recipe(AUTO, few._replace(on_cpu=False)).unfreeze_epoch


def test_an_optimizer_or_a_weighting_of_ones_own_is_not_crossed():
    scratch = known(pretrained=False)
    sgd = apply_recipe(dataclasses.replace(AUTO, optimizer_type="sgd"), scratch)
    assert (sgd.optimizer_type, sgd.momentum, sgd.init_lr) == ("sgd", TrainConfig.momentum, TrainConfig.init_lr)
    assert apply_recipe(dataclasses.replace(AUTO, optimizer_type="sgd"), known()).init_lr == TrainConfig.init_lr
    weighted = dataclasses.replace(AUTO, class_weights="balanced")
    assert apply_recipe(weighted, known(class_counts=np.array([50, 600]))).sampler == "shuffle"


def test_a_field_is_kept_at_its_default():
    keep = dataclasses.replace(AUTO, keep=("optimizer_type", "unfreeze_epoch", "min_lr"))
    config = apply_recipe(keep, known(pretrained=False))
    assert (config.optimizer_type, config.unfreeze_epoch, config.min_lr) == ("adamw", 100, TrainConfig.min_lr)
    with pytest.raises(ValueError, match=r"^keep=.*there is no field learning_rate"):
        TrainConfig(keep=("learning_rate",))


def test_a_flag_at_its_default_is_obeyed(two_classes, monkeypatch, capsys):
    config = dataclasses.replace(AUTO, backbone="vit_t_4", input_shape=(32, 32), pretrained=False)
    for flags, told in (
        ([], "recipe: optimizer_type=muon"),
        (["--optimizer-type", "adamw", "--num-workers=2"], "recipe: optimizer_type stays adamw, as you set it"),
        (["--optimizer_type=adamw"], "recipe: optimizer_type stays adamw, as you set it"),
    ):
        monkeypatch.setattr("sys.argv", ["train.py", *flags])
        train.main(config, summary=True)
        assert told in capsys.readouterr().out
    assert keep_flags(config, ["unfreeze_epoch", "num_workers", "pretrained"]).keep == ("pretrained", "unfreeze_epoch")


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("own", [{}, {"unfreeze_epoch": 7}])
def test_freezing_can_be_kept(pretrained, own):
    """As `TrainConfig.keep` says: both epochs are then chosen together, unless set."""
    kept = apply_recipe(dataclasses.replace(AUTO, keep=("freeze_train",), **own), known(pretrained=pretrained))
    assert kept.freeze_train
    assert kept.freeze_epoch == kept.unfreeze_epoch // 5
    set_too = apply_recipe(dataclasses.replace(AUTO, keep=("freeze_train",), freeze_epoch=2, **own), known())
    assert set_too.freeze_epoch == 2


def test_a_backbone_of_one_piece_has_no_layers_to_slow_down():
    """As most of timm's transformers are; the high rate goes with the slowing down."""
    assert count_layers(build_meta_model("timm/test_vit", 2, (160, 160))) == 1
    assert count_layers(build_meta_model("vit_xs_4", 2, (8, 8))) == 8
    whole = apply_recipe(AUTO, known(layers=1))
    assert (whole.layer_decay, whole.init_lr) == (1.0, TrainConfig.init_lr)
    kept = apply_recipe(dataclasses.replace(AUTO, keep=("layer_decay",)), known())
    assert (kept.layer_decay, kept.init_lr) == (1.0, TrainConfig.init_lr)
    own = apply_recipe(dataclasses.replace(AUTO, layer_decay=0.8), known())
    assert own.init_lr == apply_recipe(AUTO, known()).init_lr > TrainConfig.init_lr


def test_a_head_that_is_kept_is_no_reason(capsys):
    for keep, reason in ((("head_init",), "all of it learns in all epochs"), ((), "a frozen stage has nothing left")):
        assert not apply_recipe(dataclasses.replace(AUTO, keep=keep), known()).freeze_train
        assert reason in capsys.readouterr().out


def test_stages_of_ones_own_stay():
    stages = (StageConfig(2, "all"), StageConfig(3, "nothing"))
    config = apply_recipe(dataclasses.replace(AUTO, stages=stages), known())
    assert config.all_stages == dataclasses.replace(AUTO, stages=stages).all_stages
    assert config.freeze_train


def test_a_run_by_recipe_goes_on_by_the_same_command(two_classes, capsys, monkeypatch):
    """Its settings are stored as chosen, so that they stay what they were."""
    config = small_auto(unfreeze_epoch=2, save_period=1)
    train.main(config)
    stored = load_checkpoint(only_run() / LAST)["config"]
    assert (stored["recipe"], stored["optimizer_type"], stored["unfreeze_epoch"]) == ("none", "muon", 2)
    write_back(only_run(), 1)
    # What is known now would choose otherwise.
    monkeypatch.setattr("utils.config.recipe.SMALL_BATCH_UP_TO", 1)
    train.main(config)
    assert len(load_checkpoint(only_run() / LAST)["history"]) == 2
    assert "recipe: as it was chosen when the run began: " in capsys.readouterr().out
    train.main(dataclasses.replace(config, resume=str(only_run() / LAST)))  # finished, and nothing is chosen anew
    assert "recipe: unfreeze_batch_size" not in capsys.readouterr().out
    train.main(config)  # that one is finished: another begins, by what is known now
    assert len(list(Path("logs").iterdir())) == 2
    newest = max(Path("logs").iterdir(), key=lambda run: run.stat().st_mtime)
    assert load_checkpoint(newest / LAST)["config"]["unfreeze_batch_size"] == 128


def test_what_was_chosen_for_a_run_whose_checkpoints_are_gone_is_not_taken_up(two_classes, capsys):
    config = small_auto(unfreeze_epoch=1)
    train.main(config)
    for path in only_run().glob("*.pth"):
        path.unlink()
    capsys.readouterr()
    train.main(config)
    assert "as it was chosen when the run began" not in capsys.readouterr().out


def test_what_was_chosen_for_other_classes_is_not_taken_up(two_classes, capsys):
    config = small_auto(unfreeze_epoch=2, save_period=1)
    train.main(config)
    write_back(only_run(), 1)
    for path in ("cls_train.txt", "cls_val.txt", "cls_test.txt", "model_data/cls_classes.txt"):
        Path(path).unlink()
    (two_classes / "train/dark").rename(two_classes / "train/gloomy")
    (two_classes / "test/dark").rename(two_classes / "test/gloomy")
    capsys.readouterr()
    train.main(config)
    told = capsys.readouterr().out
    assert "as it was chosen when the run began" not in told and "isn't finished, but has other classes" in told
    assert len(list(Path("logs").iterdir())) == 2
