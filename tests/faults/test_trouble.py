"""Signals, dying workers, non-finite losses, wrong clocks."""

import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from tests.conftest import TINY, settings
from tests.faults.harness import (
    BEST,
    LAST,
    SETTINGS,
    finish,
    last_step,
    outcome,
    prepare,
    read_steps,
    run_folder,
    start,
)
from utils.modeling.pixel_network import PixelNetwork
from utils.runs.checkpoint import load_checkpoint, load_newest
from utils.system.signals import Stopped
from utils.training import non_finite
from utils.training.non_finite import NonFiniteLoss
from utils.training.stages import Stage
from utils.training.trainer import Trainer

ROOT = Path(train.__file__).parent
LONG = {"freeze_train": False, "unfreeze_epoch": 20, "num_workers": 2, "save_every_steps": 0, "ema_decay": 0.0}
"""A run long enough to be interrupted, saved only after epochs."""


def descendants(pid: int) -> list[int]:
    """The living direct and indirect child processes of `pid`."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents.setdefault(int(fields[1]), []).append(int(status.parent.name))
    pids = list(parents.get(pid, []))
    for child in list(pids):
        pids += [other for other in parents.get(child, []) if other not in pids]
    return pids


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command(settings: dict) -> list[str]:
    """`python train.py` with a flag for each setting."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return [sys.executable, str(ROOT / "train.py"), *flags]


FIRST_EPOCH = "epoch 1/"


