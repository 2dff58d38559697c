"""utils/config/train_config.py: every field is documented and checked."""

import ast
import dataclasses
import inspect
import json
from itertools import pairwise

import pytest
import tyro

import train
from utils.config import train_config as config_module
from utils.config.train_config import OPTIONAL_SWITCHES, PLAIN_DEFAULTS, SETTINGS, StageConfig, TrainConfig
from utils.system.cli import expand_switches


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer_type", "adamm"),
        ("lr_decay_type", "linear"),
        ("precision", "tf32"),
        ("device", "gpu"),
        ("activation", "relu"),
        ("input_shape", (224,)),
        ("drop_rate", 1.0),
        ("attn_drop_rate", -0.1),
        ("drop_path_rate", 1.5),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("init_lr", 0.0),
        ("min_lr", 1.0),
        ("eval_crop", 0.0),
        ("train_crop", 1.1),
        ("horizontal_flip", 2.0),
        ("freeze_blocks", -1),
        ("freeze_epoch", 101),
        ("freeze_batch_size", 0),
        ("unfreeze_batch_size", 0),
        ("unfreeze_epoch", 0),
        ("stages", (1,)),
        ("thaw_warmup", -1),
        ("save_period", 0),
        ("num_workers", -1),
        ("seed", -1),
        ("image_std", (0.2, 0.0, 0.2)),
        ("image_mean", (0.5,)),
        ("image_mean", (0.5, float("nan"), 0.5)),
        ("freeze_blocks", "8"),
        ("input_shape", 224),
        ("input_shape", (0, 224)),
        ("init_lr", "1e-3"),
        ("num_workers", None),
        ("unfreeze_batch_size", 32.0),
        ("freeze_epoch", 1.5),
        ("freeze_train", "False"),
        ("weight_decay", float("inf")),
        ("classes_path", 1),
        ("name", "a/b"),
        ("name", "x" * 101),
    ],
)
def test_invalid_value(field, value):
    with pytest.raises(ValueError, match=f"^{field}=") as error:
        TrainConfig(**{field: value})
    assert repr(value) in str(error.value)
    assert len(str(error.value).partition(": ")[2]) > 10, "no remedy"


def test_lists_count_as_tuples_and_integers_as_floats():
    assert TrainConfig(input_shape=[32, 64], weight_decay=0) == TrainConfig(input_shape=(32, 64), weight_decay=0.0)
    assert StageConfig(2, "all", input_shape=[8, 8]) == StageConfig(2, "all", input_shape=(8, 8))


def test_every_field_has_a_docstring():
    body = ast.parse(inspect.getsource(config_module.TrainConfig)).body[0].body
    documented = {
        node.target.id
        for node, after in pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }
    assert documented == {field.name for field in dataclasses.fields(TrainConfig)}


def test_every_field_is_a_flag():
    args = ["--unfreeze-epoch", "130", "--input-shape", "32", "64", "--no-freeze-train"]
    changed = tyro.cli(TrainConfig, args=expand_switches(args, ["freeze_train"]))
    assert changed == TrainConfig(unfreeze_epoch=130, input_shape=(32, 64), freeze_train=False)
    assert tyro.cli(TrainConfig, args=["--freeze-blocks", "all"]).freeze_blocks == "all"
    assert tyro.cli(TrainConfig, args=["--freeze-blocks", "3"]).freeze_blocks == 3


def test_every_flag_sets_its_field():
    """With its own default as the value, in the form in which it is typed."""
    for name, known in SETTINGS.items():
        if name == "stages":
            continue
        values = known.plain if isinstance(known.plain, tuple) else (known.plain,)
        flag = f"--{name.replace('_', '-')}"
        switch = {True: [flag], False: [flag.replace("--", "--no-")]}
        args = switch[known.plain] if isinstance(known.plain, bool) else [flag, *map(str, values)]
        config = tyro.cli(TrainConfig, args=expand_switches(args, OPTIONAL_SWITCHES))
        assert getattr(config, name) == known.plain, name


def test_dict_is_json():
    values = TrainConfig().as_dict()
    assert TrainConfig.from_dict(json.loads(json.dumps(values))).as_dict() == values


STAGES = (StageConfig(3, "all", 64), StageConfig(2, 8), StageConfig(5, "nothing", 16))


def test_custom_stages():
    assert TrainConfig(stages=STAGES).epochs == 10
    assert json.loads(json.dumps(TrainConfig(stages=STAGES).as_dict()))["stages"][1] == {
        "epochs": 2,
        "frozen": 8,
        "batch_size": 32,
        "input_shape": None,
    }


def test_input_shape_per_stage():
    small = StageConfig(3, "all", 64, (96, 128))
    values = TrainConfig(stages=(small, *STAGES)).as_dict()
    assert json.loads(json.dumps(values)) == values  # a resumed run compares them
    with pytest.raises(ValueError, match=r"^stages=.*the last stage trains at the run's input_shape"):
        TrainConfig(stages=(small,))


@pytest.mark.parametrize(
    "config", [TrainConfig().with_defaults(), TrainConfig(stages=STAGES), TrainConfig(eval_crop=0.5, stages=STAGES)]
)
def test_dict_round_trip(config):
    again = TrainConfig.from_dict(json.loads(json.dumps(config.as_dict())))
    assert again.as_dict() == config.as_dict()
    assert again.all_stages == config.all_stages


@pytest.mark.parametrize(
    "values",
    [
        (0, "all"),
        (1.5, "all"),
        (1, "most"),
        (1, -1),
        (1, 2.0),
        (1, 2, 0),
        (1, 2, 8, (0, 8)),
        (1, 2, 8, 8),
        (1, 2, 8, ()),
    ],
)
def test_invalid_stage(values):
    with pytest.raises(ValueError, match=r"^stages: (epochs|frozen|batch_size|input_shape)="):
        StageConfig(*values)


def test_recipe_fields_are_none_until_set():
    config = TrainConfig(layer_decay=1.0)
    assert (config.layer_decay, config.init_lr, config.freeze_train) == (1.0, None, None)
    given = config.with_defaults(init_lr=0.5)
    assert (given.layer_decay, given.init_lr, given.freeze_train, given.recipe) == (1.0, 0.5, True, "none")
    assert None not in [getattr(TrainConfig().with_defaults(), name) for name in PLAIN_DEFAULTS]


@pytest.mark.parametrize("keep", [[], ["layer_decay", "freeze_train"]])
def test_settings_of_an_earlier_version(keep):
    """In which fields at their default counted as not set, unless in `keep`."""
    then = TrainConfig().with_defaults().as_dict() | {"recipe": "auto", "keep": keep, "init_lr": 0.5}
    config = TrainConfig.from_dict(then)
    assert (config.init_lr, config.momentum, config.recipe) == (0.5, None, "auto")
    assert (config.layer_decay, config.freeze_train) == ((1.0, True) if keep else (None, None))
    assert TrainConfig.from_dict(then | {"recipe": "none"}).momentum == 0.9


def test_train_py_does_not_mirror_digits():
    assert train.CONFIG.horizontal_flip == 0
    assert train.CONFIG.augmentation == "none"
    assert train.CONFIG.freeze_train
