"""SIGTERM and Ctrl-C end a command with 143 and 130, one line, and the way to resume."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from ftd_lightning import TrajectoryStore, cli
from ftd_lightning.terminal import EndedBySignal

TEACH = ["fit", "--config", "digits/teacher_mtt", "--model.network_options={width: 4, depth: 1}"]
TEACH += ["--data.max_per_class=14", "--data.batch_size=32", "--trainer.enable_model_summary=false"]
TEACH += ["--trainer.accelerator=cpu", "--model.teachers=1"]
ENDS = {signal.SIGTERM: (143, "terminated"), signal.SIGINT: (130, "interrupted")}


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C is heard, though a shell makes what it runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", ENDS)
def test_a_fit_that_is_ended_says_how_to_resume(number, tmp_path: Path, command) -> None:
    arguments = [*TEACH, "--model.epochs=40"]
    process = command.start(*arguments, cwd=tmp_path)
    process.wait_for(lambda: list(tmp_path.rglob("last.ckpt")))
    process.send_signal(number)
    done, (code, how) = process.wait(60), ENDS[number]
    assert done.returncode == code
    assert done.stderr.splitlines()[-1] == f"ftd: {how}: resume with the same command and --ckpt_path last"
    assert "Traceback" not in done.stderr
    assert command(*arguments, "--ckpt_path=last", cwd=tmp_path).returncode == 0
    assert TrajectoryStore(tmp_path / "runs/digits/teacher_mtt/trajectories").epochs == 40


@pytest.mark.parametrize("number", ENDS)
def test_a_fit_leaves_a_checkpoint_of_the_step_it_was_ended_at(number, tmp_path: Path, monkeypatch, capsys) -> None:
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


@pytest.mark.parametrize("number", ENDS)
def test_any_command_ends_at_once(number, monkeypatch, capsys) -> None:
    before = {number: signal.getsignal(number) for number in ENDS}

    def slow(*args) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("went on")

    monkeypatch.setattr("ftd_lightning.commands.info.main", slow)
    with pytest.raises(SystemExit) as stop:
        cli.main(["info", "x"])
    assert stop.value.code == ENDS[number][0]
    assert capsys.readouterr().err == f"ftd: {ENDS[number][1]}: run the same command again\n"
    assert {number: signal.getsignal(number) for number in ENDS} == before


def test_errors_pass_through() -> None:
    with pytest.raises(KeyError), EndedBySignal():
        raise KeyError("a bug")