def start_script(folder: Path) -> subprocess.Popen:
    """`python train.py` in a new session, after its first epoch."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (folder / "output.log").open("a") as log:
        process = subprocess.Popen(
            command(SETTINGS | LONG), cwd=folder, stdout=log, stderr=log, env=env, start_new_session=True
        )
    wait_for(folder, FIRST_EPOCH, process)
    return process


def wait_for(folder: Path, text: str, process) -> None:
    """Wait until `text` is in the output."""
    started = time.monotonic()
    log = folder / "output.log"
    while not log.is_file() or text not in log.read_text():
        assert time.monotonic() - started < 60, log.read_text()
        assert getattr(process, "exitcode", None) is None
        time.sleep(0.02)


SIGNAL_CASES = list(itertools.product((signal.SIGINT, signal.SIGTERM), (False, True), (False, True)))


@pytest.mark.parametrize(
    ("number", "to_group", "again", "rounds"),
    [
        (signal.SIGINT, True, False, 1),
        (signal.SIGTERM, False, True, 1),
        *(pytest.param(*case, 10, marks=pytest.mark.slow) for case in SIGNAL_CASES),
    ],
)
def test_a_signal_ends_the_run_after_its_step(tmp_path, number, to_group, again, rounds):
    """10 rounds each: to the process or to its group, as Ctrl-C in a terminal; with or without a second signal."""
    folder = prepare(tmp_path / "run", "mnist_png")
    for round_number in range(rounds):
        (folder / "output.log").write_text("")
        if round_number:
            shutil.rmtree(folder / "logs")
        process = start_script(folder)
        children = descendants(process.pid)
        assert len(children) >= 2
        time.sleep(0.07 * round_number)
        for _ in range(2 if again else 1):
            (os.killpg if to_group else os.kill)(process.pid, number)
            time.sleep(0.01 * round_number)
        assert process.wait(30) == 128 + number
        output = (folder / "output.log").read_text()
        assert "Traceback" not in output
        assert not [pid for pid in children if is_alive(pid)]
        _, content = load_newest(run_folder(folder))
        if not again:
            assert f"is saved at step {content['step']}; the same command resumes it" in output


@pytest.mark.slow
def test_a_run_stopped_by_signals_equals_an_uninterrupted_one(tmp_path):
    settings = LONG | {"unfreeze_epoch": 4, "num_workers": 1}
    whole, stopped = (prepare(tmp_path / name, "mnist_png") for name in ("whole", "stopped"))
    finish(whole, settings)
    for step in (2, 9):
        process = start(stopped, settings)
        while last_step(stopped) < step:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        process.join(30)
        assert process.exitcode == 143
    finish(stopped, settings)
    assert [int(line.split()[0]) for line in read_steps(stopped)] == list(range(16))  # no step is repeated
    assert outcome(stopped) == outcome(whole)


@pytest.mark.parametrize("round_number", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 20))])
def test_a_killed_worker_is_reported_within_10_seconds(tmp_path, round_number):
    folder = prepare(tmp_path / "run", "mnist_png")
    process = start(folder, LONG)
    wait_for(folder, FIRST_EPOCH, process)
    time.sleep(0.05 * round_number)
    workers = descendants(process.pid)
    victim = workers[round_number % 2]
    killed_at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    process.join(10)
    assert time.monotonic() - killed_at < 10
    assert process.exitcode == 1
    output = (folder / "output.log").read_text()
    assert f"DataLoader worker (pid {victim}) is killed by signal: Killed" in output or f"(pid(s) {victim})" in output
    assert "usually killed for lack of memory: lower num_workers" in output
    assert "WorkerDied" in output and "the same command resumes it" in output
    assert not [pid for pid in workers if is_alive(pid)]
    assert load_newest(run_folder(folder))[1]["step"] == last_step(folder) + 1


def all_finite(folder: Path) -> bool:
    return all(
        tensor.isfinite().all()
        for name in (BEST, LAST)
        if (folder / name).is_file()
        for key in ("weights", "weights_in_training")
        for tensor in load_checkpoint(folder / name)[key].values()
    )


def only_run() -> Path:
    (run,) = Path("logs").iterdir()
    return run


@pytest.fixture
def nan_at_step(monkeypatch):
    """Make the loss of these steps a NaN."""

    def plant(*steps: int) -> None:
        accumulate = Trainer._accumulate_gradients

        def poisoned(self, *arguments):
            loss, hits = accumulate(self, *arguments)
            return (loss * math.nan if self.step in steps else loss), hits

        monkeypatch.setattr(Trainer, "_accumulate_gradients", poisoned)

    return plant


@pytest.fixture
def nan_in_an_image(monkeypatch):
    """Make the logits of a batch with a very light image NaN."""

    def poisoned(*args):
        network = PixelNetwork(*args)

        def forward(module, inputs, logits):
            light = inputs[0].float().mean((1, 2, 3)).max() > 203 if inputs[0].dtype == torch.uint8 else False
            return logits * math.nan if light and module.training else logits

        network.register_forward_hook(forward)
        return network

    monkeypatch.setattr("utils.training.trainer.PixelNetwork", poisoned)


NAN = TINY | {"ema_decay": 0.9, "cache_features": False}


def test_a_nan_at_a_step_stops_the_run(two_classes, nan_at_step):
    nan_at_step(12)
    with pytest.raises(NonFiniteLoss, match=r"at step 13 \(learning rate about .*; images: .*\.png.*on_nan=skip"):
        train.main(settings(**NAN))
    assert all_finite(only_run())


def test_steps_with_a_nan_are_skipped_and_counted(two_classes, nan_at_step, capsys):
    nan_at_step(12, 14)
    train.main(settings(**NAN, on_nan="skip"))
    output = capsys.readouterr().out
    assert "isn't finite at step 13 " in output and "isn't finite at step 15 " in output
    assert "; 2 steps skipped" in output
    history = load_checkpoint(only_run() / LAST)["history"]
    assert [row["skipped"] for row in history] == [0, 0, 0, 2, 0]
    assert all(math.isfinite(value) for row in history[1:] for value in row.values())
    assert all_finite(only_run())


def test_an_image_that_causes_a_nan_is_reported(two_classes, nan_in_an_image, capsys):
    light = Path(two_classes / "train" / "light" / "03.png")
    from PIL import Image

    Image.new("RGB", (20, 16), (255, 255, 255)).save(light)
    train.main(settings(**NAN | {"augmentation": "none"}, on_nan="skip"))
    output = [line for line in capsys.readouterr().out.splitlines() if "isn't finite at step" in line]
    assert output and all("03.png" in line for line in output)
    assert all_finite(only_run())


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_learning_rate_of_a_million(two_classes, monkeypatch, on_nan):
    """Patched in, since the check of init_lr refuses it."""
    monkeypatch.setattr(Stage, "learning_rate", lambda self, epoch: 1e6 if epoch > 2.5 else 1e-4)
    monkeypatch.setattr(non_finite, "MAX_SKIPPED", 3)
    with pytest.raises(NonFiniteLoss, match=r"n't finite|the validation loss is"):
        train.main(settings(**NAN | {"optimizer_type": "sgd"}, on_nan=on_nan))
    assert all_finite(only_run())
    assert load_checkpoint(only_run() / BEST)["epoch"] <= 3


@pytest.mark.parametrize(
    ("bad_step", "stop", "then"),
    [
        (5, 7, {"save_every_steps": 1}),  # before the interruption; on_nan="stop" afterwards
        (9, 9, {"on_nan": "skip"}),  # the first step after resuming
    ],
)
def test_a_step_is_skipped_in_an_interrupted_epoch(two_classes, nan_at_step, monkeypatch, bad_step, stop, then):
    nan_at_step(bad_step)
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save_if_due", lambda run: stop_at(run, stop))
        with pytest.raises(Stopped):
            train.main(settings(**NAN, on_nan="skip"))
    train.main(settings(**NAN, **then))
    last = load_checkpoint(only_run() / LAST)
    assert last["finished"]
    assert [row["skipped"] for row in last["history"]] == [0, 0, 1, 0, 0]


def stop_at(run, step: int) -> None:
    if run.trainer.step == step:
        raise Stopped(signal.SIGINT)


def test_a_request_to_save_saves_after_the_step_and_training_continues(two_classes, monkeypatch, capsys):
    save_if_due = train.Run.save_if_due

    def request(run) -> None:
        if run.trainer.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        save_if_due(run)
        if run.trainer.step == 2:
            assert load_checkpoint(run.folder / LAST)["step"] == 2

    monkeypatch.setattr(train.Run, "save_if_due", request)
    train.main(settings(**TINY | {"unfreeze_epoch": 1}))
    assert f"SIGUSR1: {only_run()} is saved at step 2; training continues" in capsys.readouterr().out
    assert load_checkpoint(only_run() / LAST)["finished"]


@pytest.mark.slow
def test_a_run_that_stopped_at_a_nan_resumes_without_that_step(two_classes, nan_at_step):
    nan_at_step(12)
    with pytest.raises(NonFiniteLoss):
        train.main(settings(**NAN))
    train.main(settings(**NAN, on_nan="skip"))
    last = load_checkpoint(only_run() / LAST)
    assert last["finished"]
    assert sum(row["skipped"] for row in last["history"]) == 1


def test_runs_from_the_future_are_not_overwritten(two_classes):
    """After the clock was set back."""
    changes = TINY | {"unfreeze_epoch": 1}
    train.main(settings(**changes))
    first = only_run()
    ahead = first.rename(first.with_name("2099-01-01_00-00-00"))
    for path in ahead.iterdir():
        os.utime(path, (4e9, 4e9))
    before = {path: path.read_bytes() for path in ahead.iterdir()}
    train.main(settings(**changes))
    train.main(settings(**changes, seed=12))
    assert len(list(Path("logs").iterdir())) == 3
    assert {path: path.read_bytes() for path in ahead.iterdir()} == before
