"""Robust learning (Eq. 9) as an option of TrajectoryMatching."""

from pathlib import Path

import pytest
import torch
from fits import distil, record

from ftd_lightning import SyntheticSet, TrajectoryStore
from ftd_lightning.callbacks import SyntheticSetWriter
from ftd_lightning.functional import chunked_permutations, derive_seed, make_generator, unroll
from ftd_lightning.models import ConvNet
from ftd_lightning.rules import RobustStart, start_noise


@pytest.mark.parametrize("residual", ["displacement", "endpoint"])
def test_an_iteration_is_eq_9_with_the_noise_of_its_seed(tmp_path: Path, trajectories: Path, residual: str) -> None:
    """Two iterations of gradient descent without momentum, written out with the full graph."""
    module = distil(tmp_path, trajectories, steps=2, rules=[RobustStart(0.3, residual)], momentum=0.0, seed=5)
    store, network = TrajectoryStore(trajectories), ConvNet(1, 10, 8, width=4, depth=1)
    images, step_size, loader = module.initial_images.clone(), torch.tensor(0.1), module.iteration_loader()
    for iteration in range(2):
        drawn = loader.draw(iteration)
        start, target = store.segment(drawn["teacher"], drawn["start_epoch"], 1)
        eps = start_noise(start, target, make_generator(derive_seed(5, "dsa", iteration, 0), "robust"), kappa=0.3)
        inputs = [images.requires_grad_(), step_size.requires_grad_()]
        batches = chunked_permutations(10, 3, make_generator(0))
        end = unroll(network, start + eps, images, module.labels, step_size, batches=batches, method="graph")
        gap = end - target - (eps if residual == "displacement" else 0)
        gradients = torch.autograd.grad((gap**2).sum() / ((start - target) ** 2).sum(), inputs)
        images = images.detach() - 10.0 * gradients[0]
        step_size = step_size.detach() - 1e-3 * gradients[1]
    torch.testing.assert_close(module.images.detach(), images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.step_size.detach(), step_size, rtol=1e-4, atol=1e-6)


def test_off_and_zero_are_the_same_bits_and_noise_is_not(tmp_path: Path, trajectories: Path) -> None:
    off = distil(tmp_path / "off", trajectories, steps=3)
    zero, on = (
        distil(tmp_path / str(kappa), trajectories, steps=3, rules=[RobustStart(kappa)]) for kappa in (0.0, 0.3)
    )
    assert torch.equal(off.images, zero.images)
    assert torch.equal(off.step_size, zero.step_size)
    assert not torch.equal(off.images, on.images)


def test_same_seed_gives_the_same_bits(tmp_path: Path, trajectories: Path) -> None:
    files = []
    for name in "ab":
        writer = SyntheticSetWriter(str(tmp_path / f"{name}.safetensors"))
        distil(tmp_path, trajectories, steps=4, callbacks=[writer], rules=[RobustStart(0.1)])
        files.append(writer.path.read_bytes())
    assert files[0] == files[1]


def test_the_set_says_how_it_was_made(tmp_path: Path, trajectories: Path) -> None:
    writer = SyntheticSetWriter(str(tmp_path / "set.safetensors"))
    distil(tmp_path, trajectories, steps=1, callbacks=[writer], rules=[RobustStart(0.1, "endpoint")])
    metadata = SyntheticSet.load(writer.path).metadata
    assert metadata["method"] == "mtt+robust"
    (rule,) = metadata["settings"]["rules"]
    assert rule["init_args"] == {"kappa": 0.1, "residual": "endpoint"}
    flat = distil(tmp_path / "flat", record(tmp_path, rho=0.05), steps=1, rules=[RobustStart(0.1)])
    assert flat.method == "ftd+robust"
