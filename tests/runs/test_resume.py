"""utils/runs/resume.py and utils/system/folder_lock.py: which run is resumed, and the lock on its folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from nets.weights import tree
from tests.conftest import SMALL, TINY, settings, write_back, write_image
from utils.annotation.annotate import annotate
from utils.data.image_list import compare_lists, list_in_memory, read_list, write_list
from utils.runs.checkpoint import BEST, LAST, load_checkpoint, load_newest, save_checkpoint
from utils.runs.folder import remove_leftovers
from utils.runs.resume import changed_fields, open_run
from utils.system import folder_lock
from utils.system.folder_lock import FolderLock, InUse


def runs() -> list[Path]:
    return sorted(Path("logs").iterdir())


@pytest.fixture
def interrupted(trained, tmp_path, monkeypatch) -> Path:
    """A run that was interrupted after the second of four epochs, with its images, in the working folder."""
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
    """`train.main` returns before the first step."""

    def close(run, *_):
        run.log.close()
        run._opened.lock.release()

    monkeypatch.setattr(train, "train", close)
    monkeypatch.setattr(train, "print_next_commands", lambda *_: None)


def test_the_same_command_resumes_an_unfinished_run(interrupted, capsys):
    train.main(settings(**SMALL))
    assert f"run       {interrupted} (resumed after epoch 2)\n" in capsys.readouterr().out
    assert runs() == [interrupted]
    assert load_checkpoint(interrupted / LAST)["finished"]


def test_fields_added_since_the_run_had_their_defaults(interrupted, untrained):
    stored = json.loads((interrupted / "config.json").read_text())
    del stored["patience"]
    (interrupted / "config.json").write_text(json.dumps(stored))
    assert changed_fields(stored, settings(**SMALL)) == {}
    assert changed_fields(stored, settings(**SMALL, patience=3)) == {"patience": (0, 3)}
    assert "patience" in changed_fields({}, settings(patience=3))
    train.main(settings(**SMALL))
    assert runs() == [interrupted]


def test_a_finished_run_is_not_resumed(interrupted):
    for _ in range(2):
        train.main(settings(**SMALL | {"unfreeze_epoch": 1}))
    assert len(runs()) == 3


@pytest.mark.parametrize("changed", [{"seed": 5}, {"weight_decay": 0.1}, {"resume": "no"}, {"model_path": "w.pth"}])
def test_other_settings_start_a_new_run(interrupted, untrained, changed, capsys):
    shutil.copy(interrupted / LAST, "w.pth")
    before = (interrupted / LAST).read_bytes()
    train.main(settings(**SMALL | changed))
    output = capsys.readouterr().out
    new = (set(runs()) - {interrupted}).pop()
    assert f"run       {new} (new)\n" in output
    message = f"{interrupted} isn't resumed: its settings differ; to resume it, set {next(iter(changed))}="
    assert (message in output) == ("resume" not in changed)
    assert (interrupted / LAST).read_bytes() == before


def test_changes_of_resumable_fields_are_reported(interrupted, untrained, capsys):
    train.main(settings(**SMALL | {"save_every_steps": 3, "keep_periodic": 2}))
    output = capsys.readouterr().out
    assert "keep_periodic: 5 -> 2\nsave_every_steps: 0 -> 3\n" in output
    assert runs() == [interrupted]


def test_another_environment_is_reported(interrupted, untrained, capsys):
    torch.set_num_threads(2)
    try:
        train.main(settings(**SMALL))
    finally:
        torch.set_num_threads(1)
    assert "warning: threads was 1 and is 2; the result won't be bit-identical" in capsys.readouterr().out


def test_edited_code_is_reported(interrupted, untrained, monkeypatch, capsys):
    monkeypatch.setattr("utils.runs.start.code_digest", lambda modules: "edited")
    train.main(settings(**SMALL))
    assert " and is edited; the result won't be bit-identical" in capsys.readouterr().out


def read_lists() -> dict:
    return {key: read_list(f"cls_{key}.txt", 2) for key in ("train", "val")}


def change_images() -> None:
    """Add, remove, move and relabel one image each."""
    images = read_list("cls_train.txt", 2)
    entries = [(int(images.class_ids[i]), images.name(i)) for i in range(len(images))]
    light, dark = [e for e in entries if e[0] == 1], [e for e in entries if e[0] == 0]
    write_image(Path("datasets/train/dark/new.png"), 60)
    moved = Path("elsewhere") / Path(dark[1][1]).name
    moved.parent.mkdir()
    shutil.copy(dark[1][1], moved)
    changed = [(0, "datasets/train/dark/new.png"), (0, str(moved)), (0, light[0][1]), *dark[2:], *light[1:]]
    write_list("cls_train.txt", changed)


def test_changed_lists_are_accepted_once(interrupted, monkeypatch):
    """Even if the run is interrupted again before its next step."""
    change_images()
    with monkeypatch.context() as patched:
        patched.setattr(train, "train", lambda run, *_: run.close())
        train.main(settings(**SMALL, accept_changed_lists=True))
    assert (interrupted / "train_list.txt").read_bytes() == Path("cls_train.txt").read_bytes()
    train.main(settings(**SMALL))
    assert load_checkpoint(interrupted / LAST)["finished"]


def test_a_run_that_fails_before_its_first_checkpoint_is_removed(two_classes, monkeypatch, capsys):
    monkeypatch.setattr(train, "start_run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(settings(**SMALL))
    assert runs() == []
    assert "the run ended before its first checkpoint" in capsys.readouterr().out


def test_checkpoints_with_other_names_are_ignored(trained, interrupted):
    (source,) = (trained / "logs").iterdir()
    shutil.copy(source / LAST, interrupted / "from_another.pth")  # of a later epoch
    path, content = load_newest(interrupted)
    assert (path.name, content["epoch"]) == (LAST, 2)


def test_surplus_periodic_checkpoints_are_deleted_before_resuming(trained, interrupted, capsys):
    """A full disk has no room for another file."""
    for epoch in (1, 2, 3):
        shutil.copy(interrupted / LAST, interrupted / f"ep{epoch:03d}-loss0-val_loss0.safetensors")
    shutil.copy(next((trained / "logs").glob("*/ep004-*")), interrupted)
    assert load_newest(interrupted)[1]["epoch"] == 4
    change_images()
    with pytest.raises(ValueError, match="the lists have changed"):
        open_run(settings(**SMALL, keep_periodic=2), ["dark", "light"], read_lists())
    assert len(list(interrupted.glob("ep*.safetensors"))) == 4
    annotate()
    run = open_run(settings(**SMALL, keep_periodic=2), ["dark", "light"], {})
    run.lock.release()
    assert sorted(path.name[:5] for path in interrupted.glob("ep*.safetensors")) == ["ep003", "ep004"]
    assert run.checkpoint["epoch"] == load_checkpoint(interrupted / LAST)["epoch"] == 4


@pytest.mark.parametrize("resume", ["auto", "folder"])
def test_changed_lists_are_refused_unless_accepted(interrupted, capsys, resume):
    change_images()
    config = SMALL | {"resume": str(interrupted) if resume == "folder" else "auto"}
    output = (
        r"cls_train\.txt: 1 added \(.*new\.png\), 1 removed \(.*\.png\), 1 moved \(.*\.png -> elsewhere/.*\.png\), "
        r"1 relabeled \(.*\.png, light -> dark\)"
    )
    with pytest.raises(
        ValueError, match=rf"^resume=.*the lists have changed since the run started: {output}.*resume=no"
    ):
        train.main(settings(**config))
    assert load_checkpoint(interrupted / LAST)["epoch"] == 2
    train.main(settings(**config, accept_changed_lists=True))
    assert "warning: the lists have changed since the run started" in capsys.readouterr().out
    assert load_checkpoint(interrupted / LAST)["finished"]


def test_other_classes_start_a_new_run(interrupted, untrained):
    for name in ("dark", "light"):
        for split in ("train", "test"):
            Path("datasets", split, name).rename(Path("datasets", split, f"{name} ones"))
    os.remove("model_data/cls_classes.txt")
    annotate()
    train.main(settings(**SMALL))
    assert len(runs()) == 2


def test_lists_in_another_order_are_reported():
    one, other = (list_in_memory([(0, "a.png"), (1, "b.png")][::step]) for step in (1, -1))
    assert compare_lists(one, other, ["x", "y"]) == "the same images, reordered or with paths written differently"


def test_a_run_killed_before_its_first_checkpoint_restarts_in_its_folder(interrupted):
    initial = {"config.json", "train_list.txt", "val_list.txt", folder_lock.LOCK_FILE}
    for path in interrupted.iterdir():
        if path.name not in initial and not path.name.startswith("events."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train.main(settings(**SMALL))
    assert runs() == [interrupted]
    assert load_checkpoint(interrupted / LAST)["finished"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_without_its_checkpoints_is_unchanged(interrupted, untrained, monkeypatch, capsys, fails):
    """Its curves and its report are neither replaced nor removed."""
    for path in interrupted.glob("*.safetensors"):
        path.unlink()
    (interrupted / "report.html").write_text("kept")

    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in interrupted.glob("*.*") if path.name != folder_lock.LOCK_FILE}

    before = contents()
    if fails:
        monkeypatch.setattr("utils.modeling.build.build_model", lambda **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(settings(**SMALL))
        assert runs() == [interrupted]
    else:
        train.main(settings(**SMALL))
        assert len(runs()) == 2
    assert "it has no intact checkpoint" in capsys.readouterr().out
    assert contents() == before


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="needs O_NOFOLLOW")
@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_lock_file_that_is_a_link_is_refused(here, link):
    """A downloaded folder may contain one, and every start cleans up `logs/`."""
    Path("thesis.txt").write_text("years of work")
    Path("logs/gift").mkdir(parents=True)
    link(Path("logs/gift", folder_lock.LOCK_FILE), here / "thesis.txt")
    remove_leftovers(Path("logs"))
    with pytest.raises(OSError):
        FolderLock(Path("logs/gift"))
    assert Path("thesis.txt").read_text() == "years of work"


def test_a_lock_file_of_the_users_own_is_refused(here):
    Path(folder_lock.LOCK_FILE).write_text("my notes")
    with pytest.raises(OSError, match="isn't a lock file of Thaw"):
        FolderLock(here)
    assert Path(folder_lock.LOCK_FILE).read_text() == "my notes"


def lock_in_other_process(folder: Path) -> subprocess.Popen:
    """A process that locks `folder`, prints "locked" and waits."""
    program = (
        "import sys, time; from pathlib import Path; from utils.system.folder_lock import FolderLock; "
        "FolderLock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)}
    command = [sys.executable, "-c", program, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_failed_start_releases_the_folder(interrupted, monkeypatch):
    """Tested from another process: POSIX locks don't exclude each other within one."""
    monkeypatch.setattr("utils.modeling.build.build_model", lambda **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(settings(**SMALL))
    other = lock_in_other_process(interrupted)
    assert other.stdout.readline() == "locked\n"
    other.kill()
    other.wait()
    assert (interrupted / LAST).is_file()


def test_leftovers_of_killed_runs_are_removed(interrupted, untrained, capsys):
    (interrupted / f"{LAST}.0badcafe.partial").write_text("half")
    Path("logs/not started").mkdir()
    Path("logs/not started/in_use_by.txt").touch()
    train.main(settings(**SMALL))
    assert f"{LAST}.0badcafe.partial: a killed run left it incomplete" in capsys.readouterr().out
    assert runs() == [interrupted]
    assert not list(interrupted.glob("*.partial"))


def test_a_new_run_starts_if_all_checkpoints_are_damaged(interrupted, untrained, capsys):
    (interrupted / LAST).write_bytes(b"")
    train.main(settings(**SMALL))
    assert f"{interrupted / LAST} can't be opened" in capsys.readouterr().out
    assert len(runs()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state[3].update(exp_avg="x"), "exp_avg of parameter 3 must be floats"),
        (lambda state: state[3].update(exp_avg=torch.zeros(())), "exp_avg of parameter 3 must be floats"),
        (lambda state: state[3].update(exp_avg=state[3]["exp_avg"] + 1j), "exp_avg of parameter 3 must be floats"),
        (lambda state: state[3].pop("exp_avg_sq"), "of parameter 3 it must have exp_avg, exp_avg_sq, step"),
        (lambda state: state.update({"x": {}}), "there is no parameter 'x'"),
    ],
)
def test_a_wrong_state_of_the_optimizer_is_refused(interrupted, monkeypatch, change, message):
    """The file's checksums are right."""
    monkeypatch.setitem(tree.DTYPES, torch.complex64, "C64")
    content = load_checkpoint(interrupted / LAST)
    change(content["optimizer"]["state"])
    save_checkpoint(interrupted / LAST, content)
    before = (interrupted / LAST).read_bytes()
    with pytest.raises(ValueError, match=f"{interrupted} can't be resumed: the state of its optimizer .*{message}"):
        train.main(settings(**SMALL))
    assert (interrupted / LAST).read_bytes() == before


