"""utils/system/startup.py: how threads wait is set before torch is imported, unless the user has set it."""

import ast
import os
from pathlib import Path

import pytest

import train
from utils.system.startup import SPIN_COUNT, WAITING, prepare_process

ROOT = Path(train.__file__).parent


@pytest.fixture(autouse=True)
def unset(monkeypatch) -> None:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.excepthook", None)


def test_threads_wait_briefly():
    prepare_process()
    assert {name: os.environ.get(name) for name in WAITING if name in os.environ} == {"GOMP_SPINCOUNT": f"{SPIN_COUNT}"}


@pytest.mark.parametrize("name", WAITING)
def test_what_the_user_sets_is_obeyed(monkeypatch, name):
    monkeypatch.setenv(name, "7")
    prepare_process()
    assert {other: os.environ.get(other) for other in WAITING if other in os.environ} == {name: "7"}


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_every_script_imports_it_first(script):
    nodes = ast.parse((ROOT / script).read_text(encoding="utf-8")).body
    modules = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    first = next(node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) and not is_future(node))
    assert modules[0] == "utils.system.startup" and isinstance(first, ast.Import)


def is_future(node: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"
