"""GSAM as an optimizer: a case by hand, its limits (SGD, SAM), and what a step must leave alone."""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ftd_lightning.functional import flatten_parameters, gsam_perturbation, make_generator, seeded
from ftd_lightning.models import ConvNet
from ftd_lightning.optim import GSAM, frozen_running_statistics

SGD = functools.partial(torch.optim.SGD, lr=0.1)
MOMENTUM = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)


def small_network(seed=0, norm="instance"):
    with seeded(seed, "network"):
        return ConvNet(1, 3, 8, width=4, depth=2, norm=norm)


def batches(count, seed=0):
    generator = make_generator(seed, "batches")
    for _ in range(count):
        yield torch.randn(6, 1, 8, 8, generator=generator), torch.randint(3, (6,), generator=generator)


def closure_of(network, images, labels):
    def closure():
        loss = cross_entropy(network(images), labels)
        loss.backward()
        return loss

    return closure


def train(network, optimizer, data):
    for images, labels in data:
        optimizer.step(closure_of(network, images, labels))
    return flatten_parameters(network)


def two_weights(loss, start, **options):
    """One GSAM step with SGD of learning rate 0.1 on a function of two weights; gives where it lands."""
    weights = [nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in start]
    optimizer = GSAM(weights, SGD(weights), **options)

    def closure():
        value = loss(*weights)
        value.backward()
        return value

    returned = optimizer.step(closure)
    assert returned.item() == pytest.approx(loss(*(torch.tensor(value) for value in start)).item())
    assert not optimizer.perturbed
    return [weight.item() for weight in weights]


def test_adaptive_ball_by_hand():
    # L = -a^2 + a b - 3/8 b^2 + 3 a + 5/2 b at (1, 2): g = (-2a + b + 3, a - 3/4 b + 5/2) = (3, 2).
    # w g = (3, 4), norm 5; w^2 g = (3, 8); rho 5: eps = (3, 8); g_p = gradient at (4, 10) = (5, -1).
    # <g, g_p> / ||g_p||^2 = 13 / 26 = 1/2; g across g_p: (3, 2) - (2.5, -0.5) = (0.5, 2.5).
    # alpha 0.5: direction (5, -1) - (0.25, 1.25) = (4.75, -2.25); w = (1, 2) - 0.1 * direction.
    def loss(a, b):
        return -a * a + a * b - 0.375 * b * b + 3 * a + 2.5 * b

    landed = two_weights(loss, (1.0, 2.0), rho=5.0, alpha=0.5, adaptive=True)
    assert landed == pytest.approx([0.525, 2.225])


def test_rho_zero_is_the_base_optimizer_bit_for_bit():
    gsam, plain = small_network(), small_network()
    runs = []
    optimizer = GSAM(gsam.parameters(), MOMENTUM(gsam.parameters()), rho=0.0)
    reference = MOMENTUM(plain.parameters())
    for images, labels in batches(6):
        inner = closure_of(gsam, images, labels)
        optimizer.step(lambda inner=inner: runs.append(1) or inner())
        reference.zero_grad()
        closure_of(plain, images, labels)()
        reference.step()
        assert flatten_parameters(gsam).equal(flatten_parameters(plain))
    assert len(runs) == 6, "one run of the closure a step"


@pytest.mark.parametrize("adaptive", [False, True])
def test_alpha_zero_is_sam(adaptive):
    """SAM and ASAM written down again, one parameter at a time."""
    network, reference = small_network().double(), small_network().double()
    data = [(images.double(), labels) for images, labels in batches(4)]
    landed = train(network, GSAM(network.parameters(), SGD, rho=0.05, alpha=0.0, adaptive=adaptive), data)
    sgd_alone = small_network().double()
    train(sgd_alone, GSAM(sgd_alone.parameters(), SGD, rho=0.0), data)
    for images, labels in data:
        weights = list(reference.parameters())
        gradient = torch.autograd.grad(cross_entropy(reference(images), labels), weights)
        size = [w.detach().abs() if adaptive else torch.ones_like(w) for w in weights]
        norm = sum(((s * g) ** 2).sum() for s, g in zip(size, gradient, strict=True)) ** 0.5
        old = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for w, s, g in zip(weights, size, gradient, strict=True):
                w.add_(0.05 * s * s * g / norm)
        climbed = torch.autograd.grad(cross_entropy(reference(images), labels), weights)
        with torch.no_grad():
            for w, o, g in zip(weights, old, climbed, strict=True):
                w.copy_(o - 0.1 * g)
    torch.testing.assert_close(landed, flatten_parameters(reference), rtol=1e-10, atol=1e-12)
    assert float((landed - flatten_parameters(sgd_alone)).norm()) > 1e-3, "SGD lands elsewhere"


