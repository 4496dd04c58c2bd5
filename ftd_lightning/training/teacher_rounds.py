"""Which teacher, and which epoch of it, a process trains in an epoch of the fit."""

from __future__ import annotations

from typing import NamedTuple

from ftd_lightning.training.ranks import own_share

LONGEST = 1 << 20  # epochs; no teacher has as many


class TeacherRounds(NamedTuple):
    """Teachers trained one after the other, in rounds: in each round every rank trains one.

    Attributes:
        epochs: of each teacher.
        rank: of this process among those that train teachers of their own.
        world_size: number of these processes; 1 where all train the same teacher.
    """

    epochs: int
    rank: int = 0
    world_size: int = 1

    def teacher(self, epoch: int) -> int:
        """Return the number of the teacher, from 0, that is trained in an epoch of the fit.

        Example:
            >>> [TeacherRounds(2, rank=1, world_size=2).teacher(epoch) for epoch in range(4)]
            [1, 1, 3, 3]
        """
        return epoch // self.epochs * self.world_size + self.rank

    def teacher_epoch(self, epoch: int) -> int:
        """Return the epoch of that teacher, from 0."""
        return epoch % self.epochs

    def data_epoch(self, epoch: int) -> int:
        """Return the number that decides on batches and augmentation, one for each teacher and epoch of it.

        It does not depend on how many epochs a teacher has: a longer one begins with the shorter one.

        Example:
            >>> [TeacherRounds(epochs, rank=1).data_epoch(2) == LONGEST + 2 for epochs in (3, 50)]
            [True, True]
        """
        return self.teacher(epoch) * LONGEST + self.teacher_epoch(epoch)

    def length(self, teachers: int) -> int:
        """Return how many epochs of the fit a number of teachers takes.

        Example:
            >>> TeacherRounds(2, world_size=2).length(3)
            4
        """
        return len(own_share(teachers, rank=0, world_size=self.world_size)) * self.epochs
