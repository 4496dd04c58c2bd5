"""Twenty kills at random moments of each phase, with checkpoints in the middle of epochs: the result is the same."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from fits import SMALL, make_trainer, record, small_data, small_matching
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from ftd_lightning import FlatTeacher, SyntheticEvaluation

pytestmark = [
    pytest.mark.slow,  # sixty processes
    pytest.mark.filterwarnings("ignore:.*manual optimization and every_n_train_steps.*"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning"),
]
KILLS = 20


class Report(Callback):
    """Tells the parent how many steps are done."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_batch_end(self, *args) -> None:
        os.write(self.pipe, b".")


def teachers(store: Path) -> tuple:
    module = FlatTeacher(network_options=SMALL, teachers=6, epochs=8, lr=0.05, momentum=0.9, rho=0.01)
    return module, small_data(), {}


def matching(store: Path) -> tuple:
    return small_matching(store, augment="crop", ipc=2, syn_batch=7), small_data(), {"max_steps": 220}


def evaluation(store: Path) -> tuple:
    module = SyntheticEvaluation(network_options=SMALL, networks=3)
    return module, small_data(synthetic="random", ipc=2, batch_size=8), {"max_epochs": 80}


def run(phase, folder: Path, store: Path, pipe: int) -> None:
    torch.set_num_threads(1)
    last = folder / "checkpoints" / "last.ckpt"
    keep = ModelCheckpoint(dirpath=folder / "checkpoints", save_last=True, every_n_train_steps=7)
    module, data, limits = phase(store)
    trainer = make_trainer(folder, callbacks=[keep, Report(pipe)], enable_checkpointing=True, **limits)
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None)
    if isinstance(module, SyntheticEvaluation):
        trainer.test(module, datamodule=data, verbose=False)


def child(phase, folder: Path, store: Path, *, steps: int | None, pause: float) -> bool:
    """Run a phase in a process of its own, and kill it after so many steps; return whether it was killed."""
    readable, writable = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(readable)
            run(phase, folder, store, writable)
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.close(writable)
    done, killed = 0, False
    while piece := os.read(readable, 1 if steps is not None else 1 << 16):
        done += len(piece)
        if steps is not None and done >= steps:
            time.sleep(pause)
            os.kill(process, signal.SIGKILL)
            killed = True
            break
    os.close(readable)
    _, status = os.waitpid(process, 0)
    assert killed or status == 0
    return killed and os.WIFSIGNALED(status)


def artefacts(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.suffix == ".safetensors" or path.name == "evaluation.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if ".unfinished" not in path.parts}


@pytest.mark.parametrize("phase", [teachers, matching, evaluation], ids=lambda phase: phase.__name__)
def test_kills_at_random_moments(phase, tmp_path: Path) -> None:
    store = record(tmp_path / "store")
    child(phase, tmp_path / "whole", store, steps=None, pause=0)
    expected = artefacts(tmp_path / "whole")
    assert expected
    moments = random.Random(0)
    kills = sum(
        child(phase, tmp_path / "killed", store, steps=moments.randint(1, 16), pause=moments.uniform(0, 0.01))
        for _ in range(KILLS)
    )
    assert kills == KILLS
    child(phase, tmp_path / "killed", store, steps=None, pause=0)
    assert artefacts(tmp_path / "killed") == expected