@pytest.mark.parametrize("adaptive", [False, True])
def test_second_run_sees_the_perturbed_weights_and_the_step_the_old_ones_bit_for_bit(adaptive):
    """A weight far below its perturbation loses digits to w + eps - eps: weights must come back from copies."""
    network, rho = small_network(), 50.0
    # A base optimizer of learning rate 0 leaves what it is given.
    base = torch.optim.SGD(network.parameters(), lr=0.0)
    optimizer = GSAM(network.parameters(), base, rho=rho, alpha=1.0, adaptive=adaptive)
    ((images, labels),) = batches(1)
    old = [w.detach().clone() for w in network.parameters()]
    seen, gradients = [], []

    def closure():
        assert all(w.grad is None or bool(w.grad.eq(0).all()) for w in network.parameters()), "gradients are cleared"
        assert torch.is_grad_enabled()
        seen.append([w.detach().clone() for w in network.parameters()])
        loss = closure_of(network, images, labels)()
        gradients.append([w.grad.clone() for w in network.parameters()])
        return loss

    optimizer.step(closure)
    eps = gsam_perturbation(old, gradients[0], rho=rho, adaptive=adaptive)
    assert len(seen) == 2
    assert all(a.equal(b) for a, b in zip(seen[0], old, strict=True))
    assert all(a.equal(b + e) for a, b, e in zip(seen[1], old, eps, strict=True))
    assert any(bool((a - e).ne(b).any()) for a, b, e in zip(seen[1], old, eps, strict=True)), "digits were lost"
    assert all(a.equal(b) for a, b in zip(network.parameters(), old, strict=True))


def test_weights_come_back_when_the_second_run_raises():
    network = small_network()
    optimizer = GSAM(network.parameters(), MOMENTUM, rho=0.5)
    data = list(batches(2))
    train(network, optimizer, data[:1])
    before = flatten_parameters(network)
    momentum = [optimizer.state[w]["momentum_buffer"].clone() for w in network.parameters()]
    inner = closure_of(network, *data[1])

    def closure():
        if optimizer.perturbed:
            assert not flatten_parameters(network).equal(before)
            raise KeyboardInterrupt
        return inner()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert flatten_parameters(network).equal(before)
    assert not optimizer.perturbed
    kept = [optimizer.state[w]["momentum_buffer"] for w in network.parameters()]
    assert all(a.equal(b) for a, b in zip(kept, momentum, strict=True)), "the base optimizer did not step"


def test_state_dict_continues_bit_for_bit():
    data = list(batches(6))
    network = small_network()
    optimizer = GSAM(network.parameters(), MOMENTUM, rho=0.2, alpha=0.3, adaptive=True)
    train(network, optimizer, data[:3])
    # Copies, as a file would be: both hold the live tensors.
    saved, state = copy.deepcopy(network.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(network, optimizer, data[3:])

    resumed = small_network(seed=1)
    resumed.load_state_dict(saved)
    # Settings of its own, which the saved ones replace.
    fresh = GSAM(resumed.parameters(), SGD, rho=0.9)
    fresh.load_state_dict(state)
    assert train(resumed, fresh, data[3:]).equal(expected)
    assert fresh.param_groups is fresh.base_optimizer.param_groups
    assert (fresh.param_groups[0]["rho"], fresh.param_groups[0]["alpha"]) == (0.2, 0.3)

    forgetful = small_network()
    forgetful.load_state_dict(saved)
    without = GSAM(forgetful.parameters(), MOMENTUM, rho=0.2, alpha=0.3, adaptive=True)
    assert not train(forgetful, without, data[3:]).equal(expected), "momentum is part of the state"


@pytest.mark.parametrize("reload", [False, True])
def test_scheduler_on_gsam_moves_the_base_optimizers_rate(reload):
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = GSAM([weight], SGD, rho=0.0)
    if reload:
        optimizer.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1], gamma=0.5)

    def closure():
        loss = weight.sum()  # a gradient of 1, so that a step moves by the learning rate
        loss.backward()
        return loss

    moves = []
    for _ in range(3):
        before = weight.item()
        optimizer.step(closure)
        scheduler.step()
        moves.append(before - weight.item())
    assert moves == pytest.approx([0.1, 0.05, 0.05], rel=1e-5)
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_reduce_changes_the_gradient_that_is_stepped_along():
    """Twice the learning rate on half of the gradient is the same step: reduce sees what the base optimizer takes."""
    data, calls = list(batches(2)), []

    def halve(gradients):
        calls.append(len(gradients))
        for gradient in gradients:
            gradient.div_(2)

    plain, halved = small_network(), small_network()
    expected = train(plain, GSAM(plain.parameters(), SGD, rho=0.3), data)
    twice = functools.partial(torch.optim.SGD, lr=0.2)
    landed = train(halved, GSAM(halved.parameters(), twice, rho=0.3, reduce=halve), data)
    assert landed.equal(expected)
    assert calls == [len(list(plain.parameters()))] * 2


