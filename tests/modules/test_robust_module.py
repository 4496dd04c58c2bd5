"""Robust learning (Eq. 9) as an option of TrajectoryMatching."""

from pathlib import Path

import pytest
import torch
from fits import distil, record

from ftd_lightning import SyntheticSet, TrajectoryMatching, TrajectoryStore
from ftd_lightning.callbacks import SyntheticSetWriter
from ftd_lightning.functional import chunked_permutations, make_generator, start_noise, unroll
from ftd_lightning.models import ConvNet


@pytest.mark.parametrize("residual", ["displacement", "endpoint"])
def test_an_iteration_is_eq_9_with_the_noise_of_its_seed(tmp_path: Path, trajectories: Path, residual: str) -> None:
    """Two iterations of gradient descent without momentum, written out with the full graph."""
    module = distil(tmp_path, trajectories, steps=2, robust=0.3, robust_residual=residual, momentum=0.0, seed=5)
    store, network = TrajectoryStore(trajectories), ConvNet(1, 10, 8, width=4, depth=1)
    images, step_size, loader = module.initial_images.clone(), torch.tensor(0.1), module.iteration_loader()
    for iteration in range(2):
        drawn = loader.draw(iteration)
        start, target = store.segment(drawn["teacher"], drawn["start_epoch"], 1)
        eps = start_noise(start, target, make_generator(5, "robust", iteration, 0), kappa=0.3)
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
    off, zero, on = (distil(tmp_path, trajectories, steps=3, robust=kappa) for kappa in (None, 0.0, 0.3))
    assert torch.equal(off.images, zero.images)
    assert torch.equal(off.step_size, zero.step_size)
    assert not torch.equal(off.images, on.images)


def test_same_seed_gives_the_same_bits(tmp_path: Path, trajectories: Path) -> None:
    files = []
    for name in "ab":
        writer = SyntheticSetWriter(str(tmp_path / f"{name}.safetensors"))
        distil(tmp_path, trajectories, steps=4, callbacks=[writer], robust=0.1)
        files.append(writer.path.read_bytes())
    assert files[0] == files[1]


def test_the_set_says_how_it_was_made(tmp_path: Path, trajectories: Path) -> None:
    writer = SyntheticSetWriter(str(tmp_path / "set.safetensors"))
    distil(tmp_path, trajectories, steps=1, callbacks=[writer], robust=0.1, robust_residual="endpoint")
    metadata = SyntheticSet.load(writer.path).metadata
    assert metadata["method"] == "mtt+robust"
    assert (metadata["settings"]["robust"], metadata["settings"]["robust_residual"]) == (0.1, "endpoint")
    assert distil(tmp_path, trajectories, steps=1, robust=0.0).method == "mtt"
    assert distil(tmp_path, record(tmp_path, rho=0.05), steps=1, robust=0.1).method == "ftd+robust"


@pytest.mark.parametrize("kappa", [-0.1, float("nan"), float("inf")])
def test_a_kappa_that_makes_no_sense_is_refused(refused, kappa: float) -> None:
    with refused(f"robust={kappa}"):
        TrajectoryMatching("nowhere", robust=kappa)
