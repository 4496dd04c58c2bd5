"""The choice of the step: the student is compared where it comes closest to its target (ATT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftd_lightning.functional.rules import MatchingRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClosestStep(MatchingRule):
    """Match the step of the student that comes closest to the target (ATT, Liu et al., ECCV 2024).

    The step is ``argmin_i ||theta_i - theta*_{t+m}||_1``, the later one of equal steps; the loss at it is the usual
    one, with squared differences. The student runs all n steps without gradient first, and then is unrolled up to that
    step: the gradient is that of so many steps. ``matching/steps`` tells the choice; where it is always n this is MTT.

    Example:
        >>> import torch
        >>> ClosestStep().distance(torch.tensor([1.0, -1.0]), torch.zeros(2))
        tensor(2.)
    """

    name: ClassVar[str] = "att"

    def distance(self, student: Tensor, target: Tensor) -> Tensor:
        """Return the sum of absolute differences."""
        return (student - target).abs().sum()
