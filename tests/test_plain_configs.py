"""The shipped configs run in anybody's LightningCLI, and give the results of ``ftd fit``, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from ftd_lightning import SyntheticSet, TrajectoryStore, lightning_cli

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "digits"
QUIET = ["--trainer.enable_model_summary=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
SMALL = {
    "teacher_ftd": ["--model.teachers=2", "--model.epochs=4", "--model.network_options={width: 4, depth: 1}"],
    "distill_ftd_ipc1": ["--trainer.max_steps=6", "--model.iterations_per_epoch=3", "--model.max_start_epoch=2"],
    "evaluate": ["--trainer.max_epochs=12", "--model.measure_every=6", "--model.networks=2"],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning's own CLI
def test_three_phases_in_lightnings_own_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["mine.py"])

    def both(config: str, ours: str = "", theirs: str = "") -> None:
        arguments = ["fit", "--config", str(CONFIGS / f"{config}.yaml"), *SMALL[config], *QUIET]
        for run, further in ((lightning_cli.run, ours), (lambda given: LightningCLI(args=given), theirs)):
            (tmp_path / run.__name__).mkdir(exist_ok=True)
            monkeypatch.chdir(tmp_path / run.__name__)
            torch.manual_seed(0)
            run([*arguments, *([further] if further else [])])
            torch.set_float32_matmul_precision("highest")

    ours, theirs = tmp_path / "run" / "runs" / "digits", tmp_path / "<lambda>" / "lightning_logs"
    both("teacher_ftd")
    stores = ours / "teacher_ftd" / "trajectories", theirs / "version_0" / "trajectories"
    for teacher in range(2):
        assert torch.equal(*(TrajectoryStore(store).trajectory(teacher) for store in stores))
    both("distill_ftd_ipc1", theirs=f"--model.trajectories={stores[1]}")
    sets = ours / "distill_ftd_ipc1" / "set.safetensors", theirs / "version_1" / "set.safetensors"
    first, second = map(SyntheticSet.load, sets)
    assert first.metadata["iterations"] == second.metadata["iterations"] == 6
    for name in ("images", "ema_images", "labels", "step_size"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    both("evaluate", f"--data.synthetic={sets[0]}", f"--data.synthetic={sets[1]}")
    found = json.loads((ours / "evaluate" / "evaluation.json").read_text())
    (checkpoint,) = (theirs / "version_2" / "checkpoints").glob("*.ckpt")
    arguments = ["--config", str(CONFIGS / "evaluate.yaml"), *SMALL["evaluate"], *QUIET]
    LightningCLI(args=["test", *arguments, f"--data.synthetic={sets[1]}", f"--ckpt_path={checkpoint}"])
    tested = json.loads((theirs / "version_3" / "evaluation.json").read_text())
    assert (found["accuracy"], found["seeds"]) == (tested["accuracy"], tested["seeds"])
