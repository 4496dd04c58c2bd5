"""The training data of trajectory matching: random teacher segments."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch

from ftd_lightning.data.iterations import IterationLoader
from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import make_generator

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ftd_lightning.data.trajectory_store import TrajectoryStore


class SegmentBatch(TypedDict):
    """One segment of a distillation step; ``slot`` counts a step's segments over all ranks."""

    iteration: int
    slot: int
    teacher: int
    start_epoch: int
    start: Tensor
    target: Tensor


class SegmentLoader(IterationLoader[list[SegmentBatch]]):
    """An iterable over teacher segments; what it yields is a function of (seed, iteration, slot).

    A step of W ranks with s segments each has W * s slots, dealt out in order, so W ranks with one segment each see
    what one process with W segments per step sees.

    Args:
        store: the teachers.
        expert_epochs: m.
        max_start_epoch: start epochs are below it.
        length: iterations that make one Lightning epoch.
        seed: decides the segments.
        rank: of this process; each rank draws segments of its own.
        segments: s, segments per step on each rank.
        start: the first iteration.
        window: gives the start epochs of an iteration, at least one and all below ``max_start_epoch``, of which each is
            as likely; None: all of them.

    Raises:
        InputError: if a segment could reach beyond what was recorded.
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
        return {
            "iteration": iteration,
            "slot": slot,
            "teacher": teacher,
            "start_epoch": start_epoch,
            "start": start,
            "target": target,
        }
