"""utils/runs/resume.py and utils/system/folder_lock.py: which run a start goes on with, and who may write to it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from tests.conftest import SMALL, settings, write_back, write_image
from utils.annotation.annotate import annotate
from utils.data.image_list import compare_lists, list_in_memory, read_list, write_list
from utils.runs.checkpoint import BEST, LAST, load_checkpoint, load_newest
from utils.runs.folder import remove_leftovers
from utils.runs.resume import changed_fields, open_run
from utils.system import folder_lock
from utils.system.folder_lock import FolderLock, InUse


def runs() -> list[Path]:
    return sorted(Path("logs").iterdir())


@pytest.fixture
def cut_off(trained, tmp_path, monkeypatch) -> Path:
    """A run that was cut off after the second of four epochs, with its images, in the working folder."""
    for name in ("datasets", "logs", "model_data"):
        shutil.copytree(trained / name, tmp_path / name)
    for path in trained.glob("cls_*.txt"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    (run,) = runs()
    write_back(run, epoch=2)
    return Path(run)


@pytest.fixture
def untrained(monkeypatch) -> None:
    """What a start does before its first step is all that it does."""

    def let_go(run, *_):
        run.log.close()
        run._opened.lock.release()

    monkeypatch.setattr(train, "train", let_go)
    monkeypatch.setattr(train, "print_next_commands", lambda *_: None)


def test_the_same_command_goes_on_with_an_unfinished_run(cut_off, capsys):
    train.main(settings(**SMALL))
    assert f"resuming {cut_off} after epoch 2" in capsys.readouterr().out
    assert runs() == [cut_off]
    assert load_checkpoint(cut_off / LAST)["finished"]


def test_a_field_that_is_new_since_had_its_default(cut_off, untrained):
    stored = json.loads((cut_off / "config.json").read_text())
    del stored["patience"]
    (cut_off / "config.json").write_text(json.dumps(stored))
    assert changed_fields(stored, settings(**SMALL)) == {}
    assert changed_fields(stored, settings(**SMALL, patience=3)) == {"patience": (0, 3)}
    assert "patience" in changed_fields({}, settings(patience=3))
    train.main(settings(**SMALL))
    assert runs() == [cut_off]


def test_a_finished_run_is_not_gone_on_with(cut_off):
    for _ in range(2):
        train.main(settings(**SMALL | {"unfreeze_epoch": 1}))
    assert len(runs()) == 3


@pytest.mark.parametrize("changed", [{"seed": 5}, {"weight_decay": 0.1}, {"resume": "no"}, {"model_path": "w.pth"}])
def test_other_settings_are_another_run(cut_off, untrained, changed, capsys):
    shutil.copy(cut_off / LAST, "w.pth")
    before = (cut_off / LAST).read_bytes()
    train.main(settings(**SMALL | changed))
    told = capsys.readouterr().out
    new = (set(runs()) - {cut_off}).pop()
    assert f"a new run, in {new}" in told
    (name,) = changed
    assert (f"{cut_off} isn't finished; it would go on with its own settings, {name}=" in told) == (name != "resume")
    assert (cut_off / LAST).read_bytes() == before


def test_what_may_change_is_said(cut_off, untrained, capsys):
    train.main(settings(**SMALL | {"save_every_steps": 3, "keep_periodic": 2}))
    told = capsys.readouterr().out
    assert "keep_periodic: 5 -> 2\nsave_every_steps: 0 -> 3\n" in told
    assert runs() == [cut_off]


def test_another_environment_is_reported(cut_off, untrained, capsys):
    torch.set_num_threads(2)
    try:
        train.main(settings(**SMALL))
    finally:
        torch.set_num_threads(1)
    assert "warning: threads was 1 and is 2; the result won't be bit for bit" in capsys.readouterr().out


def test_other_code_is_said(cut_off, untrained, monkeypatch, capsys):
    monkeypatch.setattr("utils.runs.start.code_digest", lambda modules: "edited")
    train.main(settings(**SMALL))
    assert " and is edited; the result won't be bit for bit" in capsys.readouterr().out


def lists_here() -> dict:
    return {key: read_list(f"cls_{key}.txt", 2) for key in ("train", "val")}


def change_images() -> None:
    """One image more, one less, one moved, one relabelled."""
    images = read_list("cls_train.txt", 2)
    entries = [(int(images.class_ids[i]), images.name(i)) for i in range(len(images))]
    light, dark = [e for e in entries if e[0] == 1], [e for e in entries if e[0] == 0]
    write_image(Path("datasets/train/dark/new.png"), 60)
    moved = Path("elsewhere") / Path(dark[1][1]).name
    moved.parent.mkdir()
    shutil.copy(dark[1][1], moved)
    changed = [(0, "datasets/train/dark/new.png"), (0, str(moved)), (0, light[0][1]), *dark[2:], *light[1:]]
    write_list("cls_train.txt", changed)


def test_accepted_lists_are_known_from_then_on(cut_off, monkeypatch):
    """Though the run is cut off again before its next step."""
    change_images()
    with monkeypatch.context() as patched:
        patched.setattr(train, "train", lambda run, *_: run.close())
        train.main(settings(**SMALL, accept_changed_lists=True))
    assert (cut_off / "train_list.txt").read_bytes() == Path("cls_train.txt").read_bytes()
    train.main(settings(**SMALL))
    assert load_checkpoint(cut_off / LAST)["finished"]


def test_a_new_run_that_comes_to_nothing_leaves_nothing(two_classes, monkeypatch, capsys):
    monkeypatch.setattr(train, "start", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(settings(**SMALL))
    assert runs() == []
    assert "is removed: the run came to nothing" in capsys.readouterr().out


def test_another_runs_checkpoint_beside_its_own_is_left_alone(trained, cut_off):
    (source,) = (trained / "logs").iterdir()
    shutil.copy(source / LAST, cut_off / "from_another.pth")  # which is farther
    path, content = load_newest(cut_off)
    assert (path.name, content["epoch"]) == (LAST, 2)


def test_checkpoints_of_single_epochs_that_are_too_many_make_way_before_it_goes_on(trained, cut_off, capsys):
    """On a disk that was full there is room for no other file."""
    for epoch in (1, 2, 3):
        shutil.copy(cut_off / LAST, cut_off / f"ep{epoch:03d}-loss0-val_loss0.pth")
    shutil.copy(next((trained / "logs").glob("*/ep004-*")), cut_off)
    assert load_newest(cut_off)[1]["epoch"] == 4
    change_images()
    with pytest.raises(ValueError, match="was begun with other lists"):
        open_run(settings(**SMALL, keep_periodic=2), ["dark", "light"], lists_here())
    assert len(list(cut_off.glob("ep*.pth"))) == 4
    annotate()
    run = open_run(settings(**SMALL, keep_periodic=2), ["dark", "light"], {})
    run.lock.release()
    assert sorted(path.name[:5] for path in cut_off.glob("ep*.pth")) == ["ep003", "ep004"]
    assert run.checkpoint["epoch"] == load_checkpoint(cut_off / LAST)["epoch"] == 4


@pytest.mark.parametrize("resume", ["auto", "folder"])
def test_changed_lists_are_named_and_refused_unless_accepted(cut_off, capsys, resume):
    change_images()
    config = SMALL | {"resume": str(cut_off) if resume == "folder" else "auto"}
    told = (
        r"cls_train\.txt: 1 added \(.*new\.png\), 1 removed \(.*\.png\), 1 moved \(.*\.png -> elsewhere/.*\.png\), "
        r"1 relabelled \(.*\.png, light -> dark\)"
    )
    with pytest.raises(ValueError, match=rf"was begun with other lists than there are now\. {told}.*resume=no"):
        train.main(settings(**config))
    assert load_checkpoint(cut_off / LAST)["epoch"] == 2
    train.main(settings(**config, accept_changed_lists=True))
    assert "warning: the lists have changed since the run began" in capsys.readouterr().out
    assert load_checkpoint(cut_off / LAST)["finished"]


def test_other_classes_are_another_run(cut_off, untrained):
    for name in ("dark", "light"):
        for split in ("train", "test"):
            Path("datasets", split, name).rename(Path("datasets", split, f"{name} ones"))
    os.remove("model_data/cls_classes.txt")
    annotate()
    train.main(settings(**SMALL))
    assert len(runs()) == 2


def test_lists_in_another_order_are_said_to_be():
    one, other = (list_in_memory([(0, "a.png"), (1, "b.png")][::step]) for step in (1, -1))
    assert compare_lists(one, other, ["x", "y"]) == "the same images in another order or notation"


def test_a_run_killed_before_its_first_checkpoint_begins_in_its_folder(cut_off):
    made_at_once = {"config.json", "train_list.txt", "val_list.txt", folder_lock.LOCK_FILE}
    for path in cut_off.iterdir():
        if path.name not in made_at_once and not path.name.startswith("events."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train.main(settings(**SMALL))
    assert runs() == [cut_off]
    assert load_checkpoint(cut_off / LAST)["finished"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_whose_checkpoints_were_put_away_is_left_alone(cut_off, untrained, monkeypatch, capsys, fails):
    """Its curves and its report are all that is left here; they are neither replaced nor removed."""
    for path in cut_off.glob("*.pth"):
        path.unlink()
    (cut_off / "report.html").write_text("kept")

    def kept() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in cut_off.glob("*.*") if path.name != folder_lock.LOCK_FILE}

    before = kept()
    if fails:
        monkeypatch.setattr("utils.modeling.build.build_model", lambda **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(settings(**SMALL))
        assert runs() == [cut_off]
    else:
        train.main(settings(**SMALL))
        assert len(runs()) == 2
    assert "has no whole checkpoint" in capsys.readouterr().out
    assert kept() == before


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="no such links here")
@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_lock_that_leads_elsewhere_harms_nothing(here, link):
    """A folder from elsewhere may hold anything under any name, and every start looks for strays in `logs/`."""
    Path("thesis.txt").write_text("years of work")
    Path("logs/gift").mkdir(parents=True)
    link(Path("logs/gift", folder_lock.LOCK_FILE), here / "thesis.txt")
    remove_leftovers(Path("logs"))
    with pytest.raises(OSError):
        FolderLock(Path("logs/gift"))
    assert Path("thesis.txt").read_text() == "years of work"


def test_a_file_of_ones_own_is_no_lock(here):
    Path(folder_lock.LOCK_FILE).write_text("my notes")
    with pytest.raises(OSError, match="a file of your own"):
        FolderLock(here)
    assert Path(folder_lock.LOCK_FILE).read_text() == "my notes"


def test_a_start_that_fails_gives_the_folder_back(cut_off, monkeypatch):
    """To another process: within one, such locks don't keep each other out."""
    monkeypatch.setattr("utils.modeling.build.build_model", lambda **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(settings(**SMALL))
    program = (
        f"from pathlib import Path; from utils.system.folder_lock import FolderLock; FolderLock(Path({str(cut_off)!r}))"
    )
    root = Path(train.__file__).parent
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(root)}, check=True)
    assert (cut_off / LAST).is_file()


