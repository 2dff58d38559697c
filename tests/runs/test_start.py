"""Epoch 0: a run is never worse than it began."""

import csv
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ttest_rel

import train
from tests.conftest import TINY, settings, train_one_epoch
from tests.faults.harness import digest
from utils.metrics.paired import CERTAIN, LEVEL, ONE_ERROR, is_higher, is_worse
from utils.runs.checkpoint import BEST, LAST, load_checkpoint
from utils.runs.run import Run

PROBE = TINY | {"head_init": "probe", "freeze_train": False, "unfreeze_epoch": 2, "recipe": "none"}


def only_run(here):
    (run,) = (here / "logs").iterdir()
    return run


def harm(monkeypatch):
    """Make every training step set the head to zero, so that all classes are equally likely."""
    from utils.training.trainer import Trainer

    step = Trainer.train_step

    def harmful_step(self, *args, **named):
        result = step(self, *args, **named)
        with torch.no_grad():
            for parameter in self.network.model.head.parameters():
                parameter.zero_()
        return result

    monkeypatch.setattr(Trainer, "train_step", harmful_step)


def test_the_start_is_the_result_if_no_epoch_is_better(two_classes, here, monkeypatch, capsys):
    harm(monkeypatch)
    saved = []
    record = Run.record_start

    def record_start(self, validation):
        record(self, validation)
        saved.append(digest(self.model.state_dict()))

    monkeypatch.setattr(Run, "record_start", record_start)
    train.main(settings(**PROBE))
    output = capsys.readouterr().out
    assert "epoch 0/2: before training; validation loss" in output
    assert "no epoch is better than the state before training, which is the result" in output
    assert "best so far" not in output
    best, last = (load_checkpoint(only_run(here) / name) for name in (BEST, LAST))
    assert (best["epoch"], best["step"], last["epoch"]) == (0, 0, 2)
    assert saved == [digest(best["weights"])]
    assert best["calibration"] and best["finished"]
    assert best["best_val_loss"] == last["best_val_loss"] == last["history"][0]["val_loss"]


def test_epoch_0_is_logged(two_classes, here):
    train.main(settings(**PROBE))
    with (only_run(here) / "epochs.csv").open(newline="") as file:
        first, second, _ = csv.DictReader(file)
    assert (first["epoch"], first["step"], second["epoch"]) == ("0", "0", "1")
    assert math.isnan(float(first["loss"]))
    assert 0 <= float(first["val_top1"]) <= 1
    assert first["val_worse"] == "0.0"


