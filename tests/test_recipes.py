"""recipes/: each can be begun."""

import importlib
import pkgutil

import pytest

import recipes
import train

NAMES = [module.name for module in pkgutil.iter_modules(recipes.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_begins(two_classes, capsys, name):
    """Its summary is printed, for other images; the network is drawn in every stage's size."""
    recipe = importlib.import_module(f"recipes.{name}")
    recipe.main(summary=True)
    told = capsys.readouterr().out
    for number, stage in enumerate(recipe.CONFIG.all_stages, start=1):
        assert f"stage {number}   " in told
        assert f"{stage.input_shape[0]} x {stage.input_shape[1]} pixels" in told
    assert train.CONFIG != recipe.CONFIG
