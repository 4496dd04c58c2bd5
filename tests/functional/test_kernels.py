"""Kernels of infinite networks: against the recursion in loops, and against wide networks; and ridge regression."""

import itertools
import math

import pytest
import torch
from torch.func import functional_call, jacrev

from ftd_lightning.functional import (
    centred_targets,
    half_squared_error,
    nngp_kernel,
    ntk_kernel,
    ridge_predictions,
    target_probabilities,
)

SETTINGS = [(1, 0.0), (3, 0.1)]


def inputs(rows, dimension=6, *, seed=0):
    return torch.randn(rows, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(x, z, depth, b):
    """The recursion for one pair after the other, with E[relu relu] and E[relu' relu'] as Cho and Saul have them."""
    nngp, ntk = torch.zeros(len(x), len(z)).double(), torch.zeros(len(x), len(z)).double()
    for i, p in enumerate(x.tolist()):
        for j, q in enumerate(z.tolist()):
            size = len(p)
            pp = 2 * sum(v * v for v in p) / size + b
            qq = 2 * sum(v * v for v in q) / size + b
            pq = 2 * sum(v * w for v, w in zip(p, q, strict=True)) / size + b
            tangent = pq
            for _ in range(depth):
                root = math.sqrt(pp * qq)
                angle = math.acos(max(-1.0, min(1.0, pq / root)))
                both_active = (math.pi - angle) / (2 * math.pi)
                product = root * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
                pq, pp, qq = 2 * product + b, 2 * pp / 2 + b, 2 * qq / 2 + b
                tangent = pq + 2 * both_active * tangent
            nngp[i, j], ntk[i, j] = pq, tangent
    return nngp, ntk


@pytest.mark.parametrize(("depth", "b"), SETTINGS)
def test_kernels_are_the_recursion(depth, b) -> None:
    x, z = inputs(4), inputs(3, seed=1)
    nngp, ntk = by_loops(x, z, depth, b)
    torch.testing.assert_close(nngp_kernel(x, z, depth=depth, bias_variance=b), nngp, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ntk_kernel(x, z, depth=depth, bias_variance=b), ntk, rtol=1e-12, atol=1e-12)


class Wide(torch.nn.Module):
    """The network of the module's docstring, of a finite width."""

    def __init__(self, dimension, width, depth, b, seed):
        super().__init__()
        sizes = [dimension, *[width] * depth, 1]
        generator = torch.Generator().manual_seed(seed)
        self.b, self.depth = b, depth
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            draw = [torch.randn(*size, generator=generator).double() for size in ((fan_out, fan_in), (fan_out,))]
            self.register_parameter(f"w{layer}", torch.nn.Parameter(draw[0]))
            self.register_parameter(f"b{layer}", torch.nn.Parameter(draw[1]))

    def layer(self, index, x):
        w, bias = getattr(self, f"w{index}"), getattr(self, f"b{index}")
        return math.sqrt(2 / x.shape[1]) * x @ w.T + math.sqrt(self.b) * bias

    def features(self, x):
        """Activations of the last hidden layer, (N, width)."""
        for index in range(self.depth):
            x = torch.relu(self.layer(index, x))
        return x

    def forward(self, x):
        return self.layer(self.depth, self.features(x)).squeeze(1)


@pytest.mark.parametrize(("depth", "b"), SETTINGS)
def test_nngp_is_that_of_wide_networks(depth, b) -> None:
    """The mean of 8 networks of width 1024: entries are of the order of 2, and vary by about depth / sqrt(8 * 1024)."""
    x, z, width = inputs(4), inputs(3, seed=1), 1024
    networks = [Wide(6, width, depth, b, seed) for seed in range(8)]
    with torch.no_grad():
        seen = sum(2 / width * net.features(x) @ net.features(z).T + b for net in networks) / len(networks)
    exact = nngp_kernel(x, z, depth=depth, bias_variance=b)
    assert float((seen - exact).abs().max()) < 0.05 * depth * float(exact.abs().max())


@pytest.mark.parametrize(("depth", "b"), SETTINGS)
def test_ntk_is_that_of_a_wide_network(depth, b) -> None:
    x, z, width = inputs(3), inputs(2, seed=1), 1024
    network = Wide(6, width, depth, b, 0)
    weights = {name: p.detach() for name, p in network.named_parameters()}

    def gradients(rows):
        found = jacrev(lambda p: functional_call(network, p, (rows,)))(weights)
        return torch.cat([g.flatten(1) for g in found.values()], dim=1)

    seen, exact = gradients(x) @ gradients(z).T, ntk_kernel(x, z, depth=depth, bias_variance=b)
    assert float((seen - exact).abs().max()) < 0.15 * float(exact.abs().max())
    assert float((exact - nngp_kernel(x, z, depth=depth, bias_variance=b)).abs().max()) > 0.3 * float(exact.abs().max())


@pytest.mark.parametrize("kernel", [nngp_kernel, ntk_kernel])
def test_gradients(kernel) -> None:
    x, z = inputs(3).requires_grad_(), inputs(2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, c: kernel(a, c, depth=2, bias_variance=0.1), (x, z))
    assert torch.autograd.gradcheck(lambda a: kernel(a, a, depth=2), (x,))  # its diagonal: each image with itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [nngp_kernel, ntk_kernel])
def test_gradients_are_finite_at_equal_opposite_and_empty_images(kernel, dtype) -> None:
    start = inputs(4).to(dtype)
    x = torch.stack([start[0], start[0], start[1], -start[1], torch.zeros(6, dtype=dtype)]).requires_grad_()
    value = kernel(x, x, depth=3)
    assert torch.isfinite(torch.autograd.grad(value.sin().sum(), x)[0]).all()
    value = value.detach()
    exact = 2 * start[0].square().mean() * (1 if kernel is nngp_kernel else 4)
    torch.testing.assert_close(value[:2, :2], exact.expand(2, 2), rtol=1e-5, atol=0)
    assert float(value[4].abs().max()) < 1e-5


# Ridge regression.


def test_predictions_are_those_of_the_normal_equations() -> None:
    """Weights w = (F'F + c I)^-1 F'y in the features: the same ridge, by a system of another size."""
    features, others, y = inputs(7, 4), inputs(5, 4, seed=1), inputs(7, 3, seed=2)
    kernel = features @ features.T
    amount = 0.03 * float(kernel.trace()) / 7
    weights = torch.linalg.inv(features.T @ features + amount * torch.eye(4).double()) @ features.T @ y
    predicted = ridge_predictions(others @ features.T, kernel, y, reg=0.03)
    torch.testing.assert_close(predicted, others @ weights, rtol=1e-9, atol=1e-9)


def test_gradients_of_ridge_regression() -> None:
    given = [
        inputs(3, 4).requires_grad_(),
        inputs(4, 6, seed=1).requires_grad_(),
        inputs(4, 2, seed=2).requires_grad_(),
    ]
    assert torch.autograd.gradcheck(lambda t, f, y: ridge_predictions(t, f @ f.T, y, reg=0.1), given)


def test_float32_targets_lose_no_more_than_their_own_rounding() -> None:
    """Eigenvalues from 1 to 1e-9 and reg 1e-6: solved in float32 the answer would be off by tens of per cent."""
    basis = torch.linalg.qr(inputs(8, 8)).Q
    kernel = basis @ torch.diag(torch.logspace(0, -9, 8, dtype=torch.float64)) @ basis.T
    exact = ridge_predictions(kernel, kernel, inputs(8, 2), reg=1e-6)
    rounded = ridge_predictions(kernel, kernel, inputs(8, 2).float(), reg=1e-6)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-6)


def test_the_loss_is_half_the_mean_of_squared_norms() -> None:
    predictions, targets = inputs(5, 3), inputs(5, 3, seed=1)
    torch.testing.assert_close(half_squared_error(predictions, targets), (predictions - targets).norm() ** 2 / 10)


def test_a_singular_system_is_no_error() -> None:
    assert not torch.isfinite(ridge_predictions(torch.ones(1, 2), torch.zeros(2, 2), torch.ones(2, 1), reg=0.0)).any()


def test_targets_and_probabilities_are_inverse_for_classes() -> None:
    labels = torch.tensor([0, 2, 1])
    for scale in (1.0, 0.5):
        targets = centred_targets(labels, 3, scale=scale)
        torch.testing.assert_close(targets.sum(1), torch.zeros(3))
        assert torch.equal(target_probabilities(targets, scale=scale), torch.eye(3)[labels])


def test_any_targets_become_probabilities() -> None:
    made = target_probabilities(torch.cat([3 * inputs(50, 4).float(), torch.full((1, 4), -9.0)]))
    assert float(made.min()) == 0.0
    torch.testing.assert_close(made.sum(1), torch.ones(51))
    assert torch.equal(made[-1], torch.full((4,), 0.25))
