"""The training loader of a distillation: iterations, counted, each with what it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

Batch = TypeVar("Batch")


class IterationLoader(ABC, Generic[Batch]):
    """An iterable whose batches are a function of the iteration's number.

    Lightning saves and restores its state, so a resumed run continues with the batch that would have come next. It has
    a length because Lightning reads one batch ahead of loaders without, and skips that batch on resume. It reads one
    batch ahead by itself, in a thread, while the present iteration runs. A trainer's ``limit_train_batches`` that does
    not divide the length shifts the epochs, and with them what is done at their end; no iteration is lost.

    Args:
        length: iterations that make one Lightning epoch, >= 1.
        start: the first iteration, >= 0; epochs are counted from it.

    Attributes:
        iteration: the next one.

    Raises:
        InputError: for a length below 1.
    """

    def __init__(self, length: int, *, start: int = 0) -> None:
        if length < 1:
            raise InputError(f"length={length} must be at least 1")
        self.length = length
        self.start = start
        self.iteration = start
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
    """Iterations that need nothing but their number.

    Example:
        >>> [batch["iteration"] for batch in IterationCounter(3)]
        [0, 1, 2]
    """

    def read(self, iteration: int) -> dict[str, int]:
        """Return the number."""
        return {"iteration": iteration}