@pytest.mark.parametrize("after", ["start", "epoch"])
def test_an_interrupted_run_still_knows_its_start(two_classes, here, monkeypatch, after):
    train.main(settings(**PROBE))
    wanted = load_checkpoint(only_run(here) / LAST)
    name = {"start": "record_start", "epoch": "finish_epoch"}[after]
    original = getattr(Run, name)

    def interrupt(self, metrics):
        if after == "epoch":
            original(self, metrics)
        raise KeyboardInterrupt

    again = settings(**PROBE | {"save_dir": "again"})
    with monkeypatch.context() as patch:
        patch.setattr(Run, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.main(again)
    train.main(again)
    (run,) = (here / "again").iterdir()
    resumed = load_checkpoint(run / LAST)
    assert [row["epoch"] for row in resumed["history"]] == [0, 1, 2]
    assert digest([resumed["start"], resumed["weights"]]) == digest([wanted["start"], wanted["weights"]])


def test_a_run_with_changed_lists_is_not_compared_with_its_start(two_classes, here, monkeypatch):
    train_one_epoch(settings(**PROBE), monkeypatch)
    lines = (here / "cls_val.txt").read_text().splitlines(keepends=True)
    (here / "cls_val.txt").write_text("".join(lines[:-1]))
    train.main(settings(**PROBE | {"accept_changed_lists": True}))
    last = load_checkpoint(only_run(here) / LAST)
    assert (last["epoch"], last["start"]) == (2, {})


def test_the_last_epoch_takes_the_place_of_a_best_one_that_is_gone(two_classes, here, monkeypatch, capsys):
    harm(monkeypatch)  # so epoch 0 stays the best
    train_one_epoch(settings(**PROBE), monkeypatch)
    (only_run(here) / BEST).unlink()
    train.main(settings(**PROBE))
    assert f"{BEST} is gone; {LAST} takes its place" in capsys.readouterr().out
    assert (best := load_checkpoint(only_run(here) / BEST))["finished"] and best["epoch"] == 2


def test_checkpoints_without_a_start_are_read(two_classes, here):
    from nets.weights import tree

    train.main(settings(**PROBE))
    content = load_checkpoint(only_run(here) / LAST)
    content = {name: value for name, value in content.items() if name != "start"} | {"format_version": 5}
    with (here / "earlier.safetensors").open("x+b") as file:
        tree.write_tree(file, content, {})
    assert load_checkpoint(here / "earlier.safetensors")["start"] == {}


def test_worse_is_what_the_tests_of_scipy_say():
    generator = np.random.default_rng(0)
    found = set()
    for shift in np.linspace(0, 0.3, 40):
        base_losses = generator.exponential(size=200)
        losses = base_losses + generator.normal(shift / 6, 0.5, size=200)
        base_correct = generator.random(200) < 0.8
        correct = base_correct ^ (generator.random(200) < shift)
        lost, gained = (base_correct & ~correct).sum(), (correct & ~base_correct).sum()
        by_accuracy = lost + gained > 0 and binomtest(lost, lost + gained, alternative="greater").pvalue < LEVEL
        by_loss = ttest_rel(np.maximum(losses, CERTAIN), np.maximum(base_losses, CERTAIN), alternative="greater").pvalue
        by_loss = by_loss < LEVEL
        assert is_worse(losses, correct, base_losses, base_correct) == bool(by_accuracy or by_loss)
        found.add((bool(by_accuracy), bool(by_loss)))
    assert len(found) == 4


def test_few_images_decide_less_than_many():
    """The level of one standard error, against scipy; four images, one of which got worse, decide nothing."""
    generator = np.random.default_rng(2)
    for count in (3, 10, 1000):
        base, other = CERTAIN + generator.exponential(size=(2, count))
        expected = ttest_rel(other, base, alternative="greater").pvalue < ONE_ERROR
        assert is_higher(other, base, ONE_ERROR) == expected
    base, worse = np.array([0.01, 0.02, 0.01, 0.03]), np.array([0.01, 0.02, 0.01, 0.93])
    assert not is_higher(worse, base, ONE_ERROR)
    assert is_higher(np.tile(worse, 10), np.tile(base, 10), ONE_ERROR)
    shift = 1.05 / 100  # standard errors of ten thousand differences of deviation 1
    many = generator.normal(size=10_000)
    many, base = 10 + (many - many.mean()) / many.std(ddof=1), np.full(10_000, 10.0)
    assert is_higher(many + shift, base, ONE_ERROR)
    assert not is_higher(many + shift - 0.1 / 100, base, ONE_ERROR)


def test_losses_of_images_that_are_certain_are_equal():
    base = np.array([0.001, 0.002, 0.001, 0.9])
    assert not is_higher(base + np.array([0.01, 0.02, 0.03, 0]), base, ONE_ERROR)
    assert is_higher(base + np.array([0.31, 0.32, 0.33, 0.3]), base, ONE_ERROR)


def test_the_lowest_validation_so_far_is_what_later_ones_are_compared_with(two_classes, here):
    train.main(settings(**PROBE | {"unfreeze_epoch": 3, "init_lr": 1e-2}))
    last = load_checkpoint(only_run(here) / LAST)
    fair = [row["val_calibrated_loss"] for row in last["history"] if not row["val_worse"]]
    assert last["lowest"]["losses"].mean().item() == pytest.approx(min(fair), rel=1e-5)
    assert last["history"][0]["val_beaten"] == 0


def test_equal_validations_are_rarely_worse():
    """Of the same distribution, one in twenty at most, though there are two tests."""
    generator = np.random.default_rng(1)
    draws = generator.exponential(size=(2, 1000, 100)), generator.random((2, 1000, 100)) < 0.8
    flags = [is_worse(draws[0][0, i], draws[1][0, i], draws[0][1, i], draws[1][1, i]) for i in range(1000)]
    assert 0.01 < np.mean(flags) < 0.065
    same = np.ones(5), np.ones(5, bool)
    assert not is_worse(*same, *same)


def test_settings_of_a_run_whose_start_is_selected(two_classes, here, monkeypatch, command):
    """eval.py's report and table take epoch 0."""
    harm(monkeypatch)
    train.main(settings(**PROBE))
    result = command("eval.py", str(only_run(here)))
    assert result.returncode == 0, result.stderr
    page = (only_run(here) / "report.html").read_text(encoding="utf-8")
    assert "best epoch: 0" in page
    top1 = load_checkpoint(only_run(here) / LAST)["history"][0]["val_top1"]
    listed = command("eval.py", "--list")
    assert f"{top1:.1%}" in listed.stdout
