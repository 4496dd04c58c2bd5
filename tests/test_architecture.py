"""What holds the house up: imports run downwards, the mathematics needs torch alone, public names stay."""

import ast
import graphlib
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
    **dict.fromkeys(["errors", "terminal"], -2),  # import nothing
    **dict.fromkeys(["bounds", "shipped_configs", "sizes"], -1),
    "functional": 0,
    **dict.fromkeys(["contracts", "models", "optim"], 1),
    **dict.fromkeys(["rules", "decoders"], 2),
    "files": 3,
    "data": 4,
    "core": 5,
    "callbacks": 6,
    **dict.fromkeys(["modules", "command_line"], 7),
    "lightning_cli": 8,
    **dict.fromkeys(["commands", "studies"], 9),
    "cli": 10,
    **dict.fromkeys(["__main__", "demo"], 11),
}


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def imported(path):
    """Absolute dotted names of all that a file imports, in functions and under TYPE_CHECKING too."""
    package = (ROOT.name, *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else node.module
            yield from (f"{base}.{alias.name}" for alias in node.names)


def file_of(dotted):
    """Return the file of this package that a dotted name lives in; None for other packages."""
    parts = dotted.split(".")
    if parts[0] == ROOT.name and len(parts) == 2:  # a public name of the package itself
        parts = ftd_lightning._HOMES.get(parts[1], dotted).split(".")
    for length in range(len(parts), 1, -1):
        stem = ROOT.joinpath(*parts[1:length])
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if parts[0] == ROOT.name and file in TREES:
                return file
    return None


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_run_downwards_and_in_no_circle():
    """Not even for types: two files that need each other are one."""
    package = ROOT / "__init__.py"  # looks names up when asked for: above all floors
    graph = {path: {file_of(name) for name in imported(path)} - {None, package} for path in MODULES if path != package}
    edges = [(room(path), room(target)) for path, targets in graph.items() for target in targets]
    assert not {(own, target) for own, target in edges if own != target and FLOORS[target] >= FLOORS[own]}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the circle


def test_the_mathematics_imports_torch_alone():
    roots = {name.split(".")[0] for path in (ROOT / "functional").glob("*.py") for name in imported(path)}
    assert roots - set(sys.stdlib_module_names) == {"torch", ROOT.name}
    code = "import sys, ftd_lightning.functional; print('lightning' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


PRIVATE = {  # without a public form; the first four are public of named tuples
    *("_asdict", "_fields", "_replace", "_make", "_foreach_add_", "_foreach_copy_"),
    *("_set_params_and_buffers_to_ignore_for_model", "_apply"),
}
PEERS = {"trainer", "module", "pl_module", "datamodule", "source"}


def test_objects_know_each_other_by_their_public_names():
    """No private attributes of others, and no guesses: hasattr, or getattr with a default, of a module or trainer."""
    offenders = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
                private = node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in PRIVATE
            elif isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                private = any(name.startswith("_") and not name.startswith("__") for name in names)
            else:
                probe = isinstance(node, ast.Call) and ast.unparse(node.func)
                guess = probe == "hasattr" or (probe == "getattr" and len(node.args) == 3)
                private = guess and bool(PEERS & set(ast.unparse(node.args[0]).split(".")))
            if private:
                offenders.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert not offenders


@pytest.mark.parametrize("module", NAMES)
def test_public_names_stay(module):
    """Whoever removes or renames a public name edits tests/public_names.json, and the changelog with it."""
    there = importlib.import_module(module)
    public = getattr(there, "__all__", dir(there))
    assert not set(NAMES[module]) - set(public)
    assert not [name for name in {*NAMES[module], *getattr(there, "__all__", [])} if not hasattr(there, name)]