def test_what_killed_runs_left_is_removed(cut_off, untrained, capsys):
    (cut_off / f"{LAST}.0badcafe.partial").write_text("half")
    Path("logs/not begun").mkdir()
    Path("logs/not begun/in_use_by.txt").touch()
    train.main(settings(**SMALL))
    assert f"{LAST}.0badcafe.partial, left half-written" in capsys.readouterr().out
    assert runs() == [cut_off]
    assert not list(cut_off.glob("*.partial"))


def test_the_damage_of_all_checkpoints_begins_a_new_run(cut_off, untrained, capsys):
    (cut_off / LAST).write_bytes(b"")
    train.main(settings(**SMALL))
    assert f"{cut_off / LAST} can't be opened" in capsys.readouterr().out
    assert len(runs()) == 2


def test_resuming_what_is_no_run(here):
    Path("logs/run").mkdir(parents=True)
    for resume in ("logs/run", "logs/none"):
        with pytest.raises(FileNotFoundError, match="there is no run; give its folder, auto or no"):
            open_run(settings(resume=resume), ["a", "b"], {})


def test_only_the_newest_periodic_checkpoints_are_kept(two_classes):
    train.main(settings(**SMALL | {"save_period": 1, "keep_periodic": 2}))
    (run,) = runs()
    assert sorted(path.name[:5] for path in run.glob("ep*.pth")) == ["ep003", "ep004"]


def test_a_lock_dies_with_its_process_but_not_before(here):
    program = (
        "import time; from pathlib import Path; from utils.system.folder_lock import FolderLock; "
        "FolderLock(Path('.')); "
        "print('ok', flush=True); time.sleep(60)"
    )
    root = Path(train.__file__).parent
    holder = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "ok\n"
    with pytest.raises(InUse, match=rf"is being written by process {holder.pid} on "):
        FolderLock(here)
    holder.kill()
    holder.wait()
    FolderLock(here).release()


@pytest.mark.parametrize("rounds", [1, 2])
def test_killed_before_the_last_of_all_saves(trained, cut_off, rounds):
    """The max_distance checkpoint becomes the last: the run is at its end, and the next start begins another."""
    (source,) = (trained / "logs").iterdir()
    for farther in (*source.glob("ep004-*"), source / BEST):
        shutil.copy(farther, cut_off)
    for _ in range(rounds):
        train.main(settings(**SMALL))
    last = load_checkpoint(cut_off / LAST)
    assert last["finished"] and last["step"] == 22
    assert len(runs()) == rounds
