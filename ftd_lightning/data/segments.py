"""The training data of distillation: one random teacher segment an iteration."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch

from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import make_generator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ftd_lightning.data.trajectory_store import TrajectoryStore


class SegmentBatch(TypedDict):
    """What one distillation step gets."""

    iteration: int
    teacher: int
    start_epoch: int
    start: Tensor
    target: Tensor


class SegmentLoader:
    """An iterable over teacher segments; what it yields is a function of (seed, iteration, rank).

    Lightning saves and restores its state, so that a resumed run goes on with the segment it would have had. It has a
    length because Lightning reads one batch ahead of loaders without, and skips that batch on resume.

    Args:
        store: the teachers.
        expert_epochs: m.
        max_start_epoch: the start epoch is uniform in {0 .. max_start_epoch - 1}.
        length: iterations that make one Lightning epoch.
        seed: decides the segments.
        rank: of this process; each rank draws segments of its own.

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
    ) -> None:
        last = max_start_epoch - 1 + expert_epochs
        if min(expert_epochs, max_start_epoch, length) < 1:
            numbers = f"expert_epochs={expert_epochs}, max_start_epoch={max_start_epoch}, length={length}"
            raise InputError(f"{numbers}: all of these must be at least 1")
        if last > store.epochs:
            raise InputError(
                f"{store.path}: max_start_epoch={max_start_epoch} with expert_epochs={expert_epochs} reaches epoch "
                f"{last}, but {store.epochs} were recorded; lower one of them or record longer teachers"
            )
        self.store = store
        self.expert_epochs = expert_epochs
        self.max_start_epoch = max_start_epoch
        self.length = length
        self.seed = seed
        self.rank = rank
        self.iteration = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[SegmentBatch]:
        # After a resume in mid-epoch only the rest of that epoch is left.
        for _ in range(self.length - self.iteration % self.length):
            self.iteration += 1
            yield self.draw(self.iteration - 1)

    def draw(self, iteration: int) -> SegmentBatch:
        """Read the segment of an iteration, counted from 0."""
        generator = make_generator(self.seed, "segment", iteration, self.rank)
        teacher = int(torch.randint(len(self.store), (1,), generator=generator))
        start_epoch = int(torch.randint(self.max_start_epoch, (1,), generator=generator))
        start, target = self.store.segment(teacher, start_epoch, self.expert_epochs)
        return {
            "iteration": iteration,
            "teacher": teacher,
            "start_epoch": start_epoch,
            "start": start,
            "target": target,
        }

    def state_dict(self) -> dict[str, int]:
        """Say how far it is."""
        return {"iteration": self.iteration}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.iteration = state["iteration"]
