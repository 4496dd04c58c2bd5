from functools import partial

import pytest
import torch
from stand_in import META, stand_in
from torch import nn

from ftd_lightning.core.step_guard import StepGuard
from ftd_lightning.errors import DivergenceError

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5)
OPTIMIZERS = {"sgd": SGD, "adam": partial(torch.optim.Adam, lr=0.1, fused=True)}


def run(gradients, *, optimizer=SGD, guarded=True, reduce=None):
    """Steps over a sequence of gradients; gives every position and the guard."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer, guard, seen = optimizer([weight]), StepGuard(), []
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        if guarded:
            guard.before(optimizer, [weight.grad.norm()], **({"reduce": reduce} if reduce else {}))
        optimizer.step()
        if guarded:
            guard.after()
        seen.append(weight.detach().clone())
    return seen, guard


GOOD = [[0.3, 0.1], [0.7, -0.2], [-0.4, 0.9]]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("where", "bad"), [(0, float("nan")), (2, float("inf")), (3, -float("inf"))])
def test_a_bad_step_leaves_no_trace_in_weights_or_momentum(monkeypatch, where: int, bad: float, optimizer) -> None:
    """Memory that nothing was written to holds NaN here."""
    monkeypatch.setattr(torch, "empty_like", partial(torch.full_like, fill_value=float("nan")))
    seen, guard = run([*GOOD[:where], [bad, 0.1], *GOOD[where:]], optimizer=optimizer)
    expected = run(GOOD, optimizer=optimizer, guarded=False)[0]
    assert torch.equal(seen[-1], expected[-1])
    assert guard.state() == (1, int(where == 3), 0, 0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_keeps_no_copy_of_the_set(monkeypatch, optimizer) -> None:
    with stand_in(monkeypatch) as mode:
        weight, guard = nn.Parameter(torch.zeros(10_000, device=META)), StepGuard()
        weight.grad, optimizer = torch.zeros_like(weight), optimizer([weight])
        for _ in range(2):  # the first creates momentum
            before = mode.peak = mode.live
            guard.before(optimizer, [weight.grad.norm()])
            optimizer.step()
            guard.after()
    assert mode.peak - before < 400  # bytes; the set has 40,000


def test_an_optimizer_that_cannot_skip_is_refused(refused) -> None:
    with refused("RMSprop cannot skip a step on the device: use SGD, Adam, AdamW or Adagrad"):
        run(GOOD, optimizer=torch.optim.RMSprop)


def test_it_counts_all_and_those_in_a_row() -> None:
    bad = [float("nan"), 0.0]
    assert run([bad, GOOD[0], bad, bad, bad])[1].state() == (4, 3, 0, 0)


def test_nine_skipped_steps_in_a_row_go_on_and_ten_end_the_run() -> None:
    bad = [float("nan"), 0.0]
    run([bad] * 9)[1].check(8)
    run([*[bad] * 9, GOOD[0], *[bad] * 9])[1].check(18)
    with pytest.raises(DivergenceError, match="not finite 10 iterations in a row, the last one 9"):
        run([bad] * 10)[1].check(9)


def test_one_rank_s_bad_step_is_everyone_s() -> None:
    seen, guard = run(GOOD, reduce=lambda flag: flag * 0)
    assert guard.state() == (3, 3, 0, 0)
    assert torch.equal(seen[-1], torch.tensor([1.0, -2.0]))


def test_ten_gradients_of_zero_in_a_row_end_the_run(refused) -> None:
    guard, weight = StepGuard(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for step, still in enumerate([*[True] * 9, False, *[True] * 10]):
        guard.check(step)
        guard.before(optimizer, [torch.tensor(0.0)], still=torch.tensor(still))
        guard.after()
    with refused("the images' gradient was exactly zero 10 iterations in a row", "the last one 19", "no_grad"):
        guard.check(19)
