"""Teachers on two processes with gloo on the CPU, against those of one process; a killed rank; runs of other worlds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import SMALL, make_trainer, small_data, small_teacher
from lightning.pytorch.callbacks import ModelCheckpoint

from ftd_lightning import TrajectoryStore
from ftd_lightning.callbacks import AtomicCheckpointIO, TrajectoryRecorder
from ftd_lightning.data.loaders import BatchOrder
from ftd_lightning.errors import InputError
from ftd_lightning.functional import gsam_direction, gsam_perturbation, load_flat
from ftd_lightning.models import ConvNet

pytestmark = pytest.mark.slow  # processes

THREE = {"teachers": 3, "epochs": 3, "rho": 0.1, "momentum": 0.9, "augment": "crop_scale"}
FOUR = {**THREE, "teachers": 4}


def options(norm):
    return {"network_options": {**SMALL, "norm": norm}}


def fit(folder, *, ckpt_path=None, callbacks=(), trainer=None, **teacher):
    """Record teachers with a checkpoint every epoch; gives the module."""
    # Not save_last with save_top_k 0: lightning 2.6 then saves at the end of the fit alone.
    last = ModelCheckpoint(dirpath=folder / "checkpoints", filename="last", save_top_k=1, enable_version_counter=False)
    settings = {"callbacks": [TrajectoryRecorder(), last, *callbacks], "enable_checkpointing": True, **(trainer or {})}
    module = small_teacher(**teacher)
    trainer = make_trainer(folder, plugins=[AtomicCheckpointIO()], **settings)
    trainer.fit(module, datamodule=small_data(), ckpt_path=ckpt_path)
    return module


def store_files(folder):
    return {path.name: path.read_bytes() for path in (folder / "trajectories").glob("teacher_*.safetensors")}


COMMON = """
import json, os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from fits import make_trainer, small_data, small_teacher
from lightning.pytorch import Callback
from test_ddp_teachers import FOUR, THREE, fit, options
from ftd_lightning.errors import InputError
from ftd_lightning.functional import flatten_parameters

folder, two = Path({folder!r}), dict(strategy="ddp", devices=2)
rank = int(os.environ.get("LOCAL_RANK", 0))
"""

MANY_FITS = """
for norm in ("instance", "batch"):
    # Where a run's files go is for the first rank to say.
    root = folder / "teachers" / norm if rank == 0 else folder / "elsewhere"
    fit(folder / "teachers" / norm, trainer=dict(two, default_root_dir=str(root)), **THREE, **options(norm))
for norm in ("instance", "batch"):
    module = fit(folder / "data" / norm, trainer=two, rho=0.1, parallel="data", **options(norm))
    torch.save(flatten_parameters(module.network), folder / f"{norm}{rank}.pt")
images = torch.utils.data.TensorDataset(torch.randn(12, 1, 8, 8), torch.zeros(12, dtype=torch.int64))
module = small_teacher(network=lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))
try:
    make_trainer(folder / "own", **two).fit(module, torch.utils.data.DataLoader(images, batch_size=4))
except InputError as error:
    (folder / f"refused{rank}").write_text(str(error))
unsplit = make_trainer(folder / "own", use_distributed_sampler=False, **two)
unsplit.fit(module, torch.utils.data.DataLoader(images, batch_size=4))
(folder / f"batches{rank}").write_text(str(unsplit.num_training_batches))
"""

KILLED_OR_RESUMED = """
class Killed(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx, rank) == (4, 1, 1):
            os.kill(os.getpid(), signal.SIGKILL)

class FirstEpoch(Callback):
    def on_train_start(self, trainer, module):
        (folder / f"resumed{rank}.json").write_text(json.dumps([trainer.current_epoch, module.teacher]))

