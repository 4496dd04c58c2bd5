"""The matching loss: two anchors by hand, and that both unrollings lead to it."""

import pytest
import torch
from torch import nn

from ftd_lightning.functional import make_generator, normalized_distance, trajectory_matching_loss, unroll


def vectors(count, seed=0):
    return torch.randn(count, 10, generator=make_generator(seed), dtype=torch.float64).unbind()


def test_distance_by_hand():
    # Student (1, 1), start (0, 0), target (3, 4): ((3-1)^2 + (4-1)^2) / (3^2 + 4^2) = 13 / 25.
    distance = normalized_distance(torch.ones(2), torch.zeros(2), torch.tensor([3.0, 4.0]))
    assert float(distance) == pytest.approx(0.52)
    assert distance.shape == ()


def test_one_is_a_student_that_stayed_and_zero_one_that_arrived():
    start, target = vectors(2)
    assert float(normalized_distance(start, start, target)) == 1.0
    assert float(normalized_distance(target, start, target)) == 0.0


def test_distance_does_not_depend_on_units_or_origin():
    student, start, target = vectors(3)
    expected = normalized_distance(student, start, target)
    shifted = [7 * v + 3 for v in (student, start, target)]
    torch.testing.assert_close(normalized_distance(*shifted), expected)


def test_distance_of_equal_snapshots_is_not_finite():
    """Snapshots that are all the same (views of live weights) must not look like a good match."""
    student, start = vectors(2)
    assert not normalized_distance(student, start, start).isfinite()
    assert not normalized_distance(start, start, start).isfinite()


@pytest.mark.parametrize("method", ["adjoint", "graph"])
def test_loss_is_the_distance_of_the_unrolled_student(method):
    start, target = vectors(2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    images = torch.randn(4, 1, 2, 2, generator=make_generator(1), dtype=torch.float64, requires_grad=True)
    labels, lr = torch.tensor([0, 1, 0, 1]), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    batches = [torch.tensor([0, 1, 2]), torch.tensor([3]), torch.tensor([1, 3])]
    loss = trajectory_matching_loss(network, start, target, images, labels, lr, batches=batches, unroll=method)
    student = unroll(network, start, images, labels, lr, batches=batches, method=method)
    assert loss.shape == ()
    assert loss.equal(((student - target) ** 2).sum() / ((start - target) ** 2).sum())
    loss.backward()
    assert images.grad.shape == images.shape
    assert float(images.grad.norm()) > 0
    assert lr.grad.shape == ()
    assert float(lr.grad) != 0


def test_adjoint_is_the_default():
    start, target = vectors(2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    images = torch.ones(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = trajectory_matching_loss(
        network, start, target, images, torch.tensor([0]), lr, batches=[torch.tensor([0])] * 2
    )
    first = torch.autograd.grad(loss, lr, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.backward()


@pytest.mark.parametrize("unroll", ["adjoint", "graph"])
def test_a_target_of_another_shape_is_refused_and_no_gradient_is_needed(unroll):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    start, images, labels = torch.zeros(10), torch.randn(2, 1, 2, 2), torch.tensor([0, 1])
    arguments = {"batches": [torch.arange(2)] * 2, "unroll": unroll}
    with torch.no_grad():
        loss = trajectory_matching_loss(network, start, start + 1, images, labels, torch.tensor(0.1), **arguments)
    assert not loss.requires_grad
    for target in (torch.ones(1), torch.ones(9)):
        with pytest.raises(ValueError, match="the target has shape"):
            trajectory_matching_loss(network, start, target, images, labels, torch.tensor(0.1), **arguments)
