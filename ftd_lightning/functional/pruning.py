"""Parameter pruning: matching rules that leave parameters which are hard to match out of the matching loss.

PP (Li, Togo, Ogawa and Haseyama, "Dataset Distillation Using Parameter Pruning", IEICE Trans. 2024) states neither its
similarity measure nor its threshold. DPD (Cao et al., ACML 2025, Eq. 3-9) writes such a rule down, and that is the
definition of the loss here::

    loss = sum_{j in K} (theta_n - theta*_{t+m})_j^2 / sum_{j in K} (theta*_t - theta*_{t+m})_j^2

over the set K of the parameters that are kept. K is computed anew for every loss and is not differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ftd_lightning.bounds import check_bounds
from ftd_lightning.functional.rules import MatchingRule


@dataclass(frozen=True)
class DropLargest(MatchingRule):
    """Parameter pruning as DPD defines it (Cao et al., ACML 2025, Eq. 3-9): drop the largest differences.

    K is all but the ``floor(P * rate)`` parameters with the largest ``|theta_n - theta*_{t+m}|``.

    Convention: where several differences are equal at the cut, their number is defined, but not which of them are kept.

    Args:
        rate: fraction of the parameters to drop, in [0, 1); DPD's is 0.1.

    Raises:
        InputError: (a ValueError) for a rate out of range.

    Example:
        >>> student, target = torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.tensor([2.0, 2.0, 3.5, 0.0])
        >>> DropLargest(rate=0.25).keep(student, torch.zeros(4), target)
        tensor([ True, False,  True,  True])
    """

    rate: float

    name: ClassVar[str] = "pp"

    def __post_init__(self) -> None:
        check_bounds(DropLargest, vars(self))

    @torch.no_grad()
    def keep(self, student: Tensor, start: Tensor, target: Tensor) -> Tensor:
        """Return which parameters are kept, (P,) bool."""
        dropped = (student - target).abs().topk(int(student.numel() * self.rate), sorted=False).indices
        return torch.ones_like(student, dtype=torch.bool).index_fill_(0, dropped, False)


@dataclass(frozen=True)
class KeepSimilar(MatchingRule):
    """Another reading of PP (Li et al., IEICE Trans. 2024): keep the parameters that are similar to the teacher's.

    K is the parameters of similarity at least epsilon. With s = theta_n and t = theta*_{t+m}, the similarity is
    ``min(|s|, |t|) / max(|s|, |t|)``, but 0 where s and t differ in sign and 1 where both are 0.

    Args:
        epsilon: least similarity, in [0, 1].

    Raises:
        InputError: (a ValueError) for an epsilon out of range.

    Example:
        >>> student, target = torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.tensor([2.0, 2.0, 3.5, 0.0])
        >>> KeepSimilar(epsilon=0.6).keep(student, torch.zeros(4), target)
        tensor([False, False,  True,  True])
    """

    epsilon: float

    name: ClassVar[str] = "pp"

    def __post_init__(self) -> None:
        check_bounds(KeepSimilar, vars(self))

    @torch.no_grad()
    def keep(self, student: Tensor, start: Tensor, target: Tensor) -> Tensor:
        """Return which parameters are kept, (P,) bool."""
        smaller, larger = torch.minimum(student.abs(), target.abs()), torch.maximum(student.abs(), target.abs())
        similarity = torch.where(larger > 0, smaller / larger, 1.0)
        return similarity.masked_fill(student.sign() * target.sign() < 0, 0.0) >= self.epsilon


def pruned_distance(student: Tensor, start: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    """Measure the normalized distance over the parameters that are kept (the loss of DPD).

    ``sum_K (theta_n - theta*_{t+m})^2 / sum_K (theta*_t - theta*_{t+m})^2``: one mask for numerator and denominator.

    Convention: with nothing dropped this is ``normalized_distance``, bit for bit. If the teacher did not move any of
    the kept parameters, the denominator is its displacement in all of them.

    Args:
        student: theta_n, (P,).
        start: theta*_t, (P,).
        target: theta*_{t+m}, (P,).
        keep: (P,) bool, e.g. from ``DropLargest.keep``.

    Returns:
        A scalar, differentiable in the weights.

    Example:
        >>> student, start, target = torch.tensor([1.0, 9.0]), torch.zeros(2), torch.tensor([2.0, 1.0])
        >>> pruned_distance(student, start, target, torch.tensor([True, False]))
        tensor(0.2500)
    """
    # Zeros in place of what is dropped, instead of shorter vectors: no synchronisation, and the same order of sums.
    movement = (start - target).square()
    kept = torch.where(keep, movement, 0.0).sum()
    denominator = torch.where(kept > 0, kept, movement.sum())
    return torch.where(keep, (student - target).square(), 0.0).sum() / denominator
