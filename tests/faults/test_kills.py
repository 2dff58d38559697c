"""A killed and resumed run gives bit-identical results to an uninterrupted one.

`python -m pytest tests/faults -m "slow or not slow"` runs all cases.
"""

import functools
import random
import time
from pathlib import Path

import pytest

from tests.faults.harness import LAST, finish, last_step, outcome, prepare, read_steps, run_folder, start
from tests.faults.harness import steps as steps_of
from utils.runs.checkpoint import BEST, SUFFIX, load_checkpoint, load_newest, read_progress

DATA = ("mnist_png", "sign_digits")
INTERVAL = 2  # save_every_steps
POINTS = ("at open", "mid-write", "before flush", "before rename", "after rename", "in retention")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The outcome of an uninterrupted run by data set."""

    @functools.cache
    def of(data: str) -> dict[str, str]:
        folder = prepare(tmp_path_factory.mktemp("uninterrupted") / data, data)
        finish(folder)
        return outcome(folder)

    return of


def slow_from(first: int, values):
    return [pytest.param(value, marks=pytest.mark.slow) if i >= first else value for i, value in enumerate(values)]


@pytest.mark.parametrize("num_workers", slow_from(0, [0, 1, 3]))
def test_the_number_of_workers_changes_nothing(tmp_path, uninterrupted, num_workers):
    folder = prepare(tmp_path / "run", "mnist_png")
    finish(folder, {"num_workers": num_workers})
    assert outcome(folder) == uninterrupted("mnist_png")


@pytest.mark.parametrize("seed", slow_from(0, range(16)))
def test_killed_at_any_time(tmp_path, uninterrupted, seed):
    """3 to 10 kills per run, 104 in total."""
    chance = random.Random(seed)
    kills, round_number = 3 + seed % 8, 0
    data = DATA[seed % 2]
    while kills:
        folder = prepare(tmp_path / f"run{round_number}", data)
        round_number += 1
        while kills:
            before, noted = last_step(folder), len(read_steps(folder))
            process = start(folder)
            while kills % 2 and process.is_alive() and len(read_steps(folder)) == noted:
                time.sleep(0.01)  # every other kill is after a step
            process.join(chance.uniform(0.0, 1.5))
            killed = process.exitcode is None
            if killed:
                process.kill()
                process.join()
                kills -= 1
            assert killed or process.exitcode == 0, (folder / "output.log").read_text()[-3000:]
            finished = is_finished(folder)  # may be just before the kill
            if len(read_steps(folder)) > noted:
                assert before + 1 - int(read_steps(folder)[noted].split()[0]) <= INTERVAL
            if finished:
                break
        if not finished:
            finish(folder)
        assert outcome(folder) == uninterrupted(data)


@pytest.mark.parametrize("seed", slow_from(0, range(34)))
@pytest.mark.parametrize("point", POINTS)
def test_killed_while_saving(tmp_path, uninterrupted, point, seed):
    """34 at each of 6 points, 204 in total."""
    kill_while_saving(tmp_path, uninterrupted, point, random.Random(f"{point} {seed}").randint(0, 6), DATA[seed % 2])


def test_killed_mid_write(tmp_path, uninterrupted):
    kill_while_saving(tmp_path, uninterrupted, "mid-write", 3, "mnist_png")


@pytest.mark.parametrize("number", slow_from(1, [3, 0, 1, 2, 4, 5]))
def test_killed_while_finishing(tmp_path, uninterrupted, number):
    """Before and after each of the three final files."""
    kill_while_saving(tmp_path, uninterrupted, "finishing", number, "mnist_png")


@pytest.mark.parametrize("number", slow_from(1, [1, 2, 3, 4]))
def test_killed_between_the_files_of_the_first_epochs(tmp_path, number):
    """After best and last of epoch 0, periodic and last of epoch 1; the initial checkpoint was saved before."""
    settings = {"freeze_train": False, "unfreeze_epoch": 1, "save_every_steps": 0}
    folder = prepare(tmp_path / "run", "mnist_png")
    process = start(folder, settings, fault="after rename", number=number)
    process.join(120)
    assert process.exitcode == -9
    finish(folder, settings)
    finish(whole := prepare(tmp_path / "whole", "mnist_png"), settings)
    assert outcome(folder) == outcome(whole)
    assert load_checkpoint(run_folder(folder) / BEST)["calibration"]


def is_finished(folder: Path) -> bool:
    """Whether it has a finished run, so the next start would be of a new one."""
    notes = map(read_progress, folder.glob(f"logs/*/{LAST}"))
    return any(progress and progress.finished for progress in notes)


def kill_while_saving(tmp_path: Path, uninterrupted, point: str, number: int, data: str) -> None:
    folder = prepare(tmp_path / "run", data)
    process = start(folder, fault=point, number=number if point != "in retention" else number % 2)
    process.join(120)
    assert process.exitcode == -9
    if list(run_folder(folder).glob(f"*{SUFFIX}")):
        assert load_newest(run_folder(folder))
    if not is_finished(folder):
        finish(folder)
    assert outcome(folder) == uninterrupted(data)
    assert not list(run_folder(folder).glob("*.partial"))


def test_the_harness_detects_a_save_that_is_not_atomic(tmp_path):
    """Otherwise the tests above would prove nothing."""
    folder = prepare(tmp_path / "run", "mnist_png")
    process = start(folder, fault="plain mid-write", number=3)
    process.join(120)
    assert process.exitcode == -9
    assert any(not readable(path) for path in run_folder(folder).glob(f"*{SUFFIX}"))


def readable(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except ValueError:
        return False
    return True


@pytest.mark.slow
def test_resuming_within_an_epoch_skips_completed_steps(tmp_path):
    folder = prepare(tmp_path / "run", "mnist_png")
    settings = {"freeze_train": False, "unfreeze_epoch": 1, "save_every_steps": 1}
    process = start(folder, settings, fault="after rename", number=5)  # three initial files and three steps
    process.join(120)
    assert last_step(folder) == 2
    noted = len(read_steps(folder))
    finish(folder, settings)
    assert [int(line.split()[0]) for line in read_steps(folder)[noted:]] == [3]
    images = [name for inputs in steps_of(folder).values() for name in inputs.split()[0].split(",")]
    assert len(images) == len(set(images)) == 32
    assert "(resumed after 3 steps)" in (folder / "output.log").read_text()


@pytest.mark.slow
def test_two_processes_cannot_write_one_run(tmp_path):
    folder = prepare(tmp_path / "run", "mnist_png")
    first = start(folder)
    while last_step(folder) < 3:
        time.sleep(0.05)
        assert first.exitcode is None
    second = start(folder)
    second.join(60)
    assert second.exitcode == 1
    assert f"is in use by process {first.pid} on " in (folder / "output.log").read_text()
    first.join(60)
    assert first.exitcode == 0
    assert load_checkpoint(run_folder(folder) / LAST)["finished"]
