"""Parameter pruning (our reading of PP) as an option of TrajectoryMatching."""

from pathlib import Path

import pytest
import torch
from fits import distil

from ftd_lightning import TrajectoryMatching, TrajectoryStore
from ftd_lightning.functional import chunked_permutations, make_generator, unroll
from ftd_lightning.models import ConvNet
from ftd_lightning.rules import DropLargest, KeepSimilar, MatchingRule


def dropped(end: torch.Tensor, target: torch.Tensor, rule: MatchingRule) -> torch.Tensor:
    """The rules of rivals: DPD's largest differences, and the smallest ratios of sizes."""
    if isinstance(rule, DropLargest):
        return (end - target).abs().argsort(descending=True)[: int(len(end) * rule.rate)]
    ratio = torch.minimum(end.abs(), target.abs()) / torch.maximum(end.abs(), target.abs())
    return ((ratio < rule.epsilon) | (end * target < 0)).nonzero().squeeze(1)


@pytest.mark.parametrize("rule", [DropLargest(0.1), KeepSimilar(0.8)], ids=str)
def test_an_iteration_matches_what_is_left(tmp_path: Path, trajectories: Path, rule: MatchingRule) -> None:
    module = distil(tmp_path, trajectories, steps=1, rules=[rule], momentum=0.0)
    store, network = TrajectoryStore(trajectories), ConvNet(1, 10, 8, width=4, depth=1)
    drawn = module.iteration_loader().draw(0)
    start, target = store.segment(drawn["teacher"], drawn["start_epoch"], 1)
    images, step_size = module.initial_images.clone().requires_grad_(), torch.tensor(0.1, requires_grad=True)
    batches = chunked_permutations(10, 3, make_generator(0))
    end = unroll(network, start, images, module.labels, step_size, batches=batches, method="graph")
    kept = torch.ones(len(end), dtype=torch.bool)
    kept[dropped(end.detach(), target, rule)] = False
    assert 0 < kept.sum() < len(kept)
    loss = ((end - target)[kept] ** 2).sum() / ((start - target)[kept] ** 2).sum()
    gradients = torch.autograd.grad(loss, [images, step_size])
    torch.testing.assert_close(module.images.detach(), images.detach() - 10.0 * gradients[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.step_size.detach(), 0.1 - 1e-3 * gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", [DropLargest, KeepSimilar])
def test_none_and_zero_are_the_same_bits_and_pruning_is_not(tmp_path: Path, trajectories: Path, rule: type) -> None:
    folders = (tmp_path / name for name in ("off", "zero", "on"))
    rules = ([], [rule(0.0)], [rule(0.5)])
    off, zero, on = (
        distil(folder, trajectories, steps=3, rules=own) for folder, own in zip(folders, rules, strict=True)
    )
    assert torch.equal(off.images, zero.images)
    assert not torch.equal(off.images, on.images)
    assert (off.method, on.method) == ("mtt", "mtt+pp")


def test_rules_come_as_in_a_config(refused) -> None:
    spec = {"class_path": "ftd_lightning.rules.masks.DropLargest", "init_args": {"rate": 0.25}}
    assert TrajectoryMatching("nowhere", rules=[spec]).rules == [DropLargest(0.25)]
    with refused("rules", "NoSuchRule", "DropLargest"):
        TrajectoryMatching("nowhere", rules=[{"class_path": "NoSuchRule"}])
    with refused("rules", "ratio"):
        TrajectoryMatching("nowhere", rules=[{**spec, "init_args": {"ratio": 0.25}}])


def test_an_unknown_setting_of_compile(refused) -> None:
    with refused("compile='yes'"):
        TrajectoryMatching("nowhere", compile="yes")
