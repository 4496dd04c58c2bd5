"""The window of start epochs: early parts of the teachers first, later ones as distillation advances (DATM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ftd_lightning.bounds import check_bounds
from ftd_lightning.errors import InputError
from ftd_lightning.functional.rules import MatchingRule


@dataclass(frozen=True)
class StartWindow(MatchingRule):
    """Segments start in {T- .. U - 1}, where U grows from T to T+ (DATM, Guo et al., ICLR 2024, Sec. 3.3).

    ``U = min(T+, T + floor((T+ - T) * iteration / E))``, and T+ is the module's ``max_start_epoch``. PAD states the
    same growth as "T grows by 1 every I iterations": E = I * (T+ - T).

    Args:
        first: T-, the first start epoch.
        ceiling: T, where the ceiling of the start epochs begins; None: at T+, so that nothing grows.
        growth_iterations: E, iterations until the ceiling reaches T+.

    Raises:
        InputError: (a ValueError) for numbers out of range, a ceiling that is not above ``first``, or ``ceiling`` and
            ``growth_iterations`` without each other.

    Example:
        >>> window = StartWindow(first=1, ceiling=3, growth_iterations=100)
        >>> [window.start_epochs(iteration, 5) for iteration in (0, 49, 50, 100, 1000)]
        [range(1, 3), range(1, 3), range(1, 4), range(1, 5), range(1, 5)]
    """

    first: int = 0
    ceiling: int | None = None
    growth_iterations: int | None = None

    name: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        check_bounds(StartWindow, vars(self))
        if (self.ceiling is None) != (self.growth_iterations is None):
            raise InputError("StartWindow: ceiling and growth_iterations belong together: give both or neither")
        if self.ceiling is not None and self.ceiling <= self.first:
            raise InputError(f"StartWindow: ceiling={self.ceiling} must be above first={self.first}")

    def start_epochs(self, iteration: int, max_start_epoch: int) -> range:
        """Return {T- .. U - 1}."""
        if self.ceiling is None or self.growth_iterations is None:
            return range(self.first, max_start_epoch)
        grown = (max_start_epoch - self.ceiling) * iteration // self.growth_iterations
        return range(self.first, min(max_start_epoch, self.ceiling + grown))
