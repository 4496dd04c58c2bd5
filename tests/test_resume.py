"""Killed with SIGKILL and resumed by the same command, a run ends with the bits of one that was never interrupted."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fits import record

pytestmark = pytest.mark.slow  # commands that are killed and run again

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "digits"
RUN = "from ftd_lightning.cli import main; main()"
COMMON = ["--trainer.accelerator=cpu", "--trainer.enable_model_summary=false", "--ckpt_path=last"]


def start(folder: Path, config: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start ``ftd fit`` in a folder of its own; the first time there is no checkpoint to go on from."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", RUN, "fit", "--config", str(CONFIGS / config), *COMMON, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Its words go to a file: a full pipe that nobody reads would stop it.
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)


def wait_for(condition, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Wait until something is on disk, or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


def run_killed(folder: Path, config: str, *arguments: str, signs: list[str], kills: int) -> int:
    """Kill the command soon after each sign of progress, at moments of no design; then let it end. Give the kills."""
    moments, done = random.Random(0), 0
    for number in range(kills):
        process = start(folder, config, *arguments)
        began = time.time()

        def progressed(began: float = began, sign: str = signs[number % len(signs)]) -> bool:
            return any(path.stat().st_mtime > began for path in folder.rglob(sign) if path.exists())

        wait_for(progressed, process)
        time.sleep(moments.uniform(0, 0.6))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            done += 1
        process.wait()
    last = start(folder, config, *arguments)
    words = folder / "output"
    assert last.wait(timeout=300) == 0, words.read_text()[-2000:]
    assert "Restored all states from the checkpoint" in words.read_text(), "it began anew"
    return done


def artefacts(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*.safetensors") if ".unfinished" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_teachers(tmp_path: Path) -> None:
    arguments = [
        "--model.teachers=6",
        "--model.epochs=25",
        "--model.network_options={width: 8, depth: 1}",
        "--model.momentum=0.9",  # a state of the optimizer that has to survive as well
    ]
    whole = start(tmp_path / "whole", "teacher_ftd.yaml", *arguments)
    assert whole.wait(timeout=300) == 0
    signs = ["*epoch_0003.safetensors", "last.ckpt", "*epoch_0020.safetensors"]
    kills = run_killed(tmp_path / "killed", "teacher_ftd.yaml", *arguments, signs=signs, kills=3)
    assert kills >= 2
    expected = artefacts(tmp_path / "whole")
    assert len(expected) == 7, "six teachers, and what describes their images"
    assert artefacts(tmp_path / "killed") == expected


def test_distillation(tmp_path: Path) -> None:
    store = record(tmp_path / "teachers")
    arguments = [
        f"--model.trajectories={store}",
        "--model.max_start_epoch=3",
        "--model.iterations_per_epoch=10",
        "--model.syn_steps=5",
        "--trainer.max_steps=250",
        "--data.max_per_class=14",
        "--data.batch_size=32",
        "--model.ipc=2",
        "--model.syn_batch=7",
    ]
    whole = start(tmp_path / "whole", "distill_ftd_ipc1.yaml", *arguments)
    assert whole.wait(timeout=300) == 0, (tmp_path / "whole" / "output").read_text()[-2000:]
    signs = ["set.safetensors", "last.ckpt", "best.safetensors"]
    kills = run_killed(tmp_path / "killed", "distill_ftd_ipc1.yaml", *arguments, signs=signs, kills=3)
    assert kills >= 2
    expected = artefacts(tmp_path / "whole")
    assert {Path(name).name for name in expected} == {"set.safetensors", "best.safetensors"}
    assert artefacts(tmp_path / "killed") == expected
