"""GSAM (Zhuang et al., ICLR 2022): the perturbation and the direction that solve Eq. 12-13 of the FTD paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.linalg import vector_norm

if TYPE_CHECKING:
    from collections.abc import Sequence


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Copy tensors into one vector, so that an operation launches one kernel and not one for each tensor."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Split a vector into tensors of the shapes and dtypes of ``like``; the inverse of :func:`flatten`."""
    parts = vector.split([t.numel() for t in like])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, like, strict=True)]


def gsam_perturbation(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, rho: float, adaptive: bool = False
) -> list[Tensor]:
    """Compute the ascent step to the worst point of the ball around the weights (Eq. 12).

    Plain ball: ``eps = rho * g / ||g||``. Adaptive ball (ASAM): ``eps = rho * w**2 g / ||w g||``. The norm is taken
    over all tensors together.

    Args:
        parameters: the weights w, any shapes.
        gradients: g, in the same shapes.
        rho: radius of the ball, >= 0.
        adaptive: measure the ball relative to each weight's size.

    Returns:
        The perturbation, in the shapes of ``parameters``; zeros where the gradient vanishes.

    Example:
        >>> w, g = [torch.zeros(2)], [torch.tensor([3.0, 4.0])]
        >>> gsam_perturbation(w, g, rho=0.5)
        [tensor([0.3000, 0.4000])]
    """
    scaled = direction = flatten(gradients)
    if adaptive:
        size = flatten(parameters).abs()
        scaled = size * scaled
        direction = size * scaled
    # Squares of gradients below 1e-22 vanish in float32; in units of the largest entry the norm is at least 1. The
    # clamps turn 0/0 into 0.
    unit = vector_norm(scaled, float("inf")).clamp_min(torch.finfo(scaled.dtype).tiny)
    norm = vector_norm(scaled / unit).clamp_min(1)
    return unflatten(rho * (direction / unit / norm), parameters)


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
    g, p = flatten(gradients), flatten(perturbed_gradients)
    along = (g * p).sum() / (p * p).sum().clamp_min(torch.finfo(p.dtype).tiny)
    return unflatten(p - alpha * (g - along * p), gradients)