def test_other_parameters_a_missing_closure_and_negative_settings_are_refused():
    weights = [nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="base_optimizer has other parameters"):
        GSAM(weights, SGD([nn.Parameter(torch.ones(1))]))
    with pytest.raises(ValueError, match="GSAM needs a closure"):
        GSAM(weights, SGD).step()
    for settings in ({"rho": -0.1}, {"alpha": -1.0}):
        with pytest.raises(ValueError, match="must be at least 0"):
            GSAM(weights, SGD, **settings)


def test_a_zero_gradient_or_none_moves_nothing():
    still, unused, moved = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = GSAM([{"params": [still, unused]}, {"params": [moved], "lr": 0.5}], SGD, rho=0.1, adaptive=True)

    def closure():
        loss = (0 * still).sum() + moved.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert [w.tolist() for w in (still, unused)] == [[1.0, 1.0]] * 2
    assert moved.tolist() == pytest.approx([0.5, 0.5]), "a group's own rate"


def statistics(network):
    return {name: value.clone() for name, value in network.named_buffers()}


def test_frozen_statistics_stay_while_outputs_are_those_of_training():
    with seeded(0):
        flat = (nn.Flatten(), nn.Linear(144, 6), nn.BatchNorm1d(6, momentum=None))
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), *flat, nn.BatchNorm1d(6, track_running_stats=False)
        )
    ((images, _),) = batches(1)
    network(images)
    before = statistics(network)
    with frozen_running_statistics(network):
        frozen = network(images + 3)
    assert all(value.equal(before[name]) for name, value in network.named_buffers())
    assert frozen.equal(network(images + 3))
    # Afterwards they move again, counter included.
    assert not any(value.equal(before[name]) for name, value in network.named_buffers())
    assert not network[-1].track_running_stats


def test_closure_that_freezes_while_perturbed_keeps_the_first_runs_statistics():
    """A GSAM step leaves the running statistics of one forward run at the weights."""
    network, reference = (small_network(norm="batch") for _ in range(2))
    optimizer, flags = GSAM(network.parameters(), SGD, rho=1.0), []
    ((images, labels),) = batches(1)
    inner = closure_of(network, images, labels)

    def closure():
        flags.append(optimizer.perturbed)
        with frozen_running_statistics(network) if optimizer.perturbed else nullcontext():
            return inner()

    optimizer.step(closure)
    reference(images)
    assert flags == [False, True]
    moved = statistics(network)
    assert all(value.equal(moved[name]) for name, value in reference.named_buffers())


def test_a_deep_copy_continues_as_the_original_does():
    network = small_network()
    optimizer = GSAM(network.parameters(), SGD, rho=0.1)
    twin, twin_optimizer = copy.deepcopy((network, optimizer))
    ((images, labels),) = batches(1)
    for net, opt in ((network, optimizer), (twin, twin_optimizer)):
        opt.step(closure_of(net, images, labels))
    assert all(map(torch.equal, network.parameters(), twin.parameters()))
