"""Matching rules: which hook receives what, and how several rules combine."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from ftd_lightning.functional import make_generator, pruned_distance, trajectory_matching_loss, unroll
from ftd_lightning.rules import MatchingRule, RobustStart


@pytest.fixture
def problem():
    generator = make_generator(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    start, target = torch.randn(2, 10, generator=generator, dtype=torch.float64).unbind()
    images = torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    return network, start, target, images, torch.tensor([0, 1, 0, 1]), lr


OPTIONS = {"batches": [torch.arange(4)] * 2, "seed": 5}


@dataclass(frozen=True)
class Shift(MatchingRule):
    """Moves the start by a constant and a draw, scales what is compared, and keeps some of the parameters."""

    by: float
    kept: slice
    name: ClassVar[str] = "shift"

    def begin(self, start, target, generator):
        return start + self.by + torch.rand((), generator=generator)

    def compared(self, student, noise):
        return 2 * student - noise

    def keep(self, student, start, target):
        assert not student.requires_grad
        mask = torch.zeros(len(start), dtype=torch.bool)
        mask[self.kept] = True
        return mask


def gradients(loss, problem):
    return [loss.detach(), *torch.autograd.grad(loss, [problem[3], problem[5]])]


@pytest.mark.parametrize("method", ["adjoint", "graph"])
def test_rules_apply_in_order_and_their_masks_intersect(problem, method):
    network, start, target, *rest = problem
    drawn = torch.rand((), generator=make_generator(5, "shift"))
    first, second = 0.5 + drawn, -1.0 + drawn
    student = unroll(network, (start + 0.5 + drawn) - 1.0 + drawn, *rest, **OPTIONS, method=method)
    compared = 2 * (2 * student - first) - second
    keep = torch.tensor([False] * 3 + [True] * 4 + [False] * 3)
    expected = pruned_distance(compared, start, target, keep)
    rules = [Shift(0.5, slice(3, None)), Shift(-1.0, slice(7))]
    loss = trajectory_matching_loss(*problem, **OPTIONS, unroll=method, rules=rules)
    torch.testing.assert_close(gradients(loss, problem), gradients(expected, problem), rtol=1e-10, atol=1e-13)


def test_a_rule_that_overrides_nothing_changes_nothing(problem):
    plain = gradients(trajectory_matching_loss(*problem, **OPTIONS), problem)
    ruled = gradients(trajectory_matching_loss(*problem, **OPTIONS, rules=[MatchingRule()]), problem)
    assert all(a.equal(b) for a, b in zip(plain, ruled, strict=True))


def test_the_seed_decides_what_a_rule_draws(problem):
    losses = [
        trajectory_matching_loss(*problem, **OPTIONS | {"seed": seed}, rules=[RobustStart(0.3)]).item()
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
