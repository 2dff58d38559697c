"""Imports point one way: scripts, then `utils/` from floor to floor, then `nets/`."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "system": 0,
    "config": 0,
    "metrics": 0,
    "data": 1,
    "modeling": 2,
    "annotation": 3,
    "training": 3,
    "runs": 4,
    "inference": 5,
    "evaluation": 6,
    "export": 6,
}
NETS = {"nets.weights", "nets"}
MODULES = sorted(path.relative_to(ROOT) for folder in ("nets", "utils") for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """All modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_package_has_a_floor():
    packages = {path.parts[1] for path in MODULES if path.parts[0] == "utils" and len(path.parts) > 2}
    assert packages == FLOORS.keys()
    assert {path.parts for path in MODULES if path.parts[0] == "utils" and len(path.parts) == 2} == {
        ("utils", "__init__.py")
    }


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_downwards(path):
    scripts = {file.stem for file in ROOT.glob("*.py")}
    for name in imports(path):
        first, second = [*name.split("."), ""][:2]
        assert first not in scripts | {"tests", "benchmarks", "recipes"}, f"{path} imports {name}"
        if path.parts[0] == "nets":
            assert first != "utils", f"{path} imports {name}"
        elif first == "utils" and second:
            own = path.parts[1]
            assert second == own or FLOORS[second] < FLOORS[own], f"{path} imports {name}"


def test_no_module_is_in_a_cycle():
    """Not even of imports inside functions."""
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
    edges = {name: {found for found in imports(path) if found in names} for name, path in names.items()}
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys() - {name}]:
        for name in leaves:
            del edges[name]
    assert not edges, f"in a cycle, or above one: {sorted(edges)}"


def test_packages_re_export_nothing():
    for path in MODULES:
        if path.name == "__init__.py":
            body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
            assert len(body) == 1, f"{path} has more than a docstring"
            assert isinstance(body[0], ast.Expr), path


def test_the_network_file_stands_alone():
    """`nets/vit.py` can be read, and copied, by itself."""
    tree = ast.parse((ROOT / "nets/vit.py").read_text(encoding="utf-8"))
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name.split(".")[0] not in sys.stdlib_module_names} == {
        *("torch", "torch.utils.checkpoint", "nets.network"),
    }