def test_resume_requires_a_run(here):
    Path("logs/run").mkdir(parents=True)
    for resume in ("logs/run", "logs/none"):
        with pytest.raises(FileNotFoundError, match="no run found; give a run folder, auto or no"):
            open_run(settings(resume=resume), ["a", "b"], {})


def test_only_the_newest_periodic_checkpoints_are_kept(two_classes):
    train.main(settings(**SMALL | {"save_period": 1, "keep_periodic": 2}))
    (run,) = runs()
    assert sorted(path.name[:5] for path in run.glob("ep*.safetensors")) == ["ep003", "ep004"]


def test_a_lock_ends_with_its_process(here):
    holder = lock_in_other_process(here)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(InUse, match=rf"is in use by process {holder.pid} on "):
        FolderLock(here)
    holder.kill()
    holder.wait()
    FolderLock(here).release()


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_run_killed_before_its_final_save(trained, interrupted, rounds):
    """The newest checkpoint becomes the last: the run is finished, and the next start is of a new one."""
    (source,) = (trained / "logs").iterdir()
    for newer in (*source.glob("ep004-*"), source / BEST):
        shutil.copy(newer, interrupted)
    for _ in range(rounds):
        train.main(settings(**SMALL))
    last = load_checkpoint(interrupted / LAST)
    assert last["finished"] and last["step"] == 22
    assert len(runs()) == rounds


def test_a_run_without_a_step_starts_anew_with_other_lists(two_classes, monkeypatch, capsys):
    """As after its first image couldn't be read, and the lists were written without it."""
    with monkeypatch.context() as patched:
        patched.setattr(train, "start_stage", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(settings(**TINY))
    (run,) = runs()
    assert load_checkpoint(run / LAST)["step"] == 0
    change_images()
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(train, "train", lambda run, *_: run.close())
        train.main(settings(**TINY))
    assert f"{run} hasn't made a step and its lists have changed: it starts anew\n" in capsys.readouterr().out
    assert runs() == [run]
    assert (run / "train_list.txt").read_bytes() == Path("cls_train.txt").read_bytes()
