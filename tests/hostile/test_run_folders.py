"""Run folders from somebody else: links in them are replaced, never followed."""

import json
import shutil
from pathlib import Path

import pytest

import eval as evaluation
import export
import train
from tests.conftest import TINY, settings, write_back
from utils.runs.checkpoint import BEST, LAST, find_checkpoint, load_checkpoint
from utils.runs.resume import find_runs
from utils.runs.run_table import format_runs
from utils.system.files import PARTIAL, WriteError


def only_run() -> Path:
    (run,) = Path("logs").iterdir()
    return run


def link_files(run: Path, outside: Path) -> dict[Path, bytes]:
    """Replace what a run writes, but for what it needs to be read, by links to files outside; return those."""
    outside.mkdir()
    names = {path.name for path in run.iterdir() if path.is_file()} - {LAST, BEST, "config.json"}
    names |= {"metrics.json", "predictions.csv", "report.html", "confusion_matrix.csv", "confusion_matrix.png"}
    names -= {name for name in names if name.startswith(("events.", "in_use"))}
    for name in names:
        (outside / name).write_bytes((run / name).read_bytes() if (run / name).is_file() else b"precious")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to((outside / name).resolve())
    return {path: path.read_bytes() for path in outside.iterdir()}


def test_links_are_replaced_by_resuming_and_evaluating(two_classes):
    train.main(settings(**TINY))
    run = only_run()
    write_back(run, epoch=2)
    before = link_files(run, Path("outside"))
    train.main(settings(**TINY, resume=str(run)))
    evaluation.main(str(run), corrupted=0)
    assert load_checkpoint(run / LAST)["finished"]
    assert len(before) > 8
    assert {path: path.read_bytes() for path in before} == before
    assert not any(path.is_symlink() for path in run.iterdir())


@pytest.mark.parametrize("folder", ["evaluation", "eval", "export"])
def test_linked_folders_are_refused(trained, tmp_path, folder):
    run = shutil.copytree(only_run(), tmp_path / "run")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "events.out.tfevents.1").write_text("precious")
    shutil.rmtree(run / folder, ignore_errors=True)
    (run / folder).symlink_to(outside)
    with pytest.raises(WriteError, match="it is a link to another folder"):
        export.main(str(run)) if folder == "export" else evaluation.main(str(run), corrupted=0)
    assert [path.name for path in outside.iterdir()] == ["events.out.tfevents.1"]


def test_strange_things_among_the_runs_stop_nothing(two_classes, capsys):
    train.main(settings(**TINY))
    run = only_run()
    write_back(run, epoch=2)
    outside = Path("outside")
    outside.mkdir()
    for name in ("in_use_by.txt", f"x.0123abcd{PARTIAL}"):
        (outside / name).touch()
    Path("logs/linked").symlink_to(outside.resolve())
    Path("logs/loop").symlink_to("loop")
    for name in (BEST, LAST, "config.json", f"{BEST}.0123abcd{PARTIAL}"):
        Path("logs/folder", name).mkdir(parents=True)
    for folder in (run, Path("logs")):
        (folder / "ep009-loss0.1.safetensors").mkdir()
    (run / f"film{PARTIAL}").touch()
    (run / "metrics.json").write_text('{"top1": "x", "data": "cls_test.txt"}')
    train.main(settings(**TINY))
    assert load_checkpoint(run / LAST)["finished"]
    assert find_checkpoint("logs") == run / BEST
    assert run.name in format_runs("logs")
    assert (run / f"film{PARTIAL}").exists() and len(list(outside.iterdir())) == 2


@pytest.mark.parametrize("values", [{"data": 3}, {"stages": 1}, {"epochs": []}, {"freeze_epoch": "x"}])
def test_wrong_settings_stop_no_new_run(trained, tmp_path, monkeypatch, values, capsys):
    shutil.copytree(only_run(), tmp_path / "logs/run")
    config = tmp_path / "logs/run/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    assert "run" in format_runs(str(tmp_path / "logs"))
    assert list(find_runs(settings(**TINY, save_dir=str(tmp_path / "logs")), finished=True)) == []
