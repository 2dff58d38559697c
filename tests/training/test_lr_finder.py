"""utils/training/lr_finder.py: on curves with a known answer, and as a command."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from tests.conftest import TINY, settings
from utils.training import lr_finder
from utils.training.lr_finder import plot_range_test, smooth, suggest

RATES = np.geomspace(1e-7, 1.0, 140)


@pytest.mark.parametrize("steepest", [1e-5, 3e-4, 1e-2])
def test_suggestion_is_the_steepest_rate(steepest):
    """A fall that is steepest at a known rate, then a steeper rise at a hundred times that rate."""
    fall = -1 / (1 + np.exp(-2 * np.log(RATES / steepest)))
    rise = 20 / (1 + np.exp(-4 * np.log(RATES / (100 * steepest))))
    losses = 3 + fall + rise
    assert suggest(RATES.tolist(), losses.tolist()) == pytest.approx(steepest, rel=0.15)
    assert suggest(RATES.tolist(), smooth(losses.tolist())) == pytest.approx(steepest, rel=0.15)
    noise = np.random.default_rng(0).normal(0, 0.05, (100, len(RATES)))
    results = [suggest(RATES.tolist(), smooth(some.tolist())) for some in losses + noise]
    assert np.quantile(results, [0.1, 0.9]) == pytest.approx(steepest, rel=0.25)


def test_no_suggestion_for_a_fitted_head():
    """Whose loss only falls by as much as it fluctuates, and then rises; measured with DINOv2 and head_init="probe"."""
    losses = [0.44, 0.46, 0.48, 0.50, 0.51, 0.50, 0.47, 0.44, 0.42, 0.42, 0.47, 0.55, 0.69, 1.0, 1.5, 2.1]
    fitted = np.interp(np.arange(80) / 5, np.arange(len(losses)), losses)
    assert suggest(RATES[:80].tolist(), fitted.tolist()) is None


@pytest.mark.parametrize("losses", [[], [1.0, 2.0, 3.0], [2.0, 1.0, 3.0]])
def test_no_suggestion_if_the_loss_never_falls(losses):
    assert suggest(RATES[: len(losses)].tolist(), losses) is None
    assert plot_range_test(RATES[: len(losses)], losses).axes[0].get_legend() is None


def fix_suggestion(monkeypatch, suggestion: float | None) -> None:
    monkeypatch.setattr(lr_finder, "STEPS", 3)
    monkeypatch.setattr(lr_finder, "suggest", lambda rates, losses: suggestion)


def test_plot_is_saved_if_the_loss_never_falls(two_classes, monkeypatch):
    fix_suggestion(monkeypatch, None)
    with pytest.raises(
        ValueError,
        match=r"less than a fifth at any learning rate, see logs/learning_rates\.png; .* keep init_lr=0\.004, else",
    ):
        train.main(settings(**TINY), find_lr=True)
    assert [path.name for path in Path("logs").iterdir()] == ["learning_rates.png"]


def test_command_saves_plot_and_creates_no_run(two_classes, capsys):
    train.main(settings(**TINY), find_lr=True)
    (init_lr,) = re.findall(
        r"init_lr=([\d.e-]+), where 0\.004 is set; see logs/learning_rates\.png\. ", capsys.readouterr().out
    )
    assert 1e-5 < float(init_lr) < 1
    assert [path.name for path in Path("logs").iterdir()] == ["learning_rates.png"]


def test_suggestion_is_limited(two_classes, monkeypatch, capsys):
    fix_suggestion(monkeypatch, 0.5)
    train.main(settings(**TINY), find_lr=True)
    assert "(adamw is limited to 1e-05 to 1e-03): init_lr=4.3e-02" in capsys.readouterr().out
    fix_suggestion(monkeypatch, 1e-6)
    train.main(settings(**TINY), find_lr=True)
    assert "(adamw is limited to 1e-05 to 1e-03): init_lr=4.3e-04" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Attempting to set identical")  # over three steps the loss may not fall
def test_head_is_initialized_as_in_training(two_classes, monkeypatch, capsys):
    fix_suggestion(monkeypatch, 1e-4)
    train.main(settings(**TINY, head_init="probe"), find_lr=True)
    printed = capsys.readouterr().out
    assert printed.index("head_init: logistic regression") < printed.index("the loss falls fastest")


def test_range_test_stops_when_the_loss_diverges(two_classes, monkeypatch):
    """And losses are finite."""
    results = []
    run = lr_finder.run_range_test
    monkeypatch.setattr(lr_finder, "HIGHEST", 1e9)
    monkeypatch.setattr(lr_finder, "run_range_test", lambda *parts: results.append(run(*parts)) or results[0])
    train.main(settings(**TINY | {"optimizer_type": "sgd"}), find_lr=True)
    assert len(results[0].rates) < lr_finder.STEPS
    assert torch.tensor(results[0].losses).isfinite().all()
    losses = results[0].losses
    lowest = np.minimum.accumulate(losses)
    assert np.all(losses <= np.maximum(losses[0], lr_finder.DIVERGED * lowest))
