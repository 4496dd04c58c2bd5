"""The shipped configs run in anybody's LightningCLI, and give what ``ftd fit`` gives, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ftd_lightning import SyntheticSet, TrajectoryStore

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "digits"
THEIRS = ["-c", "from lightning.pytorch.cli import LightningCLI; LightningCLI()"]
OURS = ["-m", "ftd_lightning"]
QUIET = ["--trainer.enable_model_summary=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
SMALL = {
    "teacher_ftd": ["--model.teachers=2", "--model.epochs=4"],
    "distill_ftd_ipc1": ["--trainer.max_steps=6", "--model.iterations_per_epoch=3", "--model.max_start_epoch=2"],
    "evaluate": ["--trainer.max_epochs=12", "--model.measure_every=6", "--model.networks=2"],
}


def run(folder: Path, program: list[str], verb: str, config: str, *arguments: str) -> None:
    command = [sys.executable, *program, verb, "--config", str(CONFIGS / f"{config}.yaml"), *SMALL[config], *QUIET]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_three_phases_in_lightnings_own_cli(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    run(ours, OURS, "fit", "teacher_ftd")
    run(theirs, THEIRS, "fit", "teacher_ftd")
    stores = ours / "runs/digits/teacher_ftd/trajectories", theirs / "lightning_logs/version_0/trajectories"
    for teacher in range(2):
        weights = [TrajectoryStore(store).trajectory(teacher) for store in stores]
        assert torch.equal(*weights)
    run(ours, OURS, "fit", "distill_ftd_ipc1")
    run(theirs, THEIRS, "fit", "distill_ftd_ipc1", f"--model.trajectories={stores[1]}")
    sets = ours / "runs/digits/distill_ftd_ipc1/set.safetensors", theirs / "lightning_logs/version_1/set.safetensors"
    first, second = map(SyntheticSet.load, sets)
    assert first.metadata["iterations"] == second.metadata["iterations"] == 6
    for name in ("images", "ema_images", "labels", "step_size"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    run(ours, OURS, "fit", "evaluate", f"--data.synthetic={sets[0]}")
    run(theirs, THEIRS, "fit", "evaluate", f"--data.synthetic={sets[1]}")
    (checkpoint,) = (theirs / "lightning_logs/version_2/checkpoints").glob("*.ckpt")
    run(theirs, THEIRS, "test", "evaluate", f"--data.synthetic={sets[1]}", f"--ckpt_path={checkpoint}")
    found = [
        json.loads((folder / "evaluation.json").read_text())
        for folder in (ours / "runs/digits/evaluate", theirs / "lightning_logs/version_3")
    ]
    assert found[0]["accuracy"] == found[1]["accuracy"]
    assert found[0]["seeds"] == found[1]["seeds"]
