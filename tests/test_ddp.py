"""Two processes with gloo on the CPU: what every rank ends with, and what one process would have got."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import SMALL, make_trainer, record, small_data, small_matching

from ftd_lightning import SyntheticSet, TrajectoryStore
from ftd_lightning.callbacks import SyntheticEMA
from ftd_lightning.data.loader import BatchOrder
from ftd_lightning.functional import gsam_direction, gsam_perturbation, load_flat
from ftd_lightning.models import ConvNet

RUN = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from fits import make_trainer, small_data, small_matching, small_teacher
from ftd_lightning import SyntheticEvaluation
from ftd_lightning.callbacks import EvaluateSynthetic, SyntheticEMA, SyntheticSetWriter, TrajectoryRecorder
from ftd_lightning.functional import flatten_parameters

folder = Path({folder!r})
parallel = dict(strategy="ddp", devices=2)
if {what!r} == "teacher":
    module = small_teacher(rho=0.1, network_options=dict(width=4, depth=1, norm={norm!r}))
    trainer = make_trainer(folder, callbacks=[TrajectoryRecorder()], **parallel)
    trainer.fit(module, datamodule=small_data())
    final = flatten_parameters(module.network)
elif {what!r} == "evaluate":
    module = SyntheticEvaluation(network_options=dict(width=4, depth=1), networks=2, augment="crop_scale")
    data = small_data(synthetic="random", ipc=2)
    trainer = make_trainer(folder, max_epochs=3, **parallel)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    final = torch.cat([torch.tensor(module.results["each"]), *map(flatten_parameters, module.networks)])
else:
    module = small_matching({trajectories!r}, augment="crop_scale")
    callbacks = [SyntheticEMA(0.9), EvaluateSynthetic(networks=1, epochs=1), SyntheticSetWriter()]
    trainer = make_trainer(folder, callbacks=callbacks, max_steps=4, **parallel)
    trainer.fit(module, datamodule=small_data())
    final = torch.cat([module.images.detach().flatten(), module.step_size.detach().view(1)])
torch.save(final, folder / f"rank{{trainer.global_rank}}.pt")
"""


def run_on_two(folder: Path, what: str, *, trajectories: Path | str = "", norm: str = "instance") -> list[torch.Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "run.py"
    tests = str(Path(__file__).parent)
    text = RUN.format(tests=tests, folder=str(folder), what=what, trajectories=str(trajectories), norm=norm)
    script.write_text(text)
    # gloo must not look for an interface that a sandboxed machine lacks.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def flat_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[torch.Tensor], TrajectoryStore]:
    """What both ranks ended with, and the store that they recorded."""
    folder = tmp_path_factory.mktemp("flat")
    return run_on_two(folder, "teacher"), TrajectoryStore(folder / "trajectories")


def test_flat_teachers_keep_all_ranks_equal(flat_run) -> None:
    (first, second), store = flat_run
    assert torch.equal(first, second)
    assert len(store) == 2
    assert torch.equal(store.trajectory(1)[-1], first)


def test_so_do_those_with_batchnorm(tmp_path: Path) -> None:
    first, second = run_on_two(tmp_path, "teacher", norm="batch")
    assert torch.equal(first, second)


def test_ranks_with_half_a_batch_each_step_along_the_mean_direction(flat_run) -> None:
    """The first epoch on two ranks, against both halves of every batch worked out here."""
    store, data = flat_run[1], small_data()
    data.setup()
    network, weights = ConvNet(1, 10, 8, **SMALL), store.trajectory(0)[0]

    def gradient(at: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        load_flat(network, at)
        loss = torch.nn.functional.cross_entropy(network(data.train.pictures[index]), data.train.labels[index])
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


def test_ranks_match_segments_of_their_own_and_share_the_images(tmp_path: Path) -> None:
    trajectories = record(tmp_path / "teachers")
    first, second = run_on_two(tmp_path / "distil", "distil", trajectories=trajectories)
    assert torch.equal(first, second)
    assert {"set.safetensors", "best.safetensors"} <= {path.name for path in (tmp_path / "distil").iterdir()}
    # One process with both segments in every step.
    one = small_matching(trajectories, augment="crop_scale", segments_per_step=2)
    make_trainer(tmp_path / "one", max_steps=4, callbacks=[SyntheticEMA(0.9)]).fit(one, datamodule=small_data())
    expected = torch.cat([one.images.detach().flatten(), one.step_size.detach().view(1)])
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-6)
    loaded = SyntheticSet.load(tmp_path / "distil" / "set.safetensors")
    torch.testing.assert_close(loaded.ema_images, one.ema_images, rtol=0, atol=1e-6)
    assert loaded.metadata["settings"]["segments_per_step"] == 2
    alone = small_matching(trajectories, augment="crop_scale")
    make_trainer(tmp_path / "alone", max_steps=4).fit(alone, datamodule=small_data())
    assert (alone.images - one.images).abs().max() > 1e-3, "the second rank's segments must matter"


def test_an_evaluation_on_two_ranks_ends_with_one_result(tmp_path: Path) -> None:
    """Files are written by the first rank alone, which must not ask the others where."""
    first, second = run_on_two(tmp_path, "evaluate")
    assert torch.equal(first, second)
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert results["each"] == pytest.approx(first[:2].tolist())
