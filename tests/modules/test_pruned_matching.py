"""Parameter pruning (our reading of PP) as an option of TrajectoryMatching."""

from pathlib import Path

import pytest
import torch
from fits import distil

from ftd_lightning import TrajectoryMatching, TrajectoryStore
from ftd_lightning.functional import chunked_permutations, make_generator, unroll
from ftd_lightning.models import ConvNet


def dropped(end: torch.Tensor, target: torch.Tensor, rule: str, size: float) -> torch.Tensor:
    """The rules of rivals: DPD's largest differences, and the smallest ratios of sizes."""
    if rule == "drop_largest":
        return (end - target).abs().argsort(descending=True)[: int(len(end) * size)]
    ratio = torch.minimum(end.abs(), target.abs()) / torch.maximum(end.abs(), target.abs())
    return ((ratio < size) | (end * target < 0)).nonzero().squeeze(1)


@pytest.mark.parametrize(("rule", "size"), [("drop_largest", 0.1), ("similarity_below", 0.8)])
def test_an_iteration_matches_what_is_left(tmp_path: Path, trajectories: Path, rule: str, size: float) -> None:
    module = distil(tmp_path, trajectories, steps=1, prune=size, prune_rule=rule, momentum=0.0)
    store, network = TrajectoryStore(trajectories), ConvNet(1, 10, 8, width=4, depth=1)
    drawn = module.iteration_loader().draw(0)
    start, target = store.segment(drawn["teacher"], drawn["start_epoch"], 1)
    images, step_size = module.initial_images.clone().requires_grad_(), torch.tensor(0.1, requires_grad=True)
    batches = chunked_permutations(10, 3, make_generator(0))
    end = unroll(network, start, images, module.labels, step_size, batches=batches, method="graph")
    kept = torch.ones(len(end), dtype=torch.bool)
    kept[dropped(end.detach(), target, rule, size)] = False
    assert 0 < kept.sum() < len(kept)
    loss = ((end - target)[kept] ** 2).sum() / ((start - target)[kept] ** 2).sum()
    gradients = torch.autograd.grad(loss, [images, step_size])
    torch.testing.assert_close(module.images.detach(), images.detach() - 10.0 * gradients[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.step_size.detach(), 0.1 - 1e-3 * gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["drop_largest", "similarity_below"])
def test_off_and_zero_are_the_same_bits_and_pruning_is_not(tmp_path: Path, trajectories: Path, rule: str) -> None:
    off, zero, on = (distil(tmp_path, trajectories, steps=3, prune=s, prune_rule=rule) for s in (None, 0.0, 0.5))
    assert torch.equal(off.images, zero.images)
    assert not torch.equal(off.images, on.images)
    assert (off.method, zero.method, on.method) == ("mtt", "mtt", "mtt+pp")


@pytest.mark.parametrize("size", [-0.1, 1.0, float("nan")])
def test_a_share_that_makes_no_sense_is_refused(refused, size: float) -> None:
    with refused(f"prune={size}"):
        TrajectoryMatching("nowhere", prune=size)


def test_a_compiled_step_and_an_unknown_setting(refused) -> None:
    with refused("compile='yes'"):
        TrajectoryMatching("nowhere", compile="yes")
