"""Ranks that train networks of their own: teachers and fresh networks share no gradient.

Lightning's DDP makes all ranks equal: it broadcasts the first rank's weights when it wraps a module, averages gradients
and saves the first rank's state only. Here each rank's own state is restored and saved with the others'.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.utilities import CombinedLoader, move_data_to_device
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from ftd_lightning.errors import InputError
from ftd_lightning.functional.gsam import flatten, unflatten

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

T = TypeVar("T")
KEYS = ("state_dict", "optimizer_states")


def ranks_share(total: int, *, rank: int, world_size: int) -> list[int]:
    """Deal the numbers 0, 1, .. out to ranks in turn, equally many to each: unused ones fill up the last round.

    Example:
        >>> [ranks_share(3, rank=rank, world_size=2) for rank in range(2)]
        [[0, 2], [1, 3]]
    """
    return list(range(rank, -(-total // world_size) * world_size, world_size))


def all_ranks(value: Any) -> list[Any]:
    """Collect one value of every rank, on every rank, in their order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def from_all_ranks(own: list[T], total: int) -> list[T]:
    """Collect a value for each number below ``total`` on every rank; ``ranks_share`` dealt out the ``own`` ones."""
    ranks = all_ranks(own)
    return [ranks[index % len(ranks)][index // len(ranks)] for index in range(total)]


def without_gradient_sync(trainer: Trainer) -> AbstractContextManager[None]:
    """Return a context in which DDP averages no gradient; a null context without DDP."""
    model = trainer.strategy.model
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def mean_over_ranks(value: Tensor, world_size: int) -> Tensor:
    """Average a tensor over all ranks; the host does not wait."""
    if world_size == 1:
        return value
    total = value.detach().clone()
    torch.distributed.all_reduce(total)  # not the strategy's, which makes the host wait for all ranks before
    return total / world_size


def average_over_ranks(trainer: Trainer, gradients: list[Tensor]) -> None:
    """Average gradients over all processes, in place, by one reduction."""
    if trainer.world_size > 1:
        mean = mean_over_ranks(flatten(gradients), trainer.world_size)
        for gradient, part in zip(gradients, unflatten(mean, gradients), strict=True):
            gradient.copy_(part)


def refuse_split_loaders(trainer: Trainer, *, or_else: str) -> None:
    """Refuse loaders that give each rank a part of the images, as Lightning makes them of any DataLoader under DDP."""
    for loader in CombinedLoader([trainer.train_dataloader, trainer.val_dataloaders]).flattened:
        for owner in (loader, getattr(loader, "batch_sampler", None)):
            sampler = getattr(owner, "sampler", None)
            if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
                raise InputError(
                    f"a {type(loader).__name__} splits its images over {sampler.num_replicas} processes, but each of "
                    "them trains networks of its own on all images: pass --trainer.use_distributed_sampler false, or "
                    f"{or_else}"
                )


class RankStates:
    """Carries each rank's own weights past DDP's broadcast, and into and out of checkpoints."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] | None = None

    def remember(self, module: LightningModule) -> None:
        """Save this rank's weights before DDP broadcasts rank 0's, and exclude buffers from the broadcast."""
        self.kept = {name: value.detach().clone() for name, value in module.state_dict().items()}
        # DDP copies the first rank's buffers (running statistics) before a forward pass. Its switch for single buffers
        # has no public form; broadcast_buffers belongs to the user's strategy.
        buffers = [name for name, _ in module.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, buffers)

    def restore(self, module: LightningModule) -> None:
        """Put the saved weights back once DDP has wrapped the module."""
        if self.kept is not None:
            module.load_state_dict(self.kept)
            self.kept = None

    def save(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add every rank's weights and optimizer state to a checkpoint. All ranks have to call this."""
        if module.trainer.world_size > 1:
            own = {key: checkpoint[key] for key in KEYS if key in checkpoint}
            # On the CPU: gathered, a tensor of one GPU would take the memory of that same GPU in every process.
            checkpoint["ranks"] = all_ranks(move_data_to_device(own, "cpu"))

    @staticmethod
    def joined(checkpoint: dict[str, Any], name: str, count: int) -> dict[str, Any]:
        """Return the weights of a checkpoint of any number of ranks as one process would have saved them.

        ``ranks_share`` dealt out the ``count`` entries of the ModuleList ``name``; other weights are the first rank's.
        """
        ranks = [state["state_dict"] for state in checkpoint.get("ranks") or [checkpoint]]
        joined = {key: value for key, value in ranks[0].items() if not key.startswith(f"{name}.")}
        for index in range(count):
            prefix = f"{name}.{index // len(ranks)}."
            for key, value in ranks[index % len(ranks)].items():
                if key.startswith(prefix):
                    joined[f"{name}.{index}.{key.removeprefix(prefix)}"] = value
        return joined

    def load(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace the first rank's state in a checkpoint by this rank's; refuse another number of ranks."""
        states, world_size = checkpoint.get("ranks"), module.trainer.world_size
        if (count := len(states) if states else 1) != world_size:
            raise InputError(
                f"the checkpoint was saved by {count} process(es), this run has {world_size}: each trained networks of "
                f"its own; resume with trainer.devices x trainer.num_nodes = {count}"
            )
        if states:
            checkpoint.update(states[module.global_rank])
        # In one process too, because the weights kept before are the initial ones.
        self.kept = dict(checkpoint["state_dict"])
