"""--resume and --continue read the settings of the run; the table of runs."""

import json
from pathlib import Path

import pytest

import eval as evaluation
import train
from tests.conftest import TINY, settings, write_back
from utils.annotation.annotate import annotate
from utils.config.train_config import TrainConfig, project_files
from utils.data.image_list import write_classes
from utils.runs.checkpoint import BEST, LAST, load_checkpoint
from utils.runs.run_table import format_runs
from utils.runs.saved_settings import settings_to_continue, settings_to_resume


def only_run() -> Path:
    (run,) = Path("logs").iterdir()
    return run


def test_resume_needs_no_other_flags(two_classes, command):
    train.main(settings(**TINY, name="first"))
    run = only_run()
    assert run.name.endswith("_first")
    before = load_checkpoint(run / LAST)["weights"]
    write_back(run, epoch=2)
    refused = command("train.py", "--resume", str(run), "--unfreeze-epoch", "9")
    assert refused.returncode == 1
    assert "unfreeze_epoch was 4 and is 9; a resumed run can't change this: remove it, or" in refused.stderr
    resumed = command("train.py", f"--resume={run}", "--save-period", "3")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after epoch 2" in resumed.stdout
    assert all(before[name].equal(tensor) for name, tensor in load_checkpoint(run / LAST)["weights"].items())


def test_printed_commands_work_as_printed(two_classes, command, capsys):
    """For a project in a folder of its own, beside another whose lists are in the working folder."""
    files = project_files("pets")
    annotate("datasets", **files, audit=False)
    write_classes("model_data/cls_classes.txt", ["apple", "pear"])
    Path("cls_test.txt").write_text("1;pear.jpg\n")
    capsys.readouterr()
    train.main(settings(**TINY, data="pets", save_dir="runs"))
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  python ")]
    assert [Path(words[1]).name for words in printed] == ["eval.py", "predict.py"]
    for _, script, *arguments in printed:
        assert Path(script).is_file()
        assert command(Path(script).name, *arguments, "--device", "cpu").returncode == 0
    (run,) = Path("runs").iterdir()
    assert json.loads((run / "metrics.json").read_text())["data"] == "pets/cls_test.txt"


def test_settings_of_a_recipe_run_are_those_that_were_asked_for(two_classes):
    train.main(TrainConfig(**TINY, recipe="auto"))
    run = only_run()
    asked = settings_to_resume(str(run))
    assert asked == TrainConfig(**TINY, recipe="auto", resume=str(run))
    assert settings_to_continue(str(run)).recipe == "none"


def test_continuing_a_finished_run(two_classes, command):
    train.main(settings(**TINY))
    run = only_run()
    result = command("train.py", "--continue", str(run), "--unfreeze-epoch", "2", "--name", "more")
    assert result.returncode == 0, result.stderr
    (new,) = Path("logs").glob("*_more")
    config = json.loads((new / "config.json").read_text())
    assert (config["model_path"], config["unfreeze_epoch"], config["freeze_train"]) == (str(run / BEST), 2, False)
    assert config["init_lr"] == pytest.approx(TINY["init_lr"] / 10)
    before, after = (load_checkpoint(path / LAST)["history"] for path in (run, new))
    assert after[0]["val_loss"] < before[0]["val_loss"]  # the head is kept
    with pytest.raises(ValueError, match="is a flag; in Python"):
        train.main(settings(**TINY), continue_run=str(run))


@pytest.mark.parametrize("flag", ["--resume", "--continue"])
def test_a_run_that_is_not_there(here, command, flag):
    result = command("train.py", flag, "logs/none")
    assert result.returncode == 1
    assert f"{flag[2:]}='logs/none': no run found; python eval.py --list" in result.stderr


def test_table_of_runs(trained, tmp_path, capsys):
    evaluation.main(list_runs=True)
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "data", "backbone", "epochs", "validation", "top-1", "test", "top-1", "size"]
    assert row.split()[1:5] == [".", "vit_xs_4", "4", "100.0%"]
    evaluation.main(list_runs=True, model_path="logs")
    with pytest.raises(FileNotFoundError, match="there is no run in"):
        format_runs(str(tmp_path))


def test_a_run_with_damaged_settings_is_not_lost(two_classes, command, capsys):
    train.main(settings(**TINY))
    run = only_run()
    before = load_checkpoint(run / LAST)["weights"]
    write_back(run, epoch=2)
    (run / "config.json").write_bytes(b"")
    train.main(settings(**TINY | {"unfreeze_epoch": 2}))
    assert "config.json is damaged, so it is unknown whether this run has the same" in capsys.readouterr().out
    result = command("train.py", "--resume", str(run))
    assert "config.json is damaged; the settings in last_epoch_weights" in result.stdout
    assert result.returncode == 0, result.stderr
    assert all(before[name].equal(tensor) for name, tensor in load_checkpoint(run / LAST)["weights"].items())
