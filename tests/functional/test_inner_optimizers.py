"""Inner optimizers in float64: torch's own updates, and adjoints against the full graph."""

import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from ftd_lightning.errors import InputError
from ftd_lightning.functional import (
    Augmentation,
    InnerAdam,
    InnerOptimizer,
    InnerSGD,
    chunked_permutations,
    flatten_parameters,
    load_flat,
    make_generator,
    roll_out,
    unroll,
)
from ftd_lightning.models import ConvNet

STEPS = 6


@dataclass(frozen=True)
class Nesterov(InnerOptimizer):
    """Somebody's own: momentum that looks ahead."""

    momentum: float

    def initial(self, weights):
        return (torch.zeros_like(weights),)

    def step(self, weights, gradient, state, lr, count):
        velocity = self.momentum * state[0] + gradient
        return weights - lr * (gradient + self.momentum * velocity), (velocity,)


OPTIMIZERS = {
    "plain": InnerSGD(),
    "momentum": InnerSGD(momentum=0.9),
    "decay": InnerSGD(weight_decay=0.1),
    "both": InnerSGD(momentum=0.7, weight_decay=0.05),
    "adam": InnerAdam(),
    "adam, other betas": InnerAdam(betas=(0.5, 0.9), eps=1e-3),
    "own": Nesterov(0.8),
}


def problem():
    torch.manual_seed(0)
    network = ConvNet(3, 4, 8, width=5, depth=2, norm="none").double()
    images = torch.randn(8, 3, 8, 8, dtype=torch.float64).requires_grad_()
    labels = torch.softmax(torch.randn(8, 4, dtype=torch.float64), 1).requires_grad_()
    start = flatten_parameters(network).requires_grad_()
    outward = torch.randn(start.shape, dtype=torch.float64)
    return network, start, images, labels, outward


# Without normalisation: a bias before one has a gradient of pure rounding error, which Adam blows up to its step size.


def gradients(optimizer, *, step_size=0.05, skip=0, method="adjoint", compiles=False):
    network, start, images, labels, outward = problem()
    lr = torch.as_tensor(step_size, dtype=torch.float64).requires_grad_()
    batches = chunked_permutations(8, STEPS, make_generator(0), batch_size=3)
    settings = {"batches": batches, "augment": Augmentation("crop_scale"), "seed": 1, "compile": compiles}
    end = unroll(network, start, images, labels, lr, **settings, method=method, optimizer=optimizer, skip=skip)
    inputs = [images, labels, lr, *([] if skip else [start])]
    return [end.detach(), *torch.autograd.grad((end * outward).sum(), inputs)]


@pytest.mark.parametrize("skip", [0, 4])
@pytest.mark.parametrize("step_size", [0.05, [0.02, 0.05, 0.1, 0.04, 0.03, 0.06]], ids=["one", "each"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_adjoint_is_the_full_graph_s_gradient(optimizer, step_size, skip):
    adjoint = gradients(optimizer, step_size=step_size, skip=skip)
    graph = gradients(optimizer, step_size=step_size, skip=skip, method="graph")
    for value, wanted in zip(adjoint, graph, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)
    lr_gradient = adjoint[3]
    assert lr_gradient.shape == torch.as_tensor(step_size).shape
    if lr_gradient.ndim:
        assert bool((lr_gradient[:skip] == 0).all())
        assert bool((lr_gradient[skip:] != 0).all())


@pytest.mark.parametrize("optimizer", [InnerSGD(momentum=0.9), InnerAdam()])
def test_skipped_steps_are_those_of_the_whole_run_without_their_gradient(optimizer):
    whole, cut = gradients(optimizer), gradients(optimizer, skip=4)
    torch.testing.assert_close(cut[0], whole[0], rtol=0, atol=0)
    assert not torch.allclose(cut[1], whole[1])
    assert bool((gradients(optimizer, skip=STEPS - 1)[1] != 0).any())


@pytest.mark.parametrize("optimizer", [InnerSGD(momentum=0.9, weight_decay=0.1), InnerAdam(betas=(0.8, 0.99))])
def test_steps_are_those_of_torch(optimizer):
    network, start, images, labels, _ = problem()
    load_flat(network, start.detach())
    if isinstance(optimizer, InnerSGD):
        theirs = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    else:
        theirs = torch.optim.Adam(network.parameters(), lr=0.05, betas=(0.8, 0.99))
    batches = chunked_permutations(8, STEPS, make_generator(0), batch_size=3)
    lr = torch.tensor(0.05, dtype=torch.float64)
    ours = list(roll_out(network, start, images, labels, lr, batches=batches, optimizer=optimizer, compile=False))
    for batch, weights in zip(batches, ours, strict=True):
        theirs.zero_grad()
        torch.nn.functional.cross_entropy(network(images.detach()[batch]), labels.detach()[batch]).backward()
        theirs.step()
        torch.testing.assert_close(weights, flatten_parameters(network), rtol=1e-9, atol=1e-12)


def test_adam_with_gradients_that_are_zero_has_a_finite_adjoint():
    """A bias that no class depends on, say: its u stays 0, whose root has no derivative."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    network = network.double()
    start = flatten_parameters(network)
    start[12:15] = -100.0  # hidden units that are never on
    images = torch.rand(4, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    batches = [torch.arange(4)] * 3
    end = unroll(network, start, images, torch.tensor([0, 1, 0, 1]), lr, batches=batches, optimizer=InnerAdam())
    for gradient in torch.autograd.grad(end.sum(), (images, lr)):
        assert bool(torch.isfinite(gradient).all())


def test_compiled_is_eager(monkeypatch):
    """With a backend that traces and runs the graph without generating code, which takes minutes."""
    module = sys.modules["ftd_lightning.functional.inner_step"]
    monkeypatch.setattr(module, "compiled", partial(module.compiled, backend="aot_eager"))
    eager, compiled = (gradients(InnerAdam(), compiles=compiles) for compiles in (False, True))
    for value, wanted in zip(compiled, eager, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-11)


def test_memory_of_activations_is_that_of_one_step():
    """What an unroll keeps: vectors, not graphs."""
    network, start, images, labels, _ = problem()
    lr = torch.tensor(0.05, dtype=torch.float64)
    settings = {"batches": [torch.arange(8)] * STEPS, "compile": False}
    end = unroll(network, start, images, labels, lr, **settings, optimizer=InnerAdam())
    saved = [tensor for tensor in end.grad_fn.saved_tensors if tensor.shape == start.shape]
    assert len(saved) == 4 * STEPS, "weights, gradient and two moments of every step"
    assert len(end.grad_fn.saved_tensors) == 4 * STEPS + 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InnerSGD(momentum=1.0), "momentum=1.0 must lie in"),
        (lambda: InnerSGD(weight_decay=-1.0), "weight_decay=-1.0 must be at least 0"),
        (lambda: InnerAdam(betas=(0.9, 1.0)), "must lie in"),
        (lambda: InnerAdam(betas=(0.9,)), "two numbers"),
        (lambda: InnerAdam(eps=0.0), "eps=0.0 must be above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"skip": 7}, "skip=7 is no number of the 6 steps"), ({"step_size": [0.1] * 5}, "one for all")],
)
def test_what_does_not_fit_the_steps_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gradients(InnerSGD(), **options)
