"""utils/training/pace.py: a run that has become slow is reported once."""

from pathlib import Path

import pytest
import torch

import train
from tests.conftest import TINY, settings
from utils.runs.checkpoint import LAST, load_checkpoint
from utils.training import pace
from utils.training.pace import STEPS, WARM_UP, Pace


@pytest.fixture
def run_steps(monkeypatch, capsys):
    """Takes steps of the given seconds with one pace; returns the warnings."""
    clock = [100.0]
    monkeypatch.setattr(pace, "monotonic", lambda: clock[0])
    watch = Pace(torch.device("cpu"))

    def run(*durations: float) -> list[str]:
        for seconds in durations:
            clock[0] += seconds
            watch.record()
        return capsys.readouterr().out.splitlines()

    run.rest = lambda seconds: (clock.__setitem__(0, clock[0] + seconds), watch.start())
    return run


def test_a_run_that_has_become_slow_is_reported_once(run_steps):
    assert not run_steps(*[0.5] * 40)
    (warning,) = run_steps(*[1.2] * 40)
    assert warning.startswith("warning: a step takes 1.2 s, and took 0.5 s before: probably other programs use")
    assert "the cores" in warning and "resume with OMP_NUM_THREADS=1" in warning
    assert not run_steps(*[5.0] * 40)


def test_a_start_beside_another_process_does_not_hide_a_later_slowdown(run_steps):
    assert not run_steps(*[3.0] * 40, *[1.0] * 40)
    assert len(run_steps(*[2.5] * 40)) == 1


@pytest.mark.parametrize(
    "durations",
    [
        [9.0] * WARM_UP + [0.5] * 60,  # the first steps
        [0.5] * 30 + ([0.5] * 6 + [8.0]) * 20,  # steps that save
        [0.5] * 30 + [0.9] * 60,  # less than twice as slow
        [0.02] * 100 + [0.06] * 60 + [0.02] * 100,  # for a moment
        [0.5] * (WARM_UP + STEPS - 1),
    ],
)
def test_other_runs_are_not(run_steps, durations):
    assert not run_steps(*durations)


def test_the_validation_between_epochs_does_not_count(run_steps):
    for _ in range(30):
        assert not run_steps(*[0.5] * 2)
        run_steps.rest(60)


def test_training_records_every_step_of_each_stage(two_classes, monkeypatch):
    stages = []

    class Counting(Pace):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            stages.append([])

        def record(self) -> None:
            super().record()
            stages[-1].append(1)

    monkeypatch.setattr(train, "Pace", Counting)
    train.main(settings(**TINY | {"unfreeze_epoch": 2}))
    history = load_checkpoint(next(Path("logs").iterdir()) / LAST)["history"]
    assert [len(steps) for steps in stages] == [history[1]["step"], history[2]["step"] - history[1]["step"]]
