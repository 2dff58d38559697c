"""utils/config/other_names.py: names of other projects are answered with Thaw's."""

import copy
import inspect
import pickle

import pytest

import eval
import export
import predict
import train
from utils.annotation.annotate import annotate
from utils.config.other_names import OTHER_NAMES, suggest_name
from utils.config.train_config import SETTINGS, StageConfig, TrainConfig


def test_answers_exist_and_are_needed():
    known = {*SETTINGS, "json", "csv"}
    mains = (train.main, predict.main, eval.main, export.main, annotate)
    known |= {name for main in mains for name in parameters(main)}
    for other, answers in OTHER_NAMES.items():
        assert other == other.lower() and "-" not in other
        assert [answer for answer in answers if answer not in known and " " not in answer] in ([], ["name"])


def parameters(main) -> list[str]:
    return list(inspect.signature(main).parameters)


@pytest.mark.parametrize(
    ("name", "answer"),
    [("epochs", "unfreeze_epoch"), ("Init_lr", "init_lr"), ("weight_dacay", "weight_decay"), ("xyzzy", "")],
)
def test_the_nearest_name_is_suggested(name, answer):
    assert suggest_name(name, SETTINGS) == answer


def test_an_unknown_field_is_an_error_with_the_field_to_use():
    with pytest.raises(ValueError, match=r"^epochs=20: TrainConfig has no such field; use unfreeze_epoch$"):
        TrainConfig(epochs=20)
    with pytest.raises(ValueError, match=r"^xyzzy=1: TrainConfig has no such field; docs/settings.md lists them$"):
        TrainConfig(xyzzy=1)
    with pytest.raises(ValueError, match=r"^batch=8: StageConfig has no such field; .*batch_size$"):
        StageConfig(3, "all", batch=8)
    config = TrainConfig(seed=3)
    assert copy.copy(config) == pickle.loads(pickle.dumps(config)) == config
