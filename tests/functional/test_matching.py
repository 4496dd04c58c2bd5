"""The matching loss and its rules in float64: by hand, against transcriptions, and against the full graph."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.autograd import gradcheck

from ftd_lightning.functional import (
    Augmentation,
    chunked_permutations,
    flatten_parameters,
    make_generator,
    normalized_distance,
    pruned_distance,
    trajectory_matching_loss,
    unroll,
)
from ftd_lightning.functional.matching import closest, match
from ftd_lightning.models import ConvNet
from ftd_lightning.rules import (
    ClosestStep,
    DropLargest,
    DropShallow,
    DropSmallest,
    KeepSimilar,
    LearnedLabels,
    LossGate,
    MatchingRule,
    RobustStart,
    StartWindow,
    start_noise,
)

METHODS = ["adjoint", "graph"]
STEPS, SEED = 7, 3


@pytest.fixture(scope="module")
def problem():
    """network, start, target, images, logits, step size; and the batches."""
    torch.manual_seed(0)
    network = ConvNet(3, 4, 8, width=6, depth=2).double()
    start = flatten_parameters(network)
    images = torch.randn(8, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    batches = chunked_permutations(8, STEPS, make_generator(0), batch_size=3)
    # Some steps away, so that a student comes near it, and passes it if its steps are large.
    near = unroll(network, start, images.detach(), logits.detach().argmax(1), torch.tensor(0.5), batches=batches[:4])
    target = near.detach() + 0.01 * torch.randn(start.shape, dtype=torch.float64)
    return network, start, target, images, logits, lr, batches


def options_of(problem, **changes):
    return {"batches": problem[-1], "augment": Augmentation("crop_scale"), "seed": SEED, **changes}


def loss_and_gradients(problem, *, lr=None, **changes):
    """The loss with learned labels, and its gradients in images, step size and logits."""
    network, start, target, images, logits, step_size, _ = problem
    step_size = step_size if lr is None else torch.tensor(lr, dtype=torch.float64, requires_grad=True)
    labels = LearnedLabels(lr=1.0).labels(logits, lambda: logits)
    loss = trajectory_matching_loss(network, start, target, images, labels, step_size, **options_of(problem, **changes))
    return [loss.detach(), *torch.autograd.grad(loss, (images, step_size, logits))]


def vectors(size=20, count=3, seed=0, dtype=torch.float64):
    return torch.randn(count, size, generator=make_generator(seed, "weights"), dtype=dtype).unbind()


def test_distance_by_hand():
    # Student (1, 1), start (0, 0), target (3, 4): ((3-1)^2 + (4-1)^2) / (3^2 + 4^2) = 13 / 25.
    assert float(normalized_distance(torch.ones(2), torch.zeros(2), torch.tensor([3.0, 4.0]))) == pytest.approx(0.52)
    student, start, target = vectors()
    assert float(normalized_distance(start, start, target)) == 1.0
    assert float(normalized_distance(target, start, target)) == 0.0
    # Snapshots that are all the same (views of live weights) must not look like a good match.
    assert not normalized_distance(student, start, start).isfinite()
    assert not pruned_distance(student, start, start, torch.ones(20, dtype=torch.bool)).isfinite()


@pytest.mark.parametrize("method", METHODS)
def test_loss_is_the_distance_of_the_unrolled_student(problem, method):
    network, start, target, images, logits, lr, _ = problem
    labels = logits.detach().argmax(1)
    student = unroll(network, start, images, labels, lr, **options_of(problem), method=method)
    expected = ((student - target) ** 2).sum() / ((start - target) ** 2).sum()
    arguments = (images, labels, lr)
    loss = trajectory_matching_loss(network, start, target, *arguments, **options_of(problem), unroll=method)
    assert loss.equal(expected)
    for other in (target[:1], target[:-1]):
        with pytest.raises(ValueError, match="the target has shape"):
            trajectory_matching_loss(network, start, other, *arguments, **options_of(problem))


RULES = {
    "labels": [],
    "shallow": [DropShallow(rate=0.3)],
    "smallest": [DropSmallest(rate=0.25)],
    "closest": [ClosestStep()],
    "all": [RobustStart(kappa=0.1), DropShallow(rate=0.3), DropLargest(rate=0.1), ClosestStep()],
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_gradients_in_images_step_size_and_logits_are_those_of_the_full_graph(problem, rules):
    adjoint, graph = (loss_and_gradients(problem, rules=rules, unroll=method) for method in METHODS)
    for value, wanted in zip(adjoint, graph, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)
    assert all(float(gradient.abs().sum()) > 0 for gradient in adjoint[1:])


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


def test_rules_apply_in_order_and_their_masks_intersect(problem):
    network, start, target, images, logits, lr, _ = problem
    drawn = torch.rand((), generator=make_generator(SEED, "shift")).double()
    first, second = 0.5 + drawn, -1.0 + drawn
    begin = (start + 0.5 + drawn) - 1.0 + drawn
    student = unroll(network, begin, images, torch.softmax(logits, 1), lr, **options_of(problem))
    keep = torch.arange(len(start))
    keep = (keep >= 3) & (keep < 50)
    expected = pruned_distance(2 * (2 * student - first) - second, start, target, keep)
    found = loss_and_gradients(problem, rules=[Shift(0.5, slice(3, None)), Shift(-1.0, slice(50))])
    wanted = [expected.detach(), *torch.autograd.grad(expected, (images, lr, logits))]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


# Robust starts (FTD, Eq. 9).


def test_noise_is_gaussian_in_proportion_to_the_segment_and_a_function_of_the_generator():
    start, target = torch.zeros(200_000), torch.full((200_000,), 0.25)
    for kappa in (0.01, 0.3):
        eps = start_noise(start, target, make_generator(0), kappa=kappa)
        sigma = kappa * float((start - target).norm()) / math.sqrt(len(start))
        assert float(eps.std()) == pytest.approx(sigma, rel=0.01)
        assert abs(float(eps.mean())) < 5 * sigma / math.sqrt(len(start))
    inside = [float((eps.abs() < width * sigma).float().mean()) for width in (1.0, 2.0, 3.0)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.005)
    assert start_noise(start, target, make_generator(0), kappa=0.3).equal(eps)
    assert not start_noise(start, target, make_generator(1), kappa=0.3).equal(eps)


@pytest.mark.parametrize("residual", ["displacement", "endpoint"])
def test_robust_start_against_eq_9_written_out(problem, residual):
    network, start, target, images, logits, lr, _ = problem
    noise = start_noise(start, target, make_generator(SEED, "robust"), kappa=0.3)
    labels = torch.softmax(logits, 1)
    theta = unroll(network, start + noise, images, labels, lr, **options_of(problem), method="graph")
    student, teacher = theta - (start + noise), target - start
    gap = student - teacher if residual == "displacement" else theta - target
    value = (gap**2).sum() / (teacher**2).sum()
    wanted = [value.detach(), *torch.autograd.grad(value, (images, lr, logits))]
    found = loss_and_gradients(problem, rules=[RobustStart(0.3, residual=residual)])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


# The choice of the step (ATT).


def test_the_choice_of_the_step_gives_the_gradient_of_so_many_steps(problem):
    network, start, target, images, logits, _, batches = problem
    labels, counts = torch.softmax(logits.detach(), 1), set()
    for lr in (0.1, 0.5, 3.0):
        arguments, distances = (images.detach(), labels, torch.tensor(lr, dtype=torch.float64)), []
        for n in range(1, STEPS + 1):
            end = unroll(network, start, *arguments, **options_of(problem, batches=batches[:n]))
            distances.append(float((end - target).abs().sum()))
        steps = max(n for n in range(STEPS) if distances[n] == min(distances)) + 1
        chosen = loss_and_gradients(problem, lr=lr, rules=[ClosestStep()])
        wanted = loss_and_gradients(problem, lr=lr, batches=batches[:steps])
        assert all(a.equal(b) for a, b in zip(chosen, wanted, strict=True))
        found = match(network, start, target, *arguments, rules=[ClosestStep()], **options_of(problem))
        assert found.steps == steps
        counts.add(steps)
    assert len(counts) > 1, "or a rule that always takes the last step would pass"
    assert closest([torch.tensor(value) for value in (2.0, 1.0, 1.0, math.nan)]) == 3, "the last of equal ones"


# Masks (PAD, EDF, DPD).


@pytest.mark.parametrize(
    ("rate", "kept"), [(0.19, [1, 1, 1, 1, 1]), (0.2, [1, 1, 1, 0, 1]), (0.5, [1, 0, 1, 0, 1]), (0.8, [0, 0, 1, 0, 0])]
)
def test_drop_largest_by_hand(rate, kept):
    # Differences 2, 4, 0, 5, 3, of both signs.
    student, target = torch.tensor([1.0, 2.0, 7.0, -1.0, 0.0]), torch.tensor([3.0, -2.0, 7.0, 4.0, 3.0])
    assert DropLargest(rate).keep(student, torch.zeros(5), target).int().tolist() == kept


def test_masks_drop_the_floor_of_the_rate():
    student, start, target = vectors(1001)
    error = (student - target).abs()
    assert DropShallow(rate=0.25).keep(student, start, target).tolist() == [index >= 250 for index in range(1001)]
    kept = DropSmallest(rate=0.25).keep(student, start, target)
    assert int(kept.sum()) == 751
    assert float(error[~kept].max()) <= float(error[kept].min())
    kept = DropLargest(rate=0.25).keep(student, start, target)
    assert int(kept.sum()) == 751
    assert float(error[~kept].min()) >= float(error[kept].max())


def similarity(s, t):
    if s == t == 0:
        return 1.0
    return 0.0 if s * t < 0 else min(abs(s), abs(t)) / max(abs(s), abs(t))


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_keep_similar_against_a_loop(epsilon):
    pairs = [(0, 0), (0, 2), (-1, 1), (1, 2), (-1, -2), (-4, -1), (3, 3), (5, -5), (1, 3)]
    student, target = torch.tensor(pairs, dtype=torch.float64).T
    expected = [similarity(s, t) >= epsilon for s, t in pairs]
    assert KeepSimilar(epsilon).keep(student, torch.zeros(9), target).tolist() == expected


def test_dropped_parameters_count_neither_in_numerator_nor_denominator():
    student, start, target = vectors()
    keep = torch.arange(20) % 3 > 0
    shorter = normalized_distance(student[keep], start[keep], target[keep])
    torch.testing.assert_close(pruned_distance(student, start, target, keep), shorter)
    leaves = [v.clone().requires_grad_() for v in vectors()]
    assert gradcheck(lambda *v: pruned_distance(*v, keep), leaves)
    assert not any(rule.keep(*leaves).requires_grad for rule in (DropLargest(0.5), KeepSimilar(0.5)))


def test_a_teacher_that_stood_still_in_all_that_is_kept_gives_no_infinite_loss():
    student, start, target = torch.tensor([3.0, 9.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 4.0])
    loss = pruned_distance(student, start, target, torch.tensor([True, False]))
    assert float(loss) == 4 / 16  # the teacher's movement in all parameters


# Window, gate and labels (DATM, TESLA).


def test_window_is_that_of_the_paper():
    low, ceiling, high, growth = 2, 5, 9, 40
    window = StartWindow(first=low, ceiling=ceiling, growth_iterations=growth)
    for iteration in (0, 9, 10, 11, 39, 40, 41, 10_000):
        upper = min(high, ceiling + int((high - ceiling) * iteration / growth))
        assert list(window.start_epochs(iteration, high)) == list(range(low, upper))
    assert StartWindow(first=3).start_epochs(0, 9) == range(3, 9)
    assert StartWindow(ceiling=4, growth_iterations=10).start_epochs(0, 3) == range(3), "never above max_start_epoch"


def test_the_gate_lets_through_what_is_not_above():
    accepted = [bool(LossGate(threshold=1.0).accepts(torch.tensor(loss))) for loss in (0.5, 1.0, 1.0001, math.nan)]
    assert accepted == [True, True, False, True], "the step guard skips NaN"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedLabels(lr=1.0, init="zeros"), "teachers"),
        (lambda: StartWindow(ceiling=3), "give both or neither"),
        (lambda: StartWindow(first=3, ceiling=3, growth_iterations=5), "must be above first"),
        (lambda: RobustStart(0.1, residual="end"), "displacement"),
    ],
)
def test_settings_of_rules_that_make_no_sense_are_refused(make, message, refused):
    with refused(message):
        make()
