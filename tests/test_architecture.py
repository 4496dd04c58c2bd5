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
    **dict.fromkeys(["bounds", "shipped_configs"], -1),
    "functional": 0,
    **dict.fromkeys(["contracts", "models", "optim"], 1),
    "rules": 2,
    "files": 3,
    "data": 4,
    "core": 5,
    "callbacks": 6,
    "modules": 7,
    **dict.fromkeys(["command_line", "lightning_cli"], 8),
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


def room(dotted):
    """ftd_lightning.files.safetensors_io -> data; a public name of the package itself -> the room that it lives in."""
    name = dotted.split(".")[1]
    return ftd_lightning._HOMES.get(name, f"{ROOT.name}.{name}").split(".")[1]


def file_of(dotted):
    """Return the file of this package that a dotted name lives in; None for other packages."""
    parts = dotted.split(".")
    if parts[0] != ROOT.name:
        return None
    for length in range(len(parts), 0, -1):
        stem = ROOT.joinpath(*parts[1:length])
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file in TREES:
                return file
    return None


def where(path, node=None):
    return f"{path.relative_to(ROOT)}{f':{node.lineno}' if node else ''}"


def test_imports_run_downwards():
    upwards = []
    for path in MODULES:
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own == "__init__":  # names that are looked up when asked for: above all floors
            continue
        for name in set(imported(path)):
            if name.startswith(f"{ROOT.name}.") and not name.endswith(".__version__"):
                target = room(name)
                if target != own and FLOORS[target] >= FLOORS[own]:
                    upwards.append(f"{where(path)} imports {name}")
    assert not upwards


def test_the_mathematics_imports_torch_alone():
    roots = {name.split(".")[0] for path in (ROOT / "functional").glob("*.py") for name in imported(path)}
    assert roots - set(sys.stdlib_module_names) == {"torch", ROOT.name}


def test_no_modules_import_each_other():
    """Not even for types: two files that need each other are one."""
    package = ROOT / "__init__.py"
    graph = {path: {file_of(name) for name in imported(path)} - {None, package} for path in MODULES if path != package}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the circle


def test_functions_take_few_arguments():
    """Twelve at most, constructors 22: what travels together is one object."""
    offenders = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len([name for name in names if name not in ("self", "cls")])
                if count > (22 if node.name == "__init__" else 12):
                    offenders.append(f"{where(path, node)} {node.name}: {count}")
    assert not offenders


PUBLIC_OF_NAMEDTUPLE = {"_asdict", "_fields", "_replace", "_make"}
PRIVATE = {  # what has no public form
    "optim.py": {"torch._foreach_add_", "torch._foreach_copy_"},
    "core/ranks.py": {"DistributedDataParallel._set_params_and_buffers_to_ignore_for_model"},
}


def test_no_private_names_of_others_are_used():
    offenders = []
    for path, tree in TREES.items():
        allowed = PRIVATE.get(path.relative_to(ROOT).as_posix(), set())
        for node in ast.walk(tree):
            used = []
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
                used = [node.attr] if ast.unparse(node) not in allowed else []
            elif isinstance(node, ast.ImportFrom):
                used = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            private = [name for name in used if name.startswith("_") and not name.startswith("__")]
            if set(private) - PUBLIC_OF_NAMEDTUPLE:
                offenders.append(f"{where(path, node)} {ast.unparse(node)}")
    assert not offenders


def test_modules_callbacks_and_data_know_each_other_by_contract():
    """No guesses at what the other one has: hasattr, or getattr with a default."""
    offenders = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3):
                probed = ast.unparse(node.args[0])
                if {"trainer", "module", "pl_module", "datamodule", "source"} & set(
                    probed.replace("self.", "").split(".")
                ):
                    offenders.append(f"{where(path, node)} {ast.unparse(node)}")
    assert not offenders


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
    assert set(NAMES) == {ROOT.name, f"{ROOT.name}.contracts", f"{ROOT.name}.optim", *rooms}


def test_text_is_utf_8_whatever_the_locale():
    offenders = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named = {keyword.arg for keyword in node.keywords}
                if node.func.attr in ("read_text", "write_text") and "encoding" not in named:
                    offenders.append(f"{where(path, node)} {ast.unparse(node)}")
    assert not offenders
