"""Eq. 6-8: the identity, a transcription of its own, and the cases that are known without computing."""

import itertools

import pytest
import torch
from torch import nn

from ftd_lightning.functional import (
    chunked_permutations,
    derive_seed,
    make_generator,
    trajectory_errors,
    unroll,
)

SEGMENTS, STEPS = 4, 3


@pytest.fixture
def problem():
    """A small network with a nonlinearity, a synthetic set, and a teacher that is a random walk; float64."""
    generator = make_generator(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    size = sum(p.numel() for p in network.parameters())
    teacher = torch.randn(SEGMENTS + 1, size, generator=generator, dtype=torch.float64).mul(0.3).cumsum(0)
    images = torch.randn(6, 1, 2, 2, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    lr = torch.tensor(0.4, dtype=torch.float64)
    batches = [chunked_permutations(6, STEPS, make_generator(0, "batches", t), batch_size=4) for t in range(SEGMENTS)]

    def augment(batch, generator):
        return batch + torch.randn(1, generator=generator)

    def advance(weights, segment):
        options = {"batches": batches[segment], "augment": augment, "seed": derive_seed(segment)}
        with torch.no_grad():
            return unroll(network, weights, images, labels, lr, **options)

    return teacher, advance, (network, images, labels, lr, batches, augment)


def transcribed(network, images, labels, lr, batches, augment):
    """A[L_S(theta), n] of segment t written out: autograd on named weights, no function of the library's maths."""

    def change(weights, segment):
        theta = weights.clone()
        for step, index in enumerate(batches[segment]):
            leaf = theta.clone().requires_grad_()
            w1, b1, w2, b2 = leaf.split([12, 3, 6, 2])
            x = augment(images[index], make_generator(derive_seed(segment), "inner", step)).flatten(1)
            logits = torch.tanh(x @ w1.view(3, 4).T + b1) @ w2.view(2, 3).T + b2
            loss = -logits.log_softmax(1)[torch.arange(len(index)), labels[index]].mean()
            loss.backward()
            theta = theta - lr * leaf.grad
        return theta - weights

    return change


def test_against_a_transcription_of_the_paper(problem):
    """Eq. 6-8 literally, teacher segments as the paper's theta*_{t,0} and theta*_{t,m}."""
    teacher, advance, parts = problem
    a_s = transcribed(*parts)
    segments = [{"0": start, "m": end} for start, end in itertools.pairwise(teacher)]
    errors = list(trajectory_errors(advance, teacher))
    assert len(errors) == SEGMENTS
    student, epsilon = teacher[0], None
    for t, (error, star) in enumerate(zip(errors, segments, strict=True)):
        delta = a_s(star["0"], t) - (star["m"] - star["0"])
        if epsilon is not None:
            # I_{t-1}, which starts at theta*_{t-1,m} = theta*_{t,0}
            before = segments[t - 1]["m"]
            torch.testing.assert_close(error.initialization, a_s(before + epsilon, t) - a_s(before, t))
        student = student + a_s(student, t)
        epsilon = student - star["m"]
        torch.testing.assert_close(error.matching, delta)
        torch.testing.assert_close(error.accumulated, epsilon)
        torch.testing.assert_close(error.student, student)
        torch.testing.assert_close(error.fresh, star["0"] + a_s(star["0"], t))
        assert error.start.equal(star["0"])
        assert error.target.equal(star["m"])


def test_the_identity_of_eq_8_to_rounding(problem):
    teacher, advance, _ = problem
    before = torch.zeros_like(teacher[0])
    for error in trajectory_errors(advance, teacher):
        gap = error.accumulated - (before + error.initialization + error.matching)
        assert float(gap.abs().max()) < 1e-14
        assert float(error.accumulated.norm()) > 0.1, "or the identity would say little"
        before = error.accumulated


def test_a_linear_model_by_hand():
    """Quadratic loss around c: n = 1 step takes w to (1 - lr) w + lr c. With lr 0.5 and c 0 every step halves."""
    teacher = [torch.tensor([8.0]), torch.tensor([6.0]), torch.tensor([5.0])]
    first, second = trajectory_errors(lambda w, t: w / 2, teacher)
    assert [float(v) for v in (first.student, first.accumulated, first.matching)] == [4.0, -2.0, -2.0]
    # epsilon_0 = -2 at theta* 6: I_0 = A(4) - A(6) = -2 + 3 = 1; delta_1 = 3 - 5 = -2; epsilon_1 = -2 + 1 - 2 = -3.
    assert [float(v) for v in (second.student, second.accumulated, second.matching)] == [2.0, -3.0, -2.0]
    assert float(second.initialization) == 1.0


def test_segments_come_one_by_one(problem):
    """Nothing is read ahead: a teacher's file is read as far as the student has come."""
    teacher, advance, _ = problem
    read = []

    def ends():
        for index, end in enumerate(teacher):
            read.append(index)
            yield end

    run = trajectory_errors(advance, ends())
    next(run)
    assert read == [0, 1]
    next(run)
    assert read == [0, 1, 2]
