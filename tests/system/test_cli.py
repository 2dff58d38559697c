"""utils/system/cli.py: whose fault an error is, and how flags are typed."""

import builtins
import io
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import tyro

import eval
import export
import predict
import train
from utils.annotation.annotate import annotate
from utils.config.other_names import suggest_name
from utils.config.train_config import TrainConfig
from utils.system import cli, startup
from utils.system.cli import expand_switches, format_command, is_own

ROOT = Path(train.__file__).parent


def test_every_module_raises_errors_of_the_user_and_no_library_does():
    for folder in ("nets", "utils"):
        assert all(is_own(path) for path in (ROOT / folder).rglob("*.py"))
    assert is_own(ROOT / "train.py")
    for other in (
        Path(pytest.__file__),
        ROOT / "tests/conftest.py",
        ROOT / ".venv/lib/torch/nn.py",
        ROOT.parent / "x.py",
    ):
        assert not is_own(other)


def test_an_error_raised_in_a_nested_package_is_one_line(here, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--input-shape", "9", "9"])
    with pytest.raises(SystemExit) as end:
        cli.run(train.main)
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: input_shape=(9, 9): ") and "Traceback" not in error


def test_a_script_of_one_process_refuses_several(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["export.py"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            cli.run(pytest.fail, alone=True)
        assert end.value.code == 1
    assert capsys.readouterr().err == "error: export.py runs in one process: start it with python, not with torchrun\n"


def test_an_error_of_a_library_keeps_its_traceback(monkeypatch):
    def main() -> None:
        raise ValueError("raised outside of Thaw")

    monkeypatch.setattr("sys.argv", ["x.py"])
    with pytest.raises(ValueError, match="raised outside"):
        cli.run(main)


class Notebook(io.TextIOBase):
    """A stream as that of a notebook's kernel: it has no encoding that could be set."""

    text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


def test_streams_of_notebooks_and_of_programs_without_a_console(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x.py"])
    monkeypatch.setattr("sys.stdout", Notebook())
    monkeypatch.setattr("sys.stderr", None)
    cli.run(lambda: print("猫"))
    assert sys.stdout.text == "猫\n"
    assert print("lost", file=sys.stderr) is None and sys.stderr is not None
    sys.stderr.close()


def test_an_interrupt_does_not_end_the_kernel_of_a_notebook(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x.py"])
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    with pytest.raises(KeyboardInterrupt):
        cli.run(lambda: os.kill(os.getpid(), signal.SIGINT))


def test_errors_of_the_user_at_import_are_one_line(capsys):
    def fail() -> None:
        raise RuntimeError("of a library")

    for action in (lambda: TrainConfig(epochs=3), fail):
        try:
            action()
        except Exception as error:
            startup._print_error(type(error), error, error.__traceback__)
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "error: epochs=3: TrainConfig has no such field; use unfreeze_epoch"
    assert others[0] == "Traceback (most recent call last):" and others[-1] == "RuntimeError: of a library"


def test_switches_get_their_value():
    names = ["freeze_train", "pretrained"]
    assert expand_switches(["--freeze-train", "--seed", "3"], names) == ["--freeze-train", "True", "--seed", "3"]
    assert expand_switches(["--no-freeze-train"], names) == ["--freeze-train", "False"]
    for given in (["--freeze-train", "None"], ["--cache-images"], ["freeze_train"], ["--pretrained", "owner/name"]):
        assert expand_switches(given, names) == given


def test_commands_repeat_what_was_given(here):
    def main(folder: str = "datasets", fraction: float = 0.1, audit: bool = True, fix: bool = False) -> None: ...

    script = cli.command(cli.script_path("train.py"))
    given = {"folder": Path("my pets"), "fraction": 0.1, "audit": False, "fix": True}
    command = format_command("train.py", main, given, fraction=0.2)
    assert command == f"python {script} --folder 'my pets' --fraction 0.2 --no-audit --fix"
    assert format_command("train.py", main, given, folder="datasets", audit=True, fix=False) == f"python {script}"


MAINS = {"train": train.main, "predict": predict.main, "eval": eval.main, "export": export.main, "annotate": annotate}


@pytest.mark.parametrize("script", MAINS)
def test_flags_are_those_of_the_help(script, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(MAINS[script], args=["--help"])
    lines = re.findall(r"^\W+(--[a-z].*)", capsys.readouterr().out, flags=re.M)
    shown = {flag.replace("-", "_") for line in lines for flag in re.findall(r"--([a-z][a-z-]*)", line)}
    flags, words = cli.read_flags(MAINS[script])
    assert shown <= flags.keys()
    assert {flag for flag in flags if len(flag) > 1 and not flag.startswith(("tyro_", "no_"))} - {"help"} <= shown
    assert words == {"predict": "paths", "eval": "model", "export": "model"}.get(script, "")


def order(*args: str, main=predict.main) -> list[str]:
    return cli.order_words(args, main, suggest_name)


def test_words_may_stand_anywhere_among_flags():
    flags = ["--reject-below", "auto", "--tta"]
    assert order("a.onnx", *flags, "b.jpg") == [*flags, "--", "a.onnx", "b.jpg"]
    assert order("a.onnx", "--reject-below", "auto", "b.jpg", "--tta") == [*flags, "--", "a.onnx", "b.jpg"]
    assert order("--top-k=2", "-", "--json") == ["--top-k=2", "--json", "--", "-"]
    assert order("a.jpg", "--", "-b.jpg", "--raw") == ["--", "a.jpg", "-b.jpg", "--raw"]
    assert order("--tta") == ["--tta"]
    compare = ["--compare", "a", "b"]
    assert order("--raw", *compare, "--ood", "c", main=eval.main) == ["--raw", *compare, "--ood", "c"]
    assert order("run", *compare, main=eval.main) == [*compare, "--", "run"]
    assert order("--device", main=train.main) == ["--device"]
    assert order("--min-lr", "-1", "x", main=train.main) == ["--min-lr", "-1", "x"]


@pytest.mark.parametrize(
    ("main", "word", "answer"),
    [
        (train.main, "--epochs", "use --unfreeze-epoch"),
        (train.main, "--Init_lr=3", "use --init-lr"),
        (train.main, "--imgsz", "use --input-shape"),
        (train.main, "-b", "use --unfreeze-batch-size"),
        (train.main, "--wheight-decay", "use --weight-decay"),
        (train.main, "--xyzzy", "--help lists them"),
        (predict.main, "--source", "give the paths without a flag"),
        (predict.main, "--image", "give the paths without a flag"),
        (predict.main, "--weights", "use --model-path"),
        (predict.main, "--model", "use --model-path"),
        (predict.main, "--imgsz", "images are resized to what the model was trained on"),
        (eval.main, "--weights", "use --model-path"),
        (eval.main, "--batch", "use --batch-size"),
        (export.main, "--include", "use --format"),
        (annotate, "--val-split", "use --val-fraction"),
    ],
)
def test_an_unknown_flag_is_answered_with_ours(main, word, answer):
    with pytest.raises(ValueError, match=rf"^{word.partition('=')[0]}: .* has no such flag; .*{answer}$"):
        order(word, main=main)
