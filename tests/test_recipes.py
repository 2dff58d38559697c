"""recipes/: each has valid settings."""

import importlib
import pkgutil

import pytest

import recipes
import train
from utils.annotation.annotate import annotate

NAMES = [module.name for module in pkgutil.iter_modules(recipes.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_summary(two_classes, capsys, name):
    annotate(audit=False)
    recipe = importlib.import_module(f"recipes.{name}")
    recipe.main(summary=True)
    printed = capsys.readouterr().out
    for number, stage in enumerate(recipe.CONFIG.all_stages, start=1):
        assert f"stage {number}   epochs" in printed
        assert f"{stage.input_shape[0]} x {stage.input_shape[1]} pixels" in printed
    assert train.CONFIG != recipe.CONFIG
