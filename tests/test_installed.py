"""What ``pip install`` gives works by itself, far from the clone: every kind of command, in an empty folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow  # an installation, and fits as commands run them


@pytest.fixture(scope="module")
def ftd(tmp_path_factory: pytest.TempPathFactory):
    """Install the package into a folder with ``pip install --target``; give ``ftd(*arguments)``, which runs there."""
    source, target, empty = (tmp_path_factory.mktemp(name) for name in ("source", "target", "empty"))
    for name in ("ftd_lightning", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    # The wheel is built apart, for setuptools writes beside the sources; without isolation no network is needed.
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target, source]
    done = subprocess.run([sys.executable, "-m", "pip", *install], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "ftd_lightning", *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    where = [sys.executable, "-c", "import ftd_lightning; print(ftd_lightning.__file__)"]
    found = subprocess.run(where, cwd=empty, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(target)
    run.folder = empty
    return run


def test_configs_and_info(ftd) -> None:
    names = [line.split()[0] for line in ftd("configs").splitlines()]
    assert {"digits/teacher_ftd", "cifar10/distill_ftd_ipc10", "imagenet/evaluate"} <= set(names)
    assert ftd("configs", "digits/teacher_ftd") == (ROOT / "configs/digits/teacher_ftd.yaml").read_text()
    assert "trajectory-error" in ftd("--help")


def test_the_three_fits(ftd) -> None:
    network = "--model.network_options={width: 4, depth: 1}"
    ftd("fit", "--config", "digits/teacher_ftd", "--model.teachers=2", "--model.epochs=3", network)
    short = ["--trainer.max_steps=4", "--model.iterations_per_epoch=2", "--model.max_start_epoch=2"]
    ftd("fit", "--config", "digits/distill_ftd_ipc1", *short)
    ftd("fit", "--config", "digits/evaluate", "--trainer.max_epochs=12", "--model.networks=2", network)
    results = json.loads((ftd.folder / "runs/digits/evaluate/evaluation.json").read_text())
    (accuracy,) = results["accuracy"].values()
    assert accuracy["n"] == 2
    assert "ftd, 4 iterations" in ftd("info", "runs/digits/distill_ftd_ipc1/set.safetensors")
    assert (ftd.folder / "runs/digits/teacher_ftd").is_dir()


def test_a_folder_of_pictures(ftd) -> None:
    with np.load(ROOT / "ftd_lightning" / "data" / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    for label in range(10):
        folder = ftd.folder / "pictures" / str(label)
        folder.mkdir(parents=True)
        for index, image in enumerate(images[labels == label][:40]):
            Image.fromarray((image * 255 / 16).astype(np.uint8)).save(folder / f"{index}.png")
    # What is planned is made shorter: how much fits into a few minutes is another on each machine.
    short = ["--teacher.model.teachers=2", "--distill.trainer.max_steps=4", "--evaluate.model.networks=2"]
    short += ["--evaluate.trainer.max_epochs=40", "--evaluate.model.measure_every=40"]
    out = ftd("distill", "pictures", "--ipc", "1", "--out", "mine", "--minutes", "10", *short)
    assert "plan for 10 minutes" in out
    accuracy = json.loads((ftd.folder / "mine/results.json").read_text())["accuracy"]
    assert list(accuracy) == ["random", "ftd", "real"]
    for file in ("set.safetensors", "images.png", "configs/teacher.yaml"):
        assert (ftd.folder / "mine" / file).is_file()
