"""Gradient matching: DC's distance row by row, its known limits, and the gradients that go into it."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from ftd_lightning.functional import gradient_distance, loss_gradients, make_generator

SHAPES = [(4, 3, 3, 3), (4,), (2, 3, 3), (5, 8), (5,)]


def draw(shapes, seed=0):
    generator = make_generator(seed, "gradients")
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def reference(synthetic, real):
    """Number by number, in Python."""
    total = 0.0
    for a, b in zip(synthetic, real, strict=True):
        if a.ndim == 1:
            continue
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            x, y = list(flatten(x)), list(flatten(y))
            dot = sum(p * q for p, q in zip(x, y, strict=True))
            total += 1 - dot / (math.hypot(*x) * math.hypot(*y) + 1e-6)
    return total


def flatten(nested):
    for item in nested:
        if isinstance(item, list):
            yield from flatten(item)
        else:
            yield item


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_distance_against_a_loop_over_rows(size):
    """At small sizes the 1e-6 in the denominator shows: it is added to the product of the norms."""
    synthetic, real = ([size * g for g in draw(SHAPES, seed)] for seed in (0, 1))
    assert float(gradient_distance(synthetic, real)) == pytest.approx(reference(synthetic, real), rel=1e-12)


def test_gradients_of_one_axis_change_nothing():
    synthetic, real = draw(SHAPES, 0), draw(SHAPES, 1)
    expected = gradient_distance(synthetic, real)
    assert gradient_distance([g + 7 if g.ndim == 1 else g for g in synthetic], real).equal(expected)
    assert float(gradient_distance(synthetic[1:2], real[1:2])) == 0


def test_rows_without_a_gradient_count_one_and_leave_the_distance_differentiable():
    synthetic, real = (torch.zeros(2, 3, requires_grad=True) for _ in range(2))
    distance = gradient_distance([synthetic], [real])
    distance.backward()
    assert float(distance.detach()) == 2
    assert synthetic.grad.isfinite().all()


def network(seed=0):
    """Small, smooth, with buffers that a run in training mode would move."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    ).double()
    for p, value in zip(net.parameters(), draw([p.shape for p in net.parameters()], seed), strict=True):
        p.data = value
    return net


def batch(count=5):
    images = torch.randn(count, 2, 6, 6, generator=make_generator(count), dtype=torch.float64)
    return images, torch.arange(count) % 4


def test_gradients_are_those_of_backward():
    net, (images, labels) = network(), batch()
    gradients = loss_gradients(net, images, labels)
    logits = net(images)
    (torch.logsumexp(logits, dim=1) - logits[range(5), labels]).mean().backward()
    for got, p in zip(gradients, net.parameters(), strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, p.grad)


def test_the_network_is_left_as_it_was():
    net, (images, labels) = network(), batch()
    net.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        gradients = loss_gradients(net, images, labels)
    assert all(float(g.abs().max()) > 0 for g in gradients[2:])
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def test_matching_gradcheck_through_the_network():
    net, (real, classes) = network(), batch(6)
    target = loss_gradients(net, real, classes)
    images, labels = batch(3)

    def distance(images):
        return gradient_distance(loss_gradients(net, images, labels, keep_graph=True), target)

    assert gradcheck(distance, images.requires_grad_())
