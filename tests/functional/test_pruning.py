"""Parameter pruning: the masks by hand, DPD's loss number by number, and plain matching when nothing is dropped."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from ftd_lightning.functional import make_generator, normalized_distance, pruned_distance, trajectory_matching_loss
from ftd_lightning.rules import DropLargest, KeepSimilar


def vectors(size=20, count=3, seed=0, dtype=torch.float64):
    return torch.randn(count, size, generator=make_generator(seed, "weights"), dtype=dtype).unbind()


@pytest.mark.parametrize(
    ("rate", "kept"),
    [
        (0.0, [1, 1, 1, 1, 1]),
        (0.19, [1, 1, 1, 1, 1]),
        (0.2, [1, 1, 1, 0, 1]),
        (0.5, [1, 0, 1, 0, 1]),
        (0.8, [0, 0, 1, 0, 0]),
    ],
)
def test_drop_largest_by_hand(rate, kept):
    # Differences 2, 4, 0, 5, 3, of both signs.
    student, target = torch.tensor([1.0, 2.0, 7.0, -1.0, 0.0]), torch.tensor([3.0, -2.0, 7.0, 4.0, 3.0])
    mask = DropLargest(rate).keep(student, torch.zeros(5), target)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == kept


@pytest.mark.parametrize("rate", [0.1, 0.33, 0.5])
def test_drop_largest_drops_the_floor_of_the_rate_and_none_smaller_than_kept(rate):
    student, start, target = vectors(997)
    keep = DropLargest(rate).keep(student, start, target)
    difference = (student - target).abs()
    assert int((~keep).sum()) == math.floor(997 * rate)
    assert float(difference[keep].max()) <= float(difference[~keep].min())


def similarity(s, t):
    if s == t == 0:
        return 1.0
    return 0.0 if s * t < 0 else min(abs(s), abs(t)) / max(abs(s), abs(t))


@pytest.mark.parametrize("epsilon", [0.0, 0.25, 0.5, 1.0])
def test_keep_similar_against_a_loop(epsilon):
    pairs = [(0, 0), (0, 2), (-1, 1), (1, 2), (-1, -2), (-4, -1), (3, 3), (5, -5), (1, 3)]
    student, target = torch.tensor(pairs, dtype=torch.float64).T
    expected = [similarity(s, t) >= epsilon for s, t in pairs]
    assert KeepSimilar(epsilon).keep(student, torch.zeros(9), target).tolist() == expected


def test_similarity_does_not_depend_on_the_order_or_scale_of_student_and_target():
    student, start, target = vectors(500)
    rule = KeepSimilar(0.4)
    mask = rule.keep(student, start, target)
    assert 50 < int(mask.sum()) < 450
    assert rule.keep(target, start, student).equal(mask)
    assert rule.keep(-8 * student, start, -8 * target).equal(mask)


def test_masks_are_not_differentiated():
    weights = [v.clone().requires_grad_() for v in vectors()]
    assert not any(rule.keep(*weights).requires_grad for rule in (DropLargest(0.5), KeepSimilar(0.5)))


@pytest.mark.parametrize("rate", [1.0, -0.1, math.nan])
def test_a_rate_out_of_range_is_refused(rate, refused):
    with refused(f"rate={rate}", "[0, 1)"):
        DropLargest(rate)


@pytest.mark.parametrize("epsilon", [1.1, -0.1, math.nan])
def test_an_epsilon_out_of_range_is_refused(epsilon, refused):
    with refused(f"epsilon={epsilon}", "[0, 1]"):
        KeepSimilar(epsilon)


def test_pruned_distance_against_a_sort_in_python():
    student, start, target = vectors(57)
    rows = sorted(zip(student.tolist(), start.tolist(), target.tolist(), strict=True), key=lambda r: abs(r[0] - r[2]))
    rows = rows[: 57 - math.floor(57 * 0.3)]
    expected = sum((s - t) ** 2 for s, _, t in rows) / sum((b - t) ** 2 for _, b, t in rows)
    keep = DropLargest(0.3).keep(student, start, target)
    assert float(pruned_distance(student, start, target, keep)) == pytest.approx(expected, rel=1e-12)


def test_what_is_dropped_does_not_count_anywhere():
    student, start, target = vectors()
    keep = torch.arange(20) % 3 > 0
    shorter = normalized_distance(student[keep], start[keep], target[keep])
    torch.testing.assert_close(pruned_distance(student, start, target, keep), shorter)
    leaf = student.clone().requires_grad_()
    pruned_distance(leaf, start, target, keep).backward()
    assert leaf.grad.ne(0).equal(keep)


def test_pruned_distance_gradcheck():
    inputs = [v.clone().requires_grad_() for v in vectors()]
    keep = torch.arange(20) % 3 > 0
    assert gradcheck(lambda *v: pruned_distance(*v, keep), inputs)


@pytest.mark.parametrize(("rule", "dtype"), [(DropLargest(0.0), torch.float32), (KeepSimilar(0.0), torch.float64)])
def test_dropping_nothing_is_trajectory_matching_bit_for_bit(rule, dtype):
    network = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).to(dtype)
    start, target, _ = vectors(30, dtype=dtype)
    labels, batches = torch.tensor([0, 1, 2, 0]), [torch.arange(4)] * 3
    found = []
    for rules in ((rule,), ()):
        images = torch.randn(4, 1, 3, 3, generator=make_generator(1), dtype=dtype).requires_grad_()
        lr = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        loss = trajectory_matching_loss(network, start, target, images, labels, lr, batches=batches, rules=rules)
        found.append((loss, *torch.autograd.grad(loss, (images, lr))))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
    assert float(found[0][1].abs().max()) > 0


def test_a_teacher_that_stood_still_in_all_that_is_kept_gives_no_infinite_loss():
    student, start, target = torch.tensor([3.0, 9.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 4.0])
    student.requires_grad_()
    loss = pruned_distance(student, start, target, torch.tensor([True, False]))
    assert float(loss.detach()) == 4 / 16  # the teacher's movement in all parameters
    loss.backward()
    assert student.grad.tolist() == [0.25, 0.0]
    assert not pruned_distance(student, start, start, torch.tensor([True, True])).isfinite(), "as without pruning"
