"""Killed with SIGKILL and resumed by the same command, a fit ends with the bits of one that was never interrupted."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # commands that are killed and run again

KILLS = 20 if "FTD_TEST_ALL" in os.environ else 3
NETWORK = "--model.network_options={width: 4, depth: 1}"
# Momentum is a state of the optimizer, which has to survive as well.
TEACHERS = [NETWORK, "--model.teachers=5", "--model.epochs=6", "--model.momentum=0.9"]
MATCHING = ["--model.max_start_epoch=3", "--model.syn_steps=2", "--trainer.max_steps=60"]
MATCHING += ["--model.iterations_per_epoch=5", "--model.ipc=2", "--model.syn_batch=7"]
MATCHING += ["--trainer.callbacks+=EvaluateSynthetic", "--trainer.callbacks.epochs=3"]
EVALUATION = [NETWORK, "--model.networks=3", "--data.synthetic=random", "--data.ipc=8", "--trainer.max_epochs=60"]
PHASES = {
    "digits/teacher_ftd": (TEACHERS, {f"teacher_000{n}.safetensors" for n in range(5)} | {"data.safetensors"}),
    "digits/distill_ftd_ipc1": (MATCHING, {"set.safetensors", "best.safetensors"}),
    "digits/evaluate": (EVALUATION, {"evaluation.json"}),
}


def artefacts(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.suffix == ".safetensors" or path.name == "evaluation.json"]
    return {path.name: path.read_bytes() for path in found if ".unfinished" not in path.parts}


@pytest.mark.parametrize("config", PHASES)
def test_kills_at_random_moments(config: str, tmp_path: Path, trajectories: Path, command) -> None:
    options, files = PHASES[config]
    options = [*options, "--data.max_per_class=14", "--data.batch_size=32", "--trainer.accelerator=cpu"]
    if options[0] == MATCHING[0]:
        options.append(f"--model.trajectories={trajectories}")

    def start(name: str):
        (tmp_path / name).mkdir(exist_ok=True)
        return command.start("fit", "--config", config, *options, "--ckpt_path=last", cwd=tmp_path / name)

    whole = start("whole").wait()
    assert whole.returncode == 0, whole.stderr[-2000:]
    expected = artefacts(tmp_path / "whole")
    assert set(expected) == files
    moments, kills = random.Random(0), 0
    for _ in range(KILLS):
        began, process = time.time(), start("killed")

        def progressed(began: float = began) -> bool:
            return any(path.stat().st_mtime > began for path in tmp_path.glob("killed/**/last.ckpt") if path.exists())

        process.wait_for(progressed)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        kills += process.wait().returncode == -signal.SIGKILL
    last = start("killed").wait()
    assert last.returncode == 0, last.stderr[-2000:]
    assert "Restored all states from the checkpoint" in last.stderr, "it began anew"
    assert kills > KILLS // 2
    assert artefacts(tmp_path / "killed") == expected
