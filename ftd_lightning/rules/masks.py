"""Rules that leave parameters out of the matching distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ftd_lightning.bounds import check_bounds
from ftd_lightning.rules.base import MatchingRule


@dataclass(frozen=True)
class DropShallow(MatchingRule):
    """Drop the shallowest parameters (PAD, Li et al., arXiv 2408.03360, Eq. 4).

    Keep all but the first ``floor(P * rate)`` parameters in the order of ``network.parameters()``; the cut may lie
    within a layer. The published code does ``DropSmallest`` instead.

    Args:
        rate: alpha, the fraction of the parameters to drop, in [0, 1).
    """

    rate: float

    name: ClassVar[str] = "deep"

    def __post_init__(self) -> None:
        check_bounds(DropShallow, vars(self))

    def keep(self, student: Tensor, start: Tensor, target: Tensor) -> Tensor:
        """Return the mask, (P,) bool."""
        return torch.arange(len(student), device=student.device) >= int(len(student) * self.rate)


@dataclass(frozen=True)
class DropSmallest(MatchingRule):
    """Drop the parameters that are matched best already (EDF, Wang et al., CVPR 2025).

    Keep all but the ``floor(P * rate)`` parameters with the smallest ``|theta_n - theta*_{t+m}|``; which of equal ones
    at the cut is undefined. The published code of PAD does this too.

    Args:
        rate: fraction of the parameters to drop, in [0, 1).
    """

    rate: float

    name: ClassVar[str] = "edf"

    def __post_init__(self) -> None:
        check_bounds(DropSmallest, vars(self))

    def keep(self, student: Tensor, start: Tensor, target: Tensor) -> Tensor:
        """Return the mask, (P,) bool."""
        count = student.numel() - int(student.numel() * self.rate)
        kept = (student - target).abs().topk(count, sorted=False).indices
        return torch.zeros_like(student, dtype=torch.bool).index_fill_(0, kept, True)


@dataclass(frozen=True)
class DropLargest(MatchingRule):
    """Drop the largest differences: parameter pruning as DPD defines it (Cao et al., ACML 2025, Eq. 3-9).

    Keep all but the ``floor(P * rate)`` parameters with the largest ``|theta_n - theta*_{t+m}|``; which of equal ones
    at the cut is undefined.

    Args:
        rate: fraction of the parameters to drop, in [0, 1); DPD's is 0.1.

    Example:
        >>> student, target = torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.tensor([2.0, 2.0, 3.5, 0.0])
        >>> DropLargest(rate=0.25).keep(student, torch.zeros(4), target)
        tensor([ True, False,  True,  True])
    """

    rate: float

    name: ClassVar[str] = "pp"

    def __post_init__(self) -> None:
        check_bounds(DropLargest, vars(self))

    def keep(self, student: Tensor, start: Tensor, target: Tensor) -> Tensor:
        """Return the mask, (P,) bool."""
        dropped = (student - target).abs().topk(int(student.numel() * self.rate), sorted=False).indices
        return torch.ones_like(student, dtype=torch.bool).index_fill_(0, dropped, False)


@dataclass(frozen=True)
class KeepSimilar(MatchingRule):
    """Keep the parameters that are similar to the teacher's: another reading of PP (Li et al., IEICE Trans. 2024).

    The similarity of s = theta_n and t = theta*_{t+m}, at least epsilon, is ``min(|s|, |t|) / max(|s|, |t|)``, but 0
    where they differ in sign and 1 where both are 0.

    Args:
        epsilon: least similarity, in [0, 1].
    """

    epsilon: float

    name: ClassVar[str] = "pp"

    def __post_init__(self) -> None:
        check_bounds(KeepSimilar, vars(self))

    def keep(self, student: Tensor, start: Tensor, target: Tensor) -> Tensor:
        """Return the mask, (P,) bool."""
        smaller, larger = torch.minimum(student.abs(), target.abs()), torch.maximum(student.abs(), target.abs())
        similarity = torch.where(larger > 0, smaller / larger, 1.0)
        return similarity.masked_fill(student.sign() * target.sign() < 0, 0.0) >= self.epsilon
