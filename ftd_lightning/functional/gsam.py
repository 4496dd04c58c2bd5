"""GSAM (Zhuang et al., ICLR 2022): the perturbation and the direction that solve Eq. 12-13 of the FTD paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def gsam_perturbation(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, rho: float, adaptive: bool = False
) -> list[Tensor]:
    """Compute the ascent step to the worst point of the ball around the weights (Eq. 12).

    Plain ball: ``eps = rho * g / ||g||``. Adaptive ball (ASAM): ``eps = rho * w**2 g / ||w g||``. The norm is taken
    over all tensors together.

    Args:
        parameters: the weights w, any shapes.
        gradients: g, the gradient of the loss at w, one tensor of the same shape per weight tensor.
        rho: radius of the ball, >= 0.
        adaptive: measure the ball relative to each weight's size.

    Returns:
        The perturbation, in the shapes of ``parameters``; zeros where the gradient vanishes.

    Example:
        >>> w, g = [torch.zeros(2)], [torch.tensor([3.0, 4.0])]
        >>> gsam_perturbation(w, g, rho=0.5)
        [tensor([0.3000, 0.4000])]
    """
    if adaptive:
        scaled = [w.abs() * g for w, g in zip(parameters, gradients, strict=True)]
        directions = [w.abs() * s for w, s in zip(parameters, scaled, strict=True)]
    else:
        scaled = directions = list(gradients)
    # Squares of gradients below 1e-22 vanish in float32; in units of the largest entry the norm is at least 1. The
    # clamps turn 0/0 into 0.
    largest = torch.stack([s.abs().max() for s in scaled]).max()
    unit = largest.clamp_min(torch.finfo(largest.dtype).tiny)
    relative = [s / unit for s in scaled]
    norm = _dot(relative, relative).sqrt().clamp_min(1)
    return [rho * (d / unit / norm) for d in directions]


def gsam_direction(gradients: Sequence[Tensor], perturbed_gradients: Sequence[Tensor], *, alpha: float) -> list[Tensor]:
    """Combine both gradients: ``g_p - alpha * (the part of g orthogonal to g_p)``.

    alpha 0 is SAM. The paper minimises ``L + alpha * S`` (Eq. 13) with GSAM; its alpha is this one.

    Args:
        gradients: g at the weights.
        perturbed_gradients: g_p at the perturbed weights, same shapes.
        alpha: weight of the surrogate gap's gradient, >= 0.

    Returns:
        The gradient for the base optimizer, in the same shapes.

    Example:
        >>> g, g_p = [torch.tensor([1.0, 1.0])], [torch.tensor([2.0, 0.0])]
        >>> gsam_direction(g, g_p, alpha=0.5)
        [tensor([ 2.0000, -0.5000])]
    """
    if alpha == 0:
        return list(perturbed_gradients)
    squared = _dot(perturbed_gradients, perturbed_gradients)
    along = _dot(gradients, perturbed_gradients) / squared.clamp_min(torch.finfo(squared.dtype).tiny)
    return [p - alpha * (g - along * p) for g, p in zip(gradients, perturbed_gradients, strict=True)]
