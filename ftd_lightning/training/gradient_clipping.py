"""Clip a gradient at a multiple of its norm's moving average."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def clip_by_average(gradient: Tensor, average: Tensor, *, factor: float, decay: float = 0.9) -> None:
    """Scale a gradient down to ``factor`` times the moving average of its norm, in place and without synchronising.

    As in the code of RaT-BPTT (Feng et al., ICLR 2024): the average takes in the unclipped norm first, then the
    gradient is clipped.

    Args:
        gradient: of any shape.
        average: a scalar >= 0, updated in place; 0 before the first call. A norm that is not finite leaves it as it is.
        factor: > 0.
        decay: of the average, in [0, 1).

    Example:
        >>> gradient, average = torch.tensor([100.0]), torch.tensor(1.0)
        >>> clip_by_average(gradient, average, factor=2.0)
        >>> gradient, round(float(average), 2)
        (tensor([21.8000]), 10.9)
    """
    norm = gradient.norm()
    moved = torch.where(average > 0, decay * average + (1 - decay) * norm, norm)
    average.copy_(torch.where(torch.isfinite(norm), moved, average))
    limit = factor * average
    gradient.mul_(torch.where(norm > limit, limit / norm, torch.ones_like(norm)))
