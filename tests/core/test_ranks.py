from types import SimpleNamespace

import pytest
import torch
from fits import make_trainer, small_teacher
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from ftd_lightning.core.ranks import RankStates, all_ranks, own_share

IMAGES = TensorDataset(torch.zeros(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64))


def module_of(*, rank=0, world_size=1):
    """What RankStates asks a LightningModule for."""
    module = nn.BatchNorm1d(2)
    module.trainer = SimpleNamespace(world_size=world_size)
    module.global_rank = rank
    return module


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("total", [1, 3, 4])
def test_shares_are_equal_disjoint_and_hold_all_numbers(total, world_size):
    shares = [own_share(total, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    numbers = sorted(number for share in shares for number in share)
    assert numbers == list(range(len(numbers)))
    assert total <= len(numbers) < total + world_size


def test_one_process_is_all_ranks():
    assert all_ranks("own") == ["own"]


def test_a_checkpoint_of_one_process_stays_as_it_is():
    checkpoint, module = {"state_dict": {}}, module_of()
    RankStates().save(module, checkpoint)
    assert checkpoint == {"state_dict": {}}
    RankStates().load(module, checkpoint)
    assert checkpoint == {"state_dict": {}}


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


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_counts_for_more_than_what_was_kept_before(world_size):
    states, module = RankStates(), module_of(world_size=world_size)
    states.keep(module)
    own = {"state_dict": {name: value + 4 for name, value in module.state_dict().items()}}
    states.load(module, {**own, **({"ranks": [own] * world_size} if world_size > 1 else {})})
    states.restore(module)
    assert module.running_mean.tolist() == [4, 4]


def test_weights_and_buffers_are_put_back_once():
    states, module = RankStates(), module_of(rank=1, world_size=2)
    states.keep(module)
    for value in (1.0, 2.0):
        for tensor in (module.weight.data, module.running_mean):
            tensor.fill_(value + 10)
        states.restore(module)
        kept = (module.weight.tolist(), module.running_mean.tolist())
        assert kept == (([1, 1], [0, 0]) if value == 1 else ([12, 12], [12, 12]))
    assert module._ddp_params_and_buffers_to_ignore == ["running_mean", "running_var", "num_batches_tracked"]


def loader(kind):
    sampler = DistributedSampler(IMAGES, num_replicas=2, rank=0)
    return {
        "sampler": lambda: DataLoader(IMAGES, batch_size=2, sampler=sampler),
        "batch sampler": lambda: DataLoader(IMAGES, batch_sampler=BatchSampler(sampler, 2, False)),
    }[kind]()


@pytest.mark.parametrize("kind", ["sampler", "batch sampler"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_teachers_of_their_own_refuse_parts_of_the_images(kind, part, tmp_path, refused):
    whole = DataLoader(IMAGES, batch_size=2)
    loaders = {"train_dataloaders": whole, "val_dataloaders": whole} | {f"{part}_dataloaders": loader(kind)}

    def fit(**options):
        module = small_teacher(
            network=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), network_options=None, **options
        )
        make_trainer(tmp_path).fit(module, **loaders)

    with refused("splits its images over 2 processes", "--trainer.use_distributed_sampler false", "--model.parallel"):
        fit()
    fit(parallel="data")