callbacks = [Killed()] if sys.argv[1] == "kill" else [FirstEpoch()]
module = fit(folder, trainer=two, ckpt_path="last", callbacks=callbacks, **FOUR, **options("batch"))
torch.save(module.network.state_dict(), folder / f"last{rank}.pt")
"""


def run_on_two(folder: Path, script: str, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.py").write_text(COMMON.format(tests=str(Path(__file__).parent), folder=str(folder)) + script)
    # gloo must not look for an interface that a sandboxed machine lacks.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, folder / "run.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of several fits on the same two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    done = run_on_two(folder, MANY_FITS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sync_dist" not in done.stderr
    return folder


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_two_ranks_record_the_teachers_of_one_process(run: Path, tmp_path: Path, norm: str) -> None:
    """Three teachers on two ranks: the fourth, which fills up the last round, is not recorded."""
    fit(tmp_path, **THREE, **options(norm))
    expected = store_files(tmp_path)
    assert len(expected) == 3
    assert store_files(run / "teachers" / norm) == expected
    assert sorted(path.name for path in (run / "teachers" / norm / "trajectories").iterdir()) == [
        "data.safetensors",
        *sorted(expected),
    ]


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_ranks_that_share_batches_stay_equal(run: Path, norm: str) -> None:
    first, second = (torch.load(run / f"{norm}{rank}.pt", weights_only=True) for rank in range(2))
    store = TrajectoryStore(run / "data" / norm / "trajectories")
    assert torch.equal(first, second)
    assert len(store) == 2
    assert torch.equal(store.trajectory(1)[-1], first)


def test_ranks_with_half_a_batch_each_step_along_the_mean_direction(run: Path) -> None:
    """The first epoch on two ranks, against both halves of every batch worked out here."""
    store, data = TrajectoryStore(run / "data" / "instance" / "trajectories"), small_data()
    data.setup()
    network, weights = ConvNet(1, 10, 8, **SMALL), store.trajectory(0)[0]

    def gradient(at: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        load_flat(network, at)
        loss = torch.nn.functional.cross_entropy(network(data.train.images[index]), data.train.labels[index])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])

    count = len(data.train.labels)
    orders = [list(BatchOrder(count, 32, shuffle=True, rank=rank, world_size=2)) for rank in range(2)]
    for indices in zip(*orders, strict=True):
        directions = []
        for index in indices:
            g = gradient(weights, index)
            g_p = gradient(weights + gsam_perturbation([weights], [g], rho=0.1)[0], index)
            directions += gsam_direction([g], [g_p], alpha=1.0)
        weights = weights - 0.1 * torch.stack(directions).mean(0)
    torch.testing.assert_close(weights, store.trajectory(0)[1], rtol=1e-4, atol=1e-5)


def test_a_loader_that_lightning_splits_is_refused_and_a_whole_one_is_not(run: Path) -> None:
    for rank in range(2):
        message = (run / f"refused{rank}").read_text()
        assert "--trainer.use_distributed_sampler false" in message
        assert "\n" not in message
        assert (run / f"batches{rank}").read_text() == "3"


def test_a_killed_rank_ends_the_run_and_a_resumed_one_records_the_same_teachers(tmp_path: Path) -> None:
    """Killed in the second epoch of the second round: one teacher of each rank is done, one is under way."""
    folder = tmp_path / "killed"
    killed = run_on_two(folder, KILLED_OR_RESUMED, "kill", timeout=120)
    assert killed.returncode != 0
    assert sorted(store_files(folder)) == ["teacher_0000.safetensors", "teacher_0001.safetensors"]
    with pytest.raises(InputError, match=r"saved by 2 process.*this run has 1.*devices"):
        fit(tmp_path / "alone", ckpt_path=str(folder / "checkpoints" / "last.ckpt"), **FOUR, **options("batch"))

    resumed = run_on_two(folder, KILLED_OR_RESUMED, "resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert [json.loads((folder / f"resumed{rank}.json").read_text()) for rank in range(2)] == [[4, 2], [4, 3]]
    whole = fit(tmp_path / "whole", **FOUR, **options("batch")).network.state_dict()
    assert len(store_files(folder)) == 4
    assert store_files(folder) == store_files(tmp_path / "whole")
    assert not (folder / "trajectories" / ".unfinished").exists()
    # Running statistics too, which no trajectory shows: DDP copies the first rank's before its first step.
    last = torch.load(folder / "last1.pt", weights_only=True)
    assert "running_var" in str(last.keys())
    assert all(value.equal(whole[name]) for name, value in last.items())
