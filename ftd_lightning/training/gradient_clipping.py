"""Clipping of gradients by what their norm has been."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@torch.no_grad()
def clip_by_average(parameters: Sequence[Tensor], average: Tensor, *, factor: float, decay: float = 0.9) -> None:
    """Scale gradients down to ``factor`` times the moving average of their norm, in place; the host does not wait.

    As in RaT-BPTT (Feng et al., ICLR 2024). The average counts what is left after clipping, so that no single gradient
    can lift it far; a norm that is not finite leaves it alone.

    Args:
        parameters: with gradients; their norm is taken over all of them together.
        average: a scalar >= 0, updated in place; 0 before the first call, which clips nothing.
        factor: > 0.
        decay: of the average, in [0, 1).

    Example:
        >>> weight, average = torch.zeros(1, requires_grad=True), torch.tensor(1.0)
        >>> weight.grad = torch.tensor([6.0])
        >>> clip_by_average([weight], average, factor=2.0)
        >>> weight.grad, round(float(average), 2)
        (tensor([2.]), 1.1)
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    scale = torch.where((average > 0) & (norm > factor * average), factor * average / norm, torch.ones_like(norm))
    for gradient in gradients:
        gradient.mul_(scale)
    left = norm * scale
    moved = torch.where(average > 0, decay * average + (1 - decay) * left, left)
    average.copy_(torch.where(torch.isfinite(norm), moved, average))
