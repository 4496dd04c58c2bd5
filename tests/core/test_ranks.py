import itertools
from types import SimpleNamespace

import pytest
import torch
from fits import make_trainer, small_teacher
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from ftd_lightning import SyntheticEvaluation
from ftd_lightning.core.ranks import RankStates, ranks_share

IMAGES = TensorDataset(torch.zeros(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64))


def module_of(*, rank=0, world_size=1):
    """What RankStates asks a LightningModule for."""
    module = nn.BatchNorm1d(2)
    module.trainer = SimpleNamespace(world_size=world_size)
    module.global_rank = rank
    return module


def test_shares_are_equal_disjoint_and_hold_all_numbers():
    for total, world_size in itertools.product((1, 3, 4), (1, 2, 3, 5)):
        shares = [ranks_share(total, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        numbers = sorted(number for share in shares for number in share)
        assert numbers == list(range(len(numbers)))
        assert total <= len(numbers) < total + world_size


@pytest.mark.parametrize(("saved", "world_size"), [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_processes_is_refused(refused, saved, world_size):
    checkpoint = {"state_dict": {}, **({"ranks": [{}] * saved} if saved > 1 else {})}
    with refused(f"saved by {saved} process", f"this run has {world_size}", "trainer.devices"):
        RankStates().load(module_of(world_size=world_size), checkpoint)


def test_each_rank_takes_its_own_state_and_keeps_it_past_the_broadcast():
    own = [{"state_dict": nn.BatchNorm1d(2).state_dict(), "optimizer_states": [rank]} for rank in range(2)]
    own[1]["state_dict"]["running_mean"] += 3
    checkpoint = {"epoch": 7, **own[0], "ranks": own}
    states, module = RankStates(), module_of(rank=1, world_size=2)
    states.load(module, checkpoint)
    assert (checkpoint["epoch"], checkpoint["optimizer_states"]) == (7, [1])
    assert checkpoint["state_dict"]["running_mean"].tolist() == [3, 3]
    states.restore(module)
    assert module.running_mean.tolist() == [3, 3]


def test_teachers_of_their_own_refuse_parts_of_the_images(tmp_path, refused):
    sampler, whole = DistributedSampler(IMAGES, num_replicas=2, rank=0), DataLoader(IMAGES, batch_size=2)
    parts = [DataLoader(IMAGES, batch_size=2, sampler=sampler)]
    parts.append(DataLoader(IMAGES, batch_sampler=BatchSampler(sampler, 2, False)))
    network = {"network": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "network_options": None}
    for part, others in itertools.product(parts, (False, True)):
        loaders = (whole, part) if others else (part, whole)
        with refused("splits its images over 2 processes", "use_distributed_sampler false", "--model.parallel"):
            make_trainer(tmp_path).fit(small_teacher(**network), *loaders)
    make_trainer(tmp_path).fit(small_teacher(parallel="data", **network), parts[0], whole)
    with refused("splits its images over 2 processes", "use a DistillationDataModule"):
        evaluation = SyntheticEvaluation(network["network"], networks=1, lr=0.1)
        make_trainer(tmp_path, max_epochs=1).fit(evaluation, parts[0], whole)
