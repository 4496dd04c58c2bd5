"""The gate on the loss: a segment that the set cannot follow at all changes nothing (DATM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftd_lightning.bounds import check_bounds
from ftd_lightning.functional.rules import MatchingRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossGate(MatchingRule):
    """No update in an iteration whose matching loss is above a threshold (the public code of DATM, ICLR 2024).

    At a loss of 1 the student ends as far from the target as it began. Such an iteration leaves images, labels, step
    size and all momenta as they were; it is counted in ``matching/gated_steps``.

    Args:
        threshold: above 0; published: 1 to 1.5.

    Raises:
        InputError: (a ValueError) for a threshold out of range.

    Example:
        >>> import torch
        >>> LossGate(threshold=1.1).accepts(torch.tensor(1.2))
        tensor(False)
    """

    threshold: float

    name: ClassVar[str] = "gate"

    def __post_init__(self) -> None:
        check_bounds(LossGate, vars(self))

    def accepts(self, loss: Tensor) -> Tensor:
        """Refuse what is above the threshold; NaN is none of its business."""
        return ~(loss > self.threshold)
