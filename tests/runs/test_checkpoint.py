"""utils/runs/checkpoint.py: atomic writes, and no code is executed."""

import errno
import math
import os
import re
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nets.weights import tree
from utils.runs.checkpoint import (
    BEST,
    KEYS,
    LAST,
    OLD_VERSIONS,
    SaveError,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def checkpoint_content(**changes):
    plain = {name: kind() for name, kind in KEYS.items() if name != "format_version"}
    model = {"name": "vit_xs_4", "num_classes": 2, "input_shape": [8, 8]}
    return plain | {"model": model, "weights": {"w": torch.ones(3)}} | changes


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("canary",))


def test_round_trip(here):
    save_checkpoint("a.pth", checkpoint_content(step=7))
    loaded = load_checkpoint("a.pth")
    assert loaded["step"] == 7
    assert torch.equal(loaded["weights"]["w"], torch.ones(3))
    assert os.listdir() == ["a.pth"]


PLAIN = {
    "empty": {},
    "nested": [1, 2.5, None, True, "x", {"a": [{}]}],
    "tuple": (1, (2, "b")),
    "by number": {0: {"step": 1}, 7: {}},
    "infinite": float("inf"),
}
TENSORS = {
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "half": torch.randn(3).bfloat16(),
    "bools": torch.tensor([True, False]),
}


def test_trees_are_read_as_they_were_written(here):
    content = checkpoint_content(config=PLAIN, weights=TENSORS, optimizer={"state": {0: TENSORS}})
    save_checkpoint("a.safetensors", content)
    loaded = load_checkpoint("a.safetensors")
    assert loaded["config"] == PLAIN
    assert isinstance(loaded["config"]["tuple"][1], tuple)
    for found in (loaded["weights"], loaded["optimizer"]["state"][0]):
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    of_library = safetensors.torch.load_file("a.safetensors")
    assert torch.equal(of_library["weights/transposed"], TENSORS["transposed"])
    assert load_checkpoint("a.safetensors", training_state=False)["optimizer"]["state"][0]["half"] is None


def test_a_skipped_part_is_not_read(here):
    """Damage there is only found where it matters."""
    content = checkpoint_content(optimizer={"state": {0: {"m": torch.full((4,), 7.25)}}})
    save_checkpoint("a.safetensors", content)
    damaged = Path("a.safetensors").read_bytes().replace(torch.full((4,), 7.25).numpy().tobytes(), bytes(16))
    Path("a.safetensors").write_bytes(damaged)
    assert load_checkpoint("a.safetensors", training_state=False)["weights"]["w"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="damaged: the checksum of its optimizer doesn't match"):
        load_checkpoint("a.safetensors")


def test_checkpoints_of_the_version_before_are_read(here):
    content = checkpoint_content(step=7, format_version=OLD_VERSIONS[0])
    torch.save(content | {"arithmetic": content.pop("environment")}, "best_epoch_weights.pth")
    loaded = load_checkpoint(find_checkpoint("."))
    assert loaded["step"] == 7
    assert torch.equal(loaded["weights"]["w"], torch.ones(3))


def test_a_failed_save_leaves_the_old_file(here, monkeypatch):
    save_checkpoint("a.pth", checkpoint_content(step=1))

    def fail(*args):
        args[0].write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tree, "write_tree", fail)
    with pytest.raises(SaveError, match=r"a\.pth can't be written \(No space left on device\): it needs .* are free"):
        save_checkpoint("a.pth", checkpoint_content(step=2))
    assert os.listdir(here) == ["a.pth"]
    monkeypatch.undo()
    assert load_checkpoint(here / "a.pth")["step"] == 1


