"""The wheel has every module and config, and works in an empty folder, far from the clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# In one process, the commands that need no fit, and the imports that they may not wait for.
COMMANDS = """
import contextlib, io, sys
from pathlib import Path

def ftd(*arguments):
    from ftd_lightning import cli
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            cli.main(arguments)
        except SystemExit as error:
            print(error.code)
    return out.getvalue()

import ftd_lightning
assert not {"torch", "jsonargparse"} & set(sys.modules)
assert "trajectory-error" in ftd("--help")
assert "digits/teacher_ftd" in ftd("configs")
assert ftd("configs", "digits/teacher_ftd").startswith("# ")
assert "did you mean export?" in ftd("exprot")
assert "torch" not in sys.modules
from ftd_lightning import SyntheticSet
import torch
SyntheticSet(torch.zeros(2, 1, 8, 8), torch.arange(2), class_names=["a", "b"]).save(Path("set.safetensors"))
assert "transform  standardised" in ftd("info", "set.safetensors")
assert "no such file" in ftd("info", "gone")
assert not {"lightning", "torchmetrics", "torchvision", "kornia", "matplotlib"} & set(sys.modules)
print(ftd_lightning.__file__)
"""


@pytest.mark.slow
def test_the_wheel(tmp_path: Path) -> None:
    files = [*(ROOT / "ftd_lightning").rglob("*"), *(ROOT / "configs").rglob("*.yaml")]
    names = {path.relative_to(ROOT) for path in files if path.is_file() and "__pycache__" not in path.parts}
    source = tmp_path / "source"  # setuptools writes beside the sources
    for name in (*names, *map(Path, ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"))):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    # Without isolation no network is needed.
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = set(wheel.namelist())
        wheel.extractall(tmp_path / "installed")
    assert {name.as_posix().replace("configs/", "ftd_lightning/configs/", 1) for name in names} <= packed
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    run = subprocess.run(
        [sys.executable, "-c", COMMANDS], cwd=tmp_path / "empty", env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert Path(run.stdout.strip()).is_relative_to(tmp_path / "installed")
