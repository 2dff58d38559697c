"""utils/system/cli.py: whose fault an error is, and how flags are typed."""

from pathlib import Path

import pytest

import train
from utils.system import cli
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


def test_an_error_of_a_library_keeps_its_traceback(monkeypatch):
    def main() -> None:
        raise ValueError("raised outside of Thaw")

    monkeypatch.setattr("sys.argv", ["x.py"])
    with pytest.raises(ValueError, match="raised outside"):
        cli.run(main)


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
