"""Loaders: batches, iterations, segments; all resume exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import make_generator, to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ftd_lightning.files.trajectory_store import TrajectoryStore


Batch = TypeVar("Batch")


class IterationLoader(ABC, Generic[Batch]):
    """An iterable whose batches are a function of the iteration's number; one is read ahead in a thread.

    Lightning saves and restores its state, so a resumed run continues with the batch that would have come next. It has
    a length, of one Lightning epoch, because Lightning reads one batch ahead of loaders without, and skips that batch
    on resume. ``start`` is the first iteration; epochs are counted from it.
    """

    def __init__(self, length: int, *, start: int = 0) -> None:
        self.length = length
        self.start = start
        self.iteration = start  # the next one
        self._epoch_ended = False

    @abstractmethod
    def read(self, iteration: int) -> Batch:
        """Return the batch of an iteration, counted from 0."""

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        # Now, and not when a batch is asked for: Lightning may leave an ended epoch without asking for one.
        ended, self._epoch_ended = self._epoch_ended, False
        return iter(()) if ended else self._rest_of_epoch()

    def _rest_of_epoch(self) -> Iterator[Batch]:
        # After a resume in mid-epoch only the rest of that epoch is left.
        end = self.iteration + self.length - (self.iteration - self.start) % self.length
        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead = reader.submit(self.read, self.iteration)
            while self.iteration < end:
                batch = ahead.result()
                self.iteration += 1
                if self.iteration < end:
                    ahead = reader.submit(self.read, self.iteration)
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the next iteration."""
        return {"iteration": self.iteration, **({"epoch_ended": True} if self._epoch_ended else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the iteration of a state; if it says "epoch_ended", the first epoch from here is empty."""
        self.iteration = state_dict["iteration"]
        self._epoch_ended = state_dict.get("epoch_ended", False)


class IterationCounter(IterationLoader[dict[str, int]]):
    """Iterations that need nothing but their number."""

    def read(self, iteration: int) -> dict[str, int]:
        """Return the number."""
        return {"iteration": iteration}


class BatchOrder(DistributedSampler[Tensor]):
    """Index tensors of an epoch's batches, a function of (seed, epoch) and split equally over ranks.

    A DistributedSampler because Lightning wraps any other sampler in one, and calls ``set_epoch`` of these. ``shuffle``
    draws a new permutation every epoch, decided by what ``epoch_map`` makes of the epoch of the fit.
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
        self.first_batch = 0  # iterations begin with this batch of their epoch
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is next."""
        super().set_epoch(epoch if self.epoch_map is None else self.epoch_map(epoch))

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.arange(self.num_images)
        if self.shuffle:
            order = torch.randperm(self.num_images, generator=make_generator(self.seed, "order", self.epoch))
        # Equal shares: a rank with one batch more would wait for the others for ever.
        share = order[self.rank :: self.num_replicas][: self.num_images // self.num_replicas]
        return iter(share.split(self.batch_size)[self.first_batch :])

    def __len__(self) -> int:
        return -(-(self.num_images // self.num_replicas) // self.batch_size)


class ResumableLoader(ABC):
    """Loaders that resume within an epoch; their state is the number of batches of it that they have yielded."""

    sampler: Any  # a :class:`BatchOrder`
    _batch = 0
    _resumes = _epoch_ended = False

    def __iter__(self) -> Iterator[Any]:
        # The position is taken now, because Lightning may leave an ended epoch without asking for a batch; the order
        # when the first batch is asked for, because only then the epoch has been set.
        if self._epoch_ended:
            self._batch = len(self.sampler)
        elif not self._resumes or self._batch >= len(self.sampler):
            self._batch = 0
        self._resumes = self._epoch_ended = False
        return self._batches(self._batch)

    @abstractmethod
    def _batches(self, first: int) -> Iterator[Any]:
        """Yield the batches of an epoch from a first one on, and count them."""

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches of the present epoch that were yielded."""
        return {"batch": self._batch, **({"epoch_ended": True} if self._epoch_ended else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the rest of a state's epoch, nothing for "epoch_ended"; after a whole one with the next."""
        self._batch = state_dict["batch"]
        self._epoch_ended = state_dict.get("epoch_ended", False)
        self._resumes = True


class TensorLoader(ResumableLoader):
    """(images, labels) batches by indexing tensors that already lie on the training device."""

    def __init__(self, images: Tensor, labels: Tensor, order: BatchOrder) -> None:
        self.images = images
        self.labels = labels
        self.sampler = order  # the name under which Lightning looks for set_epoch
        self.batch_sampler = None  # Lightning reads it wherever there is a sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def _batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index in islice(self.sampler, first, None):
            index = to_device(index, self.images.device)
            self._batch += 1
            yield self.images[index], self.labels[index]


class HostLoader(ResumableLoader, DataLoader[Any]):  # type: ignore[misc]
    """A DataLoader that resumes within an epoch, because its sampler is a :class:`BatchOrder`."""

    def _batches(self, first: int) -> Iterator[Any]:
        # A generator: workers read ahead only once the first batch is asked for, when the epoch is known. What they
        # have read ahead does not count.
        self.sampler.first_batch = first
        batches = DataLoader.__iter__(self)  # asks for the order once or, with new workers, twice
        self.sampler.first_batch = 0
        for batch in batches:
            self._batch += 1
            yield batch


def host_loader(images: Tensor, labels: Tensor, order: BatchOrder, *, num_workers: int = 0) -> HostLoader:
    """Make a DataLoader over tensors in host memory, whose batches are those of :class:`TensorLoader`, in its order."""
    return HostLoader(
        TensorDataset(images, labels),  # whole batches are its items: workers index once instead of collating
        sampler=order,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def fits_on(device: torch.device, tensor: Tensor) -> bool:
    """Tell whether a tensor takes at most half of the device's free memory; the CPU holds it anyway."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return tensor.numel() * tensor.element_size() <= 0.5 * free


class SegmentBatch(TypedDict):
    """One segment of a distillation step; ``slot`` counts a step's segments over all ranks."""

    iteration: int
    slot: int
    teacher: int
    start_epoch: int
    start: Tensor
    target: Tensor


class SegmentLoader(IterationLoader[list[SegmentBatch]]):
    """An iterable over teacher segments, which are a function of (seed, iteration, slot).

    A step of W ranks with s segments each has W * s slots, dealt out in order, so W ranks with one segment each see
    what one process with W segments per step sees.

    Args:
        store: the teachers; no segment may reach beyond what was recorded.
        expert_epochs: m.
        max_start_epoch: start epochs are below it.
        length: iterations that make one Lightning epoch.
        seed: decides the segments.
        rank: of this process.
        segments: s, segments per step on each rank.
        start: the first iteration.
        window: gives the start epochs of an iteration, all below ``max_start_epoch`` and equally likely; None: all.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        *,
        expert_epochs: int,
        max_start_epoch: int,
        length: int,
        seed: int = 0,
        rank: int = 0,
        segments: int = 1,
        start: int = 0,
        window: Callable[[int], range] | None = None,
    ) -> None:
        last = max_start_epoch - 1 + expert_epochs
        if min(expert_epochs, max_start_epoch, length, segments) < 1:
            numbers = f"expert_epochs={expert_epochs}, max_start_epoch={max_start_epoch}, length={length}"
            raise InputError(f"{numbers}, segments={segments}: all of these must be at least 1")
        if last > store.epochs:
            raise InputError(
                f"{store.path}: max_start_epoch={max_start_epoch} with expert_epochs={expert_epochs} reaches epoch "
                f"{last}, but {store.epochs} were recorded; lower one of them or record longer teachers"
            )
        super().__init__(length, start=start)
        self.store = store
        self.expert_epochs = expert_epochs
        self._window = window or (lambda iteration: range(max_start_epoch))
        self.seed = seed
        self.slots = range(rank * segments, (rank + 1) * segments)

    def read(self, iteration: int) -> list[SegmentBatch]:
        """Read this rank's segments of an iteration, counted from 0."""
        return [self.draw(iteration, slot) for slot in self.slots]

    def draw(self, iteration: int, slot: int = 0) -> SegmentBatch:
        """Read one segment of an iteration."""
        generator = make_generator(self.seed, "segment", iteration, slot)
        teacher = int(torch.randint(len(self.store), (1,), generator=generator))
        epochs = self._window(iteration)
        start_epoch = epochs[int(torch.randint(len(epochs), (1,), generator=generator))]
        ends = self.store.segment(teacher, start_epoch, self.expert_epochs)
        # From pinned memory Lightning's copy to the GPU does not wait.
        start, target = (end.pin_memory() if torch.cuda.is_available() else end for end in ends)
        return SegmentBatch(
            iteration=iteration, slot=slot, teacher=teacher, start_epoch=start_epoch, start=start, target=target
        )
