"""A run that is killed, wherever, ends as one that wasn't: the same bits, from the same images.

`python -m pytest tests/faults` is the short form, with `-m "slow or not slow"` the whole.
"""

import functools
import random
import time
from pathlib import Path

import pytest
import torch

from tests.faults.harness import LAST, finish, last_step, outcome, prepare, read_steps, run_folder, start
from tests.faults.harness import steps as steps_of
from utils.runs.checkpoint import BEST, load_checkpoint, load_newest, read_progress

DATA = ("mnist_png", "sign_digits")
INTERVAL = 2  # save_every_steps
POINTS = ("at open", "mid-write", "before flush", "before rename", "after rename", "in retention")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """What a run of each data set comes to without interruption."""

    @functools.cache
    def of(data: str) -> dict[str, str]:
        folder = prepare(tmp_path_factory.mktemp("whole") / data, data)
        finish(folder)
        return outcome(folder)

    return of


def slow_from(first: int, values):
    return [pytest.param(value, marks=pytest.mark.slow) if i >= first else value for i, value in enumerate(values)]


@pytest.mark.parametrize("num_workers", slow_from(0, [0, 1, 3]))
def test_the_same_seed_whatever_the_workers(tmp_path, whole, num_workers):
    folder = prepare(tmp_path / "run", "mnist_png")
    finish(folder, {"num_workers": num_workers})
    assert outcome(folder) == whole("mnist_png")


@pytest.mark.parametrize("seed", slow_from(1, range(16)))
def test_killed_at_any_time(tmp_path, whole, seed):
    """3 to 10 kills a run, 104 in all."""
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
                time.sleep(0.01)  # every other kill comes after a step
            process.join(chance.uniform(0.0, 1.5))
            killed = process.exitcode is None
            if killed:
                process.kill()
                process.join()
                kills -= 1
            assert killed or process.exitcode == 0, (folder / "output.log").read_text()[-3000:]
            ended = is_finished(folder)  # perhaps just before the kill
            if len(read_steps(folder)) > noted:
                assert before + 1 - int(read_steps(folder)[noted].split()[0]) <= INTERVAL
            if ended:
                break
        if not ended:
            finish(folder)
        assert outcome(folder) == whole(data)


@pytest.mark.parametrize("seed", slow_from(0, range(34)))
@pytest.mark.parametrize("point", POINTS)
def test_killed_inside_saving(tmp_path, whole, point, seed):
    """34 at each of 6 points, 204 in all."""
    kill_inside_saving(tmp_path, whole, point, random.Random(f"{point} {seed}").randint(0, 6), DATA[seed % 2])


def test_killed_inside_saving_in_short(tmp_path, whole):
    kill_inside_saving(tmp_path, whole, "mid-write", 3, "mnist_png")


@pytest.mark.parametrize("number", slow_from(1, [3, 0, 1, 2, 4, 5]))
def test_killed_while_finishing(tmp_path, whole, number):
    """Before and after each of the three files that the end writes."""
    kill_inside_saving(tmp_path, whole, "finishing", number, "mnist_png")


@pytest.mark.parametrize("number", slow_from(1, [1, 2, 3]))
def test_killed_between_the_files_of_the_first_epoch(tmp_path, number):
    """After the first, second and third of best, periodic and last; the beginning was saved before."""
    settings = {"freeze_train": False, "unfreeze_epoch": 1, "save_every_steps": 0}
    folder = prepare(tmp_path / "run", "mnist_png")
    process = start(folder, settings, fault="after rename", number=number)
    process.join(120)
    assert process.exitcode == -9
    finish(folder, settings)
    best = load_checkpoint(run_folder(folder) / BEST)
    assert best["epoch"] == 1 and best["calibration"]


def is_finished(folder: Path) -> bool:
    """Whether the run in it is at its end: the next start would begin a new one."""
    notes = map(read_progress, folder.glob(f"logs/*/{LAST}"))
    return any(progress and progress.finished for progress in notes)


def kill_inside_saving(tmp_path: Path, whole, point: str, number: int, data: str) -> None:
    folder = prepare(tmp_path / "run", data)
    process = start(folder, fault=point, number=number if point != "in retention" else number % 2)
    process.join(120)
    assert process.exitcode == -9
    if list(run_folder(folder).glob("*.pth")):
        assert load_newest(run_folder(folder))
    if not is_finished(folder):
        finish(folder)
    assert outcome(folder) == whole(data)
    assert not list(run_folder(folder).glob("*.partial"))


def test_the_harness_sees_what_a_plain_save_loses(tmp_path):
    """A checkpoint that is written in place is unreadable after a kill: else the tests above would prove nothing."""
    folder = prepare(tmp_path / "run", "mnist_png")
    process = start(folder, fault="plain mid-write", number=3)
    process.join(120)
    assert process.exitcode == -9
    assert any(not readable(path) for path in run_folder(folder).glob("*.pth"))


def readable(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:  # torch raises several types for a broken file
        return False
    return True


@pytest.mark.slow
def test_a_run_goes_on_in_the_middle_of_an_epoch_without_reading_what_was_done(tmp_path):
    folder = prepare(tmp_path / "run", "mnist_png")
    settings = {"freeze_train": False, "unfreeze_epoch": 1, "save_every_steps": 1}
    process = start(folder, settings, fault="after rename", number=3)  # the beginning, and three steps
    process.join(120)
    assert last_step(folder) == 2
    noted = len(read_steps(folder))
    finish(folder, settings)
    assert [int(line.split()[0]) for line in read_steps(folder)[noted:]] == [3]
    images = [name for given in steps_of(folder).values() for name in given.split()[0].split(",")]
    assert len(images) == len(set(images)) == 32
    assert "after epoch 0 and 3 steps" in (folder / "output.log").read_text()


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
    assert f"is being written by process {first.pid} on " in (folder / "output.log").read_text()
    first.join(60)
    assert first.exitcode == 0
    assert load_checkpoint(run_folder(folder) / LAST)["finished"]
