"""Learning-rate schedulers that restart with every teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


class RestartingSchedulers:
    """Steps schedulers epoch by epoch and puts them back to their beginning for the next teacher.

    Lightning steps no scheduler in manual optimization; ``FlatTeacher`` has none, but a subclass may return some.
    """

    def __init__(self) -> None:
        self._beginning: list[dict[str, Any]] | None = None

    def restart(self, schedulers: Sequence[Any]) -> None:
        """Put schedulers, and the learning rates of their optimizers, back to how they were at the first call."""
        if self._beginning is None:
            self._beginning = [scheduler.state_dict() for scheduler in schedulers]
        for scheduler, state in zip(schedulers, self._beginning, strict=True):
            scheduler.load_state_dict(state)
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = lr

    @staticmethod
    def step(schedulers: Sequence[Any]) -> None:
        """Step all of them once."""
        for scheduler in schedulers:
            scheduler.step()

    def state(self) -> list[dict[str, Any]] | None:
        """Return the initial states, for a checkpoint."""
        return self._beginning

    def load(self, state: list[dict[str, Any]] | None) -> None:
        """Take the beginning from a checkpoint."""
        self._beginning = state
