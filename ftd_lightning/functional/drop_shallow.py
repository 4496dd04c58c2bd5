"""The mask by depth: only the deeper parameters are matched (PAD, as its paper has it)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ftd_lightning.bounds import check_bounds
from ftd_lightning.functional.rules import MatchingRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DropShallow(MatchingRule):
    """Drop the shallowest parameters (PAD, Li et al., arXiv 2408.03360, Eq. 4).

    K is all but the first ``floor(P * rate)`` parameters in the order of ``network.parameters()``, from the input on;
    the cut may lie within a layer. The published code does something else: ``DropSmallest``.

    Args:
        rate: alpha, the fraction of the parameters to drop, in [0, 1).

    Raises:
        InputError: (a ValueError) for a rate out of range.

    Example:
        >>> DropShallow(rate=0.5).keep(torch.ones(4), torch.zeros(4), torch.ones(4))
        tensor([False, False,  True,  True])
    """

    rate: float

    name: ClassVar[str] = "deep"

    def __post_init__(self) -> None:
        check_bounds(DropShallow, vars(self))

    def keep(self, student: Tensor, start: Tensor, target: Tensor) -> Tensor:
        """Return which parameters are kept, (P,) bool."""
        return torch.arange(len(student), device=student.device) >= int(len(student) * self.rate)
