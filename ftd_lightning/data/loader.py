"""Batches of images that are one tensor: permuted and sliced where they lie."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.functional.to_device import to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class BatchOrder(DistributedSampler[Tensor]):
    """Index tensors of an epoch's batches, a function of (seed, epoch) and split over ranks.

    A DistributedSampler because Lightning wraps any other sampler in one, and calls ``set_epoch`` of these.

    Args:
        num_images: N.
        batch_size: images per batch, on each rank; the last batch may be smaller.
        shuffle: a new permutation every epoch, else the given order.
        seed: decides the permutations.
        rank: of this process.
        world_size: number of processes; each gets every world_size-th image, the same number of them.
        epoch_map: maps the epoch of the fit, which Lightning sets, to the one that decides the permutation; None is the
            identity.

    Attributes:
        first_batch: iterations begin with this batch of their epoch.

    Raises:
        InputError: for fewer images than processes.

    Example:
        >>> [len(index) for index in BatchOrder(5, 2, shuffle=False)]
        [2, 2, 1]
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epoch_map: Callable[[int], int] | None = None,
    ) -> None:
        if num_images < world_size:
            raise InputError(f"{num_images} images cannot be split over {world_size} processes: use fewer devices")
        super().__init__(range(num_images), num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.num_images = num_images
        self.batch_size = batch_size
        self.epoch_map = epoch_map
        self.first_batch = 0
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is next."""
        super().set_epoch(epoch if self.epoch_map is None else self.epoch_map(epoch))

    def __iter__(self) -> Iterator[Tensor]:
        if self.shuffle:
            order = torch.randperm(self.num_images, generator=make_generator(self.seed, "order", self.epoch))
        else:
            order = torch.arange(self.num_images)
        # Equal shares: a rank with one batch more would wait for the others for ever.
        share = order[self.rank :: self.num_replicas][: self.num_images // self.num_replicas]
        return iter(share.split(self.batch_size)[self.first_batch :])

    def __len__(self) -> int:
        return -(-(self.num_images // self.num_replicas) // self.batch_size)


class ResumableLoader:
    """What loaders share that resume within an epoch: how many batches of the present epoch they have yielded."""

    _batch = 0
    _resumes = _epoch_ended = False

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches of the present epoch that were yielded."""
        return {"batch": self._batch, **({"epoch_ended": True} if self._epoch_ended else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state: the next iteration yields what is left of its epoch.

        Args:
            state_dict: from :meth:`state_dict`. A whole epoch means that the next one begins; with "epoch_ended" it
                does only after an iteration that yields nothing.
        """
        self._batch = state_dict["batch"]
        self._epoch_ended = state_dict.get("epoch_ended", False)
        self._resumes = True

    def _begin_epoch(self, length: int) -> int:
        """Return the first batch of the iteration that begins."""
        if self._epoch_ended:
            self._batch = length
        elif not self._resumes or self._batch >= length:
            self._batch = 0
        self._resumes = self._epoch_ended = False
        return self._batch


class TensorLoader(ResumableLoader):
    """(images, labels) batches by indexing tensors that already lie on the training device.

    No collation and no copy between host and device; 50,000 CIFAR images take 614 MB in float32.

    Args:
        images: (N, C, H, W).
        labels: (N,) or (N, K).
        order: the batches.

    Example:
        >>> loader = TensorLoader(torch.zeros(5, 1, 2, 2), torch.zeros(5), BatchOrder(5, 2, shuffle=False))
        >>> [len(images) for images, labels in loader]
        [2, 2, 1]
    """

    def __init__(self, images: Tensor, labels: Tensor, order: BatchOrder) -> None:
        self.images = images
        self.labels = labels
        self.sampler = order  # the name under which Lightning looks for set_epoch
        self.batch_sampler = None  # Lightning reads it wherever there is a sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # The position is taken now, because Lightning may leave an ended epoch without asking for a batch; the order
        # when the first batch is asked for, because only then the epoch has been set.
        return self._batches(self._begin_epoch(len(self)))

    def _batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index in islice(self.sampler, first, None):
            index = to_device(index, self.images.device)
            self._batch += 1
            yield self.images[index], self.labels[index]


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """A dataset whose items are whole batches, so that workers index once instead of collating."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.images[index], self.labels[index]


class HostLoader(ResumableLoader, DataLoader[Any]):
    """A DataLoader that resumes within an epoch, because its sampler is a :class:`BatchOrder`."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._batches(self._begin_epoch(len(self)))

    def _batches(self, first: int) -> Iterator[Any]:
        # A generator: workers read ahead only once the first batch is asked for, when the epoch is known. What they
        # have read ahead does not count.
        order = cast("BatchOrder", self.sampler)
        order.first_batch = first
        batches = super().__iter__()  # asks for the order once or, with new workers, twice
        order.first_batch = 0
        for batch in batches:
            self._batch += 1
            yield batch


def host_loader(images: Tensor, labels: Tensor, order: BatchOrder, *, num_workers: int = 0) -> HostLoader:
    """Make a DataLoader over tensors in host memory, for images that do not fit on the device.

    Its batches are those of :class:`TensorLoader`, in the same order.

    Args:
        images: (N, C, H, W), on the CPU.
        labels: (N,) or (N, K).
        order: the batches.
        num_workers: processes that read ahead.
    """
    pin = torch.cuda.is_available()
    return HostLoader(
        _Batches(images, labels),  # type: ignore[arg-type]
        sampler=order,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin,
        persistent_workers=num_workers > 0,
    )


def fits_on(device: torch.device, tensor: Tensor, *, share: float = 0.5) -> bool:
    """Tell whether a tensor takes at most a share of the device's free memory; the CPU holds it anyway."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return tensor.numel() * tensor.element_size() <= share * free
