"""The mask by error: only what the student has not learned yet is matched (EDF)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ftd_lightning.bounds import check_bounds
from ftd_lightning.functional.rules import MatchingRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DropSmallest(MatchingRule):
    """Drop the parameters that are matched best already (EDF, Wang et al., CVPR 2025).

    K is all but the ``floor(P * rate)`` parameters with the smallest ``|theta_n - theta*_{t+m}|``. The published code
    of PAD does this too, where its paper has ``DropShallow``.

    Convention: where several differences are equal at the cut, their number is defined, but not which of them are kept.

    Args:
        rate: fraction of the parameters to drop, in [0, 1).

    Raises:
        InputError: (a ValueError) for a rate out of range.

    Example:
        >>> student, target = torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([2.0, 2.0, 3.5, 0.5])
        >>> DropSmallest(rate=0.5).keep(student, torch.zeros(4), target)
        tensor([ True,  True, False, False])
    """

    rate: float

    name: ClassVar[str] = "edf"

    def __post_init__(self) -> None:
        check_bounds(DropSmallest, vars(self))

    @torch.no_grad()
    def keep(self, student: Tensor, start: Tensor, target: Tensor) -> Tensor:
        """Return which parameters are kept, (P,) bool."""
        count = student.numel() - int(student.numel() * self.rate)
        kept = (student - target).abs().topk(count, sorted=False).indices
        return torch.zeros_like(student, dtype=torch.bool).index_fill_(0, kept, True)
