"""Robust learning, Eq. 9: the noise, and what of it stays in the loss."""

import math

import pytest
import torch
from torch import nn

from ftd_lightning.functional import make_generator, trajectory_matching_loss, unroll
from ftd_lightning.rules import RobustStart, start_noise

RESIDUALS = ["displacement", "endpoint"]
KAPPA, SEED = 0.1, 3


@pytest.fixture
def problem():
    generator = make_generator(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    start, target = torch.randn(2, 16, generator=generator, dtype=torch.float64).unbind()
    images = torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    batches = [torch.tensor([0, 1, 2]), torch.tensor([3]), torch.tensor([1, 3])]
    noise = start_noise(start, target, make_generator(SEED, "robust"), kappa=KAPPA)
    return (network, start, target, images, torch.tensor([0, 1, 0, 1]), lr), {"batches": batches, "seed": SEED}, noise


def rules(residual, kappa=KAPPA):
    return [RobustStart(kappa, residual=residual)]


def test_noise_is_in_proportion_to_the_segment():
    start, target = torch.zeros(200_000), torch.full((200_000,), 0.25)
    for kappa in (0.01, 0.3):
        eps = start_noise(start, target, make_generator(0), kappa=kappa)
        sigma = kappa * float((start - target).norm()) / math.sqrt(len(start))
        assert float(eps.std()) == pytest.approx(sigma, rel=0.01)
        assert abs(float(eps.mean())) < 5 * sigma / math.sqrt(len(start))
        assert float(eps.norm() / (start - target).norm()) == pytest.approx(kappa, rel=0.01)
    # Twice the displacement, twice the noise, and the same draws.
    further = start_noise(start, 2 * target, make_generator(0), kappa=0.3)
    torch.testing.assert_close(further, 2 * eps)


def test_noise_is_gaussian():
    eps = start_noise(torch.zeros(100_000), torch.ones(100_000), make_generator(1), kappa=1.0)
    inside = [float((eps.abs() < width).float().mean()) for width in (1.0, 2.0, 3.0)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.005)


def test_noise_is_a_function_of_the_generator():
    start, target = torch.zeros(10, dtype=torch.float64), torch.ones(10, dtype=torch.float64)
    a, b, c = (start_noise(start, target, make_generator(seed), kappa=0.1) for seed in (0, 0, 1))
    assert a.equal(b)
    assert not a.equal(c)
    assert a.dtype == torch.float64
    assert not start_noise(start, target, make_generator(0), kappa=0.0).any()


@pytest.mark.parametrize("method", ["adjoint", "graph"])
def test_against_eq_9_written_out(problem, method):
    (network, start, target, images, labels, lr), options, noise = problem
    theta = unroll(network, start + noise, images, labels, lr, **options, method="graph")
    scale = ((target - start) ** 2).sum()
    student, teacher = theta - (start + noise), target - start
    expected = {
        "displacement": ((student - teacher) ** 2).sum() / scale,
        "endpoint": ((theta - target) ** 2).sum() / scale,
    }
    assert float((expected["displacement"] - expected["endpoint"]).detach().abs()) > 1e-4
    for residual, value in expected.items():
        loss = trajectory_matching_loss(
            network, start, target, images, labels, lr, **options, unroll=method, rules=rules(residual)
        )
        torch.testing.assert_close(loss, value, rtol=1e-12, atol=0)
        got = torch.autograd.grad(loss, [images, lr])
        wanted = torch.autograd.grad(value, [images, lr], retain_graph=True)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_noise_of_zero_is_plain_matching_bit_for_bit(problem, residual):
    arguments, options, _ = problem
    found = []
    for chosen in ((), rules(residual, kappa=0.0)):
        loss = trajectory_matching_loss(*arguments, **options, rules=chosen)
        found.append([loss, *torch.autograd.grad(loss, [arguments[3], arguments[5]])])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_gradcheck_with_noise(problem, residual):
    (network, start, target, images, labels, lr), options, _ = problem

    def loss(images, lr):
        return trajectory_matching_loss(
            network, start, target, images, labels, lr, **options, rules=rules(residual, kappa=1.0)
        )

    assert torch.autograd.gradcheck(loss, (images, lr))


def test_a_student_whose_noise_reaches_the_target_without_a_step():
    """The two residuals differ as much as they can: nothing was done, but the student is at the target."""
    start, target = torch.zeros(2), torch.tensor([3.0, 4.0])
    for residual, distance in (("displacement", 1.0), ("endpoint", 0.0)):
        compared = RobustStart(kappa=1.0, residual=residual).compared(target, target - start)
        assert float((compared - target).square().sum() / 25) == distance


@pytest.mark.parametrize("kappa", [-0.1, math.inf, math.nan])
def test_kappa_out_of_range_is_refused(kappa, refused):
    with refused(f"kappa={kappa}"):
        RobustStart(kappa)


def test_an_unknown_residual_is_refused(refused):
    with refused("residual='end'", "displacement", "endpoint"):
        RobustStart(0.1, residual="end")
