"""SIGTERM and Ctrl-C end a command with 143 and 130, one line, and the way to resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ftd_lightning import TrajectoryStore, cli
from ftd_lightning.terminal import EndedBySignal

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "digits"
TEACH = ["fit", "--config", str(CONFIGS / "teacher_mtt.yaml"), "--model.network_options={width: 4, depth: 1}"]
TEACH += ["--data.max_per_class=14", "--data.batch_size=32", "--trainer.enable_model_summary=false"]
TEACH += ["--trainer.accelerator=cpu", "--model.teachers=1"]
NAS = ["nas", "--out", "out", "--data.synthetic", "random", "--depths", "[1]", "--widths", "[4]", "--threads", "1"]
ENDS = {signal.SIGTERM: (143, "terminated"), signal.SIGINT: (130, "interrupted")}


def ended(folder: Path, arguments: list[str], sign: str, number: signal.Signals) -> tuple[int, list[str]]:
    """Start a command, wait for a file, send a signal; return the exit code and the lines on standard error."""
    command = [sys.executable, "-m", "ftd_lightning", *arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not list(folder.rglob(sign)) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    return process.returncode, shown.strip().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("number", ENDS)
def test_a_fit_that_is_ended_says_how_to_resume(tmp_path: Path, number: signal.Signals) -> None:
    arguments = [*TEACH, "--model.epochs=150"]
    code, lines = ended(tmp_path, arguments, "last.ckpt", number)
    assert (code, lines[-1]) == (
        ENDS[number][0],
        f"ftd: {ENDS[number][1]}: resume with the same command and --ckpt_path last",
    )
    assert "Traceback" not in "".join(lines)
    resumed = [sys.executable, "-m", "ftd_lightning", *arguments, "--ckpt_path=last"]
    assert subprocess.run(resumed, cwd=tmp_path, capture_output=True, timeout=300).returncode == 0
    assert TrajectoryStore(tmp_path / "runs/digits/teacher_mtt/trajectories").epochs == 150


@pytest.mark.parametrize("number", ENDS)
def test_a_fit_leaves_a_checkpoint_of_the_step_it_was_ended_at(
    tmp_path: Path, number: signal.Signals, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = []

    def step(self, *args) -> None:
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr("ftd_lightning.callbacks.FitProgress.on_train_batch_end", step)
    with pytest.raises(SystemExit) as stop:
        cli.main([*TEACH, "--model.epochs=2"])  # of 5 steps
    assert stop.value.code == ENDS[number][0]
    assert ("ending after this step; Ctrl-C again ends at once" in capsys.readouterr().err) is (number == signal.SIGINT)
    saved = torch.load("runs/digits/teacher_mtt/checkpoints/last.ckpt", weights_only=True)
    assert (saved["global_step"], len(steps)) == (3, 3)
    cli.main([*TEACH, "--model.epochs=2", "--ckpt_path=last"])
    assert len(steps) == 10
    assert TrajectoryStore(tmp_path / "runs/digits/teacher_mtt/trajectories").epochs == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", ENDS)
def test_a_search_that_is_ended_continues(tmp_path: Path, number: signal.Signals) -> None:
    code, lines = ended(tmp_path, NAS, "nas.json", number)
    assert (code, lines[-1]) == (ENDS[number][0], f"ftd: {ENDS[number][1]}: the same command continues")
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize("number", ENDS)
def test_any_command_ends_at_once(number: signal.Signals, monkeypatch, capsys) -> None:
    before = {number: signal.getsignal(number) for number in ENDS}

    def slow(*args) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("went on")

    monkeypatch.setattr("ftd_lightning.commands.info.main", slow)
    with pytest.raises(SystemExit) as stop:
        cli.main(["info", "x"])
    assert stop.value.code == ENDS[number][0]
    assert capsys.readouterr().err == f"ftd: {ENDS[number][1]}: run it again\n"
    assert {number: signal.getsignal(number) for number in ENDS} == before


def test_errors_pass_through() -> None:
    with pytest.raises(KeyError), EndedBySignal():
        raise KeyError("a bug")
    with pytest.raises(SystemExit), EndedBySignal():
        sys.exit(2)
