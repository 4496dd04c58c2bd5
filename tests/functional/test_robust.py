"""Robust learning, Eq. 9: the noise, and what of it stays in the loss."""

import math

import pytest
import torch
from torch import nn

from ftd_lightning.functional import make_generator, start_noise, trajectory_matching_loss, unroll


@pytest.fixture
def problem():
    generator = make_generator(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    start, target, direction = torch.randn(3, 16, generator=generator, dtype=torch.float64).unbind()
    images = torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    batches = [torch.tensor([0, 1, 2]), torch.tensor([3]), torch.tensor([1, 3])]
    arguments = (network, start, target, images, torch.tensor([0, 1, 0, 1]), lr)
    return arguments, batches, 0.1 * direction


def test_noise_is_in_proportion_to_the_segment():
    start, target = torch.zeros(200_000), torch.full((200_000,), 0.25)
    for kappa in (0.01, 0.3):
        eps = start_noise(start, target, make_generator(0), kappa=kappa)
        sigma = kappa * float((start - target).norm()) / math.sqrt(len(start))
        assert float(eps.std()) == pytest.approx(sigma, rel=0.01)
        assert abs(float(eps.mean())) < 5 * sigma / math.sqrt(len(start))
        assert float(eps.norm() / (start - target).norm()) == pytest.approx(kappa, rel=0.01)
    # Twice the way, twice the noise, and the same draws.
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
    (network, start, target, images, labels, lr), batches, noise = problem
    theta = unroll(network, start + noise, images, labels, lr, batches=batches, method="graph")
    way = ((target - start) ** 2).sum()
    student, teacher = theta - (start + noise), target - start
    expected = {
        "displacement": ((student - teacher) ** 2).sum() / way,
        "endpoint": ((theta - target) ** 2).sum() / way,
    }
    for residual, value in expected.items():
        loss = trajectory_matching_loss(
            network,
            start,
            target,
            images,
            labels,
            lr,
            batches=batches,
            unroll=method,
            noise=noise,
            residual=residual,
        )
        torch.testing.assert_close(loss, value, rtol=1e-12, atol=0)
        got = torch.autograd.grad(loss, [images, lr])
        wanted = torch.autograd.grad(value, [images, lr], retain_graph=True)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)


def test_the_readings_differ_by_the_noise(problem):
    """||r + eps||^2 = ||r||^2 + 2 <r, eps> + ||eps||^2, over the same denominator."""
    (network, start, target, images, labels, lr), batches, noise = problem
    arguments = (network, start, target, images, labels, lr)
    near, far = (
        trajectory_matching_loss(*arguments, batches=batches, noise=noise, residual=residual)
        for residual in ("displacement", "endpoint")
    )
    theta = unroll(network, start + noise, images, labels, lr, batches=batches)
    residual = theta - noise - target
    difference = (2 * residual @ noise + noise @ noise) / ((start - target) ** 2).sum()
    torch.testing.assert_close(far - near, difference, rtol=1e-10, atol=1e-14)
    assert float(difference.detach().abs()) > 1e-4


@pytest.mark.parametrize("residual", ["displacement", "endpoint"])
def test_no_noise_and_noise_of_zero_are_plain_matching_bit_for_bit(problem, residual):
    arguments, batches, noise = problem
    plain = trajectory_matching_loss(*arguments, batches=batches)
    for eps in (None, torch.zeros_like(noise)):
        loss = trajectory_matching_loss(*arguments, batches=batches, noise=eps, residual=residual)
        assert loss.equal(plain)
        for got, wanted in zip(
            torch.autograd.grad(loss, [arguments[3], arguments[5]]),
            torch.autograd.grad(plain, [arguments[3], arguments[5]], retain_graph=True),
            strict=True,
        ):
            assert got.equal(wanted)


@pytest.mark.parametrize("residual", ["displacement", "endpoint"])
def test_gradcheck_with_noise(problem, residual):
    (network, start, target, images, labels, lr), batches, noise = problem

    def loss(images, lr):
        return trajectory_matching_loss(
            network, start, target, images, labels, lr, batches=batches, noise=noise, residual=residual
        )

    assert torch.autograd.gradcheck(loss, (images, lr))


def test_noise_that_lands_on_the_target_is_nothing_done_but_there():
    """No inner step at all: the two readings disagree as far as they can."""
    network = nn.Linear(1, 2, bias=False).double()
    start = torch.zeros(2, dtype=torch.float64)
    target = torch.tensor([3.0, 4.0], dtype=torch.float64)
    noise = torch.tensor([3.0, 4.0], dtype=torch.float64)
    rest = (torch.ones(1, 1, dtype=torch.float64), torch.tensor([0]), torch.tensor(1.0, dtype=torch.float64))
    values = [
        float(trajectory_matching_loss(network, start, target, *rest, batches=[], noise=noise, residual=residual))
        for residual in ("displacement", "endpoint")
    ]
    assert values == [1.0, 0.0]


def test_an_unknown_residual_is_refused(problem):
    arguments, batches, noise = problem
    with pytest.raises(ValueError, match="residual 'end' is unknown"):
        trajectory_matching_loss(*arguments, batches=batches, noise=noise, residual="end")