def test_code_in_a_checkpoint_is_not_run(here):
    torch.save(checkpoint_content(format_version=2, optimizer=Trap()), "trap.pth")
    with pytest.raises(ValueError, match=r"trap\.pth .* it holds code \((posix|nt)\.mkdir\), which"):
        load_checkpoint("trap.pth")
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda: Path("a.pth").write_bytes(b"PK\3\4 no more"), "can't be opened"),
        (lambda: Path("a.pth").write_bytes(b""), "can't be opened"),
        (lambda: torch.save({"w": torch.ones(1)}, "a.pth"), "isn't a checkpoint of Thaw"),
        (lambda: torch.save(checkpoint_content(format_version=99), "a.pth"), "format 99"),
        (lambda: safetensors.torch.save_file({"w": torch.ones(1)}, "a.pth"), "isn't a checkpoint of Thaw"),
        (
            lambda: torch.save({"format_version": OLD_VERSIONS[0], "weights": {}}, "a.pth"),
            "can't be used: it lacks best_val_loss, calibration",
        ),
    ],
)
def test_invalid_checkpoints_are_refused(here, write, message):
    write()
    with pytest.raises(ValueError, match=message):
        load_checkpoint("a.pth")


def test_a_missing_checkpoint(here):
    with pytest.raises(FileNotFoundError, match=r"no file a\.pth"):
        load_checkpoint("a.pth")
    with pytest.raises(FileNotFoundError, match=r"train first, python train\.py"):
        find_checkpoint("")


def test_find_checkpoint(here):
    for run in ("old", "new", "unfinished"):
        Path("logs", run).mkdir(parents=True)
    for run in ("old", "new"):
        for name in (BEST, LAST):
            Path("logs", run, name).touch()
    os.utime("logs/old/best_epoch_weights.safetensors", (time.time() - 100,) * 2)
    Path("logs", BEST).touch()  # of another program
    assert find_checkpoint("") == Path("logs/new", BEST)
    assert find_checkpoint("logs/old") == Path("logs/old", BEST)
    assert find_checkpoint("logs/old", LAST) == Path("logs/old", LAST)
    assert find_checkpoint("logs/old/last_epoch_weights.safetensors") == Path("logs/old", LAST)
    assert find_checkpoint("logs") == Path("logs", BEST)
    Path("logs").rename("elsewhere")
    Path("elsewhere", BEST).unlink()
    assert find_checkpoint("elsewhere") == Path("elsewhere/new", BEST)
    with pytest.raises(FileNotFoundError, match=f"there is no {BEST} in elsewhere/unfinished/ or its subfolders"):
        find_checkpoint("elsewhere/unfinished")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint elsewhere/gone"):
        find_checkpoint("elsewhere/gone")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": [{"epoch": "x"}]}, "of another type than in a checkpoint: history"),
        ({"history": [{"epoch": 1}]}, "a row of history lacks"),
        ({"weights": {"w": None}}, "of another type than in a checkpoint: weights"),
        ({"class_names": "ab"}, "of another type than in a checkpoint: class_names"),
        ({"step": -1}, "step=-1: must be 0 or more"),
        ({"scaler": {"scale": 2.0}}, "scaler must have _growth_tracker, backoff_factor, "),
        ({"epoch": True}, "of another type than in a checkpoint: epoch"),
        ({"config": {"precision": "fp8"}}, "precision='fp8': must be one of auto, fp32"),
        ({"config": {"drop_rate": float("nan")}}, "drop_rate=nan: must be of type"),
        ({"config": {"stages": [{"epochs": 0}]}}, "stages="),
        ({"model": {"norm_eps": "x"}}, "norm_eps='x': must be a number between 0 and 1"),
        ({"model": {}}, "the network's name, num_classes, input_shape is missing"),
        ({"model": {"wide": 1}}, "a network has no argument 'wide'"),
    ],
)
def test_wrong_values_are_refused_by_name(here, changes, message):
    save_checkpoint("a.safetensors", checkpoint_content(**changes))
    with pytest.raises(ValueError, match=re.escape(f"a.safetensors can't be used: {message}")):
        load_checkpoint("a.safetensors")


def test_fields_of_other_versions_are_no_error(here):
    save_checkpoint("a.safetensors", checkpoint_content(config={"of a later version": None, "best_val_loss": math.inf}))
    load_checkpoint("a.safetensors")
