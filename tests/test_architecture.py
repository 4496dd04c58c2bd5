"""What holds the house up: imports run downwards, the mathematics needs torch alone, public names stay."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ftd_lightning

ROOT = Path(ftd_lightning.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
NAMES = json.loads((Path(__file__).parent / "public_names.json").read_text())

FLOORS = {
    "errors": -1,  # two classes that import nothing
    "functional": 0,
    **dict.fromkeys(["contracts", "models", "optim"], 1),
    "data": 2,
    "training": 3,
    "callbacks": 4,
    "modules": 5,
    "lightning_cli": 6,
    **dict.fromkeys(["artefacts", "studies"], 7),
    "demo": 8,
    "cli": 9,
    "__main__": 10,
}


def imported(path):
    """Absolute dotted names of all that a file imports, in functions and under TYPE_CHECKING too."""
    package = (ROOT.name, *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else node.module
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room(dotted):
    """ftd_lightning.data.files -> data; a public name of the package itself -> the room that it lives in."""
    name = dotted.split(".")[1]
    return ftd_lightning._HOMES.get(name, f"{ROOT.name}.{name}").split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    names = set(imported(path))
    if own == "functional":
        roots = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
        assert roots <= {"torch", ROOT.name}, "the mathematics needs torch alone"
    if own == "__init__":  # names that are looked up when asked for: above all floors
        return
    for name in names:
        if name.startswith(f"{ROOT.name}.") and not name.endswith(".__version__"):
            target = room(name)
            assert target == own or FLOORS[target] < FLOORS[own], f"{own} must not import {name}"


def test_importing_the_mathematics_imports_no_framework():
    code = "import sys, {}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = []
    for module in ("torch", "ftd_lightning.functional"):
        run = subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True)
        loaded.append(set(run.stdout.split()))
    assert "lightning" not in loaded[1]
    assert loaded[1] - loaded[0] - set(sys.stdlib_module_names) == {"ftd_lightning"}, "torch and nothing else"


@pytest.mark.parametrize("module", NAMES)
def test_public_names_stay(module):
    """Whoever removes or renames a public name edits tests/public_names.json, and the changelog with it."""
    there = importlib.import_module(module)
    public = getattr(there, "__all__", dir(there))
    assert not set(NAMES[module]) - set(public)
    assert not [name for name in {*NAMES[module], *getattr(there, "__all__", [])} if not hasattr(there, name)]


def test_the_inventory_is_sorted_and_names_every_room():
    assert all(names == sorted(set(names)) for names in NAMES.values())
    rooms = {f"{ROOT.name}.{path.parent.name}" for path in ROOT.glob("*/__init__.py")}
    assert set(NAMES) == {ROOT.name, f"{ROOT.name}.optim", *rooms}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_longer_than_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300
