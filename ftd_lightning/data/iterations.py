"""The training loader of a distillation: iterations, counted, each with what it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

Batch = TypeVar("Batch")


class IterationLoader(ABC, Generic[Batch]):
    """An iterable whose batches are a function of the iteration's number.

    Lightning saves and restores its state, so that a resumed run goes on with the batch it would have had. It has a
    length because Lightning reads one batch ahead of loaders without, and skips that batch on resume. It reads one
    ahead by itself, in a thread, while the present iteration runs. A trainer's ``limit_train_batches`` that does not
    divide the length shifts the epochs, and with them what is done at their end; no iteration is lost.

    Args:
        length: iterations that make one Lightning epoch.

    Raises:
        InputError: for a length below 1.
    """

    def __init__(self, length: int) -> None:
        if length < 1:
            raise InputError(f"length={length} must be at least 1")
        self.length = length
        self.iteration = 0

    @abstractmethod
    def read(self, iteration: int) -> Batch:
        """Give the batch of an iteration, counted from 0."""

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        # After a resume in mid-epoch only the rest of that epoch is left.
        end = self.iteration + self.length - self.iteration % self.length
        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead = reader.submit(self.read, self.iteration)
            while self.iteration < end:
                batch = ahead.result()
                self.iteration += 1
                if self.iteration < end:
                    ahead = reader.submit(self.read, self.iteration)
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Say how far it is."""
        return {"iteration": self.iteration}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.iteration = state["iteration"]


class IterationCounter(IterationLoader[dict[str, int]]):
    """Iterations that need nothing but their number.

    Example:
        >>> [batch["iteration"] for batch in IterationCounter(3)]
        [0, 1, 2]
    """

    def read(self, iteration: int) -> dict[str, int]:
        """Give the number."""
        return {"iteration": iteration}
