"""What is shipped: an sdist builds, and the wheel built from it holds every module and config."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_sdist_and_wheel_hold_every_module_and_config(tmp_path: Path) -> None:
    # Without isolation, so that it needs no network. The sources are copied: setuptools writes beside them.
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    names = [name for name in files.split("\0") if name] or [
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts
    ]
    for name in names:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV_")}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", source]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    modules = {name for name in names if name.startswith("ftd_lightning/")}
    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as sdist:
        packed = {name.split("/", 1)[-1] for name in sdist.getnames()}
    assert modules <= packed
    assert {"README.md", "LICENSE", "setup.cfg", "pyproject.toml"} <= packed
    configs = {f"ftd_lightning/{name}" for name in names if name.startswith("configs/")}
    assert len(configs) > 50
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        assert modules | configs <= set(wheel.namelist())
        metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    assert "Requires-Dist: lightning<3,>=2.6.4" in metadata
    assert "Requires-Python: >=3.11" in metadata


def test_every_bound_has_its_reason() -> None:
    lines = (ROOT / "setup.cfg").read_text().splitlines()
    block = lines[lines.index("install_requires =") + 1 : lines.index("[options.package_data]")]
    for index, line in enumerate(block):
        if line.strip() and not line.strip().startswith("#"):
            assert block[index - 1].strip().startswith("#"), line
